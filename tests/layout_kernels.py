"""A kernel for each adapter of the oracle: plain torch, by definition, in the layout's own terms.

Written from what each project says of its layout, and with nothing of `paged`: a layout that our functions and these
kernels misread alike would have to be misread twice. Every kernel finds a sequence's K [n, Hkv, D] and V [n, Hkv, Dv]
in its own way, page by page or slot by slot, and hands them to `attend`, which knows nothing of caches.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Found = tuple[Tensor, Tensor]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: query [Q, Hq, D], its last tokens, over K [n, Hkv, D] and V [n, Hkv, Dv]; out and lse [Q, Hq].

    The window counts the query itself. A query that sees no key gives 0 and -inf.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // keys.shape[1]
    keys, values = (tensor.to(wide).repeat_interleave(group, dim=1) for tensor in (keys, values))  # [n, Hq, ...]
    distance = torch.arange(len(keys)) - (len(keys) - len(query) + torch.arange(len(query)))[:, None]  # [Q, n]
    scores = torch.einsum("qhd,nhd->hqn", query.to(wide), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + slopes[:, None, None] * distance
    visible = (distance <= 0) & (distance > -(window or math.inf))
    scores = scores.where(visible, -torch.inf)
    lse = scores.logsumexp(dim=2)  # [Hq, Q]
    total = lse if sinks is None else torch.logaddexp(lse, sinks[:, None].to(wide))
    weights = (scores - total[..., None]).exp().where(visible, 0.0)
    return torch.einsum("hqn,nhd->qhd", weights, values).to(query.dtype), lse.T


def each(query: Tensor, starts: Tensor, find: Callable[[int], Found], **wishes) -> tuple[Tensor, Tensor]:
    """All sequences of packed queries [T, Hq, D], one after another; `find` gives a sequence's K and V."""
    bounds = starts.tolist()
    rows = [attend(query[bounds[i] : bounds[i + 1]], *find(i), **wishes) for i in range(len(bounds) - 1)]
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])


