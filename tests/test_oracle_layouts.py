"""Layouts and adapters of the oracle: kernels of other projects' kinds pass, and mistakes in their metadata are named.

The kernels are those of layout_kernels.py, which know nothing of this project. The ways there and back are tested
number by number in test_layout_round_trips.py.
"""

import re
from collections import Counter
from itertools import product
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from layout_faults import FAULTS, PAIRS
from layout_kernels import KERNELS

from paged.oracle import Capabilities, Case, Conventions, adapters, check, replay, verify
from paged.oracle.adapters import ADAPTERS, SHIPPED
from paged.oracle.adapters.foreign import FLAGS, Foreign
from paged.oracle.adapters.latent import Latent
from paged.oracle.inputs import NoRoom, far_apart
from paged.oracle.verify import BUDGETS, Budget


@pytest.fixture(autouse=True)
def small_budget(monkeypatch):
    """All directed cases, but few drawn ones and relations: it is adapters that are tried here."""
    monkeypatch.setitem(BUDGETS, "small", Budget(rounds=1, drawn=10, related=1))


def everything(adapter: Foreign) -> Capabilities:
    """All that an adapter can express, in small shapes."""
    wide = "value_dims" not in adapter.cannot
    widths = {"mla of 24 + 8": ((20,), (12,)), "vllm_x_packed": ((8, 16), (8, 20))}
    head_dims, value_dims = widths.get(adapter.name, ((8, 12), (8, 20) if wide else None))
    granularities = [g for g in ("token", "head", "tensor") if f"kv_scales={g!r}" not in adapter.cannot]
    return Capabilities(
        dtypes=("float32",),
        head_dims=head_dims,
        value_dims=value_dims,
        query_groups=(1, 3),
        block_sizes=(4, 3),
        table_dtypes=("int32",) if "int64" in adapter.cannot else ("int32", "int64"),
        kv_scales=granularities[0] if granularities else None,
        lse="2" if "flashinfer" in adapter.name else "e",
        batch_invariant=True,
        **{flag: flag not in adapter.cannot for flag in FLAGS},
    )


# --- kernels of every kind are right ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_a_kernel_in_its_own_layout_is_right_in_all_that_its_adapter_can_express(name):
    adapter, kernel = PAIRS[name]
    report = verify(kernel, adapter=adapter, capabilities=everything(adapter), budget="small")
    assert report.ok, str(report)
    # Far apart blocks need strides, and some rows are of numbers whose rounding may do anything.
    left = [words for words in report.not_exercised if not words.endswith("rounding may do anything there")]
    strided = "strided_caches" not in adapter.cannot
    assert left == ([] if strided else ["offsets beyond 2^31 numbers: needs strided_caches, and address space"])


# --- mistakes in a layout or its metadata are found -------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.adapter}: {fault.mistake}" for fault in FAULTS])
def test_a_mistake_in_a_layout_is_found_and_named(fault):
    adapter, _ = PAIRS[fault.adapter]
    declared = {"adapter": adapter, "capabilities": everything(adapter)}
    report = verify(fault.kernel, **declared, budget="small", trace=False)
    assert not report.ok
    (traced,) = replay(fault.kernel, fault.case or report.failures[0].case, **declared).failures
    assert traced.fault == fault.named, str(traced)


def test_every_adapter_has_at_least_two_faults():
    counts = Counter(fault.adapter for fault in FAULTS)
    assert set(counts) == {adapter.name for adapter in SHIPPED}
    assert min(counts.values()) >= 2


def test_the_latent_of_512_and_64_numbers():
    case = Case(sequences=((1, 9), (3, 5)), num_kv_heads=2, query_group=2, head_dim=320, value_dim=256, poison="nan")
    for seed, recipe in product((0, 1), ("random", "needle", "uniform")):
        report = check(KERNELS["mla"], case.replace(seed=seed, recipe=recipe), adapter="mla")
        assert report.ok, str(report)


# --- what cannot be expressed, and what a kernel must not do ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "declared", "said"),
    [
        ("flashinfer", {"alibi": True}, "alibi: FlashInfer computes the slopes itself"),
        ("flashinfer", {"kv_scales": "head"}, "kv_scales='head': its scales are single numbers"),
        ("vllm_by_block", {"value_dims": (32,)}, "value_dims: keys and values of one tensor have one width"),
        ("vllm_x_packed", {"head_dims": (64, 12)}, "head_dim 12 in bfloat16: x is 8, and D must be a multiple of it"),
        ("vllm_x_packed", {"head_dims": (8,), "kv_dtypes": ("float8_e4m3fn",)}, "head_dim 8 in float8_e4m3fn: x is 16"),
        ("flash_attention", {"sinks": True}, "sinks: the kernel has no argument for it"),
        ("sglang", {"strided_caches": True}, "strided_caches: slots lie one behind another"),
        ("sglang", {"table_dtypes": ("int64",)}, "int64: kv_indices are int64 always"),
        ("transformers", {"negative_padding": True}, "negative_padding: its lists have no padding entries"),
        ("jax_ragged", {"table_dtypes": ("int64",)}, "int64: page_indices are int32"),
        ("mla", {"head_dims": (576,)}, "head_dim 576 with value_dim 576: they make 576 together"),
        ("mla", {"head_dims": (32,), "value_dims": (544,)}, "head_dim 32 with value_dim 544: they"),
        ("mla", {"head_dims": (320,), "value_dims": (256,), "window": True}, "window: the kernel has no argument"),
    ],
)
def test_what_an_adapter_cannot_express_is_refused_before_the_kernel_is_called(name, declared, said):
    capabilities = Capabilities(**declared)
    for call in (verify, lambda kernel, **rest: check(kernel, Case(sequences=((1, 1),)), **rest)):
        with pytest.raises(ValueError, match=re.escape(f"adapter '{name}' cannot express {said}")):
            call(lambda *tensors, **wishes: pytest.fail("was called"), adapter=name, capabilities=capabilities)


