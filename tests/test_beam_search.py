"""Beam search: both scorings against their originals, over forked tables, in pools that run out."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers import load, token_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from transformers import PreTrainedModel

from paged import LLM, BeamSearchParams, SamplingParams
from paged.beam_search import BeamSearch, num_candidates
from paged.request import Branch
from paged.sampling import TokenLogprobs

PROMPTS = token_prompts([1, 6, 23])
# Width, length penalty, number of end tokens.
SEARCHES = ((2, 1.0, 6), (3, 0.0, 1), (5, 2.0, 6), (4, 1.0, 0), (3, -0.5, 2))
SMALL = {"num_gpu_blocks_override": 27, "max_num_seqs": 15, "spare_blocks_per_seq": 0}
# A pool of blocks of four: from one that holds everything to one that holds barely more than the largest request.
POOLS = {
    "ample": {},
    "recompute": {**SMALL, "max_num_batched_tokens": 15},
    "swap": {**SMALL, "preemption_mode": "swap"},
}


def flat_model(name: str) -> PreTrainedModel:
    """A tiny model whose next tokens are all somewhat likely, so that beams compete and end."""
    model = tiny_model(name, torch.float64)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 0.05
    return model


@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral"])
def model(request, tmp_path_factory):
    """A model, the folder it is saved in, and tokens that beams are likely to end with."""
    model = flat_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    found = search(engine(folder, []), BeamSearchParams(4, 14))
    likely = Counter(token for answers in found for tokens, *_ in answers for token in tokens[4:])
    return model, folder, [token for token, _ in likely.most_common(6)]


def engine(folder, eos: list[int], **arguments) -> LLM:
    llm = load(folder, dtype="float64", **{"block_size": 4, "max_model_len": 64, **arguments})
    llm.engine._eos_token_ids = frozenset(eos)
    return llm


def search(llm: LLM, params: BeamSearchParams) -> list[list[tuple[list[int], float, float]]]:
    """For each of PROMPTS, the generated tokens, log probability and score of each answer."""
    outputs = llm.beam_search([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    return [
        [(list(beam.tokens[len(prompt) :]), beam.cum_logprob, beam.score) for beam in output.sequences]
        for prompt, output in zip(PROMPTS, outputs, strict=True)
    ]


# --- scoring="transformers" -------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate_beams(model: PreTrainedModel, prompt: list[int], eos: list[int], params: BeamSearchParams):
    """transformers' own answers: tokens and score of each."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=params.max_tokens,
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        early_stopping=params.early_stopping,
        length_penalty=params.length_penalty,
        eos_token_id=eos or None,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    answers = []
    for tokens, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        output = tokens[len(prompt) :]
        ends = [i + 1 for i, token in enumerate(output) if token in eos]
        answers.append((output[: ends[0] if ends else None], score))
    return answers


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_answers_and_scores_are_those_of_transformers(model, early_stopping, pool):
    model, folder, eos_tokens = model
    ended_early = preempted = 0
    for width, length_penalty, num_eos in SEARCHES:
        eos = eos_tokens[:num_eos]
        llm = engine(folder, eos, **POOLS[pool])
        params = BeamSearchParams(
            width, 14, length_penalty=length_penalty, scoring="transformers", early_stopping=early_stopping
        )
        for prompt, answers in zip(PROMPTS, search(llm, params), strict=True):
            expected = generate_beams(model, prompt, eos, params)
            assert [tokens for tokens, *_ in answers] == [tokens for tokens, _ in expected]
            # transformers adds up in float32: at most 14 sums of numbers below 100.
            assert [score for *_, score in answers] == pytest.approx([s for _, s in expected], abs=14 * 100 * 2**-23)
            ended_early += sum(len(tokens) < 14 for tokens, *_ in answers)
        scheduler = llm.engine.scheduler
        assert scheduler.pool.num_free == scheduler.pool.num_usable
        preempted += scheduler.num_swaps if pool == "swap" else scheduler.num_preemptions
    assert ended_early > 10
    # Where every layer has a window, blocks are freed so early that the pool does not run out.
    assert (preempted > 0) == (pool != "ample") or scheduler.kv.sliding_window is not None


