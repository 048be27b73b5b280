"""The kill table: its reference is right, honest kernels pass, and known gaps of published tests are gaps here."""

import doctest
import json

import mutation
import pytest
import torch
from suites import calls, marks
from suites.calls import Call, made
from suites.marks import ACCEPTED, BLIND, FLAGGED, KILLED, NOT_ASKED, PASSED, UNREACHABLE, Twins, alarm, attempt, mark
from suites.published import SUITES
from suites.rules import close, flash_mla, times_low_precision
from suites.setup import Setup

from paged.oracle.mutants import ATTENTION_MUTANTS, ATTENTION_VARIANTS
from paged.oracle.mutants.attention.honest import Attention
from reference.attention import attention

MUTANTS = {mutant.name: mutant for mutant in ATTENTION_MUTANTS}
# Quick to draw and to run; of the others only an honest kernel is asked for, in the slow part.
QUICK = ("FA3", "FlashMLA", "JAX paged", "TRT-LLM")
SMALL = Setup(((3, 9), (1, 5), (2, 0)), (4, 2), 8, 4, close(1e-3, 1e-3), dtype="float32", table="permutation")


def suite(name: str) -> list[Call]:
    return [made(setup, seed) for seed, setup in enumerate(mutation.suite_named(name).setups)]


@pytest.fixture(scope="module")
def twins() -> dict[str, Twins]:
    """Of the quick suites, drawn once."""
    return {name: Twins(suite(name)) for name in QUICK}


@pytest.mark.parametrize("module", [calls, marks])
def test_examples_in_docstrings(module):
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 3},
        {"softcap": 1.5},
        {"slopes": "powers"},
        {"slopes": "normal", "sinks": True, "window": 4},
        {"value_dim": 5, "value_is_key": True},
        {"table": "random", "num_blocks": 3},
        {"kv_dtype": "float8_e4m3fn", "kv_scales": "head"},
        {"kv_dtype": "int8", "kv_scales": "token", "unused": "zeros"},
    ],
    ids=str,
)
def test_reference_agrees_with_the_definition(changes):
    """What suites compare with, held against the loops of reference/, and both against an honest kernel."""
    call = made(SMALL.but(**changes), seed=1)
    outs, lses = [], []
    wishes = {name: call.wishes.get(name) for name in ("window", "softcap", "alibi_slopes", "sinks")}
    queries = call.tensors[0].split([q for q, _ in call.setup.sequences])
    for query, (key, value) in zip(queries, call.contexts, strict=True):
        out, lse = attention(query, key, value, scale=call.wishes["scale"], **wishes)
        outs.append(out)
        lses.append(lse)
    assert torch.allclose(call.expected[0].double(), torch.cat(outs), atol=1e-5)
    assert torch.allclose(call.expected[1].double(), torch.cat(lses), atol=1e-5)
    out, lse = attempt(Attention(), call)
    assert torch.allclose(out, call.expected[0], atol=1e-5)
    assert torch.allclose(lse, call.expected[1], atol=1e-5)


@pytest.mark.parametrize("rule", [close(1e-2, 0.0), times_low_precision(2, 1.5), flash_mla], ids=["close", "fa", "mla"])
def test_rules_refuse_what_is_wrong(rule):
    call = made(SMALL.but(accepts=rule, dtype="bfloat16", reference="float32", sequences=((3, 9), (1, 5))), seed=1)
    out, lse = call.expected
    assert rule(call, out, lse)
    for wrong in (out + 0.1, out * 1.1, out.clone().fill_(torch.nan), out.flip(1)):
        assert not rule(call, wrong, lse)
    one = out.clone()
    one[0, 0, 0] = torch.nan
    assert not rule(call, one, lse)


def test_flash_mla_wants_infinities_in_their_places():
    call = made(SMALL.but(accepts=flash_mla, reference="float32"), seed=1)
    out, lse = call.expected
    assert flash_mla(call, out, lse)
    assert not flash_mla(call, out, lse.clamp(min=0.0)), "0 where no key is seen"


def test_a_share_may_be_wrong_and_empty_rows_may_be_left_out():
    call = made(SMALL.but(skips_empty=True), seed=1)
    out, lse = call.expected
    broken = out.clone()
    broken[4:] = torch.nan  # the rows of the sequence without keys
    assert close(1e-3, 0.0)(call, broken, lse)
    broken[0, 0, :2] = 7.0  # 2 of 128 elements
    assert not close(1e-3, 0.0)(call, broken, lse)
    assert not close(1e-3, 0.0, wrong_share=0.01)(call, broken, lse)
    assert close(1e-3, 0.0, wrong_share=0.02)(call, broken, lse)


def test_a_kernel_that_writes_into_its_caches_leaves_them_for_the_next_as_they_were():
    call = made(SMALL, seed=1)
    before = call.tensors[1].clone()
    attempt(lambda query, keys, *rest, **wishes: keys.zero_(), call)
    assert torch.equal(call.tensors[1], before)


