"""CUDA graphs of decode steps: the whole forward pass of a batch as one launch.

A decode step of a model of 32 layers is some 400 kernels of a few microseconds each, and starting them one by one takes
the host longer than running them takes the GPU. Captured once, a graph starts them all together; but then every address
and every shape is fixed. So there is a graph for each of some batch sizes, a batch takes the next larger one, and what
changes from step to step (who decodes, how long everyone is) is copied into one small tensor that all of them read.
Everything else is computed on the device: slots, lists of blocks, positions, even the tokens that the step before has
sampled and the host has not seen yet.

Rows that pad a batch see nothing and write into the trash block.

Steps whose rows share a prefix (paged/attention/cascade.py) run other kernels, so they have graphs of their own, of
fewer sizes.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paged.model.flex_inputs import FlexInputs, FlexInputsBuilder
from paged.sampling import take_largest
from paged.step import Step
from paged.transfer import to_device

# token_ids [T], positions [T], inputs -> logits [T, V]
Forward = Callable[[Tensor, Tensor, FlexInputs], Tensor]


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that are captured, the more apart the larger, so that few graphs serve all and little is padded.

    A batch is padded with 7 rows at most up to 64, with 15 up to 256, and with 31 beyond.

    Example:
        >>> capture_sizes(100)
        [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def capture_order(sizes: Iterable[int]) -> list[int]:
    """The order in which they are captured, for when time runs out: the largest, which serves all; the powers of two,
    smallest first; then the others, largest first.

    Example:
        >>> capture_order([1, 2, 4, 8, 16, 24, 32, 40, 44])
        [44, 1, 2, 4, 8, 16, 32, 40, 24]
    """
    largest, *others = sorted(sizes, reverse=True)
    powers = sorted(size for size in others if size & (size - 1) == 0)
    return [largest, *powers, *(size for size in others if size not in powers)]


def cascade_sizes(sizes: Iterable[int]) -> list[int]:
    """Those among the captured sizes that are captured for shared prefixes too: powers of two from 8 on, the largest.

    Fewer rows would save little, and a row that pads the batch reads nothing here either.

    Example:
        >>> cascade_sizes(capture_sizes(100))
        [8, 16, 32, 64, 100]
    """
    sizes = sorted(sizes)
    return [size for size in sizes[:-1] if size >= 8 and size & (size - 1) == 0] + [s for s in sizes[-1:] if s > 1]


def captures_in_order(sizes: Iterable[int], *, with_cascade: bool) -> list[tuple[int, bool]]:
    """Which sizes are captured, whether for shared prefixes, in what order: first the largest of each kind.

    Example:
        >>> captures_in_order([1, 2, 8, 16], with_cascade=True)
        [(16, False), (16, True), (1, False), (2, False), (8, False), (8, True)]
    """
    sizes = list(sizes)
    ordinary = [(size, False) for size in capture_order(sizes)]
    shared = cascade_sizes(sizes) if with_cascade else []
    cascade = [(size, True) for size in capture_order(shared)] if shared else []
    return [*ordinary[:1], *cascade[:1], *ordinary[1:], *cascade[1:]]


def can_be_captured(step: Step) -> bool:
    """Whether a step is of the kind that is captured: every row computes one token and gets one."""
    others = [row for row in step.rows if len(row.token_ids) != 1 or len(row.samples) != 1 or row.prompt_targets]
    return not others


def _tuned_for(size: int) -> AbstractContextManager[object]:
    """How to compile: with one token a product is a sum, and a kernel made for its shape beats a library's."""
    return torch._inductor.config.patch(coordinate_descent_tuning=True) if size == 1 else nullcontext()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that all engines capture on: libraries keep a workspace for each stream, for ever."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class CannotBeCaptured(RuntimeError):
    """Something in the forward pass makes the host wait for the GPU, which a graph cannot hold."""


class Decoded(NamedTuple):
    """What a captured step of B rows gives.

    Attributes:
        logits: [B, V].
        sampled: [2, B] int64, the most likely tokens, which are the rows' latest tokens now; and 1 where the logits
            were no numbers, or 0.
    """

    logits: Tensor
    sampled: Tensor