# --- scoring="vllm" ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def beams_as_in_vllm(model: PreTrainedModel, prompt: list[int], eos: list[int], params: BeamSearchParams):
    """What vLLM's algorithm comes to: one token at a time, the whole of every beam computed anew."""
    live, ended = [(list(prompt), 0.0)], []
    count = max(2, 1 + len(eos)) * params.beam_width

    def score(beam):
        tokens, logprob = beam
        return logprob / (len(tokens) - (tokens[-1] in eos)) ** params.length_penalty

    for _ in range(params.max_tokens):
        logprobs = model(torch.tensor([tokens for tokens, _ in live])).logits[:, -1].log_softmax(-1)
        best = logprobs.topk(count)
        grown = [
            ([*tokens, token], so_far + logprob)
            for (tokens, so_far), row, ids in zip(live, best.values.tolist(), best.indices.tolist(), strict=True)
            for token, logprob in zip(ids, row, strict=True)
        ]
        ended += [beam for beam in grown if beam[0][-1] in eos]
        live = sorted((beam for beam in grown if beam[0][-1] not in eos), key=score, reverse=True)[: params.beam_width]
    return sorted(ended + live, key=score, reverse=True)[: params.beam_width]


@pytest.mark.parametrize("pool", POOLS)
def test_answers_and_log_probabilities_are_those_of_vllm(model, pool):
    model, folder, eos_tokens = model
    ended_early = 0
    for width, length_penalty, num_eos in SEARCHES:
        eos = eos_tokens[:num_eos]
        llm = engine(folder, eos, **POOLS[pool])
        params = BeamSearchParams(width, 14, length_penalty=length_penalty)
        for prompt, answers in zip(PROMPTS, search(llm, params), strict=True):
            expected = beams_as_in_vllm(model, prompt, eos, params)
            assert [tokens for tokens, *_ in answers] == [tokens[len(prompt) :] for tokens, _ in expected]
            assert [logprob for _, logprob, _ in answers] == pytest.approx([logprob for _, logprob in expected])
            ended_early += sum(len(tokens) < 14 for tokens, *_ in answers)
    assert ended_early > 0


def test_ends_are_passed_over_with_ignore_eos(model):
    _, folder, eos_tokens = model
    params = BeamSearchParams(3, 8, ignore_eos=True)
    assert search(engine(folder, eos_tokens), params) == search(engine(folder, []), params)
    assert all(len(tokens) == 8 for answers in search(engine(folder, eos_tokens), params) for tokens, *_ in answers)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"enforce_eager": True}, {}], ids=["eager", "compiled"])
@pytest.mark.parametrize("pool", POOLS)
def test_answers_on_a_gpu_are_those_on_a_cpu(model, pool, settings):
    transformers_model, folder, eos = model
    if not settings and (pool, transformers_model.config.model_type) != ("swap", "llama"):
        pytest.skip("compiled once: a graph for every number of rows takes half a minute")
    cpu = engine(folder, eos, **POOLS[pool])
    gpu = engine(folder, eos, device="cuda", **POOLS[pool], **settings)
    for scoring in ("vllm", "transformers"):
        params = BeamSearchParams(4, 14, scoring=scoring)
        for found, expected in zip(search(gpu, params), search(cpu, params), strict=True):
            assert [tokens for tokens, *_ in found] == [tokens for tokens, *_ in expected]
            assert [score for *_, score in found] == pytest.approx([score for *_, score in expected])


# --- the algorithm alone ----------------------------------------------------------------------------------------------


def distribution(prefix: tuple[int, ...], vocab_size: int, seed: int) -> list[float]:
    """Log probabilities of a made-up language: of everything that came before."""
    generator = torch.Generator().manual_seed(hash((prefix, seed)) % 2**31)
    logprobs: list[float] = torch.randn(vocab_size, generator=generator, dtype=torch.float64).log_softmax(0).tolist()
    return logprobs


def run(params: BeamSearchParams, vocab_size: int, eos: frozenset[int], seed: int) -> BeamSearch:
    """A search in that language."""
    found = BeamSearch(params, num_prompt_tokens=5, max_tokens=params.max_tokens, eos_token_ids=eos)
    branches: list[Branch] | None = []
    while branches is not None:
        steps = []
        for beam in found.live:
            logprobs = distribution(beam.token_ids, vocab_size, seed)
            best = sorted(range(vocab_size), key=lambda token: -logprobs[token])[: found.num_candidates]
            top = [(token, logprobs[token]) for token in best]
            steps.append(TokenLogprobs(*top[0], 1, top))
        before = found.live
        branches = found.advance(steps)
        if branches is not None:
            assert [beam.token_ids for beam in found.live] == [
                (*before[branch.parent].token_ids, branch.token) for branch in branches
            ]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 1), st.integers(0, 99), st.sampled_from([0.0, 1.0, 2.0]))
