"""Mutants F to J, M and N: the wrong keys are seen, or something goes wrong on the way from a score to a weight."""

import math

import torch
from torch import Tensor

from paged.oracle.mutants.honest import Attention, Call, SplitAttention
from paged.oracle.mutants.registry import mutant

# F: causal alignment.


@mutant("F", "flashinfer#348")
class CausalTopLeft(Attention):
    """The first query is taken to be the sequence's first token, where it is one of the last."""

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        return super().seen(call, positions - positions[0], keys) if len(positions) > 1 else positions[:, None] >= keys


@mutant("F", "sparkinfer#3")
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


@mutant("F", "")
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


@mutant("G", "sglang-jax#893", window=True)
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


@mutant("G", "openvinotoolkit/openvino#28681", window=True)
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


# H: softcap.


@mutant("H", "flashinfer#350", softcap=True)
class CapAfterMask(Attention):
    """What is masked becomes -cap, and no longer -inf."""

    def final_scores(self, call: Call, query: Tensor, key: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        masked = self.masked(self.scores(call, query, key[:, self.kv_heads(call)]), seen)
        return self.cap(call, masked)


@mutant("H", "onnx#7865", softcap=True)
class CapBeforeScale(Attention):
    """Caps what is not yet scaled."""

    def cap(self, call: Call, scores: Tensor) -> Tensor:
        return super().cap(call, scores / call.scale) * call.scale


@mutant("H", "vllm#56579", softcap=True)
class TanhOverflows(Attention):
    """tanh from exponentials that overflow: inf by inf."""

    def cap(self, call: Call, scores: Tensor) -> Tensor:
        if call.softcap is None:
            return scores
        grown = torch.exp(2 * scores / call.softcap)
        return call.softcap * (grown - 1) / (grown + 1)


@mutant("H", "vllm-metal#665", softcap=True)
class CapDropped(Attention):
    """Takes the argument and ignores it."""

    def cap(self, call: Call, scores: Tensor) -> Tensor:
        return scores


@mutant("H", "imp#688", softcap=True)
class CapDroppedInDecode(Attention):
    """Caps the scores of chunks only."""

    def cap(self, call: Call, scores: Tensor) -> Tensor:
        return super().cap(call, scores) if scores.shape[1] > 1 else scores


@mutant("H", "", softcap=True)
class CapByClamp(Attention):
    """Cuts off where tanh would bend."""

    def cap(self, call: Call, scores: Tensor) -> Tensor:
        return scores if call.softcap is None else scores.clamp(-call.softcap, call.softcap)


@mutant("H", "", softcap=True, alibi=True)
class CapAfterAlibi(Attention):
    """ALiBi is added before the cap."""

    def final_scores(self, call: Call, query: Tensor, key: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        scores = self.scores(call, query, key[:, self.kv_heads(call)])
        if call.alibi_slopes is not None:
            scores = scores + self.bias(call, call.alibi_slopes, positions, torch.arange(len(key)))
        return self.masked(self.cap(call, scores), seen)


# I: sinks.


@mutant("I", "rocm-libraries#12229", sinks=True)
class SinkScaled(Attention):
    """The sink is scaled as if it were a score."""

    def sink_logits(self, call: Call, sinks: Tensor) -> Tensor:
        return sinks * call.scale


@mutant("I", "", sinks=True)
class SinkOfFirstHead(Attention):
    """All heads have the first one's."""

    def sink_logits(self, call: Call, sinks: Tensor) -> Tensor:
        return sinks[:1].expand_as(sinks)


@mutant("I", "", sinks=True)
class SinkInBase2(Attention):
    """Scores are turned into base 2, the sink is not."""

    def sink_logits(self, call: Call, sinks: Tensor) -> Tensor:
        return sinks * math.log(2.0)


@mutant("I", "", sinks=True)
class SinkOfKvHead(Attention):
    """Sinks are read by KV head."""

    def sink_logits(self, call: Call, sinks: Tensor) -> Tensor:
        return sinks[self.kv_heads(call)]


@mutant("I", "imp#1345", sinks=True)
class SinkDroppedInChunks(Attention):
    """Only decodes know of sinks."""

    def with_sinks(self, call: Call, out: Tensor, lse: Tensor) -> Tensor:
        return super().with_sinks(call, out, lse) if len(out) == 1 else out


@mutant("I", "rocm-libraries#12227", sinks=True)
class SinkForEverySplit(SplitAttention):
    """Each part counts the sink, and the merge counts all of them."""

    def sink_logits(self, call: Call, sinks: Tensor) -> Tensor:
        return sinks + math.log(self.splits)


@mutant("I", "", sinks=True, window=True)
class SinkDroppedBehindWindow(Attention):
    """With a window, the sink is left out."""

    def with_sinks(self, call: Call, out: Tensor, lse: Tensor) -> Tensor:
        return super().with_sinks(call, out, lse) if call.window is None else out


# J: ALiBi.


@mutant("J", "", alibi=True)
class AlibiSign(Attention):
    """What is far away weighs more."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return -super().bias(call, slopes, positions, keys)


@mutant("J", "", alibi=True)
class AlibiByKvHead(Attention):
    """Slopes are read by KV head."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return super().bias(call, slopes[self.kv_heads(call)], positions, keys)


@mutant("J", "vllm#57614", alibi=True)
class AlibiIgnored(Attention):
    """Takes slopes and does nothing with them."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return 0.0 * super().bias(call, slopes, positions, keys)


@mutant("J", "HabanaAI/vllm-hpu-extension#19", alibi=True)
class AlibiWithinBlock(Attention):
    """Counts distances from the beginning of each block."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return super().bias(call, slopes, positions, keys % call.block_size)


@mutant("J", "", alibi=True)
class AlibiScaled(Attention):
    """The bias is scaled with the scores."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return super().bias(call, slopes, positions, keys) * call.scale


@mutant("J", "vllm#945", alibi=True, lse="e")
class AlibiFromFirstKey(Attention):
    """Distances from elsewhere: the output is right, the log-sum-exp is another, and nothing is declared."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return super().bias(call, slopes, positions * 0, keys)


# M: heads that share a KV head.


@mutant("M", "onnx#7274")
class HeadsTiled(Attention):
    """Query heads take KV heads in turns, where neighbours share one."""

    def kv_heads(self, call: Call) -> Tensor:
        return torch.arange(call.num_heads) % call.num_kv_heads


@mutant("M", "jax-js#180")
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


@mutant("M", "onnxruntime#32108")
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
