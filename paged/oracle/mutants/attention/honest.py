"""An honest paged attention kernel in steps that can be replaced one by one.

`Attention` reads like the definition: for each sequence, walk its table, read its keys and values, score, cap, bias,
mask, softmax, sum. Every step is a method, so that a mutant is a class with one method that is slightly wrong, and what
is wrong can be seen at a glance. It is right, declares everything, and is the first of the variants.

    sequence --> length, positions --> blocks --> read K, V --> scores --> cap --> bias --> mask --> attend --> out, lse

`SplitAttention` attends to parts of a context on their own and merges them by their log-sum-exp, as decoding kernels do
to keep all of a GPU busy; it has steps of its own for mutants of class K.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


@dataclass
class Call:
    """The contract's arguments, under their own names."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def block_size(self) -> int:
        """P."""
        return int(self.key_cache.shape[1])

    @property
    def num_heads(self) -> int:
        """Hq."""
        return self.query.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.key_cache.shape[2]

    @property
    def group(self) -> int:
        """Hq / Hkv."""
        return self.num_heads // self.num_kv_heads


class Attention:
    """Right, slow and easy to break.

    Example: one sequence of three tokens in blocks 2 and 1 of two slots; equal scores, so the values' mean.
        >>> keys, values = torch.zeros(4, 2, 1, 1), torch.zeros(4, 2, 1, 1)
        >>> values[2, 0], values[2, 1], values[1, 0] = 1.0, 2.0, 6.0
        >>> tables, seq_lens, starts = torch.tensor([[2, 1]]), torch.tensor([3]), torch.tensor([0, 1])
        >>> out, lse = Attention()(torch.ones(1, 1, 1), keys, values, tables, seq_lens, starts, scale=1.0)
        >>> round(out.item(), 5), round(lse.exp().item(), 5)
        (3.0, 3.0)
    """

    def __call__(self, *tensors: Tensor, **wishes: object) -> tuple[Tensor, Tensor]:
        """Out [T, Hq, Dv] and lse [T, Hq], for the contract's arguments."""
        call = Call(*tensors, **wishes)  # type: ignore[arg-type]
        out, lse = self.results(call)
        for index in range(len(call.block_tables)):
            rows = self.rows(call, index)
            part, part_lse = self.sequence(call, index)
            out[rows], lse[rows] = part.to(out.dtype), part_lse
        return out, lse

    def results(self, call: Call) -> tuple[Tensor, Tensor]:
        """Room for out and lse."""
        out = call.query.new_zeros(*call.query.shape[:2], call.value_cache.shape[3])
        return out, torch.full(call.query.shape[:2], -torch.inf)

    def rows(self, call: Call, index: int) -> slice:
        """Where a sequence's query tokens lie."""
        return slice(int(call.query_start_loc[index]), int(call.query_start_loc[index + 1]))

    def sequence(self, call: Call, index: int) -> tuple[Tensor, Tensor]:
        """Out [Q, Hq, Dv] and lse [Q, Hq] of one sequence."""
        query = call.query[self.rows(call, index)].float()
        length = self.length(call, index)
        count = self.keys_read(call, length)
        positions = self.positions(call, index, length)
        blocks = self.blocks(call, index, -(-count // call.block_size))
        key = self.keys(call, blocks, count)  # [n, Hkv, D]
        value = self.values(call, blocks, count)  # [n, Hkv, Dv]
        if not count or not len(query):
            return torch.zeros(*query.shape[:2], value.shape[2]), torch.full(query.shape[:2], -torch.inf)
        seen = self.seen(call, positions, torch.arange(count))  # [Q, n]
        scores = self.final_scores(call, query, key, positions, seen)  # [Hq, Q, n]
        return self.attend(call, scores, value[:, self.kv_heads(call)])

    def length(self, call: Call, index: int) -> int:
        """How many keys a sequence has."""
        return int(call.seq_lens[index])

    def keys_read(self, call: Call, length: int) -> int:
        """How many keys are read; not one more than there are."""
        return length

    def positions(self, call: Call, index: int, length: int) -> Tensor:
        """[Q] the positions of the query tokens: the sequence's last ones."""
        rows = self.rows(call, index)
        return torch.arange(length - (rows.stop - rows.start), length)

    def blocks(self, call: Call, index: int, count: int) -> Tensor:
        """[count] physical blocks of a sequence, in logical order."""
        return call.block_tables[index, :count].long()

    def keys(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        """[count, Hkv, D] float32."""
        return self.read(call, call.key_cache, call.k_scale, blocks, count)

    def values(self, call: Call, blocks: Tensor, count: int) -> Tensor:
        """[count, Hkv, Dv] float32."""
        return self.read(call, call.value_cache, call.v_scale, blocks, count)

    def read(self, call: Call, cache: Tensor, scale: Tensor | None, blocks: Tensor, count: int) -> Tensor:
        """Stored numbers of the first `count` slots of some blocks, times their scale."""
        stored = self.fetch(cache, blocks).float().flatten(0, 1)[:count]
        return stored if scale is None else stored * self.scales(scale, blocks, count)

    def fetch(self, cache: Tensor, blocks: Tensor) -> Tensor:
        """[M, P, Hkv, D] a copy of some blocks."""
        return cache[blocks]

    def scales(self, scale: Tensor, blocks: Tensor, count: int) -> Tensor:
        """What stored numbers [count, Hkv, D] are multiplied with: one number, [Hkv], or [N, P, Hkv]."""
        return scale[blocks].flatten(0, 1)[:count, :, None] if scale.dim() == 3 else scale[..., None]

    def kv_heads(self, call: Call) -> Tensor:
        """[Hq] which KV head each query head reads."""
        return torch.arange(call.num_heads) // call.group

    def seen(self, call: Call, positions: Tensor, keys: Tensor) -> Tensor:
        """[Q, n] which keys each query sees."""
        distance = positions[:, None] - keys
        return (distance >= 0) if call.window is None else (distance >= 0) & (distance < call.window)

    def final_scores(self, call: Call, query: Tensor, key: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """[Hq, Q, n] in the order of the contract: scale, softcap, ALiBi, mask."""
        scores = self.cap(call, self.scores(call, query, key[:, self.kv_heads(call)]))
        if call.alibi_slopes is not None:
            scores = scores + self.bias(call, call.alibi_slopes, positions, torch.arange(len(key)))
        return self.masked(scores, seen)

    def scores(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        """[Hq, Q, n] of queries [Q, Hq, D] and keys [n, Hq, D]."""
        return torch.einsum("qhd,nhd->hqn", query, key) * self.scale(call)

    def scale(self, call: Call) -> float:
        """Of the scores."""
        return call.scale

    def cap(self, call: Call, scores: Tensor) -> Tensor:
        """Softcap."""
        return scores if call.softcap is None else call.softcap * torch.tanh(scores / call.softcap)

    def bias(self, call: Call, slopes: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        """[Hq, Q, n] ALiBi: never positive for a key that is seen."""
        return slopes[:, None, None] * (keys - positions[:, None])

    def masked(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Scores with -inf where nothing is seen."""
        return torch.where(seen, scores, -torch.inf)

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax of scores [Hq, Q, n], and the sum of values [n, Hq, Dv] with its weights."""
        top = self.top(scores)  # [Hq, Q, 1]
        weights = self.exp(scores - top)
        total = self.total(weights)  # [Hq, Q]
        lse = top[..., 0] + total.log()
        out = self.weighted(weights, value) / total.T[..., None].clamp(min=1e-30)
        return self.with_sinks(call, out, lse.T), lse.T

    def top(self, scores: Tensor) -> Tensor:
        """[Hq, Q, 1] the largest score, finite even where nothing is seen: -inf minus -inf is not a number."""
        return scores.amax(dim=2, keepdim=True).clamp(min=LOWEST)

    def exp(self, scores: Tensor) -> Tensor:
        """Of scores less their largest."""
        return torch.exp(scores)

    def total(self, weights: Tensor) -> Tensor:
        """[Hq, Q] sum of the weights."""
        return weights.sum(dim=2)

    def weighted(self, weights: Tensor, value: Tensor) -> Tensor:
        """[Q, Hq, Dv] sum of values with weights [Hq, Q, n]."""
        return torch.einsum("hqn,nhd->qhd", weights, value)

    def with_sinks(self, call: Call, out: Tensor, lse: Tensor) -> Tensor:
        """Out [Q, Hq, Dv] with the share of a sink taken away; lse [Q, Hq] leaves it out."""
        if call.sinks is None:
            return out
        return out * torch.exp(lse - torch.logaddexp(lse, self.sink_logits(call, call.sinks)))[..., None]

    def sink_logits(self, call: Call, sinks: Tensor) -> Tensor:
        """[Hq] one more logit of each head."""
        return sinks


class SplitAttention(Attention):
    """Attends to several parts of a context on their own, then merges them."""

    splits = 3

    def attend(self, call: Call, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Attention`, part by part; short contexts leave some parts empty."""
        parts = [self.part(scores[..., keys], value[keys]) for keys in self.parts(scores.shape[2])]
        outs, lses = torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
        out, lse = self.merge(outs, lses)
        return self.with_sinks(call, out, lse), lse

    def parts(self, count: int) -> list[slice]:
        """Which keys each part attends to; their borders lie anywhere in a block."""
        size = math.ceil(count / self.splits)
        return [slice(i * size, min(count, (i + 1) * size)) for i in range(self.splits)]

    def part(self, scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Out [Q, Hq, Dv] and lse [Q, Hq] of one part; nothing and -inf if it sees no key."""
        if not scores.shape[2]:
            return torch.zeros(scores.shape[1], scores.shape[0], value.shape[2]), scores.sum(dim=2).T - torch.inf
        top = self.top(scores)
        weights = self.exp(scores - top)
        total = self.total(weights)
        out = self.weighted(weights, value) / total.T[..., None].clamp(min=1e-30)
        return out, (top[..., 0] + total.log()).T

    def merge(self, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        """Parts [S, Q, Hq, Dv] and [S, Q, Hq] as one: each part weighs exp of its log-sum-exp."""
        top = lses.amax(dim=0).clamp(min=LOWEST)
        weights = torch.exp(lses - top)
        total = weights.sum(dim=0)
        return (outs * weights[..., None]).sum(dim=0) / total[..., None].clamp(min=1e-30), top + total.log()
