"""What requests may wish for, through the whole engine: samples, log probabilities, bans, sharing, failures."""

import itertools
import math

import pytest
import torch
from helpers import as_prompts, generate, load, token_prompts, tokens_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from paged import LLM, BeamSearchParams, SamplingParams
from paged.model.loading import TINY
from paged.sampling_params import RequestOutputKind

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def tiny():
    return LLM(model="tiny", max_model_len=512, device="cpu", max_logprobs=-1)


# --- everything that must not matter ----------------------------------------------------------------------------------


PROMPTS = [[7] * 20 + [3], [7] * 20 + [5, 6], *token_prompts([1, 9, 33]), [7] * 21, [7] * 20 + [3, 9]]
WISHES = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=1, n=3, max_tokens=20, ignore_eos=True, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, seed=2, max_tokens=25, ignore_eos=True, presence_penalty=0.5, min_p=0.02),
    SamplingParams(temperature=0.7, seed=3, n=2, max_tokens=18, ignore_eos=True, top_k=30, logit_bias={9: 2.0}),
    SamplingParams(temperature=1.0, seed=4, max_tokens=16, ignore_eos=True, top_p=0.9, frequency_penalty=0.4),
    SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, prompt_logprobs=0),
    BeamSearchParams(3, 11, ignore_eos=True),
]
NUM_SEQUENCES = [1, 3, 1, 2, 1, 1, 3]


@st.composite
def engine_settings(draw) -> dict:
    block_size = draw(st.integers(1, 64))
    chunked = draw(st.booleans())
    longest = 64
    # The largest request alone: its samples share the full blocks of the prompt.
    shared = [len(prompt) // block_size for prompt in PROMPTS]
    whole = [-(-(len(p) + w.max_tokens - 1) // block_size) for p, w in zip(PROMPTS, WISHES, strict=True)]
    smallest = max(s + n * (b - s) for s, b, n in zip(shared, whole, NUM_SEQUENCES, strict=True))
    return {
        "block_size": block_size,
        "max_model_len": longest,
        "num_gpu_blocks_override": 2 + smallest + draw(st.integers(0, 96)) // block_size,
        "max_num_seqs": (seqs := draw(st.integers(3, 6))),
        "max_num_batched_tokens": draw(st.integers(seqs, 40)) if chunked else 100,
        "enable_chunked_prefill": chunked,
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 3])) if chunked else 0,
        "enable_prefix_caching": draw(st.booleans()),
        "spare_blocks_per_seq": draw(st.integers(0, 1)),
        "attention_form": draw(st.sampled_from(["gathered", "fused"])),
        "async_scheduling": draw(st.booleans()),
        "preemption_mode": draw(st.sampled_from(["recompute", "swap"])),
        "swap_space": draw(st.sampled_from([block_size * 8 / 2**20, 1])),  # GiB: for a few blocks, for all
        "scheduling_policy": draw(st.sampled_from(["fcfs", "priority"])),
    }


