"""Layouts and metadata of the oracle, there and back, bit for bit.

What lies where is read number by number with Python's own indexing, from what each project says of its layout, so that
a way there and a way back that are wrong alike are not right together. Caches are random bits, NaN with payloads
included; they have odd widths, gaps and swapped dimensions. All of it is drawn by Hypothesis, the same every time.
"""

from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.oracle import layouts, metadata
from paged.oracle.adapters import latent
from paged.oracle.guard import bits

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float64)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int, strides: str) -> torch.Tensor:
    """A tensor of random bits: dense, with gaps, or with its dimensions in another order in memory."""
    generator = torch.Generator().manual_seed(seed)
    room = shape if strides == "dense" else tuple(size + 1 for size in shape)
    whole = torch.randint(0, 256, (*room[::-1], dtype.itemsize), generator=generator, dtype=torch.uint8)
    whole = whole.view(dtype)[..., 0]  # dimensions from the last to the first
    if strides != "swapped":
        whole = whole.permute(*range(len(shape))[::-1]).contiguous()
    else:
        whole = whole.permute(*range(len(shape))[::-1])
    return whole[tuple(slice(size) for size in shape)]


@st.composite
def caches(draw: st.DrawFn, equal: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """K [N, P, Hkv, D] and V [N, P, Hkv, Dv]; Dv is D where they have to be alike."""
    blocks, size, heads, width = (draw(st.integers(1, most)) for most in (4, 5, 3, 7))
    value_width = width if equal else draw(st.integers(1, 7))
    dtype, strides = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(("dense", "gaps", "swapped")))
    seed = draw(st.integers(0, 99))
    shapes = (blocks, size, heads, width), (blocks, size, heads, value_width)
    return tuple(random_bits(shape, dtype, seed + i, strides) for i, shape in enumerate(shapes))


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    assert torch.equal(bits(one), bits(other))


def assert_lies(cache: torch.Tensor, packed: torch.Tensor, place) -> None:
    """Number [b, s, h, d] of a cache lies at `place(b, s, h, d)` of the other tensor."""
    was, now = bits(cache), bits(packed.contiguous())
    for index in product(*map(range, cache.shape)):
        assert was[index] == now[place(*index)], f"{index} is not at {place(*index)}"


# --- layouts ----------------------------------------------------------------------------------------------------------


@given(caches())
@quick
def test_one_tensor_of_k_and_v(pair):
    key, value = pair
    for to, back, place in (
        (layouts.to_stacked, layouts.from_stacked, lambda which, b, s, h, d: (which, b, s, h, d)),
        (layouts.to_by_block, layouts.from_by_block, lambda which, b, s, h, d: (b, which, s, h, d)),
        (layouts.to_alternating, layouts.from_alternating, lambda which, b, s, h, d: (b, s, 2 * h + which, d)),
    ):
        whole = to(key, value)
        assert whole.is_contiguous()
        assert whole.numel() == key.numel() + value.numel()
        for which, (found, wanted) in enumerate(zip(back(whole), pair, strict=True)):
            assert_lies(wanted, whole, partial(place, which))
            assert_same(found, wanted)


@given(caches(equal=False))
@quick
def test_two_tensors_and_packed_ones(pair):
    key, value = pair
    for cache in pair:
        hnd, transposed, flat = layouts.to_hnd(cache), layouts.to_transposed(cache), layouts.to_flat(cache)
        assert_lies(cache, hnd, lambda b, s, h, d: (b, h, s, d))
        assert_lies(cache, transposed, lambda b, s, h, d: (b, h, d, s))
        assert_lies(cache, flat, lambda b, s, h, d, size=cache.shape[1]: (b * size + s, h, d))
        assert_same(layouts.from_hnd(hnd), cache)
        assert_same(layouts.from_transposed(transposed), cache)
        assert_same(layouts.from_flat(flat, cache.shape[1]), cache)
        assert all(whole.is_contiguous() for whole in (hnd, transposed, flat))
    width = key.shape[3]
    packed = layouts.to_packed(key, value)
    assert_lies(key, packed, lambda b, s, h, d: (b, h, s, d))
    assert_lies(value, packed, lambda b, s, h, d: (b, h, s, width + d))
    for found, wanted in zip(layouts.from_packed(packed, width), pair, strict=True):
        assert_same(found, wanted)


