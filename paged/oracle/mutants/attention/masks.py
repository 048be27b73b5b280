"""Classes F and G: who sees whom, by the causal mask and the sliding window.

Edges that are off by one or on the wrong side; edges that are right for one query of a chunk and used for all; windows
in whole blocks, or only where they were thought of.
"""

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call
from paged.oracle.mutants.registry import mutant

# F: causal alignment.


@mutant("F", "sparkinfer#3")
class CausalTopLeft(Attention):
    """The first query is taken to be the sequence's first token, where it is one of the last."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        return super().seen(call, positions - positions[0], keys) if len(positions) > 1 else positions[:, None] >= keys


@mutant("F", "")
class CausalByLongest(Attention):
    """Queries are aligned with the longest chunk of the batch."""

    def positions(self, call: Call, index: int, length: int) -> Tensor:
        longest = int(call.query_start_loc.diff().max())
        return torch.arange(int(call.query_start_loc.diff()[index])) + length - longest


@mutant("F", "")
class NotCausal(Attention):
    """A chunk sees all of itself."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        return super().seen(call, positions[-1:].expand(len(positions)), keys)


@mutant("F", "flashinfer#348")
class NotItself(Attention):
    """Queries of chunks do not see their own key."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        return super().seen(call, positions - int(len(positions) > 1), keys)


@mutant("F", "NVIDIA/cutlass#2336")
class CausalByTile(Attention):
    """The mask is made once for every two queries, by the later one."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        last = positions[-1] if len(positions) else 0
        return super().seen(call, torch.minimum((positions // 2) * 2 + 1, torch.as_tensor(last)), keys)


# G: sliding window.


class Window(Attention):
    """Sees through a window whose edges can be moved."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        causal = positions[:, None] >= keys
        return causal if call.window is None else causal & (keys >= self.left(call, positions, call.window)[:, None])

    def left(self, call: Call, positions: Tensor, window: int) -> Tensor:
        """[Q] the first position each query sees."""
        return positions - window + 1


@mutant("G", "vllm#3385", window=True)
class WindowOneMore(Window):
    """Counts the keys before the query, not the query itself."""

    def left(self, call: Call, positions: Tensor, window: int) -> Tensor:
        return super().left(call, positions, window) - 1


@mutant("G", "", window=True)
class WindowOneLess(Window):
    """One key too few, but for a window of 1."""

    def left(self, call: Call, positions: Tensor, window: int) -> Tensor:
        return super().left(call, positions, max(1, window - 1))


@mutant("G", "pytorch/executorch#21857", window=True)
class WindowOfFirstQuery(Window):
    """All queries of a chunk see from where the first one does."""

    def left(self, call: Call, positions: Tensor, window: int) -> Tensor:
        return super().left(call, positions[:1].expand(len(positions)), window)


@mutant("G", "", window=True)
class WindowOfLastQuery(Window):
    """The window slides with the sequence and not with the query."""

    def left(self, call: Call, positions: Tensor, window: int) -> Tensor:
        return torch.minimum(super().left(call, positions[-1:].expand(len(positions)), window), positions)


@mutant("G", "mistral.rs#2094", window=True)
class WindowIgnoredInDecode(Window):
    """A single query sees everything."""

    def left(self, call: Call, positions: Tensor, window: int) -> Tensor:
        return super().left(call, positions, window) if len(positions) > 1 else positions * 0


@mutant("G", "", window=True)
class WindowByBlock(Window):
    """The window begins where its first block does."""

    def left(self, call: Call, positions: Tensor, window: int) -> Tensor:
        return super().left(call, positions, window).clamp(min=0) // call.block_size * call.block_size


@mutant("G", "exllamav3#378", window=True)
class WindowOfWholeBlocks(Window):
    """As many blocks as the window would fill, counted back from the last one."""

    def left(self, call: Call, positions: Tensor, window: int) -> Tensor:
        size = call.block_size
        return (positions // size - -(-window // size) + 1).clamp(min=0) * size


@mutant("G", "", window=True)
class WindowIgnoredWhenLong(Window):
    """Windows of more than one block are taken for none."""

    def left(self, call: Call, positions: Tensor, window: int) -> Tensor:
        return super().left(call, positions, window) if window <= call.block_size else positions * 0


@mutant("G", "vllm#30887", window=True)
class WindowOverKeysOnly(Window):
    """Values before the window are summed as well, with a tiny weight."""

    def weighted(self, weights: Tensor, value: Tensor) -> Tensor:
        return super().weighted(torch.where(weights == 0, 1e-6, weights), value)