def answers(
    engine, arrivals: list[int], priorities: list[int], aborted: tuple[int, int] | None = None
) -> dict[int, list[list[int]]]:
    """The tokens of each request, whenever they arrive, one of them perhaps aborted on the way.

    Args:
        arrivals: the step before which each request arrives.
        priorities: of each request.
        aborted: a step, and which request is aborted after it.
    """
    found: dict[int, list[list[int]]] = {}
    step = 0
    while step <= max(arrivals) or engine.has_unfinished_requests:
        for i, arrival in enumerate(arrivals):
            if arrival == step:
                engine.add_request(str(i), PROMPTS[i], WISHES[i], priority=priorities[i])
        for output in engine.step():
            if output.finished:
                found[int(output.request_id)] = [list(completion.token_ids) for completion in output.outputs]
        if aborted is not None and step == aborted[0]:
            engine.abort_request(str(aborted[1]))
        step += 1
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_settings_change_no_token(name, folders, pytestconfig):
    """In float64, drawn, greedy and searched, with penalties, samples, shared beginnings, preemptions and aborts.

    `--model-schedules N` runs more than the 240 of every test run: three models, each drawn schedule twice.
    """
    plain = load(folders[name], dtype="float64", enable_prefix_caching=False, max_model_len=64)
    expected = answers(plain.engine, [0] * 7, [0] * 7)
    assert [len(expected[i]) for i in range(7)] == NUM_SEQUENCES
    schedulers = []
    num_examples = pytestconfig.getoption("--model-schedules") // 6

    @settings(
        max_examples=num_examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        engine_settings(),
        st.lists(st.integers(0, 12), min_size=7, max_size=7),
        st.lists(st.integers(0, 2), min_size=7, max_size=7),
        st.none() | st.tuples(st.integers(0, 30), st.integers(0, 6)),
    )
    def check(chosen, arrivals, priorities, aborted):
        llm = load(folders[name], dtype="float64", **chosen)
        for again in range(2):  # the second time over a filled prefix cache
            found = answers(llm.engine, arrivals, priorities, aborted if again else None)
            for i, tokens in found.items():
                assert tokens == expected[i]
            assert len(found) >= 6
        schedulers.append(llm.engine.scheduler)
        assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable

    check()
    num_swaps = sum(scheduler.num_swaps for scheduler in schedulers)
    num_preemptions = sum(scheduler.num_preemptions for scheduler in schedulers)
    if num_examples >= 40 and name != "mistral":  # whose window frees blocks so early that few pools run out
        assert num_preemptions > num_swaps > 0, "some of the pools have to be too small"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("settings", "mode", "name"),
    [({"enforce_eager": True}, mode, "gemma2") for mode in ("recompute", "swap")] + [({}, "swap", "llama")],
    ids=["eager-recompute", "eager-swap", "compiled-swap"],
)
def test_settings_change_no_token_on_a_gpu(settings, mode, name, folders):
    """The same requests as above, preempted, against a CPU that holds them all."""
    plain = load(folders[name], dtype="float64", enable_prefix_caching=False, max_model_len=64)
    expected = answers(plain.engine, [0] * 7, [0] * 7)
    small = {"block_size": 4, "num_gpu_blocks_override": 26, "max_num_seqs": 6, "max_num_batched_tokens": 40}
    llm = load(
        folders[name],
        dtype="float64",
        device="cuda",
        max_model_len=64,
        preemption_mode=mode,
        spare_blocks_per_seq=0,
        **small,
        **settings,
    )
    for _ in range(2):
        assert answers(llm.engine, [0, 3, 0, 1, 0, 2, 0], [0] * 7) == expected
        llm.engine.reset_prefix_cache()
    scheduler = llm.engine.scheduler
    assert scheduler.num_preemptions > 0
    assert (scheduler.num_swaps > 0) == (mode == "swap")


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_single_requests_with_the_next_seeds(folders):
    llm = load(folders["llama"], dtype="float64")
    (prompt,) = as_prompts(token_prompts([19]))
    params = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
    (output,) = llm.generate(prompt, SamplingParams(n=4, seed=11, **params))
    together = [list(completion.token_ids) for completion in output.outputs]
    alone = [tokens_of(llm.generate(prompt, SamplingParams(seed=11 + i, **params)))[0] for i in range(4)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 4
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]


def test_samples_end_each_for_itself(tiny):
    params = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=60, stop=["e"])
    (output,) = tiny.generate("What news, my lord", params)
    lengths = {len(completion.token_ids) for completion in output.outputs}
    assert len(lengths) > 1
    assert all("e" not in completion.text for completion in output.outputs)
    assert output.finished


# --- log probabilities ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_logprobs_are_those_of_transformers(tiny):
    """Of the sampled tokens and of a prompt that is computed in several chunks, against one plain forward pass."""
    text = "My lord, " * 60
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    (output,) = tiny.generate(text, params)
    prompt, completion = list(output.prompt_token_ids), output.outputs[0]
    assert len(prompt) > 128, "more than one chunk"
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = [*prompt, *completion.token_ids]
    exact = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    found = [*output.prompt_logprobs, *completion.logprobs]
    assert found[0] is None
    for position, entries in enumerate(found[1:], 1):
        row = exact[position - 1]
        token = ids[position]
        top = 2 if position < len(prompt) else 3
        best = row.topk(top).indices.tolist()
        assert list(entries) == [token, *(t for t in best if t != token)]
        for t, entry in entries.items():
            assert entry.logprob == pytest.approx(float(row[t]), abs=1e-4)
            assert entry.rank == 1 + int((row > row[t]).sum())
            assert entry.decoded_token == tiny.get_tokenizer().decode([t])
    total = sum(float(exact[p - 1, ids[p]]) for p in range(len(prompt), len(ids)))
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_all_logprobs_sum_to_one_and_few_are_allowed_by_default(tiny, folders):
    (output,) = tiny.generate("My lord", SamplingParams(max_tokens=2, logprobs=-1, prompt_logprobs=-1))
    for entries in (*output.outputs[0].logprobs, *output.prompt_logprobs[1:]):
        assert len(entries) == 1024
        assert sum(math.exp(entry.logprob) for entry in entries.values()) == pytest.approx(1, abs=1e-4)
    llm = load(folders["llama"])
    for wish in ({"logprobs": 21}, {"prompt_logprobs": -1}):
        with pytest.raises(ValueError, match=r"gives at most max_logprobs=20"):
            llm.generate(as_prompts([[1]]), SamplingParams(**wish))
    assert llm.generate(as_prompts([[1]]), SamplingParams(logprobs=0))[0].outputs[0].logprobs[0]


