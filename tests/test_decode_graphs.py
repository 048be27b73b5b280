"""The parts of the flex form that are arithmetic: which batches are captured, what the layers get, who refuses what.

No GPU is asked for. A captured graph is played by a function that runs the same batch again, and the libraries' kernels
by the reference, so what is held to account here is everything around them: rows, slots, lengths, borders and order.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from paged.attention import dense, flex
from paged.attention.dense import PromptLengths
from paged.attention.flex_kernel import mark_sizes, run_compiled
from paged.attention.flex_plan import DecodePlan
from paged.attention.merge import merge_two
from paged.blocks import NULL_BLOCK, TableChange
from paged.config import EngineConfig
from paged.kv_pool import LayerShape, finite_values
from paged.model import flex_inputs, flex_op
from paged.model.attention_form import choose_form
from paged.model.decode_graphs import CannotBeCaptured, DecodeGraphs, can_be_captured, capture_order, capture_sizes
from paged.model.flex_inputs import FlexInputs, FlexInputsBuilder, Prompt, read_host
from paged.model.paged_attention import AttentionCall
from paged.model.runner import BYTES_OF_A_GRAPH, ModelRunner
from paged.step import RowPlan, Sample, Step
from reference.attention import attention

CPU = torch.device("cpu")
P = 16
TRASH = 90


def builder_of(*, rows: int = 4, max_model_len: int = 96, windows: tuple[int | None, ...] = (None,)):
    """A builder over a pool of 91 blocks."""
    builder = FlexInputsBuilder(
        max_num_seqs=rows,
        max_model_len=max_model_len,
        block_size=P,
        num_kv_heads=2,
        group=3,
        windows=windows,
        device=CPU,
    )
    builder.set_trash_block(TRASH)
    return builder


def row_of(row: int, start: int, num_tokens: int = 1, change: TableChange | None = None, **more) -> RowPlan:
    """A row that computes so many tokens from `start` on."""
    return RowPlan(f"r{row}", 0, row, start, (7,) * num_tokens, change, **{"samples": (Sample(row),), **more})


# --- which batches are captured ---------------------------------------------------------------------------------------


@given(most=st.integers(1, 1100))
def test_every_batch_finds_a_size_that_is_not_much_larger(most):
    sizes = capture_sizes(most)
    assert sizes[-1] == most
    assert sizes[0] == 1
    assert all(a < b for a, b in pairwise(sizes))
    for batch in range(1, most + 1):
        padding = next(size for size in sizes if size >= batch) - batch
        assert padding <= (0 if batch <= 2 else 3 if batch <= 8 else 7 if batch <= 64 else 15 if batch <= 256 else 31)


@given(sizes=st.sets(st.integers(1, 300), min_size=1))
def test_any_beginning_of_the_order_is_of_use(sizes):
    order = capture_order(sizes)
    assert sorted(order) == sorted(sizes)
    assert order[0] == max(sizes), "it serves every batch"
    powers = [size for size in order[1:] if size & (size - 1) == 0]
    others = [size for size in order[1:] if size & (size - 1)]
    assert order[1:] == sorted(powers) + sorted(others, reverse=True)


CAPTURED = {
    "decodes": ([row_of(0, 5), row_of(1, 0)], True),
    "a token that the host does not know": ([row_of(0, 5)._replace(token_ids=(None,))], True),
    "a chunk": ([row_of(0, 5), row_of(1, 0, 2)], False),
    "nothing is sampled": ([row_of(0, 5, samples=())], False),
    "several begin from one prompt": ([row_of(0, 0, samples=(Sample(0), Sample(1)))], False),
    "prompt tokens are scored": ([row_of(0, 5), row_of(1, 0, prompt_targets=(3,))], False),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_what_is_captured(name):
    rows, captured = CAPTURED[name]
    assert can_be_captured(Step(rows=tuple(rows))) is captured


# --- tables on the device ---------------------------------------------------------------------------------------------


@st.composite
def table_histories(draw):
    """Steps in which rows grow, are rewritten from somewhere on, or go to a sequence with another, shorter table."""
    steps, lengths = [], dict.fromkeys(range(4), 0)
    for _ in range(draw(st.integers(1, 8))):
        changes = []
        for row in draw(st.lists(st.integers(0, 3), unique=True)):
            first = draw(st.integers(0, lengths[row]))
            blocks = draw(st.lists(st.integers(0, TRASH - 1), max_size=6 - first))
            if draw(st.booleans()):
                changes.append((row, None))
            else:
                changes.append((row, TableChange(first, tuple(blocks))))
                lengths[row] = first + len(blocks)
        steps.append(changes)
    return steps


@given(history=table_histories())
def test_tables_on_the_device_follow_the_steps(history):
    builder = builder_of()
    address = builder.block_tables.data_ptr()
    tables = {row: [] for row in range(4)}
    for changes in history:
        builder.replay(Step(rows=tuple(row_of(row, 0, 1, change) for row, change in changes)))
        for row, change in changes:
            if change is not None:
                tables[row][change.first_index :] = change.blocks
        for row, table in tables.items():
            assert builder.block_tables[row, : len(table)].tolist() == table
        assert builder.block_tables[builder.padded_row].tolist() == [TRASH] + [NULL_BLOCK] * 5
    assert builder.block_tables.data_ptr() == address, "CUDA graphs know where it is"


def filled(**settings) -> tuple[FlexInputsBuilder, list[list[int]]]:
    """A builder whose rows have been used before, by longer sequences, and the tables that count now."""
    builder = builder_of(**settings)
    order = (torch.randperm(TRASH - 1, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    used = [TableChange(0, tuple(order.pop() for _ in range(6))) for _ in range(4)]
    builder.replay(Step(rows=tuple(row_of(row, 0, 1, change) for row, change in enumerate(used))))
    tables = [[order.pop() for _ in range(count)] for count in (1, 2, 6, 4)]
    changes = [TableChange(0, tuple(table)) for table in tables]
    builder.replay(Step(rows=tuple(row_of(row, 0, 1, change) for row, change in enumerate(changes))))
    return builder, tables


def slot_of(table: list[int], position: int) -> int:
    return table[position // P] * P + position % P


def test_slots():
    builder, tables = filled()
    wanted = [(0, 0), (0, 15), (1, 16), (2, 95), (3, 33), (2, 47)]
    rows, positions = torch.tensor(wanted).T
    assert builder.slots(rows, positions).tolist() == [slot_of(tables[row], position) for row, position in wanted]
    padded = torch.full((2,), builder.padded_row)
    assert builder.slots(padded, torch.zeros(2, dtype=torch.int64)).tolist() == [TRASH * P] * 2


def slots_read(plan: DecodePlan, index: int) -> list[int]:
    """What a row of a plan that is not split reads."""
    seen = []
    for block in plan.full_blocks[index, 0, 0, : plan.full_counts[index, 0, 0]].tolist():
        seen += range(block * P, (block + 1) * P)
    for block in plan.partial_blocks[index, 0, 0, : plan.partial_counts[index, 0, 0]].tolist():
        first = P * int(plan.last_index[index] if block == plan.last_block[index] else plan.first_index[index])
        inside = range(max(first, int(plan.first_position[index])), min(first + P, int(plan.seq_lens[index])))
        seen += [block * P + position - first for position in inside]
    return sorted(seen)


@pytest.mark.parametrize("lens", [(1, 20, 96, 50), (16, 32, 81, 64), (15, 17, 80, 49)])
def test_decodes_read_what_their_rows_have_now(lens):
    builder, tables = filled(windows=(None, 20, None, 1))
    rows = [2, 0, 3, 1, builder.padded_row]
    seq_lens = [lens[row] for row in rows[:-1]] + [0]
    first_blocks = torch.zeros(len(rows), dtype=torch.int64)
    plans = builder.decode_plans(torch.tensor(rows), torch.tensor(seq_lens, dtype=torch.int32), first_blocks)
    assert list(plans) == [None, 1, 20]
    for window, plan in plans.items():
        for i, (row, length) in enumerate(zip(rows, seq_lens, strict=True)):
            first = 0 if window is None else max(0, length - window)
            expected = [slot_of(tables[row], position) for position in range(first, length)] if length else []
            assert slots_read(plan, i) == sorted(expected)


class Counting:
    """A compiler that leaves operations as they are and counts the graphs that it is given."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, module, inputs):
        self.num_graphs += 1
        return aot_eager(module, inputs)