@given(caches(), st.sampled_from((1, 2, 4)))
@quick
def test_x_packed(pair, x):
    key = pair[0].repeat_interleave(x, dim=3)  # a width with whole pieces of x
    packed = layouts.to_x_packed(key, x)
    assert packed.is_contiguous()
    assert_lies(key, packed, lambda b, s, h, d: (b, h, d // x, s, d % x))
    assert_same(layouts.from_x_packed(packed), key)


@given(caches(equal=False), st.integers(0, 7), st.booleans())
@quick
def test_latent(pair, rope, values_first):
    key, value = pair
    width, value_width = key.shape[3], value.shape[3]
    rope = min(rope, width)
    whole = latent.to_latent(key, value, rope, values_first)
    first = 0 if values_first else width - rope  # of the values; keys before it stay, those behind make room
    assert_lies(value, whole, lambda b, s, h, d: (b, s, h, first + d))
    assert_lies(key, whole, lambda b, s, h, d: (b, s, h, d if d < first else value_width + d))
    for found, wanted in zip(latent.from_latent(whole, width, rope, values_first), pair, strict=True):
        assert_same(found, wanted)


def test_what_has_no_such_layout_is_refused():
    key, value = torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 6)
    for to in (layouts.to_stacked, layouts.to_by_block, layouts.to_alternating):
        with pytest.raises(ValueError, match=r"K is \[2, 3, 1, 4\] and V is \[2, 3, 1, 6\]"):
            to(key, value)
    with pytest.raises(ValueError, match="whole pieces of 4 numbers; D is 6"):
        layouts.to_x_packed(value, 4)
    with pytest.raises(ValueError, match="6 slots are no whole number of blocks of 4"):
        layouts.from_flat(layouts.to_flat(key), 4)
    with pytest.raises(ValueError, match="the last 5 numbers of a latent are key; D is 4"):
        latent.to_latent(key, value, 5, values_first=True)


# --- metadata ---------------------------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int], int, torch.Tensor]:
    """Blocks of each sequence, lengths, numbers of queries, block size, and the padded table."""
    size = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    queries = [draw(st.integers(0, length + 2)) for length in lengths]
    blocks = [[draw(st.integers(0, 30)) for _ in range(-(-length // size))] for length in lengths]  # may repeat
    width = max(map(len, blocks)) + draw(st.integers(0, 2))
    padding, dtype = draw(st.sampled_from((0, -1, 2**31 - 1))), draw(st.sampled_from((torch.int32, torch.int64)))
    table = torch.tensor([row + [padding] * (width - len(row)) for row in blocks], dtype=dtype).reshape(
        len(blocks), width
    )
    return blocks, lengths, queries, size, table


def running(counts: list[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


def slots_of(blocks: list[int], length: int, size: int) -> list[int]:
    return [blocks[position // size] * size + position % size for position in range(length)]


def assert_tables(found: torch.Tensor, blocks: list[list[int]]) -> None:
    """The blocks of each sequence, 0 behind them, in as many columns as are needed."""
    width = max(map(len, blocks))
    assert found.tolist() == [row + [0] * (width - len(row)) for row in blocks]


@given(batches())
@quick
def test_lists_of_pages(batch):
    blocks, lengths, _, size, table = batch
    indptr, indices, last_page_len = metadata.to_pages(table, torch.tensor(lengths, dtype=torch.int32), size)
    assert indptr.dtype == last_page_len.dtype == torch.int32
    assert indices.dtype == table.dtype
    assert indptr.tolist() == running([len(row) for row in blocks])
    assert indices.tolist() == [block for row in blocks for block in row]
    assert last_page_len.tolist() == [
        length - (len(row) - 1) * size if row else 0 for row, length in zip(blocks, lengths, strict=True)
    ]
    tables, seq_lens = metadata.from_pages(indptr, indices, last_page_len, size)
    assert_tables(tables, blocks)
    assert seq_lens.tolist() == lengths


@given(batches())
@quick
def test_lists_and_rows_of_slots(batch):
    blocks, lengths, _, size, table = batch
    slots = [slots_of(row, length, size) for row, length in zip(blocks, lengths, strict=True)]
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    kv_indptr, kv_indices = metadata.to_slots(table, seq_lens, size)
    assert kv_indptr.tolist() == running(lengths)
    assert kv_indices.tolist() == [slot for row in slots for slot in row]
    tables, found_lens = metadata.from_slots(kv_indptr, kv_indices, size)
    assert_tables(tables, blocks)
    assert found_lens.tolist() == lengths

    req_to_token, req_pool_indices = metadata.to_requests(table, seq_lens, size)
    rows = req_pool_indices.tolist()
    assert len(set(rows)) == len(rows)
    assert all(row != place for place, row in enumerate(rows) if len(rows) != 2 * place)
    for row, mine in zip(rows, slots, strict=True):
        assert req_to_token[row].tolist() == mine + [0] * (req_to_token.shape[1] - len(mine))
    tables, found_lens = metadata.from_requests(req_to_token, req_pool_indices, seq_lens, size)
    assert_tables(tables, blocks)
    assert found_lens.tolist() == lengths


@given(batches())
@quick
def test_read_and_write_indices(batch):
    blocks, lengths, queries, size, table = batch
    slots = [slots_of(row, length, size) for row, length in zip(blocks, lengths, strict=True)]
    starts = torch.tensor(running(queries), dtype=torch.int32)
    read, write = metadata.to_read_write(table, torch.tensor(lengths, dtype=torch.int32), starts, size, trash=999)
    assert read.tolist() == [slot for row in slots for slot in row]
    assert write.tolist() == [
        slot
        for mine, count in zip(slots, queries, strict=True)
        for slot in [999] * (count - len(mine)) + mine[max(0, len(mine) - count) :]
    ]
    cu_seq_lens_k = torch.tensor(running(lengths), dtype=torch.int32)
    tables, seq_lens, query_start_loc = metadata.from_read_write(read, write, starts, cu_seq_lens_k, size)
    assert_tables(tables, blocks)
    assert seq_lens.tolist() == lengths
    assert query_start_loc.tolist() == running(queries)


@given(batches(), st.integers(0, 3))
@quick
def test_ragged_rows(batch, room):
    _, lengths, queries, _, table = batch
    starts = torch.tensor(running(queries), dtype=torch.int32)
    ragged = metadata.to_ragged(table, torch.tensor(lengths), starts, len(lengths) + room)
    kv_lens, page_indices, cu_q_lens, num_seqs = ragged
    assert all(part.dtype == torch.int32 for part in ragged)
    assert kv_lens.tolist() == lengths + [0] * room
    assert page_indices.tolist() == table.tolist() + [[0] * table.shape[1]] * room
    assert cu_q_lens.tolist() == running(queries) + [0] * room
    assert num_seqs.tolist() == [len(lengths)]
    for found, wanted in zip(metadata.from_ragged(*ragged), (table.tolist(), lengths, running(queries)), strict=True):
        assert found.tolist() == wanted


def test_metadata_that_cannot_be_is_refused():
    table, long = torch.tensor([[5, 2]]), torch.tensor([5])
    for to in (metadata.to_pages, metadata.to_slots, metadata.to_requests):
        with pytest.raises(ValueError, match="have room for 4 tokens; the longest sequence has 5"):
            to(table, long, 2)
    with pytest.raises(ValueError, match="2 sequences do not fit into max_num_seqs 1"):
        metadata.to_ragged(torch.zeros(2, 1), torch.zeros(2), torch.zeros(3), 1)
    with pytest.raises(ValueError, match=r"slots \[4, 7\] are no blocks of 2"):
        metadata.from_slots(torch.tensor([0, 2]), torch.tensor([4, 7]), 2)
    starts_q, starts_k = torch.tensor([0, 1]), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"written to slots \[4\], but read from \[5\]"):
        metadata.from_read_write(torch.tensor([4, 5]), torch.tensor([4]), starts_q, starts_k, 2)