# --- bans and endings -------------------------------------------------------------------------------------------------


def test_banned_biased_and_allowed_tokens(tiny):
    whole = tiny.generate("To be, or not", GREEDY)[0].outputs[0]
    first = whole.token_ids[0]

    def run(**wishes):
        return tiny.generate("To be, or not", SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, **wishes))[
            0
        ].outputs[0]

    assert first not in run(logit_bias={first: -100}).token_ids
    assert set(run(logit_bias={77: 100}).token_ids) == {77}
    assert set(run(allowed_token_ids=[5, 9, 12]).token_ids) <= {5, 9, 12}
    word = whole.text.split()[2]
    assert word in whole.text
    assert word not in run(bad_words=[word]).text
    assert run(repetition_penalty=5.0).token_ids != whole.token_ids


def test_no_end_before_min_tokens(folders):
    llm = load(folders["llama"])
    (prompt,) = as_prompts(token_prompts([6]))
    tokens = tokens_of(llm.generate(prompt, GREEDY))[0]
    llm.engine._eos_token_ids = frozenset([tokens[2]])
    assert len(tokens_of(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=16)))[0]) == 3
    (longer,) = tokens_of(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=16, min_tokens=9)))
    assert len(longer) > 9
    assert tokens[2] not in longer[:9]


def test_text_as_it_is_wanted(tiny):
    whole = tiny.generate("To be, or not", GREEDY)[0].outputs[0]
    stop = whole.text[9:14]
    params = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
    kept = tiny.generate("To be, or not", SamplingParams(stop=stop, include_stop_str_in_output=True, **params))
    assert kept[0].outputs[0].text == whole.text[:14]
    (none,) = tiny.generate("To be, or not", SamplingParams(detokenize=False, **params))
    assert (none.outputs[0].text, none.outputs[0].token_ids) == ("", whole.token_ids)
    end = tiny.get_tokenizer().eos_token_id
    special = {"logit_bias": {end: 100}, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    assert tiny.generate("To", SamplingParams(**special))[0].outputs[0].text == ""
    (shown,) = tiny.generate("To", SamplingParams(skip_special_tokens=False, **special))
    assert shown.outputs[0].text == tiny.get_tokenizer().eos_token * 2


def test_a_prompt_is_cut_to_its_end(folders):
    llm = load(folders["llama"], max_model_len=64)
    (prompt,) = token_prompts([90])
    cut = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, truncate_prompt_tokens=10)
    (output,) = llm.generate(as_prompts([prompt]), cut)
    assert list(output.prompt_token_ids) == prompt[-10:]
    assert list(output.outputs[0].token_ids) == generate(tiny_model("llama"), prompt[-10:], 4)
    (output,) = llm.generate(as_prompts([prompt]), SamplingParams(max_tokens=1, truncate_prompt_tokens=-1))
    assert list(output.prompt_token_ids) == prompt[-63:]


def test_streams_of_text_add_up(tiny):
    """DELTA gives each piece once; no piece is taken back when a stop string is found."""
    whole = tiny.generate("To be, or not", GREEDY)[0].outputs[0]
    stop = whole.text[9:14]
    for kind in RequestOutputKind:
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, stop=stop, output_kind=kind)
        tiny.engine.add_request("a", "To be, or not", params)
        outputs = []
        while tiny.engine.has_unfinished_requests:
            outputs += tiny.engine.step()
        texts = [output.outputs[0].text for output in outputs]
        if kind is RequestOutputKind.DELTA:
            assert "".join(texts) == whole.text[:9]
            tokens = [token for output in outputs for token in output.outputs[0].token_ids]
            assert tuple(tokens) == whole.token_ids[: len(tokens)]
        elif kind is RequestOutputKind.CUMULATIVE:
            assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
            assert texts[-1] == whole.text[:9]
        else:
            assert texts == [whole.text[:9]]


# --- the prefix cache -------------------------------------------------------------------------------------------------


def test_a_shared_beginning_is_computed_once(folders):
    llm = load(folders["llama"], block_size=4)
    (stem,) = token_prompts([22])
    first, second = as_prompts([[*stem, 1], [*stem, 2, 3]])
    (one,) = llm.generate(first, GREEDY)
    (two,) = llm.generate(second, GREEDY)
    assert (one.num_cached_tokens, two.num_cached_tokens) == (0, 20)
    model = tiny_model("llama")
    for output, prompt in ((one, first), (two, second)):
        assert list(output.outputs[0].token_ids) == generate(model, prompt["prompt_token_ids"], 16)
    llm.engine.add_request("salted", second["prompt_token_ids"], GREEDY, cache_salt="mine")
    llm.engine.step()
    assert llm.engine.abort_request("salted").num_cached_tokens == 0
    assert llm.engine.reset_prefix_cache()
    assert llm.generate(first, GREEDY)[0].num_cached_tokens == 0
    off = load(folders["llama"], block_size=4, enable_prefix_caching=False)
    assert [off.generate(first, GREEDY)[0].num_cached_tokens for _ in range(2)] == [0, 0]


