"""The reference against what is neither it nor paged: torch's attention, plain Python, transformers' generate."""

import math

import pytest
import torch
from helpers import token_prompts
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, tiny_model

from reference.attention import attention
from reference.engine import Prompt, ReferenceEngine
from reference.reservation import ContiguousPool, PoolFull
from reference.tagged_memory import TaggedMemory, WrongRead, WrongWrite


def draw(num_queries: int, num_keys: int, heads: int = 4, kv_heads: int = 2, dim: int = 5, value_dim: int = 3):
    generator = torch.Generator().manual_seed(num_queries * 100 + num_keys)
    shapes = (num_queries, heads, dim), (num_keys, kv_heads, dim), (num_keys, kv_heads, value_dim)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_equals_torch(num_queries, num_keys, window):
    """torch.nn.functional.scaled_dot_product_attention in float64 with a mask written out."""
    q, k, v = draw(num_queries, num_keys)
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    mask = (distance >= 0) & (distance < (window or num_keys))
    heads = [x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.7).transpose(0, 1)
    out, lse = attention(q, k, v, scale=0.7, window=window)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    scores = torch.einsum("hqd,hkd->hqk", heads[0], heads[1]) * 0.7
    expected_lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1).T
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-14)


@pytest.mark.parametrize("features", ["softcap", "alibi", "sinks", "all"])
def test_attention_features_equal_plain_python(features):
    """The formula once more, with Python's floats and math functions, over all keys at once."""
    q, k, v = draw(3, 6)
    softcap = 0.8 if features in ("softcap", "all") else None
    slopes = [0.5, 0.25, 0.125, 0.0625] if features in ("alibi", "all") else None
    sinks = [0.3, -1.0, 2.0, 0.0] if features in ("sinks", "all") else None
    out, lse = attention(
        q,
        k,
        v,
        scale=0.7,
        softcap=softcap,
        alibi_slopes=None if slopes is None else torch.tensor(slopes, dtype=torch.float64),
        sinks=None if sinks is None else torch.tensor(sinks, dtype=torch.float64),
    )
    for i in range(3):
        for h in range(4):
            position, weights = 3 + i, []
            for j in range(position + 1):
                score = 0.7 * sum(a * b for a, b in zip(q[i, h].tolist(), k[j, h // 2].tolist(), strict=True))
                score = score if softcap is None else softcap * math.tanh(score / softcap)
                score = score if slopes is None else score - slopes[h] * (position - j)
                weights.append(math.exp(score))
            assert lse[i, h].item() == pytest.approx(math.log(sum(weights)), abs=1e-13)
            total = sum(weights) + (0 if sinks is None else math.exp(sinks[h]))
            for d in range(3):
                expected = sum(w * v[j, h // 2, d].item() for j, w in enumerate(weights)) / total
                assert out[i, h, d].item() == pytest.approx(expected, abs=1e-13)


def test_attention_without_keys_or_queries():
    q, k, v = draw(3, 1)
    out, lse = attention(q, k, v, scale=1.0)  # queries at positions -2, -1 and 0
    assert (out[:2] == 0).all()
    assert (lse[:2] == -torch.inf).all()
    assert torch.equal(out[2], v[0].repeat_interleave(2, 0))
    assert attention(q[:0], k, v, scale=1.0)[0].shape == (0, 4, 3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engine_equals_transformers_generate(name):
    prompts = [Prompt(str(i), tuple(p), 5 + 4 * i) for i, p in enumerate(token_prompts([1, 17, 4, 30, 9]))]
    model = tiny_model(name)
    expected = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt.token_ids])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=prompt.max_tokens,
                min_new_tokens=prompt.max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            expected.append(tuple(out[0, len(prompt.token_ids) :].tolist()))
    run = ReferenceEngine(model, num_rows=2, max_model_len=64).generate(prompts)
    assert [answer.token_ids for answer in run.answers] == expected


def test_engine_stops_at_the_end_token_and_keeps_the_row():
    model = tiny_model("llama")
    engine = ReferenceEngine(model, num_rows=2, max_model_len=64)
    prompts = [Prompt("a", (3, 4), 12), Prompt("b", (9,), 12)]
    whole = engine.generate(prompts).answers[0].token_ids
    model.generation_config.eos_token_id = [whole[3]]
    run = ReferenceEngine(model, num_rows=2, max_model_len=64).generate(prompts)
    first = run.answers[0]
    assert (first.token_ids, first.finish_reason) == (whole[: whole.index(whole[3]) + 1], "stop")
    ended = [held for step in run.steps for held in step.held if held.request_id == "a" and held.finished]
    assert len(run.steps) == len(run.answers[1].token_ids)
    assert len(ended) == len(run.steps) - len(first.token_ids)


def test_engine_log():
    prompts = [Prompt(str(i), tuple(p), 5 + 4 * i) for i, p in enumerate(token_prompts([1, 17, 4]))]
    engine = ReferenceEngine(tiny_model("llama"), num_rows=2, max_model_len=64)
    run = engine.generate(prompts)
    assert len(run.steps) == 9 + 13, "a batch takes as long as its longest answer"
    assert [step.num_waiting for step in run.steps] == [1] * 9 + [0] * 13
    assert run.steps[0].num_tokens == 18
    for step in run.steps:
        for held in step.held:
            assert held.num_slots == 64
            assert 0 < held.num_tokens <= len(prompts[int(held.request_id)].token_ids) + 13 - 1
    assert engine.cache.num_bytes == 2 * 2 * 2 * 64 * 2 * 16 * 4  # K and V, layers, rows, slots, heads, dim, bytes


def test_engine_refuses_what_does_not_fit_a_row():
    engine = ReferenceEngine(tiny_model("llama"), num_rows=2, max_model_len=16)
    with pytest.raises(ValueError, match="'a' has 10 tokens and wants 7 more; a row has 16 slots"):
        engine.generate([Prompt("a", tuple(range(10)), 7)])


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=40))
def test_reservations_never_overlap_and_take_the_first_gap(operations):
    pool, held = ContiguousPool(30), {}
    for i, (release, size) in enumerate(operations):
        if release and held:
            name = sorted(held)[size % len(held)]
            pool.release(name)
            del held[name]
            continue
        taken = {slot for first, length in held.values() for slot in range(first, first + length)}
        gaps = [s for s in range(30 - size + 1) if not taken & set(range(s, s + size))]
        assert pool.fits(size) == bool(gaps)
        if gaps:
            reservation = pool.reserve(f"{i:03}", size)
            assert reservation.first_slot == gaps[0]
            held[f"{i:03}"] = (gaps[0], size)
        else:
            with pytest.raises(PoolFull, match=f"{size} slots in one piece; {30 - len(taken)} are free"):
                pool.reserve(f"{i:03}", size)


def written(tokens: list[int], table: list[int]) -> TaggedMemory:
    memory = TaggedMemory(num_blocks=6, block_size=2)
    memory.write("a", table, tokens, 0, len(tokens))
    return memory


def test_tagged_memory_reads_what_was_written():
    memory = written([7, 8, 9], [4, 2])
    memory.read("a", [4, 2], [7, 8, 9])
    memory.copy_block(2, 5)
    memory.read("a", [4, 5], [7, 8, 9])
    memory.write("a", [4, 5], [7, 8, 9, 1], 3, 4)
    memory.read("a", [4, 5], [7, 8, 9, 1])


@pytest.mark.parametrize(
    ("table", "tokens", "message"),
    [
        ([2, 4], [7, 8, 9], r"position 0 in slot 4 .*holds token 9 at position 2"),
        ([4, 2], [6, 8, 9], r"position 0 in slot 8 .*should hold token 6 .*holds token 7"),
        ([4, 2], [7, 8, 9, 1], r"slot 5 \(block 2, offset 1\).*holds nothing"),
        ([4], [7, 8, 9], r"no block for position 2: its table is \[4\]"),
        ([1, 2], [7], r"holds nothing"),
    ],
)
def test_tagged_memory_names_a_wrong_read(table, tokens, message):
    with pytest.raises(WrongRead, match=message):
        written([7, 8, 9], [4, 2]).read("a", table, tokens)


def test_tagged_memory_tells_the_same_token_after_other_tokens_apart():
    memory = TaggedMemory(num_blocks=6, block_size=1)
    memory.write("a", [1, 2], [7, 8], 0, 2)
    memory.write("b", [3, 4], [1, 8], 0, 2)
    with pytest.raises(WrongRead, match="holds token 8 at position 1 after other tokens, written by 'b'"):
        memory.read("a", [1, 4], [7, 8])


def test_tagged_memory_forgets_and_protects():
    memory = written([7, 8], [4])
    memory.forget(4)
    with pytest.raises(WrongRead, match="holds nothing"):
        memory.read("a", [4], [7])
    with pytest.raises(WrongWrite, match="into block 0; blocks 1 to 5 may be written, block 0 is the null block"):
        memory.write("a", [0], [7], 0, 1)
    with pytest.raises(WrongRead, match="position 0"):  # a decode attends to what is before it
        memory.write("a", [4], [7, 8], 1, 2)