def test_a_search_wide_enough_finds_the_best_of_all(vocab_size, max_tokens, num_eos, seed, length_penalty):
    """Against every sequence there is, where the beams are enough to drop none."""
    eos = frozenset(range(num_eos))
    width = vocab_size**max_tokens
    for scoring in ("vllm", "transformers"):
        params = BeamSearchParams(width, max_tokens, length_penalty=length_penalty, scoring=scoring)
        found = run(params, vocab_size, eos, seed)
        everything = {}
        for tokens in itertools.product(range(vocab_size), repeat=max_tokens):
            ends = [i + 1 for i, token in enumerate(tokens) if token in eos]
            whole = tokens[: ends[0] if ends else None]
            everything[whole] = sum(distribution(whole[:i], vocab_size, seed)[token] for i, token in enumerate(whole))

        def score(tokens, everything=everything, scoring=scoring):
            length = len(tokens) if scoring == "transformers" else 5 + len(tokens) - (tokens[-1] in eos)
            return everything[tokens] / length**length_penalty

        best = sorted(everything, key=score, reverse=True)
        assert [beam.token_ids for beam in found.answers] == best[: len(found.answers)]
        assert len(found.answers) == len(everything)
        for beam in found.answers:
            assert math.isclose(beam.cum_logprob, everything[beam.token_ids], abs_tol=1e-12)


def test_only_the_best_may_end_with_transformers_scoring():
    """A likely end beyond the first beam_width candidates: vLLM takes it, transformers does not."""
    step = TokenLogprobs(5, math.log(0.5), 1, [(5, math.log(0.5)), (0, math.log(0.4))])
    answers = {}
    for scoring in ("vllm", "transformers"):
        params = BeamSearchParams(1, 2, length_penalty=0.0, scoring=scoring)
        found = BeamSearch(params, num_prompt_tokens=1, max_tokens=2, eos_token_ids=frozenset([0]))
        assert found.advance([step]) == [Branch(0, 5)]
        assert found.advance([step]) is None
        answers[scoring] = found.answers[0].token_ids
    assert answers == {"vllm": (0,), "transformers": (5, 5)}, "log(0.4) for the end at once, log(0.25) for two tokens"


def test_what_others_in_the_batch_want_changes_no_answer(model):
    """A step looks up as many likely tokens as anybody wants; a search sees its own."""
    _, folder, eos = model
    params = BeamSearchParams(2, 12, length_penalty=-2.0)
    prompt = {"prompt_token_ids": PROMPTS[1]}
    (alone,) = engine(folder, eos).beam_search(prompt, params)
    llm = engine(folder, eos, max_logprobs=-1)
    llm.engine.add_request("mate", PROMPTS[2], SamplingParams(temperature=0, max_tokens=20, logprobs=128))
    llm.engine.add_request("beams", PROMPTS[1], params)
    outputs = {}
    while llm.engine.has_unfinished_requests:
        outputs.update({output.request_id: output for output in llm.engine.step()})
    found = outputs["beams"].outputs
    assert [c.token_ids for c in found] == [beam.tokens[len(PROMPTS[1]) :] for beam in alone.sequences]
    assert [len(entries) for entries in found[0].logprobs] == [len(entries) for entries in alone.sequences[0].logprobs]


# --- blocks, limits, faults -------------------------------------------------------------------------------------------


def test_beams_share_what_they_have_in_common(model):
    """A long prompt is held once, and a beam that two others continue is copied in its last block only."""
    _, folder, _ = model
    llm = engine(folder, [], block_size=8)
    prompt = token_prompts([40])[0]
    llm.engine.add_request("a", prompt, BeamSearchParams(4, 12))
    most = 0
    copies = 0
    while llm.engine.has_unfinished_requests:
        (output,) = llm.engine.step() or [None]
        pool = llm.engine.scheduler.pool
        most = max(most, pool.num_usable - pool.num_free)
        for running in llm.engine.scheduler.running:
            copies += sum(pool.ref_count(sequence.block_table.blocks[-1]) > 1 for sequence in running.sequences)
    assert output.finished
    assert len(output.outputs) == 4
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert most <= 5 + 4 * 2, "five full blocks of the prompt, and two for each beam"
    assert copies > 0
    assert output.outputs[0].cumulative_logprob == max(c.cumulative_logprob for c in output.outputs)


