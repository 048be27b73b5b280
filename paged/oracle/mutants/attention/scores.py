"""Classes H, I and J: softcap, sinks and ALiBi, which come between a score and its weight.

Each has a place in the order of steps (scale, softcap, ALiBi, mask, sink), a unit and a head it belongs to; and each is
a feature that a kernel may take as an argument and forget on one of its paths.
"""

import math

import torch
from torch import Tensor

from paged.oracle.mutants.attention.honest import Attention, Call, SplitAttention
from paged.oracle.mutants.registry import mutant

# H: softcap.


@mutant("H", "flashinfer#350", softcap=True)
class CapAfterMask(Attention):
    """What is masked becomes -cap, and no longer -inf."""

    def final_scores(self, call: Call, query: Tensor, key: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        masked = self.masked(self.scores(call, query, key[:, self.kv_heads(call)]), seen)
        return self.cap(call, masked)


@mutant("H", "", softcap=True)
class CapBeforeScale(Attention):
    """Caps what is not yet scaled."""

    def cap(self, call: Call, scores: Tensor) -> Tensor:
        return super().cap(call, scores / call.scale) * call.scale


@mutant("H", "vllm#56578", softcap=True)
class TanhOverflows(Attention):
    """tanh from exponentials that overflow: inf by inf."""

    def cap(self, call: Call, scores: Tensor) -> Tensor:
        if call.softcap is None:
            return scores
        grown = torch.exp(2 * scores / call.softcap)
        return call.softcap * (grown - 1) / (grown + 1)


@mutant("H", "sglang#33915", softcap=True)
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


@mutant("H", "onnx#7867", softcap=True, alibi=True)
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


@mutant("J", "NVIDIA/TensorRT-Model-Connect#32", alibi=True)
class AlibiScaled(Attention):
    """The bias is scaled with the scores."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return super().bias(call, slopes, positions, keys) * call.scale


@mutant("J", "vllm#945", alibi=True, lse="e")
class AlibiFromFirstKey(Attention):
    """Distances from elsewhere: the output is right, the log-sum-exp is another, and nothing is declared."""

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        return super().bias(call, slopes, positions * 0, keys)
