"""CUDA graphs of decode steps: the whole forward pass of a batch as one launch.

A decode step of a model of 32 layers is some 400 kernels of a few microseconds each, and starting them one by one takes
the host longer than running them takes the GPU. Captured once, a graph starts them all together; but then every address
and every shape is fixed. So there is a graph for each of some batch sizes, a batch takes the next larger one, and what
changes from step to step (who decodes, how long everyone is) is copied into one small tensor that all of them read.
Everything else is computed on the device: slots, lists of blocks, positions, even the tokens that the step before has
sampled and the host has not seen yet.

Rows that pad a batch see nothing and write into the trash block.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
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


def can_be_captured(step: Step) -> bool:
    """Whether a step is of the kind that is captured: every row computes one token and gets one."""
    return all(len(row.token_ids) == 1 and len(row.samples) == 1 and not row.prompt_targets for row in step.rows)


def _tuned_for(size: int) -> AbstractContextManager[object]:
    """How to compile: with one token a product is a sum, and a kernel made for its shape beats a library's."""
    return torch._inductor.config.patch(coordinate_descent_tuning=True) if size == 1 else nullcontext()


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

    Attributes:
        sizes: batch sizes that are captured, in order.
        num_steps: steps that were run so far.
    """

    def __init__(self, forward: Forward, inputs: FlexInputsBuilder, last_token_ids: Tensor) -> None:
        self.sizes: list[int] = []
        self.num_steps = 0
        self._forward = forward
        self._inputs = inputs
        self._last_token_ids = last_token_ids
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # What the graphs give, one tensor for all of them: only one runs at a time.
        self._decoded = Decoded(torch.empty(0), torch.empty(0))
        # For each row of the batch: its row, its length, its token, and whether the host knows that.
        self._batch = torch.zeros(4, 0, dtype=torch.int64)

    def capture(self, sizes: Sequence[int], *, seconds: float) -> None:
        """Capture a graph for each size, as many as the time allows, and one at least.

        Args:
            sizes: batch sizes.
            seconds: after so many no other is begun.

        Raises:
            CannotBeCaptured: some layer waits for the GPU; nothing was captured then.
        """
        device = self._last_token_ids.device
        self._batch = torch.zeros(4, max(2, *sizes), dtype=torch.int64, device=device)
        self._batch[0] = self._inputs.padded_row
        self._decoded = Decoded(*(torch.empty_like(tensor) for tensor in self._forward_batch(max(sizes))))
        started, pool, stream = time.perf_counter(), torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        for size in capture_order(sizes):
            if self._graphs and time.perf_counter() - started > seconds:
                break
            # Once without capturing: what is compiled, loaded or chosen at the first call must not be captured.
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream), _tuned_for(size):
                self._run_batch(size)
                if not self._graphs:
                    self._run_without_waiting(size)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._run_batch(size)
            self._graphs[size] = graph
        self.sizes = sorted(self._graphs)

    def fits(self, step: Step) -> bool:
        """Whether a step can be run."""
        return bool(self.sizes) and len(step.rows) <= self.sizes[-1] and can_be_captured(step)

    def run(self, step: Step) -> Decoded:
        """Run a step that fits, whose tables were replayed. What it gives is there until the next run."""
        num_rows = len(step.rows)
        size = next(size for size in self.sizes if size >= num_rows)
        batch = np.zeros((4, size), np.int64)
        batch[0] = self._inputs.padded_row
        for i, row in enumerate(step.rows):
            (token,) = row.token_ids
            batch[:, i] = row.row, row.end, token or 0, token is not None
        self._batch[:, :size].copy_(to_device(batch, self._batch.device), non_blocking=True)
        self._graphs[size].replay()
        self.num_steps += 1
        logits, sampled = self._decoded
        return Decoded(logits[:num_rows], sampled[:, :num_rows])

    def _run_without_waiting(self, size: int) -> None:
        """Run a batch that ran before, with whatever makes the host wait as an error.

        In a capture it would be one as well, but a capture that breaks off leaves memory and stream in doubt. Experts
        of other dtypes than bfloat16 wait: transformers asks the GPU how many tokens each of them got.
        """
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._run_batch(size)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise CannotBeCaptured(f"a layer makes the host wait for the GPU: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def _run_batch(self, size: int) -> None:
        """Run the first rows of the batch, and leave what they give where the others leave it."""
        logits, sampled = self._forward_batch(size)
        self._decoded.logits[:size].copy_(logits)
        self._decoded.sampled[:, :size].copy_(sampled)

    def _forward_batch(self, size: int) -> Decoded:
        """The forward pass over the first rows of the batch."""
        rows, seq_lens, given, known = self._batch[:, :size]
        token_ids = torch.where(known > 0, given, self._last_token_ids[rows])
        positions = (seq_lens - 1).clamp(min=0)
        unused = self._batch[0]  # there are no prompts
        inputs = FlexInputs(
            slot_mapping=self._inputs.slots(rows, positions),
            plans=self._inputs.decode_plans(rows, seq_lens.int()),
            host=torch.tensor([size, 0]),
            block_tables=self._inputs.block_tables,
            prompt_slots=unused,
            query_start_loc=unused.int(),
            key_start_loc=unused.int(),
        )
        logits = self._forward(token_ids, positions, inputs)
        sampled = torch.stack(take_largest(logits))
        self._last_token_ids[rows] = sampled[0]
        return Decoded(logits, sampled)
