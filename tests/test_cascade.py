"""Cascade attention: finding shared prefixes, planning around them, and the two parts put together.

A CPU's FlexAttention gives no log-sum-exp, so the kernels together are tested on a GPU, against `reference.attention`.
Everything else is tested on a CPU: plans are read by a definition in float64, and prefixes are found by trying all.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from helpers import as_prompts, load, token_prompts, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import FEATURES
from torch import Tensor

from paged import SamplingParams
from paged.attention import cascade, flex, gathered
from paged.attention.merge import apply_sinks
from paged.model import shared_prefix
from paged.model.decode_graphs import DecodeGraphs, captures_in_order
from paged.model.flex_inputs import FlexInputs, FlexInputsBuilder, read_host
from paged.model.flex_op import attend
from paged.model.shared_prefix import PrefixFinder, SharedPrefix, find_shared_prefix, pays
from paged.step import RowPlan, Sample, Step
from reference.attention import attention

SIZE = 16


@dataclass
class Shared:
    """Decodes of which some begin with the same blocks, and the same sequences contiguously.

    Attributes:
        own: tokens of each sequence behind the prefix; of those that do not begin with it, all.
        is_member: who begins with it.
        prefix_blocks: how long it is.
    """

    own: tuple[int, ...]
    is_member: tuple[bool, ...]
    prefix_blocks: int
    group: int = 3
    head_dim: int = 16
    dtype: torch.dtype = torch.float64
    features: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.num_kv_heads = 2
        needed = [-(-n // SIZE) for n in self.own]
        num_blocks = self.prefix_blocks + sum(needed) + 4
        order = (torch.randperm(num_blocks - 1, generator=g) + 1).tolist()
        prefix = [order.pop() for _ in range(self.prefix_blocks)]
        shape = (num_blocks, SIZE, self.num_kv_heads, self.head_dim)
        self.key_cache, self.value_cache = (
            torch.randn(shape, generator=g, dtype=torch.float64).to(self.dtype) for _ in range(2)
        )
        tables = [
            (prefix if member else []) + [order.pop() for _ in range(count)]
            for member, count in zip(self.is_member, needed, strict=True)
        ]
        self.tables = torch.zeros(len(tables), max(map(len, tables)) + 1, dtype=torch.int32)
        for row, table in enumerate(tables):
            self.tables[row, : len(table)] = torch.tensor(table)
        self.first_blocks = torch.tensor(self.is_member) * self.prefix_blocks
        self.seq_lens = (torch.tensor(self.own) + self.first_blocks * SIZE).int()
        heads = self.num_kv_heads * self.group
        self.query = torch.randn(len(tables), heads, self.head_dim, generator=g, dtype=torch.float64).to(self.dtype)

    def expected(self) -> tuple[Tensor, Tensor]:
        """By the reference: out [B, Hq, D], lse [B, Hq]."""
        outs, lses = [], []
        for row, length in enumerate(self.seq_lens.tolist()):
            key, value = (c[self.tables[row].long()].flatten(0, 1)[:length] for c in (self.key_cache, self.value_cache))
            out, lse = attention(self.query[row : row + 1], key, value, scale=0.37, **self.features)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    def tolerance(self) -> float:
        unit = 2.0**-53 if self.dtype == torch.float64 else 2.0**-24
        return 8 * (int(self.seq_lens.max()) + self.head_dim) * unit * float(self.value_cache.abs().max())


def lists_of_prefix(plan: cascade.PrefixPlan, num_splits: int) -> list[list[list[int]]]:
    """For each split and each of its tiles, the blocks read."""
    counts = plan.counts.reshape(num_splits, -1)
    blocks = plan.blocks.reshape(*counts.shape, -1)
    return [
        [blocks[split, tile, : counts[split, tile]].tolist() for tile in range(counts.shape[1])]
        for split in range(num_splits)
    ]


def slots_of_decode(plan: flex.DecodePlan, row: int) -> list[int]:
    """The slots that a row of a plan without a window reads."""
    seen = []
    for block in plan.full_blocks[row, 0, 0, : plan.full_counts[row, 0, 0]].tolist():
        seen += [block * SIZE + offset for offset in range(SIZE)]
    for block in plan.partial_blocks[row, 0, 0, : plan.partial_counts[row, 0, 0]].tolist():
        assert block == plan.last_block[row], "without a window only the last block is seen in part"
        seen += [block * SIZE + offset for offset in range((int(plan.seq_lens[row]) - 1) % SIZE + 1)]
    return seen


OWN, MEMBERS = (20, 1, 16, 17, 50, 3), (False, True, True, False, True, True)


@pytest.mark.parametrize("prefix_blocks", [0, 1, 2, 7])
@pytest.mark.parametrize("num_splits", [2, 4, 8])
@pytest.mark.parametrize("suffix_splits", [1, 3])
def test_prefix_and_suffixes_list_every_visible_key_once(prefix_blocks, num_splits, suffix_splits):
    case = Shared(OWN, MEMBERS, prefix_blocks)
    plan = flex.plan_decode(
        case.tables, case.seq_lens, block_size=SIZE, num_splits=suffix_splits, first_blocks=case.first_blocks
    )
    prefix = cascade.plan_prefix(case.tables, case.first_blocks, num_splits=num_splits, num_tiles=3)
    lists = lists_of_prefix(prefix, num_splits)
    assert all(tile == tiles[0] for tiles in lists for tile in tiles), "each tile of a split reads the same"
    together = [block * SIZE + offset for tiles in lists for block in tiles[0] for offset in range(SIZE)]
    for i, length in enumerate(case.seq_lens.tolist()):
        rows = range(i * suffix_splits, (i + 1) * suffix_splits)
        seen = [slot for row in rows for slot in slots_of_decode(plan, row)]
        seen += together if prefix.is_member[i] else []
        assert sorted(seen) == sorted(int(case.tables[i, p // SIZE]) * SIZE + p % SIZE for p in range(length))


def test_splits_of_a_prefix_are_of_equal_length():
    """What the slowest reads decides: 7 blocks in 4 splits are 2 for each, and 1 for the last."""
    case = Shared(OWN, MEMBERS, 7)
    prefix = cascade.plan_prefix(case.tables, case.first_blocks, num_splits=4, num_tiles=1)
    assert prefix.counts.tolist() == [2, 2, 2, 1]


@pytest.mark.parametrize("window", [5, 16, 40, 70])
def test_first_blocks_and_a_window_meet(window):
    """A plan leaves out what either leaves out. (The engine's windowed layers do not use it.)"""
    case = Shared(OWN, MEMBERS, 2)
    arguments = {"block_size": SIZE, "window": window}
    plan = flex.plan_decode(case.tables, case.seq_lens, **arguments, first_blocks=case.first_blocks)
    windowed = (case.seq_lens - window).clamp(min=0)
    assert plan.first_position.tolist() == torch.maximum(windowed, case.first_blocks * SIZE).tolist()
    assert plan.first_index.tolist() == (plan.first_position // SIZE).tolist()


def attend_by_definition(case: Shared, prefix: cascade.PrefixPlan, num_splits: int) -> tuple[Tensor, Tensor]:
    """What FlexAttention gives over the prefix's lists: outs [S, Hkv, B, G, D] and lses [S, Hkv, B, G], in float64.

    Every row attends, member or not. The gathered form attends to a list as to a block table of full blocks.
    """
    softcap = case.features.get("softcap")
    batch = len(case.own)
    outs, lses = [], []
    for ((blocks, *_),) in zip(lists_of_prefix(prefix, num_splits), strict=True):
        table = torch.tensor([[*blocks, 0]] * batch, dtype=torch.int32)
        lens = torch.full((batch,), len(blocks) * SIZE, dtype=torch.int32)
        out, lse = gathered.paged_attention(
            case.query,
            case.key_cache,
            case.value_cache,
            table,
            lens,
            torch.arange(batch + 1),
            scale=0.37,
            softcap=softcap,
        )
        heads = (batch, case.num_kv_heads, case.group)
        outs.append(out.reshape(*heads, -1).transpose(0, 1))
        lses.append(lse.reshape(heads).transpose(0, 1))
    return torch.stack(outs), torch.stack(lses)


def suffixes_by_definition(case: Shared, plan: flex.DecodePlan) -> tuple[Tensor, Tensor]:
    """Attention of each row to the slots that its plan lists: out [B, Hq, D], lse [B, Hq], in float64."""
    features = {name: value for name, value in case.features.items() if name == "softcap"}
    outs, lses = [], []
    for row in range(len(case.own)):
        slots = torch.tensor(slots_of_decode(plan, row), dtype=torch.int64)
        key, value = (cache.flatten(0, 1)[slots] for cache in (case.key_cache, case.value_cache))
        out, lse = attention(case.query[row : row + 1], key, value, scale=0.37, **features)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("name", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("prefix_blocks", [0, 1, 6])
def test_the_parts_put_together_are_attention(prefix_blocks, name):
    case = Shared(OWN, MEMBERS, prefix_blocks, features=FEATURES[name])
    plan = flex.plan_decode(case.tables, case.seq_lens, block_size=SIZE, first_blocks=case.first_blocks)
    prefix = cascade.plan_prefix(case.tables, case.first_blocks, num_splits=4, num_tiles=1)
    parts = attend_by_definition(case, prefix, 4)
    out, lse = cascade.join(*suffixes_by_definition(case, plan), *parts, prefix.is_member)
    if name == "sinks":
        out = apply_sinks(out, lse, case.features["sinks"])
    expected_out, expected_lse = case.expected()
    torch.testing.assert_close(out, expected_out, rtol=0, atol=case.tolerance())
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=case.tolerance())


def test_what_others_get_of_the_prefix_weighs_nothing():
    """Rows that do not begin with the prefix attend to it all the same; NaN shows whether anybody looks."""
    out, lse = torch.full((2, 4, 3), 5.0), torch.zeros(2, 4)
    outs, lses = torch.ones(2, 2, 2, 2, 3), torch.zeros(2, 2, 2, 2)
    outs[:, :, 1] = lses[:, :, 1] = torch.nan
    joined, joined_lse = cascade.join(out, lse, outs, lses, torch.tensor([True, False]))
    assert torch.allclose(joined[0], torch.tensor(7 / 3))
    assert torch.allclose(joined_lse[0].exp(), torch.tensor(3.0))
    assert torch.equal(joined[1], out[1])
    assert torch.equal(joined_lse[1], lse[1])


def test_the_prefix_part_on_a_cpu():
    """Queries go into tiles and come back in order, with two tiles and a padded one; one split, as nothing merges."""
    case = Shared((5,) * 25, (True,) * 25, 3, dtype=torch.float32)  # 75 queries for each KV head
    tiles = cascade.num_tiles(25, case.group)
    assert tiles == 2
    prefix = cascade.plan_prefix(case.tables, case.first_blocks, num_splits=1, num_tiles=tiles)
    arguments = {"num_splits": 1, "scale": 0.37, "softcap": 0.5}
    outs, lses = cascade.attend_prefix(case.query, case.key_cache, case.value_cache, prefix, **arguments)
    assert lses is None
    case.features = {"softcap": 0.5}
    expected, _ = attend_by_definition(case, prefix, 1)
    torch.testing.assert_close(outs, expected, rtol=0, atol=2 * case.tolerance())


# Which prefix, and whether it pays.


def best_saving(tables: np.ndarray, num_full: np.ndarray, num_reads: int) -> int:
    """Most blocks that any group of rows can save, by trying all groups that a row and a length stand for."""
    best = 0
    for row, length in itertools.product(range(len(tables)), range(1, tables.shape[1] + 1)):
        members = (tables[:, :length] == tables[row, :length]).all(axis=1) & (num_full >= length)
        if members[row]:
            best = max(best, (int(members.sum()) - num_reads) * length)
    return best


@st.composite
def forests(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Tables of six rows that part here and there, with few enough forks that all are looked behind."""
    tables = np.array([[draw(st.integers(1, 2)) for _ in range(4)] for _ in range(6)], np.int32)
    return tables, np.array([draw(st.integers(0, 4)) for _ in range(6)])


@given(forest=forests(), num_reads=st.integers(1, 2))
@settings(max_examples=300, deadline=None)
def test_what_is_found_is_shared_and_on_the_way_that_most_rows_take(forest, num_reads):
    """Members begin with the same full blocks, nobody else does, and no group saves more that follows the majority."""
    tables, num_full = forest
    found = find_shared_prefix(tables, np.arange(6), num_full, num_reads=num_reads)
    best = best_saving(tables, num_full, num_reads)
    if found is None:
        first = [tables[i, 0] for i in range(6) if num_full[i] > 0]
        most = max((first.count(block) for block in first), default=0)
        assert most <= max(1, num_reads), "the largest group of the first block saves a block at least"
        return
    members = found.members.tolist()
    prefix = tables[members[0], : found.num_blocks]
    begins = [
        bool((tables[i, : found.num_blocks] == prefix).all()) and num_full[i] >= found.num_blocks for i in range(6)
    ]
    assert members == [i for i in range(6) if begins[i]]
    assert 0 < found.num_blocks_saved(num_reads) <= best


def test_the_prefix_that_saves_most_is_found():
    """Ten rows share 2 blocks, and four of them 30 more, in a batch that others are part of; rows are not adjacent."""
    tables = np.arange(1000, 1000 + 20 * 50).reshape(20, 50)
    tables[1:20:2, :2] = [5, 6]
    long = [1, 7, 9, 15]
    tables[long, :32] = tables[1, :32]
    rows, num_full = np.arange(20), np.full(20, 40)
    found = find_shared_prefix(tables, rows, num_full)
    assert (found.members.tolist(), found.num_blocks) == (long, 32)  # 3 * 32 blocks against 9 * 2
    found = find_shared_prefix(tables, rows, num_full, num_reads=4)
    assert (found.members.tolist(), found.num_blocks) == (list(range(1, 20, 2)), 2)  # 0 against 6 * 2
    # Rows of a step are in another order than the persistent ones, and some are left out.
    rows = np.array([15, 3, 1, 0])
    found = find_shared_prefix(tables, rows, np.array([40, 40, 10, 40]))
    assert (found.members.tolist(), found.num_blocks) == ([0, 2], 10)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 95, 96, 97, 180, 200])
def test_prefixes_of_any_length_are_found_whole(length):
    """Columns are compared a few at a time: around the borders of these, and up to the end of what may be shared."""
    tables = np.arange(1, 601).reshape(3, 200)
    tables[2, :length] = tables[0, :length]
    found = find_shared_prefix(tables, np.arange(3), np.array([200, 200, 190]))
    assert (found.members.tolist(), found.num_blocks) == ([0, 2], min(length, 190))


def test_blocks_that_a_window_left_behind_are_nobodys():
    tables = np.array([[0, 5], [0, 5]])
    assert find_shared_prefix(tables, np.arange(2), np.array([2, 2])) is None


def decodes(rows: list[int], starts: list[int]) -> Step:
    """A step in which these rows decode the token at these positions."""
    return Step(
        tuple(
            RowPlan(str(row), 0, row, start, (1,), table_change=None, samples=(Sample(row),))
            for row, start in zip(rows, starts, strict=True)
        )
    )


@pytest.fixture
def tables() -> np.ndarray:
    """Eight rows; 2, 5 and 6 begin with the same ten blocks, and 5 and 6 with the same eleven."""
    tables = np.arange(100, 260).reshape(8, 20)
    tables[[2, 5, 6], :10] = np.arange(10) + 1
    tables[[5, 6], 10] = 99
    return tables


def test_first_blocks_of_a_step(tables, monkeypatch):
    monkeypatch.setattr(shared_prefix, "BYTES_WORTH_A_CASCADE", 0)
    finder = PrefixFinder(tables, block_size=SIZE, group=1, block_bytes=1)
    found = finder.first_blocks(decodes([0, 6, 2, 5], [300, 200, 171, 310]))
    assert found.tolist() == [0, 10, 10, 10]
    # The block of the token that is computed is not shared, even if it is the last slot of it and tables say so.
    found = finder.first_blocks(decodes([5, 6], [175, 180]))
    assert found.tolist() == [10, 10]
    assert finder.first_blocks(decodes([5, 6], [176, 180])).tolist() == [11, 11]
    assert finder.first_blocks(decodes([5, 6], [15, 180])) is None
    # Nobody else begins like that; one row alone; somebody computes a prompt.
    assert finder.first_blocks(decodes([0, 1, 2, 3], [200] * 4)) is None
    assert finder.first_blocks(decodes([2], [200])) is None
    prompt = RowPlan("p", 0, 7, 0, (1, 2, 3), table_change=None)
    assert finder.first_blocks(Step((*decodes([5, 6], [200, 200]).rows, prompt))) is None


def test_it_has_to_pay(tables):
    """A tile of queries reads the prefix once; so rows that fill a tile each, or few bytes, save nothing."""
    step = decodes([2, 5, 6], [200] * 3)
    enough = shared_prefix.BYTES_WORTH_A_CASCADE // 20 + 1  # 3 rows, a tile, 10 blocks
    assert PrefixFinder(tables, block_size=SIZE, group=1, block_bytes=enough).first_blocks(step) is not None
    assert PrefixFinder(tables, block_size=SIZE, group=1, block_bytes=enough - 1).first_blocks(step) is None
    assert PrefixFinder(tables, block_size=SIZE, group=64, block_bytes=enough).first_blocks(step) is None
    prefix = SharedPrefix(np.arange(32), 512)
    assert pays(prefix, num_reads=2, block_bytes=2**16)
    assert not pays(prefix, num_reads=32, block_bytes=2**16)


def test_graphs_are_captured_for_the_largest_batch_of_each_kind_first():
    captures = captures_in_order([1, 2, 4, 8, 16, 24, 32, 40], with_cascade=True)
    assert captures[:2] == [(40, False), (40, True)]
    assert [size for size, cascade in captures if cascade] == [40, 8, 16, 32]
    assert len(captures) == 12
    assert captures_in_order([1], with_cascade=True) == [(1, False)], "a row alone shares with nobody"
    assert not any(cascade for _, cascade in captures_in_order([8, 16], with_cascade=False))


# What layers get of it, and do with it.


@pytest.fixture
def builder(tables) -> FlexInputsBuilder:
    """Inputs of layers with and without a window, over the tables."""
    builder = FlexInputsBuilder(
        max_num_seqs=8,
        max_model_len=20 * SIZE,
        block_size=SIZE,
        num_kv_heads=2,
        group=30,
        windows=[None, 40],
        device=torch.device("cpu"),
    )
    builder.block_tables[:8] = torch.tensor(tables)
    return builder


def check_inputs(inputs: FlexInputs, tables: np.ndarray, rows: list[int], lens: list[int]) -> None:
    """Each row sees all of its keys once, in the prefix or behind it; a layer with a window reads them all itself."""
    num_decodes, num_splits, prompts = read_host(inputs.host)
    assert (num_decodes, prompts) == (len(rows), [])
    assert num_splits >= 2
    together = [block for tiles in lists_of_prefix(inputs.prefix, num_splits) for block in tiles[0]]
    plan, windowed = inputs.plans[None], inputs.plans[40]
    for i, (row, length) in enumerate(zip(rows, lens, strict=True)):
        seen = [block * SIZE + offset for block in together for offset in range(SIZE)] * bool(
            inputs.prefix.is_member[i]
        )
        seen += slots_of_decode(plan, i)
        assert sorted(seen) == sorted(int(tables[row, p // SIZE]) * SIZE + p % SIZE for p in range(length))
        assert windowed.first_position[i] == max(0, length - 40)


ROWS, LENS, FIRST = [0, 6, 2, 5, 7], [301, 201, 172, 311, 20], [0, 10, 10, 10, 0]


def test_layers_get_the_prefix_and_what_lies_behind(builder, tables):
    step = decodes(ROWS, [length - 1 for length in LENS])
    inputs = builder.build(step, torch.zeros(5, dtype=torch.int64), np.array(FIRST))
    check_inputs(inputs, tables, ROWS, LENS)
    assert inputs.prefix.is_member.tolist() == [False, True, True, True, False]
    assert len(inputs.prefix.counts) == 2 * 3, "150 queries fill three tiles"
    inputs = builder.build(step, torch.zeros(5, dtype=torch.int64))
    assert read_host(inputs.host)[1] == 0
    assert inputs.prefix is builder.no_prefix
    assert not inputs.plans[None].first_index.any()


def test_captured_layers_get_it_from_a_number_for_each_row(builder, tables):
    """What a graph computes on the device, here computed once without one; two rows pad the batch."""
    given = []

    def forward(token_ids: Tensor, positions: Tensor, inputs: FlexInputs) -> Tensor:
        given.append(inputs)
        return torch.zeros(len(token_ids), 3)

    graphs = DecodeGraphs(forward, builder, torch.zeros(9, dtype=torch.int64), with_cascade=True)
    batch = np.zeros((5, 7), np.int64)
    batch[0] = builder.padded_row
    batch[0, :5], batch[1, :5], batch[4, :5] = ROWS, LENS, FIRST
    graphs._batch = torch.from_numpy(batch)
    graphs._forward_batch(7, cascade=True)
    graphs._batch[4] = 0
    graphs._forward_batch(7, cascade=False)
    shared, ordinary = given
    check_inputs(shared, np.vstack([tables, np.zeros((1, 20), int)]), [*ROWS, 8, 8], [*LENS, 0, 0])
    assert read_host(ordinary.host)[1] == 0
    assert not ordinary.plans[None].first_index.any()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_layers_without_a_window_attend_to_the_prefix_apart(with_prefix, window, builder, monkeypatch):
    """And sinks come after the merge, whoever attends; the two ways to attend are stood in for."""
    calls = []

    def stand_in(name: str, query: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(name)
        return torch.ones(query.shape), torch.zeros(query.shape[:2])

    monkeypatch.setattr(cascade, "attend", lambda query, *_, **__: stand_in("cascade", query))
    monkeypatch.setattr(flex, "attend_decode", lambda query, *_, **__: stand_in("decode", query))
    step = decodes(ROWS, [length - 1 for length in LENS])
    inputs = builder.build(step, torch.zeros(5, dtype=torch.int64), np.array(FIRST) if with_prefix else None)
    query, key, cache = torch.ones(5, 6, 16), torch.ones(5, 2, 16), torch.ones(300, SIZE, 2, 16)
    arguments = {"sinks": torch.zeros(6), "scale": 1.0, "window": window, "softcap": None}
    out = attend(query, key, key, cache, cache.clone(), inputs, **arguments)
    assert calls == ["cascade" if with_prefix and window is None else "decode"]
    assert torch.equal(out, torch.full_like(out, 0.5)), "a sink as heavy as all keys takes half"


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("prefix_blocks", [0, 1, 6, 40])
@pytest.mark.parametrize("name", ["plain", "softcap", "sinks"])
def test_on_a_gpu(name, prefix_blocks, group, dtype):
    """Few rows in one tile, and so many that they fill several."""
    sinks = {"sinks": torch.linspace(-2, 3, 2 * group, dtype=torch.float64)}
    features = sinks if name == "sinks" else FEATURES[name]
    for repeat in (1, 9):
        case = Shared(OWN * repeat, MEMBERS * repeat, prefix_blocks, group, dtype=dtype, features=features)
        query, keys, values, tables, lens, first = (
            tensor.cuda()
            for tensor in (
                case.query,
                case.key_cache,
                case.value_cache,
                case.tables,
                case.seq_lens,
                case.first_blocks,
            )
        )
        expected_out, expected_lse = case.expected()
        for num_splits, suffix_splits in ((2, 1), (8, 4)):
            tiles = cascade.num_tiles(len(query), group)
            plan = flex.plan_decode(tables, lens, block_size=SIZE, num_splits=suffix_splits, first_blocks=first)
            prefix = cascade.plan_prefix(tables, first, num_splits=num_splits, num_tiles=tiles)
            out, lse = cascade.attend(
                query,
                keys,
                values,
                plan,
                prefix,
                num_splits=num_splits,
                scale=0.37,
                softcap=features.get("softcap"),
            )
            if name == "sinks":
                out = apply_sinks(out, lse, features["sinks"].cuda())
            largest = float(case.value_cache.abs().max())
            # Weights, parts and what is merged are rounded: as in tests/test_flex.py, and once more.
            rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}[dtype] * (expected_out.abs() + 3 * largest)
            assert ((out.cpu().double() - expected_out).abs() <= 2 * case.tolerance() + rounding).all()
            assert ((lse.cpu().double() - expected_lse).abs() <= 64 * case.tolerance()).all()


ENGINE_SETTINGS = {
    "captured": {},
    "not captured": {"cudagraph_capture_sizes": ()},
    "captured for few": {"cudagraph_capture_sizes": (1, 4)},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("setting", ENGINE_SETTINGS)
def test_tokens_are_the_same_with_and_without(setting, name, folders, monkeypatch):
    """Samples of one prompt, beside another request, and requests that meet in the prefix cache; in float32."""
    monkeypatch.setattr(shared_prefix, "BYTES_WORTH_A_CASCADE", 0)
    common, other = token_prompts([70, 20])
    prompts = as_prompts([common, other, *([*common[:64], i, i + 1] for i in range(3))])
    wishes = [SamplingParams(n=n, temperature=1, seed=3, max_tokens=24, ignore_eos=True) for n in (8, 1, 1, 1, 1)]
    arguments = {"device": "cuda", "num_gpu_blocks_override": 200, "max_num_seqs": 16, "max_model_len": 128}
    tokens, num_steps = {}, {}
    for enabled in (True, False):
        llm = load(folders[name], **arguments, **ENGINE_SETTINGS[setting], enable_cascade_attention=enabled)
        # Twice: the second time the prompts of the others are found in the prefix cache.
        for _ in range(2):
            outputs = llm.generate(prompts, wishes)
        tokens[enabled] = [[list(sample.token_ids) for sample in output.outputs] for output in outputs]
        num_steps[enabled] = llm.engine.runner.num_cascade_steps
    assert tokens[True] == tokens[False]
    assert num_steps[False] == 0
    # Where every layer has a window there is nothing to read once.
    assert (num_steps[True] > 20) == (name != "mistral")


@pytest.mark.gpu
def test_requests_that_meet_in_the_prefix_cache_read_it_once(folders, monkeypatch):
    monkeypatch.setattr(shared_prefix, "BYTES_WORTH_A_CASCADE", 0)
    (common,) = token_prompts([64])
    prompts = as_prompts([[*common, i, i + 1] for i in range(8)])
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    arguments = {"device": "cuda", "num_gpu_blocks_override": 200, "max_num_seqs": 16, "max_model_len": 128}
    llm = load(folders["llama"], **arguments)
    alone = [tokens_of(llm.generate([prompt], greedy)) for prompt in prompts]
    before = llm.engine.runner.num_cascade_steps
    together = tokens_of(llm.generate(prompts, greedy))
    assert [together[i] for i in range(8)] == [tokens[0] for tokens in alone]
    assert llm.engine.runner.num_cascade_steps > before
