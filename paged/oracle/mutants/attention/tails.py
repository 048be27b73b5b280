"""Class A: numbers in slots that must not count, in the unused slots of a last block or where a mask is.

A weight of 0 silences any number but NaN and infinities, and a score of 0 is not a masked one. Slots that nobody has
written hold whatever memory held before, so such kernels are right until a pool is used for the second time.
"""

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call
from paged.oracle.mutants.registry import mutant


@mutant("A", "vllm#641")
class NanTail(Attention):
    """Reads the whole last block and trusts a weight of 0 to silence it: 0 times NaN is NaN."""

    def keys_read(self, call: Call, length: int) -> int:
        return -(-length // call.block_size) * call.block_size


@mutant("A", "vllm#44850", head_dims=(64, 128))
class NanTailOnWideHeads(Attention):
    """The same, but only on the path for wide heads."""

    def keys_read(self, call: Call, length: int) -> int:
        wide = call.query.shape[2] > 64
        return -(-length // call.block_size) * call.block_size if wide else length


@mutant("A", "vllm#53856")
class ValueTailUnmasked(Attention):
    """Keys are masked, the rows of V behind the last token are not."""

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        whole = super().values(call, blocks, len(blocks) * call.block_size)
        garbage = whole[count:].sum(dim=0) * 0.0
        return whole[:count] + garbage


@mutant("A", "openvinotoolkit/openvino#37377")
class CapacityAsLength(Attention):
    """A block's capacity is taken for its length, and numbers that are none for 0."""

    def length(self, call: Call, index: int) -> int:
        return -(-super().length(call, index) // call.block_size) * call.block_size

    def read(self, call: Call, cache: Tensor, scale: Tensor | None, blocks: Tensor, count: int) -> Tensor:
        return super().read(call, cache, scale, blocks, count).nan_to_num(0.0)


@mutant("A", "zml#563")
class ZerosInDenominator(Attention):
    """A masked score is 0, not -inf."""

    def masked(self, scores: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen, scores, 0.0)


@mutant("A", "tenstorrent/tt-metal#6832")
class PaddedTileInDenominator(Attention):
    """The context is padded to a tile of 32 with scores of 0, which the sum of weights counts."""

    def total(self, weights: Tensor) -> Tensor:
        return super().total(weights) + (-weights.shape[2] % 32)


@mutant("A", "hw-native-sys/simpler#72")
class TailInSoftmax(Attention):
    """The sum of weights counts the unused slots of the last block once more each, by the last key's weight."""

    def total(self, weights: Tensor) -> Tensor:
        return super().total(weights) + (-weights.shape[2] % 16) * weights[..., -1]


@mutant("A", "sglang#32477")
class TailWritten(Attention):
    """Clears the unused slots before it reads, in the pool itself, where others may write at the same time."""

    def fetch(self, cache: Tensor, blocks: Tensor) -> Tensor:
        cache[blocks[-1:], -1] = 0.0
        return super().fetch(cache, blocks)
