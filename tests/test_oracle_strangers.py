"""Other people's paged attention, judged by the oracle: what is right, and where each differs on purpose.

How they are called is in strangers.py. Those that are right need no declaration but the dtypes; where one of them
differs from the contract, a test shows what the oracle says of it and which Profile or Convention makes it right.
"""

from importlib.util import find_spec

import pytest
from strangers import eager_paged, flashinfer_paged, sdpa_gathered, sdpa_paged, vllm_unified

from paged.attention import flex, fused, gathered
from paged.oracle import Capabilities, Case, Conventions, Profile, check, verify
from paged.oracle.verify import BUDGETS, Budget

SMALL = {"head_dims": (16, 24), "block_sizes": (4, 16)}
ROWS = ((1, 9), (3, 12), (1, 1), (5, 5))


@pytest.fixture(autouse=True)
def small_budget(monkeypatch):
    """All directed cases, but few drawn ones and relations: these are slow kernels, and other tests search."""
    monkeypatch.setitem(BUDGETS, "small", Budget(rounds=1, drawn=20, related=2))


def cases(dtype: str, **changes):
    """Some cases of every recipe that 16 bits can hold."""
    plain = Case(ROWS, num_kv_heads=2, query_group=2, head_dim=16, value_dim=16, block_size=4, poison="nan")
    for seed, recipe in enumerate(("uniform", "needle", "random", "random", "pair", "staircase")):
        poison = "none" if recipe == "uniform" else "nan"
        yield plain.replace(dtype=dtype, kv_dtype=dtype, recipe=recipe, seed=seed, poison=poison, **changes)


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "declared"),
    [
        (eager_paged, {"dtypes": ("float32",), "sinks": True, "repeated_blocks": True}),
        (sdpa_paged, {"dtypes": ("float32", "float64", "bfloat16"), "repeated_blocks": True}),
    ],
)
def test_transformers_paged_attention_is_right(kernel, declared):
    report = verify(kernel, adapter="transformers", capabilities=Capabilities(**SMALL, **declared), budget="small")
    assert report.ok, str(report)


@pytest.mark.parametrize("kernel", [eager_paged, sdpa_paged])
@pytest.mark.parametrize("window", [2, 4, 5, 11])
def test_transformers_windows_count_the_query(kernel, window):
    for case in cases("float32", window=window):
        report = check(kernel, case, adapter="transformers")
        assert report.ok, str(report)


def test_a_window_of_1_is_none_to_transformers():
    """Its mask takes 1, and not None, for "no window"; there is no convention for that, so it is a fault."""
    (failure,) = check(eager_paged, Case(((1, 6),), window=1, recipe="uniform"), adapter="transformers").failures
    assert failure.fault == "window is ignored"


@pytest.mark.parametrize(
    ("dtype", "rounds"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("float64", "float32")]
)
def test_transformers_eager_attention_rounds_scores(dtype, rounds):
    """Scores in the queries' 16 bits, and a softmax in float32 even for float64: a Profile says so."""
    profile = Profile(acc_dtype=rounds, p_dtype=rounds, exp_rel=2.0**-22)
    wrong = [case for case in cases(dtype) if not check(eager_paged, case, adapter="transformers").ok]
    assert wrong
    for case in cases(dtype):
        assert check(eager_paged, case, adapter="transformers", profile=profile).ok
    assert all(check(sdpa_paged, case, adapter="transformers").ok for case in wrong), "with SDPA scores are not rounded"


def test_a_row_that_sees_no_key_is_anything_to_transformers():
    """All its scores are the lowest number, so that all keys of the batch have equal weights."""
    case = Case(((1, 9), (1, 0), (1, 5)), recipe="random")
    for kernel in (eager_paged, sdpa_paged):
        assert not check(kernel, case, adapter="transformers").ok
        assert check(kernel, case, adapter="transformers", conventions=Conventions(empty_out="any")).ok


def test_the_lowest_float16_does_not_mask_scores_below_it():
    """A mask that adds -65504 lets another sequence's key through if this one's score is farther below that."""
    case = Case(
        ((1, 1), (1, 1)), head_dim=16, value_dim=16, dtype="float16", kv_dtype="float16", recipe="negative", seed=4
    )
    (failure,) = check(sdpa_paged, case, adapter="transformers").failures
    assert failure.fault == "wrong where scores are large"
    assert check(sdpa_paged, case.replace(dtype="bfloat16", kv_dtype="bfloat16"), adapter="transformers").ok


# --- torch, and this project's own forms ------------------------------------------------------------------------------


def test_sdpa_over_a_gathered_cache_is_right():
    capabilities = Capabilities(("float64", "float32", "bfloat16", "float16"), window=True, **SMALL)
    report = verify(sdpa_gathered, capabilities=capabilities, budget="small")
    assert report.ok, str(report)


@pytest.mark.parametrize("form", [gathered, fused])
def test_the_forms_that_run_everywhere_take_quantised_caches_and_strides(form):
    """What test_oracle.py does not declare of them."""
    capabilities = Capabilities(
        dtypes=("float32", "bfloat16"), kv_dtypes=("auto", "int8", "float8_e4m3fn"), kv_scales="token", window=True,
        strided_caches=True, repeated_blocks=True, lse="e", **SMALL,
    )  # fmt: skip
    report = verify(form.paged_attention, capabilities=capabilities, budget="small")
    assert report.ok, str(report)


def flex_out(*tensors, **wishes):
    """Without its log-sum-exp, which a CPU does not have."""
    return flex.paged_attention(*tensors, **wishes)[0]


def test_the_flex_form_is_right_where_unused_slots_are_finite():
    """Decodes of one shape and one scale, since every other is compiled anew; NaN in an unused slot is too much."""
    conventions = Conventions(unused_slots="masked")
    rows = tuple((1, length) for length in (1, 15, 16, 17, 40))
    plain = Case(rows, num_kv_heads=2, query_group=2, head_dim=16, value_dim=16, scale=0.125, extra_columns=1)
    for seed, recipe in enumerate(("uniform", "needle", "pair", "random", "random")):
        case = plain.replace(recipe=recipe, seed=seed, poison="none" if recipe == "uniform" else "huge")
        report = check(flex_out, case, conventions=conventions, time_limit=120.0)
        assert report.ok, str(report)
    (failure,) = check(flex_out, plain.replace(poison="nan"), time_limit=120.0).failures
    assert failure.letter == "A"


# --- kernels of GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("flashinfer") is None, reason="FlashInfer is not installed")
def test_flashinfer_is_right():
    capabilities = Capabilities(("float16", "bfloat16"), window=True, softcap=True, lse="2", head_dims=(64, 128))
    report = verify(flashinfer_paged, adapter="flashinfer", capabilities=capabilities, device="cuda")
    assert report.ok, str(report)


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllms_unified_attention_is_right():
    capabilities = Capabilities(("float16", "bfloat16"), window=True, softcap=True, sinks=True)
    report = verify(vllm_unified, capabilities=capabilities, device="cuda")
    assert report.ok, str(report)
