"""The operation by which the layers of a compiled model attend in the flex form; the compiler does not look into it.

What happens here depends on the step: how many rows decode, how long the prompts are, which library's kernel suits
each. Traced by the compiler, every kind of step would make a graph of its own. As one operation, whose shapes are those
of its query, it lets one graph of a layer serve every step, and decodes can be captured in CUDA graphs all the same.
"""

import torch
from torch import Tensor

from paged.attention import cascade, dense, flex
from paged.attention.cascade import PrefixPlan
from paged.attention.flex_plan import CHUNK_TILE, DecodePlan, place_blocks
from paged.attention.merge import apply_sinks
from paged.model.flex_inputs import FlexInputs, Prompt, read_host


@torch.library.custom_op("paged::attend", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: list[Tensor],
    prefix: list[Tensor],
    host: Tensor,
    block_tables: Tensor,
    prompt_slots: Tensor,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_decodes, num_prefix_splits, prompts = read_host(host)
    out = lse = None
    if num_decodes > 0:
        # Outside of CUDA graphs two decodes at least are planned; what a padded one gets is cut off.
        decodes = DecodePlan(*plan)
        num_planned = min(max(2, num_decodes), len(query))
        tokens = query[:num_planned], key_cache, value_cache, decodes
        if num_prefix_splits > 0 and window is None:
            splits = num_prefix_splits
            out, lse = cascade.attend(*tokens, PrefixPlan(*prefix), num_splits=splits, scale=scale, softcap=softcap)
        else:
            needs_lse = sinks is not None
            out, lse = flex.attend_decode(*tokens, scale=scale, window=window, softcap=softcap, needs_lse=needs_lse)
        if sinks is not None:
            assert lse is not None, "this form runs on a GPU"
            out = apply_sinks(out, lse, sinks)
    parts = [] if out is None else [out[:num_decodes]]
    if prompts:
        first, last = num_decodes, num_decodes + sum(prompt.lengths.query_len for prompt in prompts)
        new = query[first:last], key[first:last], value[first:last]
        caches = key_cache, value_cache
        if dense.supports(query, value_cache.shape[3], softcap):
            starts = query_start_loc, key_start_loc
            out, lse = _attend_dense(*new, *caches, prompts, block_tables, prompt_slots, *starts, scale, window)
        else:
            queries = torch.split(new[0], [prompt.lengths.query_len for prompt in prompts])
            chunks = [
                _attend_chunk(each, *caches, prompt, block_tables, scale, window, softcap)
                for each, prompt in zip(queries, prompts, strict=True)
            ]
            out, lse = (torch.cat(tensors) for tensors in zip(*chunks, strict=True))
        parts.append(out if sinks is None else apply_sinks(out, lse, sinks))
    num_padded = len(query) - sum(len(part) for part in parts)
    if num_padded > 0:
        parts.append(query.new_zeros(num_padded, query.shape[1], value_cache.shape[3]))
    # FlexAttention's output lies in memory as its query does, and the compiler was promised this order.
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


@_attend.register_fake
def _shape_of_attend(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object
) -> Tensor:
    return query.new_empty(*query.shape[:2], value_cache.shape[3])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    inputs: FlexInputs,
    *,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of a step's tokens over what lies in the pool, their own K and V included.

    Args:
        query: [T, Hq, D], decodes first, then prompts, then padding.
        key, value: [T, Hkv, D] and [T, Hkv, Dv], of the same tokens; they are in the pool already.
        key_cache, value_cache: [N, P, Hkv, D] and [N, P, Hkv, Dv].
        inputs: who reads what.
        sinks, scale, window, softcap: as in the other forms.

    Returns:
        [T, Hq, Dv]; padded tokens get 0.
    """
    out: Tensor = torch.ops.paged.attend(
        query,
        key,
        value,
        key_cache,
        value_cache,
        list(inputs.plans[window]),
        list(inputs.prefix),
        inputs.host,
        inputs.block_tables,
        inputs.prompt_slots,
        inputs.query_start_loc,
        inputs.key_start_loc,
        sinks,
        scale,
        window,
        softcap,
    )
    return out


def _attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    prompts: list[Prompt],
    block_tables: Tensor,
    prompt_slots: Tensor,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Prompts by the libraries' kernels: all in one call, but those that are long each by itself."""
    lengths = [prompt.lengths for prompt in prompts]
    long = [dense.is_long(each, query.shape[2], window) for each in lengths]
    if not any(long):
        if any(each.seq_len > each.query_len for each in lengths):
            key, value = (cache.flatten(0, 1).index_select(0, prompt_slots) for cache in (key_cache, value_cache))
        return dense.attend_together(
            query, key, value, query_start_loc, key_start_loc, lengths, scale=scale, window=window
        )
    outs, lses, first, first_key = [], [], 0, 0
    for i, prompt in enumerate(prompts):
        query_len, seq_len = prompt.lengths
        tokens = slice(first, first + query_len)
        if long[i]:
            context_len = seq_len - query_len
            num_blocks = -(-context_len // key_cache.shape[1])
            blocks = block_tables[prompt.row, :num_blocks]
            parts = query[tokens], key[tokens], value[tokens], key_cache, value_cache, blocks, context_len
            out, lse = dense.attend_in_parts(*parts, scale=scale)
        else:
            slots = prompt_slots[first_key : first_key + seq_len]
            keys, values = (cache.flatten(0, 1).index_select(0, slots) for cache in (key_cache, value_cache))
            query_start, key_start = (starts[i : i + 2] - starts[i] for starts in (query_start_loc, key_start_loc))
            out, lse = dense.attend_together(
                query[tokens], keys, values, query_start, key_start, [prompt.lengths], scale=scale, window=window
            )
        outs.append(out)
        lses.append(lse)
        first, first_key = first + query_len, first_key + seq_len
    return torch.cat(outs), torch.cat(lses)


def _attend_chunk(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    prompt: Prompt,
    block_tables: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """One prompt by FlexAttention: query [Q, Hq, D] -> out [Q, Hq, Dv], lse [Q, Hq]."""
    query_len, seq_len = prompt.lengths
    block_size = key_cache.shape[1]
    table = block_tables[prompt.row, : -(-seq_len // block_size)][None]  # [1, M]
    positions = torch.arange(seq_len - query_len, seq_len, dtype=torch.int32, device=query.device)
    padding = -query_len % CHUNK_TILE
    positions = torch.nn.functional.pad(positions, (0, padding), value=-1)[None]  # [1, Q]
    padded = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, padding))[None]  # [1, Q, Hq, D]
    lengths = positions.amax(dim=1) + 1
    logical_index = place_blocks(table, lengths, len(key_cache), block_size)
    out, lse = flex.attend_chunks(
        padded, key_cache, value_cache, table, positions, logical_index, scale=scale, window=window, softcap=softcap
    )
    assert lse is not None, "this form runs on a GPU"
    return out[0, :query_len], lse[0, :query_len]