def test_plans_of_all_batches_are_compiled_once():
    """Once for one row, once for more, once for more without splits; for each kind of window."""
    compiler = Counting()
    compiled = torch.compile(flex_inputs.plan_rows, fullgraph=True, backend=compiler)
    generator = torch.Generator().manual_seed(0)
    tables = torch.randint(1, 900, (65, 40), generator=generator, dtype=torch.int32)
    cases = [(512, 1), (1, 16), (2, 16), (3, 8), (64, 1), (5, 2), (65, 1), (1, 4), (20, 3)]
    with torch.inference_mode():
        for window in (None, 37):
            for count, num_splits in cases:
                rows = torch.randint(0, 65, (count,), generator=generator)
                seq_lens = torch.randint(0, 640, (count,), generator=generator).int()
                first_blocks = torch.randint(0, 3, (count,), generator=generator).minimum(seq_lens // 17)
                arguments = tables, rows, seq_lens, rows.new_empty(num_splits), first_blocks, P, window
                mark_sizes(arguments[1:5], (0,))
                plan, right = run_compiled(compiled, *arguments), flex_inputs.plan_rows(*arguments)
                for name, found in plan._asdict().items():
                    expected = getattr(right, name)
                    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
                    assert torch.equal(found, expected), name
                    assert found.is_contiguous(), name
    assert compiler.num_graphs == 6


# --- what the layers get ----------------------------------------------------------------------------------------------


def test_prompts_and_decodes_of_a_step():
    builder, tables = filled(windows=(None, 20))
    rows = (row_of(1, 19), row_of(0, 4, 3), row_of(2, 40, 50))
    slots = torch.arange(54)
    inputs = builder.build(Step(rows=rows), slots)
    assert inputs.slot_mapping is slots
    assert inputs.block_tables is builder.block_tables
    assert read_host(inputs.host) == (1, 0, [Prompt(0, PromptLengths(3, 7)), Prompt(2, PromptLengths(50, 90))])
    assert inputs.query_start_loc.tolist() == [0, 3, 53]
    assert inputs.key_start_loc.tolist() == [0, 7, 97]
    seen = [slot_of(tables[0], position) for position in range(7)]
    assert inputs.prompt_slots.tolist() == seen + [slot_of(tables[2], position) for position in range(90)]
    for plan in inputs.plans.values():  # both windows see all 20
        assert slots_read(plan, 0) == sorted(slot_of(tables[1], position) for position in range(20))
        assert slots_read(plan, 1) == [], "padding reads nothing"
    starts = inputs.query_start_loc, inputs.key_start_loc
    assert [each.dtype for each in (inputs.prompt_slots, *starts)] == [torch.int64, torch.int32, torch.int32]
    assert (inputs.host.dtype, inputs.host.device) == (torch.int64, CPU)


@pytest.mark.parametrize("num_prompts", [0, 1, 2])
@pytest.mark.parametrize("num_decodes", [0, 1, 2, 3])
def test_nothing_is_so_short_that_the_compiler_would_make_a_graph_for_it(num_decodes, num_prompts):
    """A size of 0 or 1 is taken for a constant; so every size that may be one is at least 2."""
    builder, _ = filled(rows=8)
    rows = [row_of(row, 3) for row in range(num_decodes)] + [row_of(3 + row, 0, 2) for row in range(num_prompts)]
    inputs = builder.build(Step(rows=tuple(rows)), torch.zeros(9, dtype=torch.int64))
    for plan in inputs.plans.values():
        assert [len(tensor) for tensor in plan] == [max(2, num_decodes)] * len(plan)
    for tensor in (inputs.host, inputs.prompt_slots, inputs.query_start_loc, inputs.key_start_loc, inputs.block_tables):
        assert len(tensor) >= 2
    for tensor in inputs.prefix:
        assert len(tensor) >= 2
    num, num_prefix_splits, prompts = read_host(inputs.host)
    assert (num, num_prefix_splits, len(prompts)) == (num_decodes, 0, num_prompts)


def test_a_step_of_one_token_is_padded_with_one_that_is_written_to_the_trash_block():
    builder, tables = filled()
    seen = []
    runner = SimpleNamespace(_flex=builder, _forward=lambda *arguments: seen.append(arguments))
    batch = SimpleNamespace(
        sampled=torch.tensor([0]),
        prompt_tokens=torch.tensor([], dtype=torch.int64),
        token_ids=torch.tensor([5]),
        positions=torch.tensor([20]),
        attention=SimpleNamespace(slot_mapping=torch.tensor([slot_of(tables[1], 20)])),
    )
    ModelRunner._logits(runner, Step(rows=(row_of(1, 20),)), batch, None)
    ((token_ids, positions, inputs, wanted),) = seen
    assert (token_ids.tolist(), positions.tolist(), wanted.tolist()) == ([5, 0], [20, 0], [0])
    assert inputs.slot_mapping.tolist() == [slot_of(tables[1], 20), TRASH * P]
    assert read_host(inputs.host) == (1, 0, [])


# --- a captured batch -------------------------------------------------------------------------------------------------

VOCAB = 11


class Played:
    """Graphs of a model whose logits name the token, the position and the length that it was given."""

    def __init__(self, sizes: list[int]) -> None:
        self.builder, self.tables = filled(windows=(None, 20))
        self.last_token_ids = torch.tensor([1, 2, 3, 4, 0])
        self.seen: list[tuple[Tensor, Tensor, FlexInputs]] = []
        self.graphs = DecodeGraphs(self.forward, self.builder, self.last_token_ids)
        self.graphs.sizes = sizes
        self.graphs._batch = torch.full((5, max(2, *sizes)), 99)
        self.graphs._decoded = self.graphs._decoded._replace(
            logits=torch.full((max(sizes), VOCAB), -9.0), sampled=torch.full((2, max(sizes)), -9)
        )
        self.graphs._graphs = {
            (size, False): SimpleNamespace(replay=lambda size=size: self.graphs._run_batch(size, cascade=False))
            for size in sizes
        }

    def forward(self, token_ids: Tensor, positions: Tensor, inputs: FlexInputs) -> Tensor:
        """[T, V]: the next token is the token plus its position; a row of position 33 gets no numbers."""
        self.seen.append((token_ids, positions, inputs))
        logits = torch.nn.functional.one_hot((token_ids + positions) % VOCAB, VOCAB).double()
        return torch.where((positions == 33)[:, None], torch.nan, logits)


def test_a_captured_step_takes_tokens_from_the_host_or_the_row_and_leaves_its_own_there():
    played = Played([1, 2, 4])
    rows = (row_of(2, 30), row_of(0, 4)._replace(token_ids=(None,)), row_of(1, 31)._replace(token_ids=(0,)))
    logits, sampled = played.graphs.run(Step(rows=rows))
    ((token_ids, positions, inputs),) = played.seen
    padded = played.builder.padded_row
    assert (token_ids.tolist(), positions.tolist()) == ([7, 1, 0, 0], [30, 4, 31, 0])
    places = [(2, 30), (0, 4), (1, 31)]
    assert inputs.slot_mapping.tolist() == [slot_of(played.tables[row], at) for row, at in places] + [TRASH * P]
    assert read_host(inputs.host) == (4, 0, [])
    for plan in inputs.plans.values():
        assert plan.seq_lens.tolist() == [31, 5, 32, 0]
        assert slots_read(plan, 3) == [], "padding reads nothing"
    assert sampled.tolist() == [[37 % VOCAB, 5, 31 % VOCAB], [0, 0, 0]]
    assert logits.argmax(dim=1).tolist() == sampled[0].tolist()
    # Each row's latest token, where the step behind finds it.
    assert played.last_token_ids.tolist() == [5, 31 % VOCAB, 37 % VOCAB, 4, 0]
    assert len(played.last_token_ids) == padded + 1
    assert played.graphs.num_steps == 1


def test_a_captured_step_takes_the_next_larger_size_and_tells_who_is_broken():
    played = Played([1, 2, 4])
    for num_rows, size in ((1, 1), (2, 2), (3, 4), (4, 4)):
        rows = tuple(row_of(row, 3 if row else 33)._replace(token_ids=(1,)) for row in range(num_rows))
        assert played.graphs.fits(Step(rows=rows))
        logits, sampled = played.graphs.run(Step(rows=rows))
        assert len(played.seen[-1][0]) == size
        assert (logits.shape, sampled.shape) == ((num_rows, VOCAB), (2, num_rows))
        assert sampled[1].tolist() == [1] + [0] * (num_rows - 1)
    assert not played.graphs.fits(Step(rows=tuple(row_of(0, 3) for _ in range(5))))
    assert not played.graphs.fits(Step(rows=(row_of(0, 3, 2),)))
    assert not DecodeGraphs(played.forward, played.builder, played.last_token_ids).fits(Step(rows=(row_of(0, 3),)))


class SyncMode:
    """PyTorch's switch that makes waiting for the GPU an error."""

    def __init__(self, monkeypatch) -> None:
        self.modes = ["default"]
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.modes[-1])
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.modes.append)