class DecodeGraphs:
    """A forward pass, captured for several batch sizes.

    Args:
        forward: the model.
        inputs: the block tables on the device.
        last_token_ids: [rows + 1] int64, the latest token of each row, on the device.
        with_cascade: capture steps whose rows share a prefix, too.

    Attributes:
        sizes: batch sizes that are captured, in order.
        num_steps: steps that were run so far.
        cascade_sizes: those captured for steps whose rows share a prefix. The largest is the same.
    """

    def __init__(
        self, forward: Forward, inputs: FlexInputsBuilder, last_token_ids: Tensor, *, with_cascade: bool = False
    ) -> None:
        self.sizes: list[int] = []
        self.num_steps = 0
        self.cascade_sizes: list[int] = []
        self._with_cascade = with_cascade
        self._forward = forward
        self._inputs = inputs
        self._last_token_ids = last_token_ids
        # For each size, of ordinary steps and of those whose rows share a prefix.
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        # What the graphs give, one tensor for all of them: only one runs at a time.
        self._decoded = Decoded(torch.empty(0), torch.empty(0))
        # For each row of the batch: its row, its length, its token, whether the host knows that, and how many blocks it
        # leaves to the prefix part.
        self._batch = torch.zeros(5, 0, dtype=torch.int64)

    def warm_up(self, sizes: Sequence[int], *, seconds: float) -> None:
        """Run batches of the sizes that differ in kind, so that what they need compiled, tuned and loaded is.

        While kernels are tuned they want memory that nobody needs later, so this should be done before there is a pool
        that fills the GPU.

        Args:
            sizes: batch sizes that are to be captured.
            seconds: after so many no other is begun.
        """
        self._prepare(sizes)
        started = time.perf_counter()
        for size, cascade in captures_in_order(sizes, with_cascade=self._with_cascade):
            # How contexts are split, and so which kernels there are, changes with the powers of two.
            if size == max(sizes) or size & (size - 1) == 0:
                self._run_once(size, cascade=cascade)
            if time.perf_counter() - started > seconds:
                break

    def capture(self, sizes: Sequence[int], *, seconds: float) -> None:
        """Capture a graph for each size, as many as the time allows, and one of each kind at least.

        Args:
            sizes: batch sizes.
            seconds: after so many no other is begun.

        Raises:
            CannotBeCaptured: some layer waits for the GPU; nothing was captured then.
        """
        self._prepare(sizes)
        started, pool = time.perf_counter(), torch.cuda.graph_pool_handle()
        captures = captures_in_order(sizes, with_cascade=self._with_cascade)
        num_kinds = len({cascade for _, cascade in captures})
        for size, cascade in captures:
            if len(self._graphs) >= num_kinds and time.perf_counter() - started > seconds:
                break
            # Once without capturing: what is compiled, loaded or chosen at the first call must not be captured.
            self._run_once(size, cascade=cascade)
            if not self._graphs:
                self._run_without_waiting(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                self._run_batch(size, cascade=cascade)
            self._graphs[size, cascade] = graph
        self.sizes, self.cascade_sizes = (
            sorted(s for s, cascade in self._graphs if cascade == c) for c in (False, True)
        )

    def fits(self, step: Step) -> bool:
        """Whether a step can be run."""
        return bool(self.sizes) and len(step.rows) <= self.sizes[-1] and can_be_captured(step)

    def run(self, step: Step, first_blocks: np.ndarray | None = None) -> Decoded:
        """Run a step that fits, whose tables were replayed. What it gives is there until the next run.

        Args:
            step: the step.
            first_blocks: [B] int64, blocks of each row that are read as a shared prefix; None: there is none.
        """
        num_rows = len(step.rows)
        cascade = first_blocks is not None
        size = next(size for size in (self.cascade_sizes if cascade else self.sizes) if size >= num_rows)
        batch = np.zeros((5, size), np.int64)
        batch[0] = self._inputs.padded_row
        tokens = [row.token_ids[0] for row in step.rows]
        batch[0, :num_rows] = [row.row for row in step.rows]
        batch[1, :num_rows] = [row.start + 1 for row in step.rows]
        batch[2, :num_rows] = [token or 0 for token in tokens]
        batch[3, :num_rows] = [token is not None for token in tokens]
        if first_blocks is not None:
            batch[4, :num_rows] = first_blocks
        self._batch[:, :size].copy_(to_device(batch, self._batch.device), non_blocking=True)
        self._graphs[size, cascade].replay()
        self.num_steps += 1
        logits, sampled = self._decoded
        return Decoded(logits[:num_rows], sampled[:, :num_rows])

    @property
    def _stream(self) -> torch.cuda.Stream:
        return _capture_stream(self._last_token_ids.device)

    def _prepare(self, sizes: Sequence[int]) -> None:
        """Make the tensors that all graphs share."""
        self._batch = torch.zeros(5, max(2, *sizes), dtype=torch.int64, device=self._last_token_ids.device)
        self._batch[0] = self._inputs.padded_row
        self._decoded = Decoded(*(torch.empty_like(tensor) for tensor in self._forward_batch(max(sizes))))

    def _run_once(self, size: int, *, cascade: bool) -> None:
        """Run a batch without capturing it, where it will be captured."""
        current = torch.cuda.current_stream(self._last_token_ids.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _tuned_for(size):
            self._run_batch(size, cascade=cascade)
        current.wait_stream(self._stream)

    def _run_without_waiting(self, size: int) -> None:
        """Run a batch that ran before, with whatever makes the host wait as an error.

        In a capture it would be one as well, but a capture that breaks off leaves memory and stream in doubt. Experts
        of other dtypes than bfloat16 wait: transformers asks the GPU how many tokens each of them got.
        """
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._run_batch(size, cascade=False)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise CannotBeCaptured(f"a layer makes the host wait for the GPU: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def _run_batch(self, size: int, *, cascade: bool) -> None:
        """Run the first rows of the batch, and leave what they give where the others leave it."""
        logits, sampled = self._forward_batch(size, cascade=cascade)
        self._decoded.logits[:size].copy_(logits)
        self._decoded.sampled[:, :size].copy_(sampled)

    def _forward_batch(self, size: int, *, cascade: bool = False) -> Decoded:
        """The forward pass over the first rows of the batch."""
        rows, seq_lens, given, known, first_blocks = self._batch[:, :size]
        token_ids = torch.where(known > 0, given, self._last_token_ids[rows])
        positions = (seq_lens - 1).clamp(min=0)
        unused = self._batch[0]  # there are no prompts
        inputs = FlexInputs(
            slot_mapping=self._inputs.slots(rows, positions),
            plans=self._inputs.decode_plans(rows, seq_lens.int(), first_blocks),
            prefix=self._inputs.prefix_plan(rows, first_blocks) if cascade else self._inputs.no_prefix,
            host=torch.tensor([size, 0, self._inputs.num_prefix_splits(size) if cascade else 0]),
            block_tables=self._inputs.block_tables,
            prompt_slots=unused,
            query_start_loc=unused.int(),
            key_start_loc=unused.int(),
        )
        logits = self._forward(token_ids, positions, inputs)
        sampled = torch.stack(take_largest(logits))
        self._last_token_ids[rows] = sampled[0]
        return Decoded(logits, sampled)