def test_a_beam_brings_its_logprobs_and_text():
    llm = LLM(model="tiny", max_model_len=128, device="cpu")
    (output,) = llm.beam_search("To be, or", BeamSearchParams(3, 6, ignore_eos=True))
    tokenizer = llm.get_tokenizer()
    for beam in output.sequences:
        assert beam.text == tokenizer.decode(beam.tokens)
        assert "To be, or" in beam.text
        generated = beam.tokens[-6:]
        assert [next(iter(entries)) for entries in beam.logprobs] == list(generated)
        total = sum(entries[token].logprob for entries, token in zip(beam.logprobs, generated, strict=True))
        assert beam.cum_logprob == pytest.approx(total)
    scores = [beam.score for beam in output.sequences]
    assert scores == sorted(scores, reverse=True)
    greedy = llm.generate("To be, or", SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    (narrow,) = llm.beam_search("To be, or", BeamSearchParams(1, 6, ignore_eos=True))
    assert narrow.sequences[0].tokens[-6:] == greedy[0].outputs[0].token_ids


def test_a_drawn_token_is_a_candidate_too():
    """With a temperature, as in vLLM: the token may be an unlikely one."""
    found = BeamSearch(
        BeamSearchParams(3, 2, temperature=1.0), num_prompt_tokens=1, max_tokens=2, eos_token_ids=frozenset([0])
    )
    top = [(0, -0.1), (1, -3.0), (2, -4.0)]
    assert found.advance([TokenLogprobs(9, -5.0, 8, top)]) == [Branch(0, 1), Branch(0, 2), Branch(0, 9)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam_width": 0}, r"beam_width must be an integer in \[1, 1024\], got 0"),
        ({"max_tokens": None}, r"max_tokens must be an integer >= 1, got None"),
        ({"length_penalty": math.nan}, r"length_penalty must be a number in \[-10, 10\], got nan"),
        ({"length_penalty": 1e3}, r"length_penalty must be a number in \[-10, 10\], got 1000.0"),
        ({"temperature": -1}, r"temperature must be a number in \[0, 2\], got -1"),
        ({"scoring": "hf"}, r"scoring must be one of vllm, transformers, got 'hf'"),
        ({"scoring": "transformers", "temperature": 1}, r"temperature must be 0 with scoring='transformers'"),
        ({"scoring": "transformers", "early_stopping": "soon"}, r"early_stopping must be True, False or 'never'"),
        ({"early_stopping": True}, r"early_stopping must be False with scoring='vllm'"),
        ({"ignore_eos": 1}, r"ignore_eos must be True or False, got 1"),
    ],
)
def test_wishes_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **arguments})


def test_searches_that_cannot_run_are_refused(model):
    _, folder, eos_tokens = model
    llm = engine(folder, eos_tokens, max_num_seqs=8, max_num_batched_tokens=64)
    (prompt,) = token_prompts([5])
    for width, message in (
        (9, r"beam_width=9 sequences and a step runs at most max_num_seqs=8"),
        (100, r"700 candidates"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.beam_search({"prompt_token_ids": prompt}, BeamSearchParams(width, 4))
    with pytest.raises(ValueError, match="beam_search wants BeamSearchParams"):
        llm.beam_search({"prompt_token_ids": prompt}, SamplingParams())
    assert not llm.engine.has_unfinished_requests


def test_logits_that_are_no_numbers_end_the_search(model, monkeypatch):
    _, folder, _ = model
    llm = engine(folder, [])
    runner = llm.engine.runner
    logits = runner._logits
    steps = itertools.count()
    monkeypatch.setattr(runner, "_logits", lambda *step: logits(*step) * (math.nan if next(steps) == 3 else 1))
    (output,) = llm.beam_search({"prompt_token_ids": PROMPTS[1]}, BeamSearchParams(3, 8))
    assert [beam.finish_reason for beam in output.sequences] == ["error"] * 3
    assert all(beam.score is None and len(beam.tokens) == 6 + 3 for beam in output.sequences)
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable
    assert len(search(llm, BeamSearchParams(2, 4))) == 3


def test_candidates_are_enough_for_every_end():
    assert [num_candidates(4, count) for count in (0, 1, 2, 5)] == [8, 8, 12, 24]