@pytest.mark.parametrize(
    ("message", "expected"),
    [("called a synchronizing CUDA operation", CannotBeCaptured), ("CUDA out of memory", RuntimeError), (None, None)],
)
def test_a_layer_that_waits_for_the_gpu_is_found_before_a_capture(message, expected, monkeypatch):
    switch, played = SyncMode(monkeypatch), Played([2])
    played.graphs._batch.zero_()

    def forward(*arguments):
        assert switch.modes[-1] == "error"
        if message is not None:
            raise RuntimeError(message)
        return played.forward(*arguments)

    played.graphs._forward = forward
    if expected is None:
        played.graphs._run_without_waiting(2)
        assert len(played.seen) == 1
    else:
        with pytest.raises(RuntimeError, match=message) as caught:
            played.graphs._run_without_waiting(2)
        assert caught.type is expected
    assert switch.modes == ["default", "error", "default"]


def test_an_engine_whose_layers_wait_has_no_graphs(caplog):
    tried = []

    def capture(loaded, sizes):
        tried.append(sizes)
        if broken:
            raise CannotBeCaptured("a layer waits")
        return None, 1000

    for broken in (False, True):
        runner = SimpleNamespace(_capture=capture, _capture_sizes=[1, 4, 8], _prefixes=None)
        num_bytes = ModelRunner._graph_bytes(runner, None)
        assert num_bytes == (0 if broken else 1000 + 3 * BYTES_OF_A_GRAPH)
        assert runner._capture_sizes == ([] if broken else [1, 4, 8])
        assert ("will not run as CUDA graphs: a layer waits" in caplog.text) == broken
    assert tried == [[8], [8]], "the largest is tried"


