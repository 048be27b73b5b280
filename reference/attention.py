"""Attention from its definition: float64, one sequence, one query and one head at a time, over contiguous K and V.

    score_j = scale * q . k_j        softcap * tanh(score_j / softcap)        + slope * (j - i)
    out     = sum_j exp(score_j) v_j / (sum_j exp(score_j) + exp(sink))       over the keys j that query i sees

(Vaswani et al. 2017; softcap: Gemma 2, 2024; ALiBi: Press et al. 2021; sinks: Xiao et al. 2023.) A key that is not
seen is never touched. There is no mask to get wrong: the loop takes the slice of keys that is visible.
"""

import math

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last Q tokens of one sequence over its K tokens.

    Args:
        query: [Q, Hq, D]; query i sits at position K - Q + i and sees the keys up to there.
        key: [K, Hkv, D]; query head h reads KV head h // (Hq // Hkv).
        value: [K, Hkv, Dv].
        scale: of the scores.
        window: a query sees itself and `window - 1` tokens before it; None: all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        alibi_slopes: [Hq], adds `slope * (key position - query position)`.
        sinks: [Hq], one more logit in the denominator, which no value belongs to.

    Returns:
        out [Q, Hq, Dv] and lse [Q, Hq], both float64. The log-sum-exp is natural and leaves the sink out. A query
        that sees no key gives 0 and -inf.

    Example: two equal scores, so the mean of the values, and e^lse counts the keys.
        >>> q, k, v = torch.zeros(1, 1, 1), torch.zeros(2, 1, 1), torch.tensor([[[1.0]], [[3.0]]])
        >>> out, lse = attention(q, k, v, scale=1.0)
        >>> out.item(), lse.exp().item()
        (2.0, 2.0)
    """
    query, key, value = query.double(), key.double(), value.double()
    num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads, value_dim = value.shape
    out = torch.zeros(num_queries, num_heads, value_dim, dtype=torch.float64)
    lse = torch.full((num_queries, num_heads), -torch.inf, dtype=torch.float64)
    for i in range(num_queries):
        position = num_keys - num_queries + i
        first = 0 if window is None else max(0, position - window + 1)
        seen = range(first, position + 1)
        if not seen:
            continue
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = scale * (key[first : position + 1, kv_head] @ query[i, head])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi_slopes is not None:
                distance = torch.arange(first, position + 1, dtype=torch.float64) - position
                scores = scores + alibi_slopes[head].double() * distance
            largest = scores.max()
            weights = torch.exp(scores - largest)
            denominator = weights.sum()
            lse[i, head] = largest + math.log(denominator)
            if sinks is not None:
                denominator = denominator + torch.exp(sinks[head].double() - largest)
            out[i, head] = weights @ value[first : position + 1, kv_head] / denominator
    return out, lse