def test_check_takes_what_a_case_asks_for_as_declared():
    for changes, said in (({"strides": "padded"}, "strided_caches"), ({"alibi": True}, "alibi")):
        with pytest.raises(ValueError, match=f"adapter 'sglang' cannot express {said}"):
            check(KERNELS["sglang"], Case(sequences=((1, 9),), **changes), adapter="sglang")


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("flash_infer", "unknown adapter 'flash_infer'; there are contract, flash_attention, flashinfer, "),
        (Latent, "an object with the methods call and results, got the class Latent"),
        (object(), "an object with the methods call and results, got a object"),
    ],
)
def test_what_is_no_adapter_is_refused(adapter, said):
    with pytest.raises(ValueError, match=said):
        verify(KERNELS["hnd"], adapter=adapter)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_a_kernel_that_writes_into_a_copy_is_caught(name):
    """The contract's own tensors are watched; what an adapter made of them has to be, too."""
    adapter, kernel = PAIRS[name]

    def scribbler(*tensors, **wishes):
        returned = kernel(*tensors, **wishes)
        caches = [tensor for tensor in tensors if tensor.dim() >= 3 and tensor is not tensors[0]]
        caches[-1][0] = 7
        return returned

    can = everything(adapter)
    case = Case(
        sequences=((1, 5),), block_size=4, head_dim=can.head_dims[0], value_dim=can.value_dim_for(can.head_dims[0])
    )
    (failure,) = check(scribbler, case, adapter=adapter).failures
    assert failure.fault == "writes into its inputs"


def test_too_little_address_space_is_no_fault_of_the_kernels(monkeypatch):
    def refuse(tensor):
        raise NoRoom("no such machine")

    monkeypatch.setattr("paged.oracle.adapters.foreign.far_apart", refuse)
    adapter, kernel = PAIRS["hnd"]
    capabilities = Capabilities(dtypes=("float32",), head_dims=(8,), block_sizes=(4,), strided_caches=True)
    report = verify(kernel, adapter=adapter, capabilities=capabilities, budget="small")
    assert report.ok, str(report)
    assert "offsets beyond 2^31 numbers: needs strided_caches, and address space" in report.not_exercised
    with pytest.raises(NoRoom, match="GiB of address space cannot be had"):
        far_apart(torch.zeros(100_000, 1))


def test_a_window_convention_that_a_report_advises_makes_the_kernel_right():
    """A kernel that takes window_left for one key more is wrong, and right once that is declared."""

    def wide(*tensors, window_left=-1, **wishes):
        return KERNELS["flashinfer"](*tensors, window_left=window_left + (window_left >= 0), **wishes)

    declared = {
        "adapter": "flashinfer",
        "capabilities": Capabilities(("float32",), head_dims=(8,), block_sizes=(4,), window=True),
    }
    advice = {failure.declare for failure in verify(wide, **declared, budget="small").failures}
    assert advice == {"Conventions(window_counts_self=False)"}
    assert verify(wide, **declared, conventions=Conventions(window_counts_self=False), budget="small").ok


# --- an adapter of one's own ------------------------------------------------------------------------------------------


def test_the_adapter_in_the_documentation_works():
    """The ten lines that the package shows, with the kernel of that layout."""
    example = dedent(re.search(r"(    class MyAdapter.*?)\n\n[A-Z]", adapters.__doc__, re.DOTALL)[1])
    scope = {"torch": torch}
    exec(example, scope)

    def decode(query, cache, block_tables, seq_lens, scale):
        starts = torch.arange(len(query) + 1)
        return KERNELS["vllm_stacked"](query, cache, block_tables, seq_lens, starts, scale=scale)[0]

    capabilities = Capabilities(("float32",), head_dims=(8,), block_sizes=(4,), decode_only=True)
    declared = {"adapter": scope["MyAdapter"](), "capabilities": capabilities, "budget": "small", "trace": False}
    assert verify(decode, **declared).ok
    assert not verify(lambda query, cache, *rest, scale: decode(query, cache.flip(0), *rest, scale), **declared).ok


DOCS = (Path(__file__).parent.parent / "docs" / "oracle.md").read_text()
SECTION = DOCS[DOCS.index("## Kernels with other arguments") :].split("\n## ")[0]


def test_the_table_in_the_documentation_names_every_adapter():
    rows = [line.split("|")[1] for line in SECTION.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(ADAPTERS)


def test_the_code_in_the_documentation_runs():
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    exec(code, {"__name__": "documentation"})
    broken = code.replace("p % 16 for p", "max(0, p % 16 - 1) for p")
    assert broken != code
    with pytest.raises(AssertionError, match="FAIL"):
        exec(broken, {"__name__": "documentation"})