# --- chat -------------------------------------------------------------------------------------------------------------

TEMPLATE = """{% for m in messages %}{{ m.role.upper() }}:
{{ m.content }}

{% endfor %}{% if add_generation_prompt %}ROMEO:
{% endif %}"""


def test_chat_is_generate_over_the_template(tiny):
    conversation = [{"role": "Juliet", "content": "What man art thou?"}]
    (expected,) = tiny.generate(
        {
            "prompt_token_ids": tiny.get_tokenizer()(
                "JULIET:\nWhat man art thou?\n\nROMEO:\n", add_special_tokens=False
            )["input_ids"]
        },
        GREEDY,
    )
    (one,) = tiny.chat(conversation, GREEDY, chat_template=TEMPLATE)
    assert (one.prompt_token_ids, one.outputs) == (expected.prompt_token_ids, expected.outputs)
    two = tiny.chat([conversation, conversation * 2], GREEDY, chat_template=TEMPLATE)
    assert len(two) == 2
    assert two[0].outputs == expected.outputs
    (open_ended,) = tiny.chat(conversation, GREEDY, chat_template=TEMPLATE, add_generation_prompt=False)
    assert len(open_ended.prompt_token_ids) < len(one.prompt_token_ids)
    with pytest.raises(ValueError, match="no chat template; give one"):
        tiny.chat(conversation, GREEDY)
    with pytest.raises(ValueError, match="the chat template refuses"):
        tiny.chat(conversation, GREEDY, chat_template="{{ raise_exception('no') }}")


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_step_that_fails_ends_its_requests_and_nobody_elses(folders, monkeypatch, caplog):
    llm = load(folders["llama"], max_num_seqs=2)
    prompts = token_prompts([5, 9, 7])
    expected = tokens_of(llm.generate(as_prompts(prompts), GREEDY))
    launch, steps = llm.engine.runner.launch, []

    def failing(step):
        steps.append(step)
        if len(steps) == 3:
            raise RuntimeError("the device is on fire")
        return launch(step)

    monkeypatch.setattr(llm.engine.runner, "launch", failing)
    outputs = llm.generate(as_prompts(prompts), GREEDY)
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["error", "error", "length"]
    assert tokens_of(outputs)[2] == expected[2]
    assert "the device is on fire" in caplog.text
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable
    assert tokens_of(llm.generate(as_prompts(prompts), GREEDY)) == expected


def test_who_was_swapped_out_by_a_failed_step_is_computed_again(folders, monkeypatch):
    small = {"num_gpu_blocks_override": 12, "block_size": 4, "spare_blocks_per_seq": 0, "max_model_len": 64}
    llm = load(folders["llama"], preemption_mode="swap", **small)
    prompts = token_prompts([9, 9])
    expected = tokens_of(llm.generate(as_prompts(prompts), GREEDY))
    assert llm.engine.scheduler.num_swaps > 0
    launch = llm.engine.runner.launch

    def failing(step):
        if step.swap_outs:
            monkeypatch.setattr(llm.engine.runner, "launch", launch)
            raise RuntimeError("the host is on fire")
        return launch(step)

    monkeypatch.setattr(llm.engine.runner, "launch", failing)
    outputs = llm.generate(as_prompts(prompts), GREEDY)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
    assert tokens_of(outputs)[1] == expected[1]
    assert llm.engine.scheduler.num_recomputed_tokens > 0


def test_logits_that_are_no_numbers_are_an_error_and_not_a_token(folders):
    llm = load(folders["llama"])
    prompts = as_prompts(token_prompts([5, 9]))
    expected = tokens_of(llm.generate(prompts, GREEDY))
    head = llm.engine.runner._model.get_output_embeddings()

    def poison(module, arguments, output):
        output[0, 0] = torch.nan
        return output

    handle = head.register_forward_hook(poison)
    first, second = llm.generate(prompts, GREEDY)
    handle.remove()
    assert (first.outputs[0].finish_reason, first.outputs[0].token_ids) == ("error", ())
    # Once the first one is gone, the second one's logits are poisoned instead.
    assert second.outputs[0].finish_reason == "error"
    assert list(second.outputs[0].token_ids) == expected[1][: len(second.outputs[0].token_ids)]
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable
    assert tokens_of(llm.generate(prompts, GREEDY)) == expected
