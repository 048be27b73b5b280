"""The oracle itself: its numbers, its float64 answer against one in decimal arithmetic, and what it says of kernels.

What it finds is tested with kernels that are wrong on purpose; here are plain ones, and everything that may go wrong
before there is a number to judge.
"""

import importlib
import json
import math
import time
from dataclasses import replace
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged.attention import fused, gathered
from paged.oracle import (
    Capabilities,
    Case,
    Conventions,
    ManagerCapabilities,
    Profile,
    WriteCapabilities,
    check,
    replay,
    verify,
)
from paged.oracle.drawn import cases, search
from paged.oracle.exact import Problem, answer
from paged.oracle.expected import RMS, solve
from paged.oracle.inputs import materialise
from paged.oracle.managers.operations import cases as manager_cases
from paged.oracle.mutants.attention.honest import Attention
from paged.oracle.mutants.attention.variants import FlushesSubnormals
from paged.oracle.row_statistics import row_limit, spread, unlikely_rows
from paged.oracle.values import FIELD_BITS, KEY, VALUE, random_bits, random_values
from paged.oracle.writers.cases import cases as writer_cases

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


# --- numbers ----------------------------------------------------------------------------------------------------------


def mix(x: int) -> int:
    """SplitMix64's finaliser in Python's own integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def bits_of(seed: int, tensor: int, token: int, head: int, dim: int) -> int:
    """The 64 bits of one number, from the description in words."""
    stream = mix((mix((seed + GAMMA) & MASK) + tensor * GAMMA) & MASK)
    counter = (token * 2**10 + head) * 2**14 + dim
    return mix((stream + (counter + 1) * GAMMA) & MASK)


@given(
    seed=st.integers(-(2**70), 2**70),
    tensor=st.integers(0, 8),
    token=st.integers(0, 2**40 - 1),
    head=st.integers(0, 40),
    dim=st.integers(0, 300),
)
@settings(deadline=None)
def test_bits_are_those_of_the_description(seed, tensor, token, head, dim):
    found = random_bits(seed, tensor, np.array([token]), head + 1, dim + 1)[0, head, dim]
    assert int(found) == bits_of(seed, tensor, token, head, dim)


def test_vectors_that_other_languages_can_be_held_to():
    assert [hex(bits_of(0, KEY, 0, 0, 0)), hex(bits_of(1, VALUE, 2**40 - 1, 3, 127))] == [
        hex(random_bits(0, KEY, np.array([0]), 1, 1)[0, 0, 0]),
        hex(random_bits(1, VALUE, np.array([2**40 - 1]), 4, 128)[0, 3, 127]),
    ]
    # The first outputs of SplitMix64 for seed 1234567, as published with its reference code.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix((1234567 + n * GAMMA) & MASK) for n in (1, 2, 3)] == outputs


@pytest.mark.parametrize("dtype", [name for name in FIELD_BITS if name != "int8"])
def test_values_are_held_by_their_dtype_and_look_normal(dtype):
    values = torch.from_numpy(random_values(3, VALUE, np.arange(200), 2, 64, dtype))
    assert torch.equal(values.to(getattr(torch, dtype)).double(), values)
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1.155 * math.sqrt(1 - 4.0 ** -FIELD_BITS[dtype])) < 0.02


# --- what is right ----------------------------------------------------------------------------------------------------


def by_decimals(inputs) -> tuple[list[list[list[float]]], list[list[float]]]:
    """Attention of a case with 40 digits, read through the block table number by number."""
    getcontext().prec = 40
    case = inputs.case
    out, lse = [], []
    for sequence, (query_len, seq_len) in enumerate(case.sequences):
        first = int(inputs.query_start_loc[sequence])
        for i in range(query_len):
            position = seq_len - query_len + i
            rows = [row_by_decimals(inputs, sequence, first + i, position, head) for head in range(case.num_heads)]
            out.append([row[0] for row in rows])
            lse.append([row[1] for row in rows])
    return out, lse


def row_by_decimals(inputs, sequence: int, token: int, position: int, head: int) -> tuple[list[float], float]:
    case = inputs.case
    kv_head, weights = head // case.query_group, {}
    first = 0 if case.window is None else max(0, position - case.window + 1)

    def number(tensor, *place) -> Decimal:
        return Decimal(float(tensor[place]))

    def slot(key: int) -> tuple[int, int]:
        return int(inputs.block_tables[sequence, key // case.block_size]), key % case.block_size

    for key in range(first, position + 1):
        score = sum(
            number(inputs.query, token, head, d) * number(inputs.key_cache, *slot(key), kv_head, d)
            for d in range(case.head_dim)
        ) * Decimal(inputs.scale)
        if case.softcap is not None:
            cap = Decimal(case.softcap)
            twice = (2 * score / cap).exp()
            score = cap * (twice - 1) / (twice + 1)
        if case.alibi:
            score += number(inputs.alibi_slopes, head) * (key - position)
        weights[key] = score.exp()
    without_sink = sum(weights.values())
    total = without_sink + (number(inputs.sinks, head).exp() if case.sinks else 0)
    values = [
        sum(weights[key] * number(inputs.value_cache, *slot(key), kv_head, d) for key in weights) / total
        for d in range(case.value_dim)
    ]
    return [float(value) for value in values], float(without_sink.ln())


@given(
    sequences=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=3),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    block_size=st.integers(1, 5),
    window=st.none() | st.integers(1, 6),
    softcap=st.none() | st.just(2.5),
    flags=st.tuples(st.booleans(), st.booleans()),
    order=st.sampled_from(["shuffled", "reversed", "interleaved"]),
    recipe=st.sampled_from(["random", "uniform", "needle", "large"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_answer_is_that_of_decimal_arithmetic(
    sequences, heads, block_size, window, softcap, flags, order, recipe, seed
):
    """Inputs and answer together: the decimals know nothing but the tensors that a kernel gets."""
    case = Case(
        sequences=tuple((queries, queries + before) for queries, before in sequences),
        num_kv_heads=heads[0], query_group=heads[1], head_dim=3, value_dim=2, block_size=block_size, window=window,
        softcap=softcap, alibi=flags[0], sinks=flags[1], order=order, recipe=recipe, seed=seed,
        dtype="float64", kv_dtype="float64",
    )  # fmt: skip
    inputs = materialise(case)
    expected = solve(inputs.problem, Profile().roundoffs("float64"), recipe=recipe)
    out, lse = answer(inputs.problem)
    right, right_lse = (torch.tensor(found, dtype=torch.float64) for found in by_decimals(inputs))
    assert torch.equal(out, expected.out)
    # The oracle computes in float64, so it is itself held to the bound of a kernel that does.
    assert ((out - right).abs() <= expected.bound).all()
    assert ((lse - right_lse).abs() <= expected.lse_bound + 2.0**-50 * right_lse.abs()).all()


def test_bounds_are_tight_enough_to_tell_a_rounding_from_a_fault():
    """An answer in bfloat16 arithmetic is outside of the bound for float32, and inside of its own."""
    case = Case(sequences=((1, 60),), dtype="float32", kv_dtype="float32")
    inputs = materialise(case)
    expected = solve(inputs.problem, Profile().roundoffs("float32"))
    coarse = solve(inputs.problem, Profile(p_dtype="bfloat16").roundoffs("float32"))
    problem = inputs.problem
    scores = torch.einsum("qhd,nhd->hqn", problem.queries[0], problem.keys[0]) * problem.scale
    weights = scores.softmax(-1).bfloat16().double()
    out = torch.einsum("hqn,nhd->qhd", weights, problem.values[0])
    error = (out - expected.out).abs()
    assert (error > expected.bound).any()
    assert (error <= coarse.bound).all()


# --- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not the JSON of a case"),
        ("[1]", "a case is a JSON object"),
        ("{}", "no sequences"),
        ('{"sequences": [[1, 2]], "windows": 3}', "unknown fields windows"),
        ('{"sequences": [[1, 2]], "window": 0}', "window must be at least 1"),
        ('{"sequences": [[1, -2]]}', "none negative"),
        ('{"sequences": [], "seed": 1}', "one or more"),
        ('{"sequences": [[1, 2]], "dtype": "half"}', "dtype must be one of"),
        ('{"sequences": 5}', "not a case"),
    ],
)
def test_cases_that_cannot_be(text, said):
    with pytest.raises(ValueError, match=said):
        Case.from_json(text)


def test_a_block_that_moves_keeps_its_values():
    case = Case(sequences=((2, 40), (1, 17)), num_kv_heads=2, dtype="bfloat16", kv_dtype="bfloat16")
    here, there = (materialise(case.replace(order=order)) for order in ("identity", "shuffled"))
    assert here.block_tables.tolist() != there.block_tables.tolist()
    for cache in ("key_cache", "value_cache"):
        for mine, other in zip(here.block_tables.flatten(), there.block_tables.flatten(), strict=True):
            if mine and other:
                assert torch.equal(getattr(here, cache)[mine], getattr(there, cache)[other])
    assert torch.equal(here.query, there.query)


def rounded_by_definition(problem: Problem, weights_rounded: bool, noise: torch.Generator | None = None) -> Tensor:
    """One decode [Hq, Dv] whose weights, or whose scaled query, are rounded to bfloat16, or as if at random."""

    def rounded(numbers: Tensor) -> Tensor:
        if noise is None:
            return numbers.bfloat16().double()
        return numbers * (1 + RMS * 2.0**-8 * torch.randn(numbers.shape, generator=noise, dtype=torch.float64))

    query = problem.queries[0][0] * problem.scale
    query = query if weights_rounded else rounded(query)
    scores = torch.einsum("hd,nhd->hn", query, problem.keys[0][:, problem.kv_heads])
    weights = torch.exp(scores - scores.amax(dim=1, keepdim=True))
    total = weights.sum(dim=1, keepdim=True)
    return torch.einsum(
        "hn,nhd->hd", (rounded(weights) if weights_rounded else weights) / total, problem.values[0][:, problem.kv_heads]
    )


@pytest.mark.parametrize("weights_rounded", [True, False], ids=["weights", "query"])
def test_how_far_a_rows_errors_spread(weights_rounded):
    """Against 4000 rounded answers: as large as they are, and their sum of squares spreads no further than is said."""
    case = Case(sequences=((1, 60),), query_group=2, head_dim=128, value_dim=128, dtype="bfloat16", kv_dtype="bfloat16")
    problem, profile = materialise(case).problem, Profile(p_dtype="bfloat16" if weights_rounded else "float32")
    profile = profile if weights_rounded else replace(profile, q_prescale_dtype="bfloat16")
    expected = solve(problem, replace(profile.roundoffs("bfloat16"), out=0.0))
    noise = torch.Generator().manual_seed(0)
    errors = torch.stack([rounded_by_definition(problem, weights_rounded, noise) for _ in range(4000)]) - expected.out
    for head in range(2):
        deviation, num_dims = spread(expected, 0, head)
        assert torch.allclose(errors[:, head].square().mean(dim=0).sqrt(), deviation, rtol=6 / math.sqrt(2 * 4000))
        squares = (errors[:, head] / deviation).square().mean(dim=1)  # chi-square over its dims: variance 2 / dims
        assert num_dims < 2 / float(squares.var()) < 128 / 2, "as if all dims were independent would be too strict"
        assert float(squares.max()) < row_limit(num_dims, 1) ** 2


def test_a_row_that_shares_a_rounded_query_is_not_flagged():
    """The errors of head 5 are beyond the limit for 128 independent ones."""
    sizes = {"num_kv_heads": 2, "query_group": 3, "head_dim": 128, "value_dim": 128}
    case = Case(sequences=((1, 140),), **sizes, dtype="bfloat16", kv_dtype="bfloat16", seed=962)
    problem = materialise(case).problem
    expected = solve(problem, Profile(q_prescale_dtype="bfloat16").roundoffs("bfloat16"))
    error = (rounded_by_definition(problem, False).bfloat16().double() - expected.out).abs()
    assert (error / expected.deviation).square().mean(dim=2).sqrt()[0, 5] > row_limit(128, 6)
    rows, share = unlikely_rows(expected, error)
    assert rows == []
    assert 0.5 < share < 1
    worst = unlikely_rows(expected, 3 * error)[0][0]
    assert (worst.row, worst.head) == (0, 5)


# --- verdicts ---------------------------------------------------------------------------------------------------------

EVERYTHING = {"window": True, "softcap": True, "alibi": True, "sinks": True, "lse": "e", "empty_rows": True}


@pytest.mark.parametrize("form", [gathered, fused])
def test_this_projects_own_forms_are_right(form):
    capabilities = Capabilities(
        dtypes=("bfloat16", "float16", "float32"), head_dims=(64, 80), value_dims=(64, 48), block_sizes=(16, 5),
        table_dtypes=("int32", "int64"), **EVERYTHING,
    )  # fmt: skip
    report = verify(form.paged_attention, capabilities=capabilities)
    assert report.ok, str(report)
    # All that is not exercised is what needs address space, and maybe rows of numbers that 16 bits cannot tell apart.
    missing = [words for words in report.not_exercised if not words.endswith("rounding may do anything there")]
    assert [words.split(":")[0] for words in missing] == ["offsets beyond 2^31 numbers"]
    assert 0.2 < report.slack["hard bound"] < 1, "a bound that is never approached finds little"


def wrong_at(position: int):
    """A kernel that reads the token after `position` twice, and that one not at all."""

    def kernel(query, key_cache, value_cache, block_tables, *rest, **wishes):
        block_size = key_cache.shape[1]
        places = [(int(block_tables[0, p // block_size]), p % block_size) for p in (position, position + 1)]
        caches = []
        for cache in (key_cache, value_cache):
            cache = cache.clone()
            cache[places[0]] = cache[places[1]]
            caches.append(cache)
        return gathered.paged_attention(query, *caches, block_tables, *rest, **wishes)[0]

    return kernel


@pytest.mark.parametrize("position", [0, 4097, 8190])
def test_one_wrong_token_of_8192_in_bfloat16_is_found_and_named(position):
    case = Case(sequences=((1, 8192),), dtype="bfloat16", kv_dtype="bfloat16", recipe="uniform")
    assert check(lambda *t, **w: gathered.paged_attention(*t, **w)[0], case).ok
    report = check(wrong_at(position), case)
    assert not report.ok
    cause = dict(report.failures[0].details)["cause"]
    assert f"token {position} " in cause
    assert f"token {position + 1}" in cause or "in the place of" in cause


def test_a_report_is_the_same_every_time_and_can_be_replayed():
    def shifted(*tensors, scale, **wishes):
        return gathered.paged_attention(*tensors, scale=scale * 1.01, **wishes)

    capabilities = Capabilities(dtypes=("float32",), lse="e")
    first, second = (verify(shifted, capabilities=capabilities) for _ in range(2))
    assert str(first) == str(second)
    assert first.to_json() == second.to_json()
    found = json.loads(first.to_json())["failures"][0]
    again = replay(shifted, json.dumps(found["case"]), capabilities=capabilities)
    assert not again.ok
    assert replay(gathered.paged_attention, first.failures[0].case, capabilities=capabilities).ok


# --- kernels that give nothing to judge -------------------------------------------------------------------------------


def good(*tensors, **wishes):
    return gathered.paged_attention(*tensors, **wishes)[0]


def raises(*_, **__):
    raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")


def hangs(*tensors, **wishes):
    time.sleep(3)
    return good(*tensors, **wishes)


def writes(query, key_cache, *rest, **wishes):
    out = good(query, key_cache, *rest, **wishes)
    key_cache[1, 0, 0, 0] += 1
    return out


BAD = {
    "raises an exception": (raises, "RuntimeError: CUDA error: an illegal memory access (at test_oracle.py:"),
    "returns something else": (lambda *_, **__: {"out": 1}, "returned a dict, not a tensor or (out, lse)"),
    "returns the wrong shape": (lambda *t, **w: good(*t, **w)[:, :, 1:], "[T, Hq, Dv] is"),
    "returns the wrong dtype": (lambda *t, **w: good(*t, **w).double(), "out is float64; queries are bfloat16"),
    "returns on the wrong device": (lambda *t, **w: good(*t, **w).to("meta"), "out is on meta; queries are on cpu"),
    "writes into its inputs": (writes, "key_cache was written to: 1 elements changed"),
    "returns NaN or infinities": (lambda *t, **w: good(*t, **w) * torch.nan, "got +nan"),
}


@pytest.mark.parametrize("fault", BAD)
def test_whatever_a_kernel_does_is_a_verdict(fault):
    kernel, said = BAD[fault]
    report = verify(kernel)
    assert [failure.fault for failure in report.failures] == [fault]
    assert said in str(report)
    assert "Traceback" not in str(report)


def test_a_kernel_that_hangs_is_left_alone():
    started = time.perf_counter()
    report = verify(hangs, time_limit=0.05)
    assert time.perf_counter() - started < 30
    assert [failure.fault for failure in report.failures] == ["hangs"]


@pytest.mark.parametrize("name", ["no.such.module:attend", "paged.attention.gathered:missing", "nonsense", 5])
def test_what_cannot_be_imported_is_a_verdict(name):
    report = verify(name)
    assert [failure.fault for failure in report.failures] == ["cannot be imported"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budget": "huge"}, "unknown budget"),
        ({"adapter": "huge"}, "unknown adapter"),
        (
            {"capabilities": Capabilities(lse="2"), "conventions": Conventions(lse_base="e")},
            "declare one, or the same in both",
        ),
    ],
)
def test_declarations_that_contradict_each_other(arguments, said):
    with pytest.raises(ValueError, match=said):
        verify(good, **arguments)


def test_what_else_is_loaded_changes_no_draw(tmp_path, monkeypatch):
    """Hypothesis mixes numbers of the program's own source into what it draws, which would change the verdict."""

    def draws() -> list[object]:
        found: list[object] = []
        can = Capabilities(window=True, empty_rows=True, block_sizes=(16, 256))
        for strategy in (
            cases(can, Conventions()),
            writer_cases(WriteCapabilities(block_sizes=(16, 256))),
            manager_cases(ManagerCapabilities()),
        ):
            search(strategy, 200, 0, lambda drawn: found.append(drawn) is not None)
        return found

    before = draws()
    numbers = ", ".join(str(number) for number in range(100, 3000, 7))
    (tmp_path / "of_a_stranger.py").write_text(f"NUMBERS = [{numbers}]")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("of_a_stranger")
    assert draws() == before
    assert len(before) > 500


