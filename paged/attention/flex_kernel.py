"""FlexAttention over lists of blocks: the one call of it, compiled, and how its Triton kernel is cut.

Two things about it are awkward, and this file is where they are dealt with. Eagerly it ignores the lists of blocks, so
it must never run eagerly. And the compiler has to be told which sizes change from call to call, or it would make a
kernel for each.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

SMALLEST = 16  # a side of a matrix product in Triton
# These kernels are cut by hand, or so small that nothing is gained; trying out how would take longer than compiling all
# the rest, when that is asked for around them (paged/model/decode_graphs.py).
COMPILE_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": False}
# One kernel, not two: parts are few, and starting a kernel takes longer than going through them.
MERGE_OPTIONS = COMPILE_OPTIONS | {"split_reductions": False}
# Most bytes of K and V that are read at a time, and of the queries beside them.
BYTES_AHEAD = 32 * 1024


def attend_blocks(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    counts_and_blocks: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
    mask: Callable[..., Tensor],
    score: Callable[..., Tensor] | None,
    scale: float,
    tile: int,
    pace: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention over lists of blocks. To be called inside of what `torch.compile` compiles.

    Args:
        query: [R, H, Q, D]; a multiple of Hkv for H.
        key_cache, value_cache: [N, P, Hkv, D] and [N, P, Hkv, Dv].
        counts_and_blocks: for each row and tile of queries, how many blocks are read of which every slot is seen, and
            which; then the same of blocks of which the mask decides. All with as many columns. The first two may be
            None: then the mask decides everywhere.
        mask, score: FlexAttention's functions of (row, head, query, slot) and (score, row, head, query, slot), where a
            slot is `block * P + offset`; score may be None.
        scale: of the scores.
        tile: queries of a tile, a power of two from 16 on.
        pace: warps of a program, and blocks it loads ahead.

    Returns:
        out [R, H, Q, Dv], lse [R, H, Q] float32 (natural log); on a CPU lse is None.

    Raises:
        RuntimeError: it would run eagerly.
    """
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "FlexAttention was about to run eagerly, where it ignores the lists of blocks and attends to the whole "
            "pool; torch.compile must not be disabled for the flex form: use attention_form='gathered' instead"
        )
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    full_counts, full_blocks, partial_counts, partial_blocks = counts_and_blocks
    on_cpu = query.device.type == "cpu"
    block_mask = BlockMask.from_kv_blocks(
        partial_counts,
        partial_blocks,
        full_counts,
        full_blocks,
        BLOCK_SIZE=(tile, block_size),
        mask_mod=mask,
        seq_lengths=(query.shape[2], num_blocks * block_size),
        compute_q_blocks=False,
    )
    # [N, P, Hkv, D] as [1, Hkv, N * P, D]: a view, for whose strides the kernel does not care.
    torch._check(value_cache.shape[0] == num_blocks)  # type: ignore[no-untyped-call]
    keys, values = (cache.flatten(0, 1)[None].transpose(1, 2) for cache in (key_cache, value_cache))
    options = kernel_options(key_cache, value_cache.shape[3], tile, pace)
    # A CPU knows neither options nor a log-sum-exp.
    wishes: Any = {} if on_cpu else {"kernel_options": options, "return_aux": AuxRequest(lse=True)}
    result: Any = flex_attention(
        query,
        keys,
        values,
        score_mod=score,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != num_kv_heads,
        **wishes,
    )
    return (result, None) if on_cpu else (result[0], result[1].lse)


def pace_of(num_programs: int, num_splits: int) -> tuple[int, int]:
    """Warps of a program, and blocks it loads ahead, as measured on an H200 for blocks of 16 (docs/performance.md).

    A decode has little to compute, so one warp is enough; what counts is how many loads are under way. Programs that
    load far ahead need so much shared memory that fewer of them run at a time, which is good where they are many:
    each ends sooner, and no long context is still read when all others are done.
    """
    if num_programs > 1024:
        return 1, 6
    return (1, 4) if num_splits == 1 else (1, 3)


def kernel_options(cache: Tensor, value_dim: int, tile: int, pace: tuple[int, int]) -> dict[str, Any]:
    """How the Triton kernel is cut: queries and the blocks loaded ahead have to fit any GPU's shared memory."""
    warps, stages = pace
    widths = [1 << (width - 1).bit_length() for width in (cache.shape[3], value_dim)]  # the kernel rounds them up
    keys, itemsize = min(cache.shape[1], 64), cache.dtype.itemsize  # keys read at a time
    while keys > SMALLEST and keys * sum(widths) * itemsize > BYTES_AHEAD:
        keys //= 2
    queries = tile
    while queries > SMALLEST and queries * widths[0] * itemsize > BYTES_AHEAD:
        queries //= 2
    bytes_ahead = keys * sum(widths) * itemsize
    if bytes_ahead > 8 * 1024:  # more than a block of 16 tokens of 128 in half precision
        warps, stages = max(warps, 2 if bytes_ahead <= 16 * 1024 else 4), 3
    return {
        "BACKEND": "TRITON",
        "BLOCK_M": queries,
        "BLOCK_N": keys,
        "num_stages": max(1, min(stages, 3 * BYTES_AHEAD // bytes_ahead)),
        "num_warps": warps,
        "FLOAT32_PRECISION": "'ieee'",
    }


def run_compiled(compiled: Callable[..., Any], *arguments: Any) -> Any:
    """Call a compiled function, with room for as many graphs as it needs."""
    # Head shapes, block sizes and features each make a graph of their own. Having seen two values of a number, the
    # compiler would take it for a variable, but numbers are part of the kernel.
    with torch._dynamo.config.patch(recompile_limit=256, specialize_int=True, specialize_float=True):
        return compiled(*arguments)


def mark_sizes(tensors: Iterable[Tensor], changing: tuple[int, ...]) -> None:
    """Tell the compiler which sizes change, so that one graph serves all of them (but 1, which always has its own).

    The others are fixed: if it has seen two of them it must not make a graph for any, since the kernel needs numbers.
    """
    for tensor in tensors:
        for dim in range(tensor.dim()):
            if dim in changing:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
            else:
                torch._dynamo.mark_static(tensor, dim)


def with_pool_columns(blocks: Tensor, num_blocks: int) -> Tensor:
    """Lists of blocks [..., W] with as many columns as the pool has blocks, which is what the CPU's kernel wants."""
    return torch.nn.functional.pad(blocks, (0, num_blocks - blocks.shape[-1]))
