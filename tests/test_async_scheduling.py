"""Steps that are planned while another is in flight: the same tokens, which requests wait, and what failures leave.

A CPU runs a step while it is launched, so nothing is gained here; what is tested is that no plan needs what a GPU would
not have told yet.
"""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import as_prompts, load, token_prompts, tokens_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from paged import LLM, BeamSearchParams, SamplingParams
from paged.async_engine import AsyncEngine
from paged.model.runner import StepInFlight
from paged.sampling_params import RequestOutputKind

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
ENDS = list(range(0, 1024, 9))  # stop tokens, so many that a drawn text soon ends with one of them
PROMPTS = [[7] * 20 + [3], [7] * 20 + [5, 6], *token_prompts([1, 9, 33, 4, 12]), [7] * 21, [7] * 20 + [3, 9], [8, 2]]
DRAWN = {"temperature": 1.0, "ignore_eos": True}
WISHES = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(seed=1, max_tokens=25, stop_token_ids=ENDS, **DRAWN),
    SamplingParams(seed=2, n=3, max_tokens=20, stop_token_ids=ENDS, repetition_penalty=1.3, **DRAWN),
    SamplingParams(seed=3, max_tokens=25, temperature=1.0, logit_bias={0: 6.0}),  # 0 is the end of sequence
    SamplingParams(seed=4, max_tokens=20, top_p=0.95, presence_penalty=0.5, frequency_penalty=0.4, **DRAWN),
    SamplingParams(seed=5, max_tokens=1, **DRAWN),
    SamplingParams(seed=6, max_tokens=25, stop=["e"], **DRAWN),
    SamplingParams(seed=7, max_tokens=18, min_tokens=4, stop_token_ids=ENDS, **DRAWN),
    SamplingParams(seed=8, n=2, max_tokens=9, logprobs=1, prompt_logprobs=0, **DRAWN),
    BeamSearchParams(3, 7),
]
NUM_SEQUENCES = [wish.beam_width if isinstance(wish, BeamSearchParams) else wish.n for wish in WISHES]


def tiny(**arguments) -> LLM:
    return LLM(model="tiny", device="cpu", dtype="float64", max_model_len=64, **arguments)


def serve(
    engine, arrivals: list[int], chosen: list[int], aborted: tuple[int, int] | None = None
) -> dict[int, list[tuple]]:
    """What each of the chosen requests ends with.

    Args:
        arrivals: the step before which each request arrives.
        chosen: which requests there are.
        aborted: a step, and which request is aborted after it.
    """
    found, step = {}, 0
    while step <= max(arrivals) or engine.has_unfinished_requests:
        for i in chosen:
            if arrivals[i] == step:
                engine.add_request(str(i), PROMPTS[i], WISHES[i])
        outputs = engine.step()
        if aborted is not None and step == aborted[0]:
            outputs.append(engine.abort_request(str(aborted[1])))
        for output in outputs:
            if output is not None and output.finished:
                found[int(output.request_id)] = [(c.token_ids, c.text, c.finish_reason) for c in output.outputs]
        step += 1
    return found


@pytest.fixture(scope="module")
def expected():
    """What the requests end with where every step waits."""
    engine = tiny(enable_prefix_caching=False, async_scheduling=False).engine
    found = serve(engine, [0] * len(PROMPTS), list(range(len(PROMPTS))))
    assert engine.num_overlapped_steps == 0
    reasons = [{reason for *_, reason in found[i]} for i in range(len(PROMPTS))]
    assert all("stop" in reasons[i] for i in (1, 2, 3, 6, 7)), "tokens and strings that end a text are what is tested"
    return found


