"""Attention of prompts on a GPU: keys and values lie together, so the libraries' kernels that torch ships can be used.

A prompt has many query tokens for every key, so gathering its context out of the blocks is paid once and used
thousands of times: 4 % of the time of a chunk of 2,048 tokens over 6,144. After it there are two ways:

- FlashAttention takes prompts of any lengths in one call, each with its own context. It is what most steps need.
- cuDNN's attention is nearly twice as fast on a Hopper GPU, but knows no causal mask that is aligned at the end of the
  keys, and makes a plan for every shape, which takes some 50 ms. So a long chunk is attended in parts: its context
  without a mask, itself causally, both of rounded lengths; and the parts are merged by their log-sum-exp.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paged.attention.merge import merge_two

HALVES = (torch.float16, torch.bfloat16)
# Chunks this long over contexts this long are worth a plan of cuDNN's.
LONG_CHUNK, LONG_CONTEXT = 512, 4096
# Lengths that plans are made for are multiples of these, so that there are few of them.
QUERY_STEP, CONTEXT_STEP = 256, 1024

_merge_two = torch.compile(merge_two, fullgraph=True, dynamic=True)


class PromptLengths(NamedTuple):
    """Lengths of one prompt, known on the host.

    Attributes:
        query_len: tokens computed now.
        seq_len: tokens visible to the last of them, itself included.
    """

    query_len: int
    seq_len: int


def supports(query: Tensor, value_dim: int, softcap: float | None) -> bool:
    """Whether the libraries' kernels can compute this."""
    head_dim = query.shape[-1]
    fits = query.dtype in HALVES and head_dim % 8 == 0 and head_dim <= 256 and head_dim == value_dim
    return query.is_cuda and fits and softcap is None


def is_long(prompt: PromptLengths, head_dim: int, window: int | None) -> bool:
    """Whether a prompt is attended in parts by cuDNN."""
    all_seen = window is None or window >= prompt.seq_len
    return all_seen and head_dim <= 128 and prompt.query_len >= LONG_CHUNK and prompt.seq_len >= LONG_CONTEXT


def attend_together(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    lengths: Sequence[PromptLengths],
    *,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of several prompts over contiguous K and V, in one call of FlashAttention.

    Args:
        query: [T, Hq, D], one prompt after another.
        keys, values: [K, Hkv, D], contexts and new tokens, one prompt after another.
        query_start_loc, key_start_loc: [B + 1] int32, where each prompt's queries and keys begin.
        lengths: of the B prompts.
        scale, window: as everywhere.

    Returns:
        out [T, Hq, D], lse [T, Hq] float32.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        keys,
        values,
        query_start_loc,
        key_start_loc,
        max(prompt.query_len for prompt in lengths),
        max(prompt.seq_len for prompt in lengths),
        0.0,
        True,
        return_debug_mask=False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=-1 if window is None else 0,
    )
    return out, lse.transpose(0, 1)


def attend_in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    context_blocks: Tensor,
    context_len: int,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention of one long chunk over its context, which lies in blocks, and over itself.

    Args:
        query: [Q, Hq, D].
        key, value: [Q, Hkv, D], of the chunk itself.
        key_cache, value_cache: [N, P, Hkv, D].
        context_blocks: [blocks that hold the context], integers.
        context_len: tokens before the chunk.
        scale: of the scores.

    Returns:
        out [Q, Hq, D], lse [Q, Hq] float32.
    """
    num_queries = len(query)
    padding = -num_queries % QUERY_STEP
    # Padding comes last, so no query sees a padded key, and nobody looks at a padded query.
    query, key, value = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) for x in (query, key, value))
    out, lse = _cudnn(query, key, value, scale, causal=True)
    if context_len > 0:
        keys, values = (cache.index_select(0, context_blocks).flatten(0, 1) for cache in (key_cache, value_cache))
        rounded = context_len - context_len % CONTEXT_STEP
        if rounded > 0:
            out, lse = _merge_two(out, lse, *_cudnn(query, keys[:rounded], values[:rounded], scale, causal=False))
        if rounded < context_len:
            rest = slice(rounded, context_len)
            out, lse = _merge_two(out, lse, *_flash(query, keys[rest], values[rest], scale))
    return out[:num_queries], lse[:num_queries]


def _cudnn(query: Tensor, keys: Tensor, values: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """[Q, Hq, D] over [K, Hkv, D], by cuDNN; a causal mask begins at the first key."""
    inputs = [x.transpose(0, 1)[None] for x in (query, keys, values)]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*inputs, None, True, 0.0, causal, scale=scale)
    return out[0].transpose(0, 1), lse.reshape(lse.shape[1], -1).transpose(0, 1)


def _flash(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[Q, Hq, D] over all of [K, Hkv, D], by FlashAttention."""
    starts = [torch.tensor([0, len(x)], dtype=torch.int32, device=x.device) for x in (query, keys)]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, keys, values, *starts, len(query), len(keys), 0.0, False, return_debug_mask=False, scale=scale
    )
    return out, lse.transpose(0, 1)
