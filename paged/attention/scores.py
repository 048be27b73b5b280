"""The parts of attention that do not depend on where K and V lie: who sees whom, and what becomes of a score.

Order, as everywhere in this project: scale, softcap, ALiBi, mask, sink.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def check_arguments(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    window: int | None,
) -> None:
    """Refuse shapes that do not belong together, which would otherwise fail far from here, or not at all.

    Raises:
        ValueError: which shapes, and what they should be.
    """
    if query.dim() != 3 or key_cache.dim() != 4 or value_cache.dim() != 4:
        raise ValueError(
            f"query, key_cache and value_cache must be [T, Hq, D], [N, P, Hkv, D] and [N, P, Hkv, Dv], got "
            f"{list(query.shape)}, {list(key_cache.shape)} and {list(value_cache.shape)}"
        )
    if query.shape[1] % key_cache.shape[2] or query.shape[2] != key_cache.shape[3]:
        raise ValueError(
            f"{query.shape[1]} query heads of {query.shape[2]} cannot read {key_cache.shape[2]} KV heads of "
            f"{key_cache.shape[3]}: the first must be a multiple of the second, and the widths equal"
        )
    if key_cache.shape[:3] != value_cache.shape[:3]:
        raise ValueError(
            f"key_cache {list(key_cache.shape)} and value_cache {list(value_cache.shape)} must have the same blocks, "
            "slots and heads"
        )
    batch = len(block_tables)
    if seq_lens.shape != (batch,) or query_start_loc.shape != (batch + 1,):
        raise ValueError(
            f"{batch} block tables need {batch} seq_lens and {batch + 1} entries of query_start_loc, got "
            f"{list(seq_lens.shape)} and {list(query_start_loc.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the query itself, or None for all keys; got {window}")


class Tokens(NamedTuple):
    """Where each of T query tokens belongs.

    Attributes:
        sequence: [T] which sequence.
        offset: [T] which of the sequence's query tokens.
        position: [T] its position in the sequence; a token sees the keys at positions up to its own.
        real: [T] False for padded rows behind the last sequence, which belong to none.
    """

    sequence: Tensor
    offset: Tensor
    position: Tensor
    real: Tensor


def place_tokens(num_tokens: int, seq_lens: Tensor, query_start_loc: Tensor) -> Tokens:
    """Find out where each query token belongs.

    The query tokens of a sequence are its last ones: query i of n sits at position `seq_len - n + i` (the causal mask
    is aligned at the bottom right).

    Args:
        num_tokens: T.
        seq_lens: [B] tokens visible to the last query token of each sequence, itself included.
        query_start_loc: [B + 1] where each sequence's query tokens begin.

    Example: two sequences with one and two query tokens, and a padded row.
        >>> tokens = place_tokens(4, torch.tensor([5, 2]), torch.tensor([0, 1, 3]))
        >>> tokens.sequence[:3].tolist(), tokens.position[:3].tolist(), tokens.real.tolist()
        ([0, 1, 1], [4, 0, 1], [True, True, True, False])
    """
    token = torch.arange(num_tokens, device=seq_lens.device)
    ended = token[:, None] >= query_start_loc[None, 1:]  # [T, B]
    sequence = ended.sum(dim=1).clamp(max=len(seq_lens) - 1)  # [T]
    offset = token - query_start_loc[sequence]
    query_len = query_start_loc[sequence + 1] - query_start_loc[sequence]
    return Tokens(sequence, offset, seq_lens[sequence] - query_len + offset, token < query_start_loc[-1])


def visible_keys(query_position: Tensor, num_keys: int, window: int | None) -> Tensor:
    """Which keys a query sees: those up to itself, of which a window keeps the last `window`, itself included.

    Args:
        query_position: [...], any shape.
        num_keys: K.
        window: or None for all.

    Returns:
        [..., K] bool.

    Example:
        >>> visible_keys(torch.tensor([2]), 4, window=2).int().tolist()
        [[0, 1, 1, 0]]
    """
    key_position = torch.arange(num_keys, device=query_position.device)
    distance = query_position[..., None] - key_position
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def cap_and_bias(scores: Tensor, query_position: Tensor, softcap: float | None, alibi_slopes: Tensor | None) -> Tensor:
    """Softcap, then ALiBi.

    Softcap (Gemma 2): `softcap * tanh(scores / softcap)`. ALiBi (Press et al. 2021): plus `slope * (key position -
    query position)`, which is never positive for a visible key.

    Args:
        scores: [..., K], already scaled.
        query_position: broadcasts to [...].
        softcap: or None.
        alibi_slopes: broadcasts to [...], or None.
    """
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        key_position = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores + alibi_slopes[..., None] * (key_position - query_position[..., None])
    return scores


def softmax_with_sink(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights of the keys, and the log-sum-exp of their scores.

    A sink is one more logit in the denominator that no value belongs to. The log-sum-exp leaves it out, so that parts
    of a context can be merged. A row that sees no key has log-sum-exp -inf, and weights that are no numbers: whoever
    uses them puts 0 in place of what comes out (that is a smaller tensor).

    Args:
        scores: [..., K], -inf where a key is not visible; K at least 1.
        sinks: broadcasts to [...], or None.

    Returns:
        weights [..., K], lse [...].

    Example: scores 0 and 0 and a sink of 0: each a third.
        >>> weights, lse = softmax_with_sink(torch.zeros(1, 2), torch.zeros(1))
        >>> weights, lse.exp()
        (tensor([[0.3333, 0.3333]]), tensor([2.]))
    """
    weights = scores.softmax(dim=-1)
    # The largest weight is exp(largest score - lse). Read backwards, that is two passes over the scores less than
    # torch.logsumexp makes.
    largest = scores.amax(dim=-1)
    lse = torch.where(largest == -torch.inf, largest, largest - weights.amax(dim=-1).log())
    if sinks is not None:
        weights = weights * torch.exp(lse - torch.logaddexp(lse, sinks))[..., None]
    return weights, lse


def nothing_seen(query: Tensor, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What attention over no key at all gives: out [T, Hq, Dv] of zeros and lse [T, Hq] of -inf."""
    num_tokens, num_heads = query.shape[:2]
    lse = torch.full((num_tokens, num_heads), -torch.inf, dtype=dtype, device=query.device)
    return query.new_zeros(num_tokens, num_heads, value_dim), lse


def by_head(per_query_head: Tensor | None, heads: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """[Hq] as [Hkv, G] or [Hkv, G, 1]: query head `h` reads KV head `h // G`, as its member `h % G`."""
    return None if per_query_head is None else per_query_head.to(dtype).reshape(heads)


def dequantised(stored: Tensor, scale: Tensor | float | None, block_tables: Tensor, dtype: torch.dtype) -> Tensor:
    """What stored numbers stand for: stored value times scale.

    Args:
        stored: [B, M, P, Hkv, D], gathered by block_tables.
        scale: None, a number, [Hkv], or [N, P, Hkv] (one for each token and head, gathered like the cache).
        block_tables: [B, M].
        dtype: to compute in.
    """
    if scale is None:
        return stored.to(dtype)
    scale = torch.as_tensor(scale, device=stored.device)
    if scale.dim() == 3:
        scale = scale[block_tables]
    return stored.to(dtype) * scale.to(dtype)[..., None]


def compute_dtype(query: Tensor) -> torch.dtype:
    """Scores and softmax are computed in float32, or in float64 for float64 queries."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