# --- one operation for everything -------------------------------------------------------------------------------------


def pool_of(tables: list[list[int]], lens: list[int], *, heads: int = 2, width: int = 16, dtype=torch.float32):
    """A poisoned pool in which sequences lie, and their keys and values contiguously."""
    g = torch.Generator().manual_seed(1)
    key_cache, value_cache = (torch.full((TRASH + 1, P, heads, width), 1e4, dtype=dtype) for _ in range(2))
    contexts = []
    for table, length in zip(tables, lens, strict=True):
        key, value = (torch.randn(length, heads, width, generator=g, dtype=dtype) for _ in range(2))
        slots = torch.tensor([slot_of(table, position) for position in range(length)])
        key_cache.view(-1, heads, width)[slots], value_cache.view(-1, heads, width)[slots] = key, value
        contexts.append((key, value))
    return key_cache, value_cache, contexts


def test_decodes_through_the_operation_and_padding_gets_zeros():
    """On a CPU, in float32; the compiler's FlexAttention is the same that a GPU gets, its kernel is not."""
    builder, tables = filled(windows=(None,))
    lens = [16, 20, 96, 50]
    key_cache, value_cache, contexts = pool_of(tables, lens)
    query = torch.randn(6, 6, 16, generator=torch.Generator().manual_seed(2))
    new = torch.zeros(6, 2, 16)
    for num_decodes in (4, 3, 1):
        step = Step(rows=tuple(row_of(row, lens[row] - 1) for row in range(num_decodes)))
        inputs = builder.build(step, torch.zeros(6, dtype=torch.int64))
        wishes = {"sinks": None, "scale": 0.37, "window": None, "softcap": None}
        out = flex_op.attend(query, new, new, key_cache, value_cache, inputs, **wishes)
        for row in range(num_decodes):
            expected, _ = attention(query[row : row + 1], *contexts[row], scale=0.37)
            # 8 (K + D) roundings of 2^-24, relative to values below 5, as in tests/test_attention.py.
            assert (out[row].double() - expected[0]).abs().max() <= 8 * (96 + 16) * 2.0**-24 * 5
        assert not out[num_decodes:].any()