def pages_of(table: list[int], length: int, page_size: int) -> Iterator[tuple[int, int]]:
    """Physical page and how many of its slots are in use, in the order of tokens."""
    for place in range(-(-length // page_size)):
        yield table[place], min(page_size, length - place * page_size)


def joined(parts: list[Found], like: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> Found:
    """Pieces of K and V one behind another; of a sequence without tokens, K [0, Hkv, D] and V [0, Hkv, Dv]."""
    if not parts:
        return torch.empty(0, *like[0], dtype=dtype), torch.empty(0, *like[1], dtype=dtype)
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys), torch.cat(values)


# --- the contract's tables, other caches ------------------------------------------------------------------------------


def over_blocks(
    page: Callable[[int, int], Found], size: int, query, tables, seq_lens, starts, scale,
    window=None, softcap=None, alibi_slopes=None, sinks=None, k_scale=None, v_scale=None,
):  # fmt: skip
    """Attention where `page(block, count)` reads a block's first slots as K and V [count, Hkv, ...]."""

    def find(i: int) -> Found:
        parts = []
        for block, count in pages_of(tables[i].tolist(), int(seq_lens[i]), size):
            key, value = page(block, count)
            parts.append((scaled(key, k_scale, block, count), scaled(value, v_scale, block, count)))
        return joined(parts, *nothing)

    key, value = page(0, 0)
    nothing = (key.shape[1:], value.shape[1:]), key.dtype
    return each(query, starts, find, scale=scale, window=window, softcap=softcap, slopes=alibi_slopes, sinks=sinks)


def scaled(part: Tensor, scale, block: int, count: int) -> Tensor:
    """Stored numbers [count, Hkv, D] times their scale: one, one for each head [Hkv], or one for each slot too."""
    if scale is None:
        return part
    scale = torch.as_tensor(scale)
    scale = scale[block, :count] if scale.dim() == 3 else scale
    return part.float() * (scale[..., None] if scale.dim() else scale)


def hnd(query, key_cache, value_cache, tables, seq_lens, starts, **wishes):
    """A page holds head after head: [N, Hkv, P, D]."""

    def page(block: int, count: int) -> Found:
        heads = range(key_cache.shape[1])
        return tuple(torch.stack([c[block, h, :count] for h in heads], 1) for c in (key_cache, value_cache))

    return over_blocks(page, key_cache.shape[2], query, tables, seq_lens, starts, **wishes)


def stacked(query, kv_cache, tables, seq_lens, starts, **wishes):
    """All of K, then all of V: [2, N, P, Hkv, D]."""

    def page(block: int, count: int) -> Found:
        return kv_cache[0, block, :count], kv_cache[1, block, :count]

    return over_blocks(page, kv_cache.shape[2], query, tables, seq_lens, starts, **wishes)


def by_block(query, kv_cache, tables, seq_lens, starts, **wishes):
    """A block's keys, then its values: [N, 2, P, Hkv, D]."""

    def page(block: int, count: int) -> Found:
        return kv_cache[block, 0, :count], kv_cache[block, 1, :count]

    return over_blocks(page, kv_cache.shape[2], query, tables, seq_lens, starts, **wishes)


def packed(query, kv_cache, tables, seq_lens, starts, **wishes):
    """Of each slot of a head the key and then the value: [N, Hkv, P, D + Dv]."""
    width = query.shape[2]

    def page(block: int, count: int) -> Found:
        slots = [kv_cache[block, :, slot] for slot in range(count)]  # [Hkv, D + Dv] each
        both = torch.stack(slots) if slots else kv_cache[block, :, :0].transpose(0, 1)
        return both[..., :width], both[..., width:]

    return over_blocks(page, kv_cache.shape[2], query, tables, seq_lens, starts, **wishes)


def x_packed(query, key_cache, value_cache, tables, seq_lens, starts, **wishes):
    """Number d of a key is at [block, head, d // x, slot, d % x], number d of a value at [block, head, d, slot]."""
    x, d = key_cache.shape[4], torch.arange(query.shape[2])

    def page(block: int, count: int) -> Found:
        keys = key_cache[block][:, d // x, :, d % x]  # [D, Hkv, P]
        return keys[..., :count].permute(2, 1, 0), value_cache[block, :, :, :count].permute(2, 0, 1)

    return over_blocks(page, key_cache.shape[3], query, tables, seq_lens, starts, **wishes)


def latent(query, kv_cache, tables, seq_lens, starts, *, scale, value_width=512):
    """One vector [N, P, 1, 576] for all heads: all of it is the key, its first 512 numbers are the value."""

    def page(block: int, count: int) -> Found:
        vectors = kv_cache[block, :count]
        return vectors, vectors[..., :value_width]

    return over_blocks(page, kv_cache.shape[1], query, tables, seq_lens, starts, scale)


def flash_attention(
    q, k_cache, v_cache, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, softmax_scale, causal,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, k_descale=None, v_descale=None, return_softmax_lse,
):  # fmt: skip
    """K and V [N, P, Hkv, D]; scales [B, Hkv]; lse [Hq, T]."""
    left, right = window_size
    assert causal
    assert right in (-1, 0)
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())

    def find(i: int) -> Found:
        pages = list(pages_of(page_table[i].tolist(), int(cache_seqlens[i]), k_cache.shape[1]))
        parts = [(k_cache[block, :count], v_cache[block, :count]) for block, count in pages]
        key, value = joined(parts, (k_cache.shape[2:], v_cache.shape[2:]), k_cache.dtype)
        if k_descale is None:
            return key, value
        return key.float() * k_descale[i][:, None], value.float() * v_descale[i][:, None]

    window = None if left == -1 else left + 1
    wishes = {"scale": softmax_scale, "window": window, "softcap": softcap or None, "slopes": alibi_slopes}
    out, lse = each(q, cu_seqlens_q, find, **wishes)
    return (out, lse.T) if return_softmax_lse else out


# --- other metadata ---------------------------------------------------------------------------------------------------


def flashinfer(
    q, paged_kv_cache, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, *, sm_scale,
    window_left=-1, logits_soft_cap=0.0, sinks=None, k_scale=1.0, v_scale=1.0,
):  # fmt: skip
    """[N, 2, P, Hkv, D]; pages indices[indptr[i] : indptr[i + 1]], the last with last_page_len tokens; lse base 2."""
    size = paged_kv_cache.shape[2]

    def find(i: int) -> Found:
        pages = paged_kv_indices[int(paged_kv_indptr[i]) : int(paged_kv_indptr[i + 1])].tolist()
        counts = [size] * (len(pages) - 1) + [int(paged_kv_last_page_len[i])] * bool(pages)
        both = [paged_kv_cache[page, :, :count] for page, count in zip(pages, counts, strict=True)]
        parts = [(pair[0] * k_scale, pair[1] * v_scale) for pair in both]
        return joined(parts, (paged_kv_cache.shape[3:],) * 2, paged_kv_cache.dtype)

    window = None if window_left == -1 else window_left + 1
    out, lse = each(q, qo_indptr, find, scale=sm_scale, window=window, softcap=logits_soft_cap or None, sinks=sinks)
    return out, lse / math.log(2)


def flashinfer_hnd(q, paged_kv_cache, *lists, **wishes):
    """[N, 2, Hkv, P, D]."""
    return flashinfer(q, paged_kv_cache.permute(0, 1, 3, 2, 4), *lists, **wishes)


def over_slots(q, k_buffer, v_buffer, qo_indptr, slots: Callable[[int], Tensor], **wishes):
    """SGLang's arguments by name; `slots` gives those of a sequence's tokens."""
    k_scale, v_scale = wishes.get("k_scale", 1.0), wishes.get("v_scale", 1.0)
    left, cap = wishes.get("sliding_window_size", -1), wishes.get("logit_cap", 0.0)

    def find(i: int) -> Found:
        keys, values = k_buffer[slots(i)], v_buffer[slots(i)]
        return keys.to(torch.float32) * k_scale, values.to(torch.float32) * v_scale

    window = None if left == -1 else left + 1
    sinks, scale = wishes.get("sinks"), wishes["sm_scale"]
    return each(q, qo_indptr, find, scale=scale, window=window, softcap=cap or None, sinks=sinks)


def token_slots(q, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices, **wishes):
    """[slots, Hkv, D]; slots kv_indices[kv_indptr[i] : kv_indptr[i + 1]]."""

    def slots(i: int) -> Tensor:
        return kv_indices[int(kv_indptr[i]) : int(kv_indptr[i + 1])]

    return over_slots(q, k_buffer, v_buffer, qo_indptr, slots, **wishes)


def request_rows(q, k_buffer, v_buffer, req_to_token, req_pool_indices, seq_lens, qo_indptr, **wishes):
    """[slots, Hkv, D]; slots of sequence i stand in row req_pool_indices[i] of req_to_token."""

    def slots(i: int) -> Tensor:
        return req_to_token[int(req_pool_indices[i]), : int(seq_lens[i])]

    return over_slots(q, k_buffer, v_buffer, qo_indptr, slots, **wishes)


def jax_ragged(
    q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, *, sm_scale, sliding_window=None, soft_cap=None,
    k_scale=None, v_scale=None,
):  # fmt: skip
    """[N, P, 2 * Hkv, D]: head h's keys at 2 h, its values at 2 h + 1; only the first num_seqs sequences are there."""
    heads = torch.arange(kv_pages.shape[2] // 2)

    def find(i: int) -> Found:
        parts = []
        for page, count in pages_of(page_indices[i].tolist(), int(kv_lens[i]), kv_pages.shape[1]):
            key, value = kv_pages[page, :count, 2 * heads], kv_pages[page, :count, 2 * heads + 1]
            parts.append((key * (k_scale or 1.0), value * (v_scale or 1.0)))
        return joined(parts, ((len(heads), q.shape[2]),) * 2, kv_pages.dtype)

    starts = cu_q_lens[: int(num_seqs[0]) + 1]
    return each(q, starts, find, scale=sm_scale, window=sliding_window, softcap=soft_cap)


def flat_indices(
    query, key, value, key_cache, value_cache, read_index, write_index, cu_seq_lens_q, cu_seq_lens_k, *, scaling,
    sliding_window=None, softcap=None, sinks=None,
):  # fmt: skip
    """[slots, Hkv, D]: this step's K and V are written to write_index, then all are read from read_index."""
    key_cache[write_index], value_cache[write_index] = key, value

    def find(i: int) -> Found:
        slots = read_index[int(cu_seq_lens_k[i]) : int(cu_seq_lens_k[i + 1])]
        return key_cache[slots], value_cache[slots]

    wishes = {"scale": scaling, "window": sliding_window, "softcap": softcap, "sinks": sinks}
    return each(query, cu_seq_lens_q, find, **wishes)


KERNELS: dict[str, Callable[..., object]] = {
    "hnd": hnd,
    "vllm_stacked": stacked,
    "vllm_by_block": by_block,
    "vllm_packed": packed,
    "vllm_x_packed": x_packed,
    "mla": latent,
    "flashinfer": flashinfer,
    "flashinfer_hnd": flashinfer_hnd,
    "flash_attention": flash_attention,
    "sglang": token_slots,
    "sglang_requests": request_rows,
    "jax_ragged": jax_ragged,
    "transformers": flat_indices,
}