def fewest_blocks(block_size: int) -> int:
    """The smallest pool that every request fits, the null and the trash block included."""
    most = [
        len(prompt) // block_size
        + n * (-(-(len(prompt) + wish.max_tokens - 1) // block_size) - len(prompt) // block_size)
        for prompt, wish, n in zip(PROMPTS, WISHES, NUM_SEQUENCES, strict=True)
    ]
    return 2 + max(most)


def tight(preemption_mode: str) -> dict:
    """Settings under which requests are preempted: a drawn pool may be large enough for all."""
    return {
        "block_size": 4,
        "num_gpu_blocks_override": fewest_blocks(4),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 40,
        "spare_blocks_per_seq": 0,
        "preemption_mode": preemption_mode,
        "swap_space": 1,
    }


@st.composite
def engine_settings(draw) -> dict:
    block_size = draw(st.integers(1, 24))
    chunked = draw(st.booleans())
    return {
        "block_size": block_size,
        "num_gpu_blocks_override": fewest_blocks(block_size) + draw(st.integers(0, 120)) // block_size,
        "max_num_seqs": (seqs := draw(st.integers(3, 12))),
        "max_num_batched_tokens": draw(st.integers(seqs, 40)) if chunked else 100,
        "enable_chunked_prefill": chunked,
        "enable_prefix_caching": draw(st.booleans()),
        "spare_blocks_per_seq": draw(st.integers(0, 1)),
        "preemption_mode": draw(st.sampled_from(["recompute", "swap"])),
        "swap_space": draw(st.sampled_from([block_size * 16 / 2**20, 1])),
    }


def test_planning_ahead_changes_no_token(expected, pytestconfig):
    """In float64, under drawn settings: whoever ends, is preempted or aborted while a step is in flight."""
    engines = []

    @settings(
        max_examples=pytestconfig.getoption("--model-schedules") // 4,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        engine_settings(),
        st.lists(st.integers(0, 30), min_size=len(PROMPTS), max_size=len(PROMPTS)),
        # Half of the time only requests that need not wait, so that as much as possible overlaps.
        st.just(list(range(6))) | st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, unique=True),
        st.none() | st.tuples(st.integers(0, 60), st.integers(0, len(PROMPTS) - 1)),
    )
    @example(tight("recompute"), [0] * len(PROMPTS), list(range(len(PROMPTS))), None)
    @example(tight("swap"), [0] * len(PROMPTS), list(range(len(PROMPTS))), None)
    def check(chosen_settings, arrivals, chosen, aborted):
        engine = tiny(async_scheduling=True, **chosen_settings).engine
        for again in range(2):  # the second time over a filled prefix cache
            found = serve(engine, arrivals, chosen, aborted if again else None)
            assert sorted(found) == sorted(chosen)
            for i, completions in found.items():
                for (tokens, text, reason), whole in zip(completions, expected[i], strict=True):
                    if reason != "abort":
                        assert (tokens, text, reason) == whole
                    elif i != len(PROMPTS) - 1:  # a beam that was dropped later is in nobody's answer
                        assert tokens == whole[0][: len(tokens)]
        engines.append(engine)
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable
        assert not engine._in_flight
        assert not engine._answers

    check()
    assert sum(engine.num_overlapped_steps for engine in engines) > sum(engine.num_steps for engine in engines) / 4
    num_swaps = sum(engine.scheduler.num_swaps for engine in engines)
    assert sum(engine.scheduler.num_preemptions for engine in engines) > num_swaps > 0


# --- which steps overlap ----------------------------------------------------------------------------------------------


def counts(engine) -> tuple[int, int]:
    return engine.num_steps, engine.num_overlapped_steps


def run_to_the_end(engine) -> list:
    outputs = []
    for _ in range(100):
        if not engine.has_unfinished_requests:
            return outputs
        outputs += engine.step()
    raise AssertionError("somebody never ends")


def test_steps_of_simple_requests_overlap_from_the_second_on(folders):
    """Prompts in chunks, newcomers, samples once they are forked, penalties: only the first step is planned alone."""
    prompts = token_prompts([5, 40, 9])
    params = [replace(GREEDY, max_tokens=n, repetition_penalty=1.2) for n in (10, 12, 30)]
    llm = load(folders["llama"], async_scheduling=True, max_num_batched_tokens=16, max_num_seqs=4)
    expected = tokens_of(load(folders["llama"]).generate(as_prompts(prompts), params))
    assert tokens_of(llm.generate(as_prompts(prompts), params)) == expected
    num_steps, num_overlapped = counts(llm.engine)
    assert num_overlapped == num_steps - 1 > 30
    samples = replace(GREEDY, n=3, temperature=1.0)
    llm.generate(as_prompts(prompts[:1]), samples)
    # The prompt's step alone, then its fork, whose samples are computed next to each other.
    assert counts(llm.engine) == (num_steps + 16, num_overlapped + 14)


@pytest.mark.parametrize(
    "wishes",
    [{"logprobs": 0}, {"prompt_logprobs": 0}, {"stop": ["\x00"]}, {"bad_words": ["zzz"]}, {"min_tokens": 3}],
    ids=str,
)
def test_steps_wait_while_a_request_is_not_simple(wishes):
    engine = tiny(async_scheduling=True).engine
    engine.add_request("long", [1, 2], replace(GREEDY, max_tokens=20))
    engine.add_request("waits", [3, 4], replace(GREEDY, max_tokens=8, **wishes))
    run_to_the_end(engine)
    assert counts(engine) == (20, 11), "the first eight steps, and the ninth, which is planned when they are over"


def test_steps_wait_while_a_beam_search_runs_or_events_are_recorded(folders):
    engine = load(folders["llama"], async_scheduling=True).engine
    engine.add_request("long", [1, 2], replace(GREEDY, max_tokens=20))
    engine.add_request("beams", [3, 4], BeamSearchParams(2, 8))
    run_to_the_end(engine)
    assert counts(engine) == (20, 11)
    events = engine.record_events()
    engine.add_request("recorded", [1, 2], GREEDY)
    run_to_the_end(engine)
    assert counts(engine) == (36, 11)
    assert len(events) == 16


def test_it_is_off_on_a_cpu_unless_asked_for(folders):
    llm = load(folders["llama"])
    llm.generate(as_prompts([[1, 2]]), GREEDY)
    assert counts(llm.engine) == (16, 0)


class Spy:
    """Notes when steps are launched and when their results are read."""

    def __init__(self, engine, monkeypatch) -> None:
        self.log: list[str] = []
        self._launch, self._result, self._numbers = engine.runner.launch, StepInFlight.result, itertools.count()
        self._names: dict[int, int] = {}
        self._kept: list[StepInFlight] = []  # so that no two have the same id
        monkeypatch.setattr(engine.runner, "launch", self.launch)
        monkeypatch.setattr(StepInFlight, "result", lambda flight: self.result(flight))

    def launch(self, step):
        flight = self._launch(step)
        self._kept.append(flight)
        self._names[id(flight)] = next(self._numbers)
        self.log.append(f"launch {self._names[id(flight)]}")
        return flight

    def result(self, flight):
        self.log.append(f"result {self._names[id(flight)]}")
        return self._result(flight)


def test_the_next_step_is_launched_before_the_result_is_read(folders, monkeypatch):
    for ahead in (True, False):
        llm = load(folders["llama"], async_scheduling=ahead)
        with monkeypatch.context() as patch:
            spy = Spy(llm.engine, patch)
            llm.generate(as_prompts([[1, 2]]), replace(GREEDY, max_tokens=4))
        if ahead:
            order = ["launch 0", "launch 1", "result 0", "launch 2", "result 1", "launch 3", "result 2", "result 3"]
        else:
            order = [f"{what} {i}" for i in range(4) for what in ("launch", "result")]
        assert spy.log == order


# --- ends, aborts and failures while a step is in flight --------------------------------------------------------------


def end_after(folder, prompt: list[int], count: int) -> tuple[LLM, list[int]]:
    """An engine that plans ahead, and greedy tokens of which the last one, seen first there, can be a stop token."""
    llm = load(folder, async_scheduling=True)
    (tokens,) = tokens_of(llm.generate(as_prompts([prompt]), replace(GREEDY, max_tokens=count)))
    assert tokens[-1] not in tokens[:-1]
    llm.engine.num_steps = llm.engine.num_overlapped_steps = 0
    return llm, tokens


def test_a_stop_token_is_found_one_step_late_and_the_row_in_vain_is_dropped(folders):
    llm, tokens = end_after(folders["llama"], [5, 9, 2], 3)
    engine = llm.engine
    params = replace(GREEDY, stop_token_ids=[tokens[-1]], output_kind=RequestOutputKind.DELTA)
    engine.add_request("a", [5, 9, 2], params)
    given = [tuple(output.outputs[0].token_ids) for output in run_to_the_end(engine)]
    assert given == [(token,) for token in tokens]
    assert counts(engine) == (4, 3), "one for nothing"
    assert not engine._in_flight
    assert not engine.has_unfinished_requests
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_a_name_and_a_row_are_used_again_while_their_step_is_in_flight(folders):
    llm = load(folders["llama"], async_scheduling=True, max_num_seqs=2)
    other, old, new = tokens_of(llm.generate(as_prompts([[3], [5, 9, 2], [7, 7]]), GREEDY))
    engine = llm.engine
    engine.add_request("other", [3], GREEDY)
    engine.add_request("a", [5, 9, 2], GREEDY)
    engine.step()
    engine.step()
    assert list(engine.abort_request("a").outputs[0].token_ids) == old[:2]
    (in_flight,) = engine._in_flight
    engine.add_request("a", [7, 7], GREEDY)
    engine.step()
    assert {row.row for row in in_flight.step.rows} == {row.row for row in engine._in_flight[0].step.rows}
    done = {output.request_id: list(output.outputs[0].token_ids) for output in run_to_the_end(engine)}
    assert done == {"other": other, "a": new}


def test_an_abort_while_a_step_is_in_flight_leaves_the_others_alone(folders):
    prompts = token_prompts([5, 9, 7])
    llm = load(folders["llama"], async_scheduling=True)
    expected = tokens_of(llm.generate(as_prompts(prompts), GREEDY))
    engine = llm.engine
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    for _ in range(3):
        engine.step()
    assert engine.abort_request("1").outputs[0].finish_reason == "abort"
    done = {output.request_id: list(output.outputs[0].token_ids) for output in run_to_the_end(engine)}
    assert done == {"0": expected[0], "2": expected[2]}
    engine.add_request("last", prompts[0], GREEDY)
    engine.step()
    assert engine._in_flight
    engine.abort_request("last")
    assert not engine._in_flight, "nobody is left whom it could bring anything"


def test_prompt_logprobs_of_a_request_that_was_aborted_in_flight_are_nobodys(folders):
    engine = load(folders["llama"], async_scheduling=True).engine
    engine.add_request("other", [1, 2], GREEDY)
    engine.step()
    engine.add_request("scored", [5, 9, 2], replace(GREEDY, prompt_logprobs=1))
    engine.step()  # which brings what "other" got, while "scored" waits behind it
    assert any(row.prompt_targets for row in engine._in_flight[0].step.rows)
    engine.abort_request("scored")
    outputs = run_to_the_end(engine)
    assert {output.request_id for output in outputs} == {"other"}
    assert len(outputs[-1].outputs[0].token_ids) == 16


@pytest.mark.parametrize("where", ["launch", "result"])
def test_a_failure_ends_the_requests_of_its_step_and_nobody_elses(where, folders, monkeypatch, caplog):
    """ "new" is admitted by the step behind the one that fails, or after it; the other two are in both."""
    prompts = token_prompts([5, 9, 7])
    llm = load(folders["llama"], async_scheduling=True)
    expected = tokens_of(llm.generate(as_prompts(prompts), GREEDY))
    engine, steps = llm.engine, []
    launch, result = engine.runner.launch, StepInFlight.result

    def failing(what, argument):
        steps.append(argument)
        if len(steps) == 4:
            raise RuntimeError("the device is on fire")
        return what(argument)

    if where == "launch":
        monkeypatch.setattr(engine.runner, "launch", lambda step: failing(launch, step))
    else:
        monkeypatch.setattr(StepInFlight, "result", lambda flight: failing(result, flight))
    engine.add_request("0", prompts[0], GREEDY)
    engine.add_request("1", prompts[1], GREEDY)
    outputs = [output for _ in range(3) for output in engine.step()]
    engine.add_request("new", prompts[2], GREEDY)
    outputs += run_to_the_end(engine)
    ends = {output.request_id: output.outputs[0] for output in outputs if output.finished}
    assert {name: end.finish_reason for name, end in ends.items()} == {"0": "error", "1": "error", "new": "length"}
    for i in (0, 1):  # three steps brought a token each
        assert list(ends[str(i)].token_ids) == expected[i][:3]
    assert list(ends["new"].token_ids) == expected[2]
    if where == "launch":
        assert {row.request_id for step in steps[4:] for row in step.rows} == {"new"}, "nothing is planned behind it"
    assert "the device is on fire" in caplog.text
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable
    assert tokens_of(llm.generate(as_prompts(prompts), GREEDY)) == expected


def test_an_interrupted_result_is_read_by_the_next_step(folders, monkeypatch):
    llm = load(folders["llama"], async_scheduling=True)
    (expected,) = tokens_of(llm.generate(as_prompts([[5, 9, 2]]), GREEDY))
    llm.engine.add_request("a", [5, 9, 2], GREEDY)
    llm.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(StepInFlight, "result", lambda flight: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llm.engine.step()
    outputs = run_to_the_end(llm.engine)
    assert list(outputs[-1].outputs[0].token_ids) == expected


def test_streams_are_the_same(folders):
    prompts = token_prompts([5, 17, 30])
    llm = load(folders["llama"], async_scheduling=True, block_size=4, num_gpu_blocks_override=20)
    expected = tokens_of(load(folders["llama"]).generate(as_prompts(prompts), GREEDY))
    engine = AsyncEngine(llm.engine)
    params = replace(GREEDY, output_kind=RequestOutputKind.DELTA)

    async def collect(name: str, prompt: list[int], most: int) -> list[int]:
        tokens: list[int] = []
        stream = engine.stream(name, prompt, params)
        async for output in stream:
            tokens += output.outputs[0].token_ids
            if len(tokens) >= most:
                break
        await stream.aclose()
        return tokens

    async def run():
        return await asyncio.gather(*(collect(str(i), prompt, 4 if i == 1 else 99) for i, prompt in enumerate(prompts)))

    assert asyncio.run(run()) == [expected[0], expected[1][:4], expected[2]]
    assert llm.engine.num_overlapped_steps > 0
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Within it, an operation that makes the host wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [{"enforce_eager": True, "attention_form": "fused"}, {}], ids=["eager", "compiled"]
)
def test_launching_a_decode_step_does_not_wait_for_the_gpu(settings, folders, monkeypatch):
    llm = load(folders["llama"], device="cuda", async_scheduling=True, num_gpu_blocks_override=100, **settings)
    prompts, params = as_prompts(token_prompts([5, 9])), replace(GREEDY, repetition_penalty=1.2)
    expected = tokens_of(llm.generate(prompts, params))  # compiles what there is to compile
    launch = llm.engine.runner.launch
    guarded = []

    def without_waiting(step):
        if step.num_single < len(step.rows):
            return launch(step)
        guarded.append(step)
        with refusing_to_wait():
            return launch(step)

    monkeypatch.setattr(llm.engine.runner, "launch", without_waiting)
    assert tokens_of(llm.generate(prompts, params)) == expected
    assert len(guarded) > 10


# --- what a step costs the host ---------------------------------------------------------------------------------------


class Watched(list):
    """Tokens that note the longest slice anybody takes of them."""

    longest = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if isinstance(index, slice):
            Watched.longest = max(Watched.longest, len(found))
        return found


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
@pytest.mark.parametrize("wishes", [{}, {"bad_words": ["the end"], "min_tokens": 50}], ids=str)
def test_a_step_looks_at_few_tokens_however_many_there_are(kind, wishes, monkeypatch):
    """One block's tokens at most, which the prefix cache takes."""
    engine = tiny(async_scheduling=True, block_size=8).engine
    engine.add_request("a", [1, 2], replace(GREEDY, max_tokens=50, output_kind=kind, **wishes))
    engine.step()
    monkeypatch.setattr(Watched, "longest", 0)
    (sequence,) = engine.scheduler.running[0].sequences
    sequence.token_ids = Watched(sequence.token_ids)
    for _ in range(45):
        engine.step()
    assert 0 < Watched.longest <= 8
    (output,) = run_to_the_end(engine)[-1:]
    assert output.finished


def test_text_that_nobody_wants_before_the_end_is_decoded_at_the_end(monkeypatch):
    engine = tiny(async_scheduling=True).engine
    calls, decode = [], type(engine.tokenizer).decode
    noted = lambda self, *arguments, **named: calls.append(1) or decode(self, *arguments, **named)  # noqa: E731
    monkeypatch.setattr(type(engine.tokenizer), "decode", noted)
    params = replace(GREEDY, max_tokens=30, output_kind=RequestOutputKind.FINAL_ONLY)
    engine.add_request("a", [1, 2], params)
    (output,) = run_to_the_end(engine)
    assert len(calls) == 2
    assert output.outputs[0].text == engine.tokenizer.decode(list(output.outputs[0].token_ids))