def test_numbers_too_small_for_a_dtype_may_vanish():
    """Where the heaviest token's value is 0, weights that GPUs flush to 0 are all that the output is made of."""
    case = Case(
        sequences=((1, 1), (1, 1), (3, 17)),
        query_group=3,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        recipe="large",
        seed=29,
    )
    kernel, inputs = FlushesSubnormals(), materialise(case)
    tensors = (inputs.query, inputs.key_cache, inputs.value_cache)
    out, _ = kernel(*tensors, inputs.block_tables, inputs.seq_lens, inputs.query_start_loc, scale=inputs.scale)
    expected = solve(inputs.problem, Profile().roundoffs("bfloat16"))
    assert ((out == 0) & (expected.out != 0)).any()
    assert check(kernel, case).ok
    roundoffs = replace(Profile().roundoffs("bfloat16"), least_out=0.0, small_weights=(0.0, 0.0))
    strict = solve(inputs.problem, roundoffs)
    assert ((out.double() - expected.out).abs() > strict.bound).any()


def test_scores_that_may_be_off_by_anything_leave_rows_undecided():
    """Scores of -80 that are kept in bfloat16 are off by up to a quarter; a first-order bound would flag these."""

    class Coarse(Attention):
        def scores(self, call, query, key):
            return super().scores(call, query, key).bfloat16().float()

    profile, flagged = Profile(acc_dtype="bfloat16", p_dtype="bfloat16"), 0
    for seed in range(20):
        case = Case(sequences=((1, 17), (3, 40)), dtype="bfloat16", kv_dtype="bfloat16", recipe="negative", seed=seed)
        report = check(Coarse(), case, profile=profile)
        assert report.ok, report
        assert "rounding may do anything" in report.not_exercised[0]
        flagged += not check(Coarse(), case).ok
    assert flagged, "without the declaration it is wrong"
