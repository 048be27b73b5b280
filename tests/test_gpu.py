"""The engine on a GPU as it runs by default: flex attention, CUDA graphs, asynchronous scheduling.

Tokens in float32 are those of the eager gathered form on the same GPU and of transformers' `generate` on a CPU; and
counters say that what is tested did run: steps as graphs, steps that overlapped, preemptions. Every engine compiles, so
one engine serves as many wishes at once as can be told apart. Meant for `pytest -n 10 tests/test_gpu.py`.
"""

import functools
from dataclasses import replace

import pytest
import torch
from architectures import build
from helpers import as_prompts, generate, load, token_prompts, tokens_of
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from paged import LLM, SamplingParams
from paged.attention import dense
from paged.attention.dense import PromptLengths
from reference.attention import attention

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LENGTHS = [1, 3, 16, 17, 40, 33, 1, 70]
# Batches of 3 and of 5 are padded, and no size is max_num_seqs.
FLEX = {
    "device": "cuda",
    "dtype": "float32",
    "block_size": 16,
    "max_model_len": 128,
    "max_num_seqs": 5,
    "num_gpu_blocks_override": 60,
    "cudagraph_capture_sizes": (1, 4, 8),
    "cudagraph_capture_seconds": 600,
}
# Prompts in chunks, a pool that five requests do not fit, and contexts too short for splits.
TIGHT = {"max_model_len": 112, "max_num_batched_tokens": 24, "num_gpu_blocks_override": 12, "spare_blocks_per_seq": 0}
PLAIN = {
    "enforce_eager": True,
    "attention_form": "gathered",
    "enable_prefix_caching": False,
    "num_gpu_blocks_override": 400,
}


@pytest.fixture(autouse=True)
def fixed_seed():
    """Of what `build` leaves to the model's own initialisation."""
    torch.manual_seed(0)


def prepared(model: PreTrainedModel, folder) -> PreTrainedModel:
    model.save_pretrained(folder)
    return model


def plain(folder, **settings) -> LLM:
    """The eager gathered form on the same GPU, with room for everybody.

    Its pool is given in blocks: a share of the GPU has to be free, and other workers hold some of it.
    """
    return load(folder, device="cuda", dtype="float32", max_model_len=128, **{**PLAIN, **settings})


def check_that_it_ran(llm: LLM) -> None:
    """Flex, graphs and overlap, and every block came back."""
    runner, pool = llm.engine.runner, llm.engine.scheduler.pool
    assert runner.attention_form == "flex"
    assert runner.num_graph_steps > 10, "decode steps did not run as graphs"
    assert llm.engine.num_overlapped_steps > 10, "no step was planned behind another"
    assert pool.num_free == pool.num_usable


# Experts in float32 make the host wait for the GPU, if transformers knows no better; then there are no graphs.
WITH_EXPERTS = ("gpt_oss", "mixtral", "qwen3_moe")


# qwen2 has biases, mistral and mixtral a window in every layer, gemma2 softcap and a window in every other layer,
# gpt_oss sinks, mixtral and qwen3_moe experts, glm a rotation of half of each head. All have 3 query heads for each KV
# head.
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_oss", "mixtral", "qwen3_moe", "glm"]
)
def test_tokens_are_those_of_the_gathered_form_and_of_transformers(name, tmp_path):
    model = prepared(build(name), tmp_path)
    prompts = token_prompts(LENGTHS)
    llm = load(tmp_path, **{**FLEX, **TIGHT})
    tokens = tokens_of(llm.generate(as_prompts(prompts), GREEDY))
    assert tokens == tokens_of(plain(tmp_path).generate(as_prompts(prompts), GREEDY))
    assert tokens == [generate(model, prompt, GREEDY.max_tokens) for prompt in prompts]
    assert len({token for each in tokens for token in each}) > 9, "a model that repeats itself would hide faults"
    if llm.engine.runner.graphs is not None or name not in WITH_EXPERTS:
        check_that_it_ran(llm)
    if llm.engine.runner.sliding_window is None:  # or blocks are freed so early that the pool does not run out
        assert llm.engine.scheduler.num_preemptions > 0


