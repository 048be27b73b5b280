"""Class R: what slips through tests that are broken.

Results that depend on other calls or on chance, and constants that a loose tolerance lets pass.
"""

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call, SplitAttention
from paged.oracle.mutants.registry import mutant


@mutant("R", "")
class RemembersTheFirstCall(Attention):
    """Returns what it returned before, for equal shapes of query and table."""

    def __init__(self) -> None:
        self.kept: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        shape = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if shape not in self.kept:
            self.kept[shape] = super().__call__(*tensors, **wishes)
        return self.kept[shape]


@mutant("R", "")
class SumsIntoOldOutput(Attention):
    """The output's memory is reused and not cleared."""

    kept: Tensor | None = None

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        out, lse = super().__call__(*tensors, **wishes)
        if self.kept is not None and self.kept.shape == out.shape:
            out = out + self.kept
        self.kept = out
        return out, lse


@mutant("R", "sglang#35795")
class RaceNowAndThen(Attention):
    """Every seventh call loses one key: what a missing barrier does."""

    calls = 0

    def masked(self, scores: Tensor, seen: Tensor) -> Tensor:
        self.calls += 1
        lost = self.calls % 7 == 0 and scores.shape[2] > 2
        return super().masked(scores, seen & (torch.arange(scores.shape[2]) != 1) if lost else seen)


@mutant("R", "KernelBench#165")
class AllZeros(Attention):
    """Returns nothing but zeros."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        return out * 0.0, lse


@mutant("R", "mlir-air#1427")
class KeysIgnored(Attention):
    """The mean of all values that are seen: what loose tolerances let pass."""

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call, query, key) * 0.0


@mutant("R", "", batch_invariant=True)
class SplitsByBatch(SplitAttention):
    """Right, but other bits alone than in a batch, and declares that there are none."""

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        self.splits = len(tensors[4])
        return super().__call__(*tensors, **wishes)
