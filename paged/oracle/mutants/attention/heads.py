"""Classes M and N: heads that share a KV head, the width of a head, and the scale that goes with it.

Which KV head a query head reads, how many heads share one, and what happens to dims beyond a multiple of the tile.
"""

import math

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call
from paged.oracle.mutants.registry import mutant

# M: heads that share a KV head.


@mutant("M", "onnx#7274")
class HeadsTiled(Attention):
    """Query heads take KV heads in turns, where neighbours share one."""

    def kv_heads(self, call: Call) -> Tensor:
        return torch.arange(call.num_heads) % call.num_kv_heads


@mutant("M", "")
class QueryHeadAsKvHead(Attention):
    """Each head reads its own number, as far as there are KV heads."""

    def kv_heads(self, call: Call) -> Tensor:
        return torch.arange(call.num_heads).clamp(max=call.num_kv_heads - 1)


@mutant("M", "b12x#24", query_groups=(1, 16))
class EightHeadsOfGroup(Attention):
    """Of more than eight heads that share a KV head, the rest is never computed."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = super().attend(call, scores, value)
        out[:, torch.arange(call.num_heads) % call.group >= 8] = 0.0
        return out, lse


@mutant("M", "")
class GroupAsPowerOfTwo(Attention):
    """The group's size is a number of bits: 3 is taken for 2."""

    def kv_heads(self, call: Call) -> Tensor:
        size = 1 << (call.group.bit_length() - 1)
        return (torch.arange(call.num_heads) // size).clamp(max=call.num_kv_heads - 1)


@mutant("M", "")
class ValueHeadsTiled(Attention):
    """Keys are read by the right head, values are not."""

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        first = value[:, :: call.group]
        return super().attend(call, scores, first.repeat(1, call.group, 1))


# N: width of heads, scale of scores.


@mutant("N", "mlc-llm#3426")
class NoScale(Attention):
    """Scores are not scaled."""

    def scale(self, call: Call) -> float:
        return 1.0


@mutant("N", "")
class DefaultScale(Attention):
    """1 / sqrt(D), whatever was asked for."""

    def scale(self, call: Call) -> float:
        return 1 / math.sqrt(call.query.shape[2])


@mutant("N", "triton#621", head_dims=(64, 128))
class First64Dims(Attention):
    """Products of queries and keys end after 64 dims."""

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call, query[..., :64], key[..., :64])


@mutant("N", "flashinfer#4299", head_dims=(64, 72))
class RestOfHeadDropped(Attention):
    """Values are summed in steps of 16 dims, and what is left over stays 0."""

    def weighted(self, weights: Tensor, value: Tensor) -> Tensor:
        out = super().weighted(weights, value)
        out[..., value.shape[2] // 16 * 16 :] = 0.0
        return out


@mutant("N", "")
class LastDimOfKeyLost(Attention):
    """One dim too few in the product."""

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call, query[..., :-1], key[..., :-1])


@mutant("N", "vllm-ascend#1958", head_dims=(96,), value_dims=(64,))
class ScaleByValueWidth(Attention):
    """The scale is corrected for the width of a value, where keys have another."""

    def scale(self, call: Call) -> float:
        return call.scale * math.sqrt(call.query.shape[2] / call.value_cache.shape[3])
