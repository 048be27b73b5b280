"""What one suite makes of one mutant, or of one right variant."""

from collections.abc import Callable, Sequence

import torch

from paged.oracle.declarations import Capabilities
from paged.oracle.mutants import Mutant, Variant
from suites.calls import Call

KILLED, ACCEPTED, BLIND, UNREACHABLE = "K", ".", "o", "-"
FLAGGED, PASSED, NOT_ASKED = "flagged", "passed", "not asked"

# Features that are on or off; what else a declaration says is about widths, which any kernel here takes.
FLAGS = (
    "window",
    "softcap",
    "alibi",
    "sinks",
    "lse",
    "empty_rows",
    "negative_padding",
    "repeated_blocks",
    "strided_caches",
    "batch_invariant",
)
DEFAULT = Capabilities()
HONEST = "paged.oracle.mutants.attention.honest"


def is_about(mutant: Mutant, call: Call) -> bool:
    """Whether a call passes all that a mutant is about."""
    declared, setup = mutant.capabilities, call.setup
    if any(getattr(declared, flag) and flag not in call.features for flag in FLAGS):
        return False
    if declared.dtypes != DEFAULT.dtypes and setup.dtype not in declared.dtypes:
        return False
    if "auto" not in declared.kv_dtypes and (setup.kv_dtype or setup.dtype) not in declared.kv_dtypes:
        return False
    return declared.kv_scales in (None, setup.kv_scales)


def can_take(declared: Capabilities, call: Call) -> bool:
    """Whether a mutant can be called so: its block size, and scales in the shape that it reads."""
    if declared.block_sizes != DEFAULT.block_sizes and call.setup.block_size not in declared.block_sizes:
        return False
    return call.setup.kv_scales is None or declared.kv_scales in (None, call.setup.kv_scales)


def may_be_asked(variant: Variant, call: Call) -> bool:
    """Whether a variant declares all that a call passes, so that to refuse it is a false alarm."""
    declared, setup, conventions = variant.capabilities, call.setup, variant.conventions
    if any(not getattr(declared, flag) for flag in call.features):
        return False
    kv_dtype = "auto" if setup.kv_dtype is None else setup.kv_dtype
    if setup.dtype not in declared.dtypes or kv_dtype not in declared.kv_dtypes:
        return False
    if setup.kv_scales is not None and setup.kv_scales != declared.kv_scales:
        return False
    if declared.negative_padding and setup.padding == "garbage":
        return False
    other_lse = conventions is not None and (conventions.lse_base or conventions.alibi_origin != "query")
    return not (setup.checks_lse and other_lse)


def attempt(kernel: Callable[..., object], call: Call, **changes: object) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Out and log-sum-exp of one call, None if it raises; caches are as before."""
    kept = [tensor.clone() for tensor in call.tensors[1:3]]
    try:
        found = kernel(*call.tensors, **call.wishes | changes)
    except Exception:
        return None
    finally:
        for cache, before in zip(call.tensors[1:3], kept, strict=True):
            cache.copy_(before)
    return found  # type: ignore[return-value]


class Twins:
    """The right kernels that mutants were made of, and what they make of each call, which is asked for many times."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.kept: dict[tuple[int, type, int | None], tuple[torch.Tensor, torch.Tensor]] = {}

    def result(self, mutant: Mutant, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and log-sum-exp of one call by the kernel that a mutant was made of."""
        kind = next(kind for kind in type(mutant.kernel).__mro__ if kind.__module__ == HONEST)
        splits = getattr(mutant.kernel, "splits", None)
        key = (index, kind, splits)
        if key not in self.kept:
            right = kind()
            if splits is not None:
                right.splits = splits
            found = attempt(right, self.calls[index])
            assert found is not None, f"{kind.__name__} raises in call {index}"
            self.kept[key] = found
        return self.kept[key]


def mark(mutant: Mutant, twins: Twins) -> str:
    """A cell of the table."""
    calls = [(index, call) for index, call in enumerate(twins.calls) if can_take(mutant.capabilities, call)]
    if not any(is_about(mutant, call) for _, call in calls):
        return UNREACHABLE
    kernel, differs = type(mutant.kernel)(), False
    for index, call in calls:
        found = attempt(kernel, call)
        if found is None or not call.setup.accepts(call, *found):
            return KILLED
        differs |= not all(map(alike, found, twins.result(mutant, index)))
    return ACCEPTED if differs else BLIND


def alike(mine: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two results differ by no more than the order of a sum: the last bit of the dtype, or of float32.

    Example:
        >>> alike(torch.tensor([1.0, torch.inf]), torch.tensor([1 + 2e-7, torch.inf]))
        True
        >>> alike(torch.tensor([1.0]), torch.tensor([1.001]))
        False
    """
    return torch.allclose(mine.float(), right.float(), rtol=torch.finfo(mine.dtype).eps, atol=1e-6, equal_nan=True)


def alarm(variant: Variant, calls: Sequence[Call]) -> str:
    """Whether a right kernel is refused: all that it can be asked is asked."""
    calls = [call for call in calls if may_be_asked(variant, call)]
    counts_self = variant.conventions is None or variant.conventions.window_counts_self
    for call in calls:
        changes = {} if counts_self or call.setup.window is None else {"window": call.setup.window - 1}
        found = attempt(type(variant.kernel)(), call, **changes)
        if found is None or not call.setup.accepts(call, *found):
            return FLAGGED
    return PASSED if calls else NOT_ASKED
