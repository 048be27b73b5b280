"""Layouts and adapters of the oracle: kernels of other projects' kinds pass, and mistakes in their metadata are named.

The kernels are those of layout_kernels.py, which know nothing of this project. The ways there and back are tested
number by number in test_layouts.py.
"""

from collections import Counter

import pytest
from layout_faults import FAULTS, PAIRS

from paged.oracle import Capabilities, replay, verify
from paged.oracle.adapters import SHIPPED
from paged.oracle.adapters.foreign import FLAGS, Foreign
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