# What section 1 of the literature says, and the suites here repeat: which published set-ups let what pass.
KNOWN = [
    ("all_zeros", "FA3", KILLED),
    ("value_heads_tiled", "JAX paged", KILLED),
    ("nan_tail", "FlashMLA", KILLED),
    ("nan_tail", "FA3", BLIND),
    ("nan_tail", "TRT-LLM", BLIND),
    ("no_maximum", "FlashMLA", BLIND),
    ("no_maximum", "FA3", BLIND),
    ("lse_in_base2", "FA3", UNREACHABLE),
    ("lse_in_base2", "FlashMLA", KILLED),
    ("sink_scaled", "FA3", UNREACHABLE),
    ("first_scale_for_all", "TRT-LLM", UNREACHABLE),
    ("table_ignored", "TRT-LLM", BLIND),
    ("table_ignored", "FA3", KILLED),
    ("rest_of_block_dropped", "FA3", UNREACHABLE),
]


@pytest.mark.parametrize(("name", "column", "expected"), KNOWN, ids=[f"{name}-{column}" for name, column, _ in KNOWN])
def test_known_marks(name, column, expected, twins):
    assert mark(MUTANTS[name], twins[column]) == expected


def test_all_zeros_are_right_for_numbers_below_the_tolerance():
    """vLLM's test of fp8 caches draws numbers of at most 1e-3 and allows 1e-3; that of float16 caches allows 1e-4."""
    float16, *_, float8 = mutation.suite_named("vLLM prefix").setups
    for setup, expected in ((float8, ACCEPTED), (float16, KILLED)):
        twins = Twins([made(setup.but(sequences=((5, 300), (1, 140))), seed=0)])
        assert mark(MUTANTS["all_zeros"], twins) == expected
        assert mark(MUTANTS["nan_tail"], twins) == BLIND


@pytest.mark.parametrize("column", QUICK)
def test_honest_variants_pass(column, twins):
    honest = {variant.name: variant for variant in ATTENTION_VARIANTS}
    assert alarm(honest["honest"], twins[column].calls) in (PASSED, NOT_ASKED)
    assert alarm(honest["weights_in16_bits"], twins[column].calls) in (PASSED, NOT_ASKED)


@pytest.mark.slow
@pytest.mark.parametrize("column", [suite.name for suite in SUITES])
def test_no_suite_refuses_an_honest_kernel(column):
    for call in suite(column):
        found = attempt(Attention(), call)
        assert found is not None
        assert call.setup.accepts(call, *found), call.setup


def test_tables_count_what_was_found():
    result = {
        "columns": ["FA3", "oracle"],
        "mutants": [
            {"name": "b", "class": "B", "marks": {"FA3": UNREACHABLE, "oracle": KILLED}},
            {"name": "a", "class": "A", "marks": {"FA3": BLIND, "oracle": KILLED}},
            {"name": "c", "class": "B", "marks": {"FA3": UNREACHABLE, "oracle": KILLED}},
        ],
        "variants": [{"name": "v", "alarms": {"FA3": NOT_ASKED, "oracle": FLAGGED}}],
        "judged": {"writers": [3, 4, 1, 5]},
    }
    table = mutation.totals(result)
    assert "| FA3 | 0 | 0 | 1 | 2 | 0 of 0 |" in table
    assert "| oracle | 3 | 0 | 0 | 0 | 1 of 1 |" in table
    assert "Of writers, the oracle finds 3 of 4, and refuses 1 of 5 right ones." in table
    assert "| A numbers in slots that must not count | 1 | 0/1 | 1/1 |" in mutation.by_class(result)
    assert mutation.survivors(result) == "None."
    assert "| v | oracle |" in mutation.refused(result)
    result["mutants"][0]["marks"] = {"FA3": KILLED, "oracle": ACCEPTED}
    assert "| B b | FA3 |" in mutation.survivors(result)
    result["mutants"][0]["marks"] = {"FA3": UNREACHABLE, "oracle": KILLED}
    assert mutation.kill_table(result).splitlines()[2:] == ["| A a | o | K |", "| B b | - | K |", "| B c | - | K |"]


def test_the_page_says_what_the_result_says():
    page = (mutation.RESULTS.parent.parent / "docs" / "mutation.md").read_text()
    result = json.loads((mutation.RESULTS / "mutation.json").read_text())
    assert mutation.filled(page, result) == page, "python benchmarks/mutation.py --fill docs/mutation.md has not run"
    assert all(f"<!-- figure: {name} -->" in page for name in mutation.PLACES)
    assert {mutant["name"] for mutant in result["mutants"]} == set(MUTANTS), "the result is of other mutants"


def test_a_suite_has_to_be_known():
    with pytest.raises(ValueError, match="no suite 'FA9'; there are vLLM paged"):
        mutation.suite_named("FA9")
