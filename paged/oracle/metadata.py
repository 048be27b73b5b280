"""Metadata: the contract's block tables and lengths as other kernels are given them, and back.

The contract has block_tables [B, M], seq_lens [B] and query_start_loc [B + 1]. What others have instead, with a pair of
functions each:

    pages        indptr [B + 1], indices [pages in use], last_page_len [B]              FlashInfer
    slots        kv_indptr [B + 1], kv_indices [tokens]                                 SGLang's kernels
    requests     req_to_token [R, C], req_pool_indices [B]                              SGLang's pool
    read, write  read_index [tokens], write_index [query tokens]                        transformers
    ragged       kv_lens [S], page_indices [S, M], cu_q_lens [S + 1], num_seqs [1]      JAX

FlashAttention's page_table, cache_seqlens and cu_seqlens_q are the contract's three under other names. Padding entries
of a table, whatever they hold, are in none of the lists, and as they are in ragged rows; on the way back from a list
they are the null block, 0. Tables too narrow for their sequences are refused with a ValueError everywhere.
"""

from itertools import pairwise

import torch
from torch import Tensor


def to_pages(block_tables: Tensor, seq_lens: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tables to lists of pages, one behind another.

    Source: FlashInfer, docs/tutorials/kv_layout.rst, "page table". A full last page has P tokens, never 0; a sequence
    without tokens has no page, and a last_page_len of 0 (vLLM, v1/attention/backends/flashinfer.py).

    Args:
        block_tables: [B, M].
        seq_lens: [B].
        block_size: P.

    Returns:
        indptr [B + 1] int32, where each sequence's pages begin; indices, the pages in use; last_page_len [B] int32,
        tokens on each sequence's last page.

    Example: a full block, a block and a token, nothing.
        >>> tables, lengths = torch.tensor([[5, 0], [3, 4], [0, 0]]), torch.tensor([2, 3, 0])
        >>> [part.tolist() for part in to_pages(tables, lengths, block_size=2)]
        [[0, 1, 3, 3], [5, 3, 4], [2, 1, 0]]
    """
    _wide_enough(block_tables, seq_lens, block_size)
    pages = -(-seq_lens // block_size)  # [B]
    in_use = torch.arange(block_tables.shape[1], device=seq_lens.device) < pages[:, None]  # [B, M]
    last_page_len = torch.where(seq_lens > 0, (seq_lens - 1) % block_size + 1, 0)
    return starts(pages), block_tables[in_use], last_page_len.int()


def from_pages(indptr: Tensor, indices: Tensor, last_page_len: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Lists of pages back to block_tables [B, M], as narrow as can be, and seq_lens [B] int32."""
    pages = indptr.diff()
    seq_lens = torch.where(pages > 0, (pages - 1) * block_size + last_page_len, 0)
    return _as_rows(indices, pages), seq_lens.int()


def to_slots(block_tables: Tensor, seq_lens: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Tables to lists of slots, one for every token.

    Source: SGLang, srt/layers/attention/triton_backend.py, `kv_indptr` and `kv_indices`.

    Returns:
        kv_indptr [B + 1] int32, where each sequence's slots begin; kv_indices int64, slots in the order of tokens.

    Example: block 5 is slots 10 and 11.
        >>> tables, lengths = torch.tensor([[5, 2], [3, 0]]), torch.tensor([3, 1])
        >>> [part.tolist() for part in to_slots(tables, lengths, block_size=2)]
        [[0, 3, 4], [10, 11, 4, 6]]
    """
    slots, in_use = _slots(block_tables, seq_lens, block_size)
    return starts(seq_lens), slots[in_use]


def from_slots(kv_indptr: Tensor, kv_indices: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Lists of slots back to block_tables [B, M] and seq_lens [B] int32.

    Raises:
        ValueError: tokens of a block that do not lie one behind another; those have no block table.

    Example:
        >>> from_slots(torch.tensor([0, 2]), torch.tensor([4, 7]), block_size=2)
        Traceback (most recent call last):
        ...
        ValueError: slots [4, 7] are no blocks of 2
    """
    seq_lens = kv_indptr.diff()
    slots = _as_rows(kv_indices, seq_lens)
    block_tables = slots[:, ::block_size] // block_size
    again, in_order = to_slots(block_tables, seq_lens, block_size)
    for start, end in pairwise(again.tolist()):
        if not torch.equal(in_order[start:end], kv_indices[start:end]):
            raise ValueError(f"slots {kv_indices[start:end].tolist()} are no blocks of {block_size}")
    return block_tables, seq_lens.int()


def to_requests(block_tables: Tensor, seq_lens: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Tables to rows of slots in a pool of requests, of which the batch's are some.

    The batch's first sequence is the pool's last request, and request 0 is nobody's, so that no row is its own number.

    Source: SGLang, srt/mem_cache/memory_pool.py, `ReqToTokenPool`; slot 0 is padding.

    Returns:
        req_to_token [B + 1, M * P] int32, slots of each request's tokens, 0 behind them; req_pool_indices [B] int64.

    Example:
        >>> tables, lengths = torch.tensor([[5], [3]]), torch.tensor([2, 1])
        >>> [part.tolist() for part in to_requests(tables, lengths, block_size=2)]
        [[[0, 0], [6, 0], [10, 11]], [2, 1]]
    """
    slots, in_use = _slots(block_tables, seq_lens, block_size)
    req_pool_indices = torch.arange(len(seq_lens), 0, -1, device=seq_lens.device)
    req_to_token = slots.new_zeros(len(seq_lens) + 1, slots.shape[1])
    req_to_token[req_pool_indices] = torch.where(in_use, slots, 0)
    return req_to_token.int(), req_pool_indices


def from_requests(
    req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Rows of a request pool back to block_tables [B, M] and seq_lens [B] int32."""
    rows = req_to_token[req_pool_indices].long()
    in_use = torch.arange(rows.shape[1], device=rows.device) < seq_lens[:, None]
    return from_slots(starts(seq_lens), rows[in_use], block_size)


def to_read_write(
    block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor, block_size: int, trash: int
) -> tuple[Tensor, Tensor]:
    """Tables to flat indices: slots to write this step's tokens to, and then to read whole contexts from.

    Source: transformers, generation/continuous_batching/cache_allocators/full_attention.py, `get_read_indices` and
    `get_write_indices`; padding is written to a trash slot.

    Args:
        block_tables, seq_lens, query_start_loc: as in the contract.
        block_size: P.
        trash: the slot that query tokens without a key of their own write to (more queries than keys).

    Returns:
        read_index int64, as kv_indices of `to_slots`; write_index [T] int64, the slot of each query token.

    Example: the last two of three tokens are new.
        >>> tables, lengths, starts = torch.tensor([[5, 2]]), torch.tensor([3]), torch.tensor([0, 2])
        >>> [part.tolist() for part in to_read_write(tables, lengths, starts, block_size=2, trash=99)]
        [[10, 11, 4], [11, 4]]
    """
    kv_indptr, read_index = to_slots(block_tables, seq_lens, block_size)
    query_lens = query_start_loc.diff()
    # Query i of a sequence is its token seq_len - query_len + i; its slot stands at that place of the sequence's slots.
    sequence = torch.repeat_interleave(torch.arange(len(seq_lens), device=seq_lens.device), query_lens.long())
    tokens = torch.arange(len(sequence), device=seq_lens.device) - query_start_loc[sequence]
    tokens = tokens + (seq_lens - query_lens)[sequence]
    known = torch.cat((read_index, read_index.new_tensor([trash])))
    return read_index, known[torch.where(tokens >= 0, kv_indptr[sequence] + tokens, len(read_index)).long()]


def from_read_write(
    read_index: Tensor, write_index: Tensor, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Flat indices back to block_tables [B, M], seq_lens [B] int32 and query_start_loc [B + 1].

    Raises:
        ValueError: what is read are no blocks, or a query token is not written to the slot that it is read from.

    Example:
        >>> starts_q, starts_k = torch.tensor([0, 2]), torch.tensor([0, 3])
        >>> parts = from_read_write(torch.tensor([10, 11, 4]), torch.tensor([11, 4]), starts_q, starts_k, block_size=2)
        >>> [part.tolist() for part in parts]
        [[[5, 2]], [3], [0, 2]]
    """
    block_tables, seq_lens = from_slots(cu_seq_lens_k, read_index, block_size)
    bounds = zip(pairwise(cu_seq_lens_q.tolist()), pairwise(cu_seq_lens_k.tolist()), strict=True)
    for (first, last), (start, end) in bounds:
        count = min(last - first, end - start)  # queries before the first key have none to write
        written, read = write_index[last - count : last].tolist(), read_index[end - count : end].tolist()
        if written != read:
            raise ValueError(f"query tokens {first} to {last - 1} are written to slots {written}, but read from {read}")
    return block_tables, seq_lens, cu_seq_lens_q


def to_ragged(
    block_tables: Tensor, seq_lens: Tensor, query_start_loc: Tensor, max_num_seqs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The contract's tables with room for max_num_seqs sequences, and how many there are.

    Source: JAX, experimental/pallas/ops/tpu/ragged_paged_attention/kernel.py; its tests pad with zeros.

    Returns:
        kv_lens [S], page_indices [S, M], cu_q_lens [S + 1] and num_seqs [1], all int32; S is max_num_seqs.

    Raises:
        ValueError: more sequences than that.

    Example:
        >>> tables, lengths, starts = torch.tensor([[5, 2]]), torch.tensor([3]), torch.tensor([0, 2])
        >>> [part.tolist() for part in to_ragged(tables, lengths, starts, max_num_seqs=2)]
        [[3, 0], [[5, 2], [0, 0]], [0, 2, 0], [1]]
    """
    num_seqs, width = block_tables.shape
    if num_seqs > max_num_seqs:
        raise ValueError(f"{num_seqs} sequences do not fit into max_num_seqs {max_num_seqs}")
    kv_lens, cu_q_lens = seq_lens.new_zeros(max_num_seqs), query_start_loc.new_zeros(max_num_seqs + 1)
    page_indices = block_tables.new_zeros(max_num_seqs, width)
    kv_lens[:num_seqs], page_indices[:num_seqs], cu_q_lens[: num_seqs + 1] = seq_lens, block_tables, query_start_loc
    return kv_lens.int(), page_indices.int(), cu_q_lens.int(), seq_lens.new_tensor([num_seqs]).int()


def from_ragged(
    kv_lens: Tensor, page_indices: Tensor, cu_q_lens: Tensor, num_seqs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Back to block_tables [B, M], seq_lens [B] and query_start_loc [B + 1], views."""
    count = int(num_seqs)
    return page_indices[:count], kv_lens[:count], cu_q_lens[: count + 1]


def starts(counts: Tensor) -> Tensor:
    """[B] counts to [B + 1] int32: where each one's part of a list begins, and where the last one ends.

    Example:
        >>> starts(torch.tensor([3, 0, 2])).tolist()
        [0, 3, 3, 5]
    """
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()


def _slots(block_tables: Tensor, seq_lens: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """[B, M] to slots of each block [B, M * P], and which of them hold a token; others' numbers mean nothing."""
    _wide_enough(block_tables, seq_lens, block_size)
    offsets = torch.arange(block_size, device=block_tables.device)
    slots = (block_tables.long()[..., None] * block_size + offsets).flatten(1)
    return slots, torch.arange(slots.shape[1], device=seq_lens.device) < seq_lens[:, None]


def _wide_enough(block_tables: Tensor, seq_lens: Tensor, block_size: int) -> None:
    room, longest = block_tables.shape[1] * block_size, int(seq_lens.max()) if len(seq_lens) else 0
    if longest > room:
        shape = f"{block_tables.shape[1]} columns of blocks of {block_size}"
        raise ValueError(f"block_tables of {shape} have room for {room} tokens; the longest sequence has {longest}")


def _as_rows(entries: Tensor, counts: Tensor) -> Tensor:
    """A list and how many entries each row has, to [B, most of them], padded with 0."""
    width = int(counts.max()) if len(counts) else 0
    rows = entries.new_zeros(len(counts), width)
    rows[torch.arange(width, device=entries.device) < counts[:, None]] = entries
    return rows