def fives(query, *_, **__) -> tuple[Tensor, Tensor]:
    """Decodes whose values are all 5 and whose weights sum up to 1."""
    return torch.full_like(query, 5), query.new_zeros(query.shape[:2])


def test_what_the_operation_gives_lies_in_memory_as_the_compiler_was_told(monkeypatch):
    """Also behind a rotation of part of each head, which leaves heads outermost, as FlexAttention then does."""
    monkeypatch.setattr(flex, "attend_decode", fives)
    builder, _ = filled()
    key_cache, value_cache, _ = pool_of([[1]], [1])
    query = torch.randn(4, 2, 16).transpose(0, 1)
    step = Step(rows=(row_of(0, 3), row_of(1, 3)))
    inputs = builder.build(step, torch.zeros(2, dtype=torch.int64))
    wishes = {"sinks": None, "scale": 0.37, "window": None, "softcap": None}
    out = flex_op.attend(query, query, query, key_cache, value_cache, inputs, **wishes)
    promised = flex_op._shape_of_attend(query, query, query, key_cache, value_cache)
    assert fives(query)[0].stride() != promised.stride(), "or there is nothing to see"
    assert (out.shape, out.stride()) == (promised.shape, promised.stride())


class Kernels:
    """The libraries' kernels, played by the reference."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(dense, "_cudnn", self.cudnn)
        monkeypatch.setattr(dense, "_flash", self.flash)
        monkeypatch.setattr(dense, "attend_together", self.together)
        monkeypatch.setattr(dense, "_merge_two", merge_two)

    def cudnn(self, query, keys, values, scale, *, causal):
        """A causal mask that begins at the first key, or none."""
        self.calls.append(f"cudnn {len(query)} x {len(keys)}{' causal' if causal else ''}")
        assert not causal or len(query) == len(keys)
        return attention(query, keys, values, scale=scale) if causal else whole(query, keys, values, scale)

    def flash(self, query, keys, values, scale):
        self.calls.append(f"flash {len(query)} x {len(keys)}")
        return whole(query, keys, values, scale)

    def together(self, query, keys, values, query_start_loc, key_start_loc, lengths, *, scale, window=None):
        self.calls.append(f"together {[tuple(each) for each in lengths]}")
        assert query_start_loc.diff().tolist()[: len(lengths)] == [each.query_len for each in lengths]
        assert key_start_loc.diff().tolist()[: len(lengths)] == [each.seq_len for each in lengths]
        parts = [
            attention(query[q : q + n], keys[k : k + m], values[k : k + m], scale=scale, window=window)
            for q, k, (n, m) in zip(query_start_loc.tolist(), key_start_loc.tolist(), lengths, strict=False)
        ]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def whole(query, keys, values, scale):
    """Every query sees every key: one query at a time, as the last of its sequence."""
    parts = [attention(query[i : i + 1], keys, values, scale=scale) for i in range(len(query))]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


@pytest.mark.parametrize(
    ("num_queries", "context_len", "kernels"),
    [
        (3, 0, ["cudnn 4 x 4 causal"]),
        (4, 5, ["cudnn 4 x 4 causal", "flash 4 x 5"]),
        (5, 8, ["cudnn 8 x 8 causal", "cudnn 8 x 8"]),
        (7, 83, ["cudnn 8 x 8 causal", "cudnn 8 x 80", "flash 8 x 3"]),
    ],
)
def test_a_long_chunk_is_the_sum_of_its_parts(num_queries, context_len, kernels, monkeypatch):
    played = Kernels(monkeypatch)
    monkeypatch.setattr(dense, "QUERY_STEP", 4)
    monkeypatch.setattr(dense, "CONTEXT_STEP", 8)
    _, tables = filled()
    key_cache, value_cache, ((keys, values),) = pool_of([tables[2]], [90], dtype=torch.float64)
    query = torch.randn(num_queries, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    keys, values = keys[: context_len + num_queries], values[: context_len + num_queries]
    blocks = torch.tensor(tables[2][: -(-context_len // P)], dtype=torch.int32)
    out, lse = dense.attend_in_parts(
        query, keys[context_len:], values[context_len:], key_cache, value_cache, blocks, context_len, scale=0.3
    )
    expected_out, expected_lse = attention(query, keys, values, scale=0.3)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    assert played.calls == kernels


@pytest.mark.parametrize("num_decodes", [0, 1, 3])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(
    ("starts", "lens"),
    [((0, 0, 0), (3, 20, 40)), ((10, 0, 60), (3, 20, 30)), ((80, 30, 2), (16, 2, 40)), ((0, 16, 33), (96, 20, 60))],
)
def test_prompts_of_a_step_by_the_libraries_kernels(starts, lens, window, num_decodes, monkeypatch):
    """Fresh ones, ones with a context, long ones among short ones: each finds its own queries, keys and context."""
    monkeypatch.setattr(flex, "attend_decode", fives)
    played = Kernels(monkeypatch)
    monkeypatch.setattr(dense, "supports", lambda *_: True)
    for name, value in {"LONG_CHUNK": 16, "LONG_CONTEXT": 50, "QUERY_STEP": 4, "CONTEXT_STEP": 8}.items():
        monkeypatch.setattr(dense, name, value)
    builder = builder_of()
    _, (*_, fourth) = filled()
    order = [block for block in range(1, TRASH) if block not in fourth]
    tables = [[order.pop() for _ in range(6)] for _ in range(3)]
    key_cache, value_cache, contexts = pool_of(tables, [96] * 3, dtype=torch.float64)
    changes = [TableChange(0, tuple(table)) for table in tables]
    rows = [
        row_of(row, start, length, change)
        for row, (start, length, change) in enumerate(zip(starts, lens, changes, strict=True))
    ]
    builder.replay(Step(rows=tuple(rows)))
    query = torch.randn(
        num_decodes + sum(lens) + 2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    new = [[tensor[row.start : row.end] for tensor in contexts[i]] for i, row in enumerate(rows)]
    decoded, padded = (torch.zeros(count, 2, 16, dtype=torch.float64) for count in (num_decodes, 2))
    key, value = (torch.cat([decoded, *tensors, padded]) for tensors in zip(*new, strict=True))
    decodes = [row_of(3, 5)] * num_decodes
    inputs = builder.build(Step(rows=(*decodes, *rows)), torch.zeros(2, dtype=torch.int64))
    inputs = inputs._replace(plans={window: inputs.plans[None]})
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64)
    out = flex_op.attend(
        query, key, value, key_cache, value_cache, inputs, sinks=sinks, scale=0.3, window=window, softcap=None
    )
    decoded = out[:num_decodes].transpose(1, 2)  # [decodes, D, Hq]
    torch.testing.assert_close(decoded, (5 / (1 + sinks.exp())).expand(decoded.shape), rtol=1e-12, atol=0)
    first = num_decodes
    for i, row in enumerate(rows):
        keys, values = (tensor[: row.end] for tensor in contexts[i])
        tokens = slice(first, first + len(row.token_ids))
        expected, _ = attention(query[tokens], keys, values, scale=0.3, window=window, sinks=sinks)
        torch.testing.assert_close(out[tokens], expected, rtol=1e-12, atol=1e-12)
        first += len(row.token_ids)
    assert not out[first:].any()
    is_long = [n >= 16 and start + n >= 50 and window is None for start, n in zip(starts, lens, strict=True)]
    assert sum(" causal" in call for call in played.calls) == sum(is_long)


# --- who refuses what -------------------------------------------------------------------------------------------------


def loaded_of(device: str = "cuda", dtype=torch.bfloat16, kv_dtype=None):
    return SimpleNamespace(device=torch.device(device), dtype=dtype, kv_dtype=kv_dtype or dtype)


SERVED = AttentionCall(torch.nn.Identity(), LayerShape(8, 128, 128), None, num_heads=32)
NARROW = AttentionCall(torch.nn.Identity(), LayerShape(8, 24, 12), 7, num_heads=8)
FORMS = {
    "a GPU": ({}, loaded_of(), [SERVED], False, "flex", None),
    "float32": ({}, loaded_of(dtype=torch.float32), [SERVED], False, "flex", None),
    "eager": ({}, loaded_of(), [SERVED], True, "gathered", "eager or on a CPU"),
    "a CPU": ({}, loaded_of("cpu"), [SERVED], False, "fused", "eager or on a CPU"),
    "an eager CPU": ({}, loaded_of("cpu"), [SERVED], True, "gathered", "eager or on a CPU"),
    "int8": ({}, loaded_of(kv_dtype=torch.int8), [SERVED], False, "fused", "reads no cache of torch.int8 for a model"),
    "float64": ({}, loaded_of(dtype=torch.float64), [SERVED], False, "fused", "no cache of torch.float64"),
    "small blocks": ({"block_size": 8}, loaded_of(), [SERVED], False, "fused", "16 tokens or more, and hold 8"),
    "narrow values": ({}, loaded_of(), [SERVED, NARROW], False, "fused", "16 wide or more, and one is 12"),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_the_best_that_can_serve_the_model(name):
    config, loaded, calls, eager, expected, reason = FORMS[name]

    def chosen(form):
        return choose_form(EngineConfig(model="tiny", attention_form=form, **config), loaded, calls, eager=eager)

    assert chosen("auto") == expected
    assert (chosen("gathered"), chosen("fused")) == ("gathered", "fused"), "what is asked for is given"
    if reason is None:
        assert chosen("flex") == "flex"
    else:
        with pytest.raises(ValueError, match=f"attention_form='flex' cannot be used here: .*{reason}.*; use 'auto'"):
            chosen("flex")


@pytest.mark.parametrize(
    ("query_len", "seq_len", "head_dim", "window", "expected"),
    [
        (512, 4096, 128, None, True),
        (511, 4096, 128, None, False),
        (512, 4095, 128, None, False),
        (4096, 4096, 64, None, True),
        (512, 4096, 136, None, False),
        (512, 4096, 128, 4096, True),
        (512, 4096, 128, 4095, False),
    ],
)
def test_which_prompts_are_long(query_len, seq_len, head_dim, window, expected):
    assert dense.is_long(PromptLengths(query_len, seq_len), head_dim, window) is expected


def test_what_the_libraries_kernels_compute():
    def supported(head_dim=128, value_dim=None, dtype=torch.bfloat16, softcap=None, is_cuda=True):
        query = SimpleNamespace(shape=(4, 8, head_dim), dtype=dtype, is_cuda=is_cuda)
        return dense.supports(query, value_dim or head_dim, softcap)

    assert supported()
    assert supported(dtype=torch.float16)
    assert supported(head_dim=256)
    assert supported(head_dim=80)
    assert not supported(head_dim=264)
    assert not supported(head_dim=100)
    assert not supported(value_dim=64)
    assert not supported(dtype=torch.float32)
    assert not supported(softcap=30.0)
    assert not supported(is_cuda=False)


# --- values that are no numbers ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    seed=st.integers(0, 99),
    broken=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 6), st.sampled_from(["nan", "inf", "-inf"]))
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_value_is_stored_that_is_no_number_and_its_key_tells(seed, broken, dtype):
    g = torch.Generator().manual_seed(seed)
    key, value = torch.randn(5, 3, 8, generator=g).to(dtype), torch.randn(5, 3, 7, generator=g).to(dtype)
    value[0, 0] = torch.finfo(dtype).max
    for token, head, place, number in broken:
        value[token, head, place] = float(number)
    spoilt = torch.zeros(5, 3, dtype=torch.bool)
    for token, head, _, _ in broken:
        spoilt[token, head] = True
    stored_key, stored_value = finite_values(key, value)
    assert stored_key.dtype == stored_value.dtype == dtype
    assert stored_value.isfinite().all()
    assert torch.equal(stored_value, torch.where(value.isfinite(), value, 0))
    assert torch.equal(stored_key.isnan().all(dim=-1), spoilt), "its own sequence has to see it"
    assert torch.equal(stored_key[~spoilt], key[~spoilt])
