"""What the attention layers of the flex form get: where to write, and who reads which blocks, on the device.

Block tables live on the device here, one row for each sequence, and a Step brings only what changed. From them and the
lengths, everything that FlexAttention wants is computed on the device, once for each step and kind of window, not once
for each layer.

Compiled layers see tensors whose shapes do not tell how many sequences of which kind a step has: one graph of a layer
serves every step. What the host knows (how many decodes, which prompts) goes along in a tensor in host memory, which an
operation that the compiler does not look into reads without waiting for the device.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paged.attention.cascade import PrefixPlan, num_tiles, plan_prefix
from paged.attention.dense import PromptLengths
from paged.attention.flex_kernel import COMPILE_OPTIONS, mark_sizes, run_compiled
from paged.attention.flex_plan import DecodePlan, num_splits_for, plan_decode
from paged.blocks import NULL_BLOCK, blocks_for
from paged.step import RowPlan, Step
from paged.transfer import to_device


class FlexInputs(NamedTuple):
    """What every attention layer gets, of T tokens: those of B decodes first, then those of the prompts.

    Attributes:
        slot_mapping: [T] int64.
        plans: for each kind of window, what the decodes read; without a window, what they read beside the prefix.
        prefix: what they read of a prefix that many of them share.
        host: in host memory, int64: the number of decodes, the number of prompts, the splits of the prefix (0: there is
            none, and `prefix` means nothing), then three numbers for each prompt: its row, the tokens computed now, the
            tokens seen by the last of them.
        block_tables: [rows + 1, M] int32.
        prompt_slots: [K] int64, the slots of all that the prompts see, one prompt after another.
        query_start_loc, key_start_loc: [prompts + 1] int32, where each prompt's queries and keys begin.
    """

    slot_mapping: Tensor
    plans: dict[int | None, DecodePlan]
    prefix: PrefixPlan
    host: Tensor
    block_tables: Tensor
    prompt_slots: Tensor
    query_start_loc: Tensor
    key_start_loc: Tensor


class Prompt(NamedTuple):
    """A prompt of a step, as the host knows it."""

    row: int
    lengths: PromptLengths


def read_host(host: Tensor) -> tuple[int, int, list[Prompt]]:
    """The number of decodes, the splits of their prefix, and the prompts of a step, from `FlexInputs.host`."""
    num_decodes, num_prompts, num_prefix_splits, *numbers = host.tolist()
    prompts = [Prompt(row, PromptLengths(*lengths)) for row, *lengths in zip(*[iter(numbers)] * 3, strict=True)]
    return num_decodes, num_prefix_splits, prompts[:num_prompts]


def plan_rows(
    block_tables: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    splits: Tensor,
    first_blocks: Tensor | None,
    block_size: int,
    window: int | None,
) -> DecodePlan:
    """`plan_decode` of some rows of all tables, in a form that can be compiled for all batches: 60 small operations.

    Args:
        block_tables: [rows, M].
        rows: [B] int64.
        seq_lens: [B] int32.
        splits: [S], whatever it holds. A number would be part of what is compiled; a size need not be.
        first_blocks, block_size, window: as in `plan_decode`.
    """
    return plan_decode(
        block_tables[rows],
        seq_lens,
        block_size=block_size,
        window=window,
        num_splits=len(splits),
        first_blocks=first_blocks,
    )


_compiled_plan_rows = torch.compile(plan_rows, fullgraph=True, options=COMPILE_OPTIONS)


class FlexInputsBuilder:
    """Block tables on the device, and what attention layers get of them.

    Args:
        max_num_seqs: R, the persistent rows.
        max_model_len: tokens of the longest sequence.
        block_size: P.
        num_kv_heads: most KV heads of a layer.
        group: most query heads of a layer for each of its KV heads.
        windows: the kinds of window that the model's layers have.
        device: where the tables are.

    Attributes:
        block_tables: [R + 1, M] int32. The last row is that of padded decodes; it begins with the trash block.
        no_prefix: what layers get where no prefix is shared.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_kv_heads: int,
        group: int,
        windows: Iterable[int | None],
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self._windows = sorted(set(windows), key=lambda window: window or 0)
        self._num_kv_heads, self._group = num_kv_heads, group
        self._device = device
        shape = (max_num_seqs + 1, blocks_for(max_model_len, block_size))
        self.block_tables = torch.full(shape, NULL_BLOCK, dtype=torch.int32, device=device)
        self._multiprocessors = 1
        if device.type == "cuda":
            self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        # Made as the plans of steps are made: tensors of inference mode are another kind to the compiler.
        with torch.inference_mode():
            counts, blocks = (torch.zeros(size, dtype=torch.int32, device=device) for size in (2, 4))
            self.no_prefix = PrefixPlan(counts, blocks, torch.zeros(2, dtype=torch.bool, device=device))

    @property
    def padded_row(self) -> int:
        """The row of padded decodes."""
        return len(self.block_tables) - 1

    def set_trash_block(self, block: int) -> None:
        """Say where padded decodes write: the pool's last block."""
        self.block_tables[self.padded_row, 0] = block

    def replay(self, step: Step) -> None:
        """Bring the tables up to date. Rows keep what their last sequence left: its lengths say what is in use."""
        changes = [(row.row, row.table_change) for row in step.rows if row.table_change is not None]
        if not changes:
            return
        # Lists: in most steps a few tables grow by one block, and arrays of one number would cost more than they hold.
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for row, change in changes:
            rows += [row] * len(change.blocks)
            columns += range(change.first_index, change.first_index + len(change.blocks))
            blocks += change.blocks
        packed = to_device(np.array([rows, columns, blocks], np.int64), self._device)
        self.block_tables[packed[0], packed[1]] = packed[2].int()

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The slots of tokens; rows and positions [T] int64 -> [T] int64."""
        blocks = self.block_tables[rows, positions // self.block_size]
        return blocks.long() * self.block_size + positions % self.block_size

    def decode_plans(self, rows: Tensor, seq_lens: Tensor, first_blocks: Tensor) -> dict[int | None, DecodePlan]:
        """What B decodes read, for each kind of window.

        Args:
            rows: [B] int64, on the device as the others.
            seq_lens: [B] int32.
            first_blocks: [B] int64, blocks at the beginning of each table that are read as a shared prefix, or 0.
                Layers with a window read all themselves: what they see begins elsewhere for each row.
        """
        num_blocks = self.block_tables.shape[1]
        num_splits = num_splits_for(len(rows), self._num_kv_heads, num_blocks, self._multiprocessors)
        splits = rows.new_empty(num_splits)
        plans = {}
        for window in self._windows:
            first = first_blocks if window is None else None
            arguments = self.block_tables, rows, seq_lens, splits, first, self.block_size, window
            if rows.is_cuda:
                mark_sizes([tensor for tensor in (rows, seq_lens, splits, first) if tensor is not None], (0,))
                plans[window] = DecodePlan(*run_compiled(_compiled_plan_rows, *arguments))
            else:
                plans[window] = plan_rows(*arguments)
        return plans

    def num_prefix_splits(self, batch: int) -> int:
        """Splits of a prefix that is shared by some of B rows; two at least, as a size of 1 would make new graphs."""
        tiles, num_blocks = num_tiles(batch, self._group), self.block_tables.shape[1]
        return max(2, num_splits_for(tiles, self._num_kv_heads, num_blocks, self._multiprocessors))

    def prefix_plan(self, rows: Tensor, first_blocks: Tensor) -> PrefixPlan:
        """What B decodes read of the prefix that some of them share; rows and first_blocks [B] int64."""
        return plan_prefix(
            self.block_tables[rows],
            first_blocks,
            num_splits=self.num_prefix_splits(len(rows)),
            num_tiles=num_tiles(len(rows), self._group),
        )

    def build(self, step: Step, slot_mapping: Tensor, first_blocks: np.ndarray | None = None) -> FlexInputs:
        """What the layers get in a step whose tables were replayed.

        Args:
            step: the step, rows with a single token first.
            slot_mapping: [T] int64, its slots.
            first_blocks: [decodes] int64, blocks of each decode that are read as a shared prefix; None: there is none.
        """
        decodes, prompts = step.rows[: step.num_single], step.rows[step.num_single :]
        # Sizes 0 and 1 would make graphs of their own, so nothing is ever shorter than 2.
        padding = max(0, 2 - len(decodes))
        rows = [row.row for row in decodes] + [self.padded_row] * padding
        seq_lens = [row.end for row in decodes] + [0] * padding
        shared = np.zeros(len(rows), np.int64) if first_blocks is None else np.pad(first_blocks, (0, padding))
        packed = to_device(np.array([rows, seq_lens, shared], np.int64), self._device)
        has_prefix = first_blocks is not None
        host = [len(decodes), len(prompts), self.num_prefix_splits(len(rows)) if has_prefix else 0]
        for row in prompts:
            host += [row.row, len(row.token_ids), row.end]
        slots, query_starts, key_starts = self._prompts(prompts)
        return FlexInputs(
            slot_mapping,
            self.decode_plans(packed[0], packed[1].int(), packed[2]),
            self.prefix_plan(packed[0], packed[2]) if has_prefix else self.no_prefix,
            torch.tensor(host),
            self.block_tables,
            slots,
            query_starts,
            key_starts,
        )

    def _prompts(self, prompts: tuple[RowPlan, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The slots of all that prompts see, and where queries and keys begin."""
        query_lens, seq_lens = (
            np.array(x, np.int64) for x in ([len(p.token_ids) for p in prompts], [p.end for p in prompts])
        )
        starts = np.zeros((2, max(2, len(prompts) + 1)), np.int64)
        starts[0, 1 : len(prompts) + 1], starts[1, 1 : len(prompts) + 1] = query_lens.cumsum(), seq_lens.cumsum()
        if len(prompts) == 0:
            slots = torch.zeros(2, dtype=torch.int64, device=self._device)
        else:
            owners = np.repeat(np.arange(len(prompts)), seq_lens)
            rows = np.array([p.row for p in prompts])[owners]
            positions = np.arange(len(owners)) - starts[1][owners]
            packed = to_device(np.stack([rows, positions]), self._device)
            slots = self.slots(packed[0], packed[1])
        # Tensors of their own: where in another one a view begins is something that the compiler looks at.
        query_starts, key_starts = (row.int() for row in to_device(starts, self._device))
        return slots, query_starts, key_starts