def wishes() -> tuple[list[dict[str, list[int]]], list[SamplingParams]]:
    """Requests of every kind, two of which begin alike."""
    prompts = token_prompts([1, 5, 18, 30, 9, 40, 2])
    prompts.append([*prompts[5][:33], 3, 1])
    drawn = {"temperature": 0.9, "max_tokens": 20, "ignore_eos": True}
    params = [
        SamplingParams(seed=1, **drawn),
        SamplingParams(seed=2, top_p=0.8, top_k=30, **drawn),
        SamplingParams(seed=3, n=3, **drawn),
        SamplingParams(seed=4, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.3, **drawn),
        replace(GREEDY, logprobs=3, prompt_logprobs=2),
        replace(GREEDY, repetition_penalty=1.4, logit_bias={5: 1.5}),
        SamplingParams(seed=5, min_p=0.05, min_tokens=4, **drawn),
        GREEDY,
    ]
    return as_prompts(prompts), params


SETTINGS = {
    "plain": {},
    "chunks, recomputed": TIGHT,
    "chunks, swapped": {**TIGHT, "preemption_mode": "swap", "swap_space": 0.1},
    "sizes by default": {"cudagraph_capture_sizes": None},
    "sizes smaller than the batch": {"cudagraph_capture_sizes": (2,)},
    "no graphs": {"cudagraph_capture_sizes": ()},
    "one after another": {"async_scheduling": False},
    "no prefix caching": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_wishes_and_settings(name, tmp_path):
    prepared(build("llama"), tmp_path)
    prompts, params = wishes()
    expected = plain(tmp_path).generate(prompts, params)
    llm = load(tmp_path, **{**FLEX, **SETTINGS[name]})
    for _ in range(2):  # the second time the beginnings are cached
        for output, right in zip(llm.generate(prompts, params), expected, strict=True):
            assert [each.token_ids for each in output.outputs] == [each.token_ids for each in right.outputs]
            assert_alike(output.prompt_logprobs, right.prompt_logprobs)
            assert_alike(output.outputs[0].logprobs, right.outputs[0].logprobs)
    engine = llm.engine
    # Alone, so that each step can be captured: batches of 1, 3 and 5.
    for count in (1, 3, 5):
        alone = llm.generate(prompts[-1:] * count, [GREEDY] * count)
        assert tokens_of(alone) == [list(expected[-1].outputs[0].token_ids)] * count
    if name == "no graphs":
        assert engine.runner.graphs is None
        assert engine.runner.num_graph_steps == 0
    else:
        sizes = {"sizes by default": [1, 2, 4, 5], "sizes smaller than the batch": [2]}.get(name, [1, 4, 8])
        assert engine.runner.graphs.sizes == sizes
        assert engine.runner.num_graph_steps > 10
    assert (engine.num_overlapped_steps > 10) == (name != "one after another")
    assert (engine.scheduler.num_preemptions > 0) == name.startswith("chunks")
    assert (engine.scheduler.num_swaps > 0) == (name == "chunks, swapped")
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def assert_alike(found, expected) -> None:
    """The same tokens with log probabilities that differ by rounding alone."""
    if expected is None:
        assert found is None
        return
    for some, others in zip(found, expected, strict=True):
        if others is None:
            assert some is None
            continue
        assert set(some) == set(others)
        for token, other in others.items():
            assert abs(some[token].logprob - other.logprob) < 1e-4


def test_many_splits_of_long_contexts(tmp_path):
    """Contexts long enough that a few sequences are split for all multiprocessors, beside short ones."""
    model = prepared(build("llama"), tmp_path)
    prompts = token_prompts([450, 3, 300])
    settings = {**FLEX, "max_model_len": 512, "num_gpu_blocks_override": 120}
    llm = load(tmp_path, **settings)
    tokens = tokens_of(llm.generate(as_prompts(prompts), GREEDY))
    assert tokens == [generate(model, prompt, GREEDY.max_tokens) for prompt in prompts]
    assert tokens_of(llm.generate(as_prompts(prompts[:1]), GREEDY)) == tokens[:1]
    check_that_it_ran(llm)
    rows = torch.zeros(1, dtype=torch.int64, device="cuda")
    (plan,) = llm.engine.runner._flex.decode_plans(rows, rows.int(), rows).values()
    assert len(plan.seq_lens) >= 4, "the context was to be split"


def test_poison_outside_of_what_is_written_changes_nothing(tmp_path):
    """Padded rows write into the trash block and nowhere else; what others have left behind reaches nobody.

    V is poisoned with large numbers and not with NaN: a weight of 0 does not silence that, so none is ever stored.
    """
    prepared(build("gemma2"), tmp_path)
    prompts = as_prompts(token_prompts([20, 1, 33, 50, 7]))
    llm = load(tmp_path, **FLEX, enable_prefix_caching=False)
    runner = llm.engine.runner
    expected = {count: tokens_of(llm.generate(prompts[:count], GREEDY)) for count in (3, 5)}
    with torch.inference_mode():
        for key_cache, value_cache in runner.caches:
            key_cache[1:], value_cache[1:] = torch.nan, 1e4
    used, launch = set(), runner.launch

    def watched(step):
        used.update(block for row in step.rows if row.table_change for block in row.table_change.blocks)
        return launch(step)

    runner.launch = watched
    graph_steps = runner.num_graph_steps
    for count in (3, 5):
        assert tokens_of(llm.generate(prompts[:count], GREEDY)) == expected[count]
    assert runner.num_graph_steps > graph_steps
    trash = runner.num_blocks - 1
    assert trash not in used
    unused = [block for block in range(1, trash) if block not in used]
    assert len(unused) > 10, "the pool is larger than what is used"
    for key_cache, value_cache in runner.caches:
        assert not key_cache[0].any()
        assert not value_cache[0].any()
        assert key_cache[unused].isnan().all()
        assert (value_cache[unused] == 1e4).all()
        assert not key_cache[trash, 0].isnan().any(), "padded rows were to write here"
        assert key_cache[trash, 1:].isnan().all()


def test_a_request_without_numbers_spoils_nobody(tmp_path):
    """A token whose embedding is NaN: computed in a prompt, and in a graph. Others get the blocks afterwards."""
    prepared(build("llama"), tmp_path)
    prompts = as_prompts(token_prompts([20, 33, 5]))
    settings = {**FLEX, "num_gpu_blocks_override": 2 + 12, "enable_prefix_caching": False}
    llm = load(tmp_path, **settings)
    expected = tokens_of(llm.generate(prompts, GREEDY))
    broken = next(token for token in range(100, 128) if not any(token in tokens for tokens in expected))
    with torch.no_grad():
        llm.engine.runner._model.get_input_embeddings().weight[broken] = torch.nan
    in_prompt = {"prompt_token_ids": [5] * 20 + [broken] + [6] * 12}
    forced = replace(GREEDY, allowed_token_ids=[broken])  # sampled after the prompt, computed by a graph
    graph_steps = llm.engine.runner.num_graph_steps
    for _ in range(3):
        outputs = llm.generate([in_prompt, *prompts, prompts[1]], [GREEDY] * 4 + [forced])
        assert [output.outputs[0].finish_reason for output in outputs] == ["error", *["length"] * 3, "error"]
        assert tokens_of(outputs)[1:4] == expected
        assert list(outputs[4].outputs[0].token_ids) == [broken]
        assert tokens_of(llm.generate(prompts, GREEDY)) == expected, "blocks of the broken ones were given to these"
    assert llm.engine.runner.num_graph_steps > graph_steps
    for _, value_cache in llm.engine.runner.caches:
        assert value_cache.isfinite().all()


def test_enforce_eager_turns_everything_off(tmp_path):
    model = prepared(build("llama"), tmp_path)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    llm = load(tmp_path, **{**FLEX, "cudagraph_capture_sizes": None, "enforce_eager": True})
    prompts = token_prompts([1, 17, 40])
    assert tokens_of(llm.generate(as_prompts(prompts), GREEDY)) == [generate(model, each, 20) for each in prompts]
    runner = llm.engine.runner
    assert (runner.attention_form, runner.graphs, runner.num_graph_steps) == ("gathered", None, 0)
    assert llm.engine.num_overlapped_steps == 0
    assert llm.memory_ledger.graphs == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "something was compiled"


def test_the_graphs_have_a_line_in_the_ledger(tmp_path):
    prepared(build("llama"), tmp_path)
    ledger = load(tmp_path, **FLEX).memory_ledger
    assert ledger.graphs_measured is not None
    assert ledger.graphs_measured <= ledger.graphs_reserved
    assert sum(ledger.lines.values()) == ledger.budget


# --- in half precision, by the libraries' kernels ---------------------------------------------------------------------


def counted(monkeypatch, name: str) -> list[int]:
    """How often a function of `dense` is called: a list that grows."""
    calls, function = [], getattr(dense, name)

    @functools.wraps(function)
    def counting(*arguments, **keywords):
        calls.append(len(arguments[0]))
        return function(*arguments, **keywords)

    monkeypatch.setattr(dense, name, counting)
    return calls


def with_decided_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Let tokens choose their experts clearly, by numbers of their embeddings that are larger than what layers add.

    Where two experts are nearly equal, rounding decides which of them a token gets, and its logits are others.
    """
    num_experts = 4
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        tokens = torch.arange(len(embedding))
        embedding[:, :num_experts] = 0.0
        embedding[tokens, tokens % num_experts], embedding[tokens, (tokens + 1) % num_experts] = 128.0, 64.0
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.copy_(torch.eye(*parameter.shape))
            if name.endswith("router.bias"):
                parameter.zero_()
    return model


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """With weights in bfloat16, but not its frequencies, which `model.bfloat16()` would round too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    return model


def check_half(llm: LLM, folder, prompts: list[list[int]]) -> None:
    """Each token is one of the best, up to what rounding in bfloat16 does to transformers' own logits."""
    outputs = tokens_of(llm.generate(as_prompts(prompts), GREEDY))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        judge = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda")
        with torch.inference_mode():
            logits[dtype] = [
                judge(torch.tensor([prompt + tokens], device="cuda"), use_cache=False).logits[0, len(prompt) - 1 : -1]
                for prompt, tokens in zip(prompts, outputs, strict=True)
            ]
    for tokens, exact, in_half in zip(outputs, logits[torch.float32], logits[torch.bfloat16], strict=True):
        error = (exact - in_half.float()).abs().max()  # of one logit; two may be off by it, in both engines
        chosen = exact.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        assert (exact.amax(dim=1) - chosen).max() <= 4 * error


@pytest.mark.parametrize("name", ["llama", "mistral", *WITH_EXPERTS])
def test_prompts_in_bfloat16_take_flash_attention(name, tmp_path, monkeypatch):
    """And the decodes run as graphs, those of experts too, whose rows are padded to 8 and to 4."""
    calls = counted(monkeypatch, "attend_together")
    model = build(name)
    prepared(rounded(with_decided_experts(model) if name in WITH_EXPERTS else model), tmp_path)
    llm = load(tmp_path, **{**FLEX, "dtype": "bfloat16", "max_num_batched_tokens": 64})
    calls.clear()
    check_half(llm, tmp_path, token_prompts([1, 40, 17, 90, 5]))
    check_that_it_ran(llm)
    assert calls


def test_long_prompts_in_bfloat16_are_attended_in_parts(tmp_path, monkeypatch):
    calls = counted(monkeypatch, "attend_in_parts")
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, num_hidden_layers=2, max_position_embeddings=8192, initializer_range=0.25,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    prepared(rounded(LlamaForCausalLM(config).eval()), tmp_path)
    settings = {"max_model_len": 8192, "max_num_batched_tokens": 1100, "num_gpu_blocks_override": 600}
    llm = load(tmp_path, **{**FLEX, **settings, "dtype": "bfloat16"})
    calls.clear()
    check_half(llm, tmp_path, token_prompts([5300, 40, 600]))
    assert len(calls) >= 2, "at least one chunk of each of the two layers"
    check_that_it_ran(llm)


UNIT = 2.0**-8  # of bfloat16


def check_bounds(out: Tensor, lse: Tensor, exact: Tensor, exact_lse: Tensor, mean: Tensor, most: float, roundings: int):
    """Hold a kernel in bfloat16 to what rounding can do.

    Args:
        out, lse: the kernel's.
        exact, exact_lse: in float64.
        mean: what attention over |V| gives: the mean size of the values that are summed up.
        most: the largest sum of the absolute terms of a score.
        roundings: to bfloat16, each of them relative to that mean: of the weights before they are multiplied with V, of
            each part's output, of each merge.

    Scores, weights and sums are float32: D + 16 roundings of 2^-24 of a score, which move its weight by as much and so
    the mean twice (above and below the line), and 64 more for exponentials and sums in blocks.
    """
    in_float32 = 2.0**-24 * ((64 + 16) * most + 64)
    assert ((lse.double() - exact_lse).abs() <= in_float32).all(), "the log-sum-exp differs"
    assert ((out.double() - exact).abs() <= (1.01 * roundings * UNIT + 2 * in_float32) * mean).all(), "out differs"


@pytest.mark.parametrize("num_queries", [512, 700, 2048])
@pytest.mark.parametrize("context_len", [0, 16, 1000, 1024, 4096 + 7])
def test_a_chunk_in_parts_against_float64(context_len, num_queries):
    g = torch.Generator("cuda").manual_seed(0)
    num_blocks, heads, kv_heads, width, scale = 700, 8, 2, 64, 0.125

    def randn(*shape):
        return torch.randn(*shape, generator=g, device="cuda").bfloat16()

    query, key, value = 3 * randn(num_queries, heads, width), *(randn(num_queries, kv_heads, width) for _ in range(2))
    key_cache, value_cache = (randn(num_blocks, 16, kv_heads, width) for _ in range(2))
    blocks = torch.randperm(num_blocks, generator=g, device="cuda")[: -(-context_len // 16)].int()
    out, lse = dense.attend_in_parts(query, key, value, key_cache, value_cache, blocks, context_len, scale=scale)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (query.shape, query.dtype, query.shape[:2], torch.float32)

    def together(cache, new):
        whole = torch.cat([cache[blocks.long()].flatten(0, 1)[:context_len], new]).double()
        return whole.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1)  # [Hq, K, D]

    keys, values = together(key_cache, key), together(value_cache, value)
    exact_query = query.double().transpose(0, 1)  # [Hq, Q, D]
    scores = exact_query @ keys.transpose(1, 2) * scale
    positions = torch.arange(context_len + num_queries, device="cuda")
    scores.masked_fill_(positions > positions[context_len:, None], -torch.inf)
    exact_lse = scores.logsumexp(-1)
    weights = scores.sub_(exact_lse[..., None]).exp_()
    most = float((exact_query.abs() @ keys.abs().transpose(1, 2)).amax()) * scale
    by_tokens = [x.transpose(0, 1) for x in (weights @ values, exact_lse, weights @ values.abs())]
    check_bounds(out, lse, *by_tokens, most, roundings=4)


@pytest.mark.parametrize("window", [None, 1, 7, 64])
def test_ragged_prompts_together_against_the_reference(window):
    g = torch.Generator().manual_seed(0)
    lengths = [PromptLengths(*each) for each in ((2, 2), (5, 40), (64, 64), (33, 130), (2, 200), (129, 129))]

    def randn(count, heads):
        return torch.randn(count, heads, 64, generator=g).bfloat16()

    query = 3 * randn(sum(each.query_len for each in lengths), 6)
    keys, values = (randn(sum(each.seq_len for each in lengths), 2) for _ in range(2))
    starts = [torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32) for sizes in zip(*lengths, strict=True)]
    on_gpu = (tensor.cuda() for tensor in (query, keys, values, *starts))
    out, lse = dense.attend_together(*on_gpu, lengths, scale=0.125, window=window)
    exact = []
    for i in range(len(lengths)):
        tokens, context = (slice(int(start[i]), int(start[i + 1])) for start in starts)
        parts = query[tokens], keys[context]
        right, right_lse = attention(*parts, values[context], scale=0.125, window=window)
        exact.append((right, right_lse, attention(*parts, values[context].abs(), scale=0.125, window=window)[0]))
    most = 0.125 * float(query.double().norm(dim=-1).max() * keys.double().norm(dim=-1).max())
    check_bounds(out.cpu(), lse.cpu(), *(torch.cat(x) for x in zip(*exact, strict=True)), most, roundings=2)
