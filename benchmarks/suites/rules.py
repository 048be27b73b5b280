"""Rules by which published tests call an output right.

Each gives a function of a call, the output [T, Hq, Dv] and the log-sum-exp [T, Hq]. NaN is never right where the
reference has a number.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from suites.calls import Call

Rule = Callable[[Call, Tensor, Tensor], bool]


def close(atol: float, rtol: float, *, wrong_share: float = 0.0) -> Rule:
    """Every element within atol + rtol * |expected|, but for a share that may be wrong: allclose."""

    def accepts(call: Call, out: Tensor, lse: Tensor) -> bool:
        got, want = call.compared(out), call.compared(call.expected[0])
        wrong = ~((got - want).abs() <= atol + rtol * want.abs())
        return wrong.float().mean().item() <= wrong_share

    return accepts


def times_low_precision(largest: float, mean: float | None = None) -> Rule:
    """FlashAttention's: the largest error at most so many times that of PyTorch in low precision, and so the mean."""

    def accepts(call: Call, out: Tensor, lse: Tensor) -> bool:
        want = call.expected[0]
        error, usual = (out.float() - want).abs(), (call.in_low_precision - want).abs()
        if not error.max().item() <= largest * usual.max().item() + 1e-5:
            return False
        return mean is None or error.mean().item() <= mean * usual.mean().item()

    return accepts


def flash_mla(call: Call, out: Tensor, lse: Tensor) -> bool:
    """FlashMLA's: absolute or relative, the cosine of the whole, the log-sum-exp, and NaN and infinities in place."""
    want, want_lse = call.expected
    return _alike(out.float(), want, 8e-4, 2.01 / 128, 5e-6) and _alike(lse, want_lse, 1e-6, 8.01 / 65536, 1e-7)


def _alike(got: Tensor, want: Tensor, absolute: float, relative: float, cosine: float) -> bool:
    for is_odd in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(is_odd(got), is_odd(want)):
            return False
    got, want = (tensor.double().nan_to_num(0.0, 0.0, 0.0) for tensor in (got, want))
    error = (got - want).abs()
    if not ((error < absolute) | (error / (want.abs() + 1e-6) < relative)).all():
        return False
    squares = (want * want).sum() + (got * got).sum()
    return bool((want * want).sum() < 1e-12 or (1 - 2 * (got * want).sum() / squares).abs() <= cosine)
