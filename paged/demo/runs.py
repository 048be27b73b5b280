"""The two runs of the demo, and what each did with its memory."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paged.config import EngineConfig
from paged.engine import Engine
from paged.memory.events import StepEvent
from paged.memory.plots import PoolHistory
from paged.memory.states import Frame, SlotState, Span, contiguous_frame, paged_frame, shares
from paged.outputs import RequestOutput
from paged.sampling_params import SamplingParams
from reference.engine import Prompt, ReferenceEngine, Run


@dataclass(frozen=True)
class Figures:
    """One column of the table.

    Attributes:
        kv_bytes: of the K and V tensors, measured.
        most_at_once: most requests that ran in one step and had not ended.
        live_average, live_fullest: share of the pool that held live tokens, over all steps and at the fullest.
        num_steps, num_computed_tokens, num_recomputed_tokens, num_output_tokens: counts.
        gather_scratch_bytes: most bytes that K and V gathered from blocks took in one layer, modelled (matrix
            products may make further copies, on both sides).
        block_table_bytes: of the block tables.
        seconds: of serving all requests, loading not included.
    """

    kv_bytes: int
    most_at_once: int
    live_average: float
    live_fullest: float
    num_steps: int
    num_computed_tokens: int
    num_recomputed_tokens: int
    num_output_tokens: int
    gather_scratch_bytes: int
    block_table_bytes: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Output tokens."""
        return self.num_output_tokens / self.seconds


class PagedRun:
    """All prompts through the paged engine, with a note of the pool at every step."""

    def __init__(self, config: EngineConfig, prompts: Sequence[Prompt]) -> None:
        self.engine = Engine(config)
        self.events: list[StepEvent] = self.engine.record_events()
        started = time.perf_counter()
        for prompt in prompts:
            params = SamplingParams(temperature=0, max_tokens=prompt.max_tokens, ignore_eos=prompt.ignore_eos)
            self.engine.add_request(prompt.request_id, prompt.token_ids, params)
        finished: dict[str, RequestOutput] = {}
        while self.engine.has_unfinished_requests:
            finished |= {output.request_id: output for output in self.engine.step() if output.finished}
        self.seconds = time.perf_counter() - started
        self.outputs = [finished[prompt.request_id] for prompt in prompts]
        self.token_ids = {output.request_id: output.outputs[0].token_ids for output in self.outputs}


def contiguous_history(run: Run, *, num_slots: int, row: int) -> PoolHistory:
    """The reference's pool, step by step."""
    final = {a.request_id: len(a.prompt_token_ids) + len(a.token_ids) - 1 for a in run.answers}
    frames = [
        contiguous_frame(
            [Span(h.first_slot, h.num_slots, h.num_tokens, final[h.request_id], h.finished) for h in step.held],
            num_slots=num_slots,
            smallest_gap=row,
        )
        for step in run.steps
    ]
    return PoolHistory(
        name=f"contiguous: rows of {row}, static batches",
        frames=frames,
        shares=_shares(frames),
        num_running=[step.num_running for step in run.steps],
        num_waiting=[step.num_waiting for step in run.steps],
        outcome=f"all {len(run.answers)} requests done after {len(run.steps):,} steps, {run.seconds:.1f} s",
    )


def paged_history(run: PagedRun) -> PoolHistory:
    """The paged pool, step by step."""
    # Of every sequence, all tokens but the last: nothing comes after that one, so it is never computed.
    final = {
        (output.request_id, answer.index): len(output.prompt_token_ids) + len(answer.token_ids) - 1
        for output in run.outputs
        for answer in output.outputs
    }
    num_blocks, block_size = run.engine.runner.num_blocks, run.engine.config.block_size
    frames = [
        paged_frame(event, num_blocks=num_blocks, block_size=block_size, num_final_tokens=final) for event in run.events
    ]
    recomputed = run.engine.scheduler.num_recomputed_tokens
    return PoolHistory(
        name=f"paged: blocks of {block_size}, continuous batching",
        frames=frames,
        shares=_shares(frames),
        num_running=[event.num_running for event in run.events],
        num_waiting=[event.num_waiting for event in run.events],
        outcome=f"all {len(run.outputs)} requests done after {len(run.events):,} steps, {run.seconds:.1f} s; "
        f"{recomputed:,} tokens computed twice",
    )


def contiguous_figures(engine: ReferenceEngine, run: Run, history: PoolHistory) -> Figures:
    """The left column. Nothing is gathered from blocks, and there is no block table."""
    return Figures(
        kv_bytes=engine.cache.num_bytes,
        most_at_once=max(history.num_running),
        live_average=float(history.shares[:, SlotState.TOKENS].mean()),
        live_fullest=float(history.shares[:, SlotState.TOKENS].max()),
        num_steps=len(run.steps),
        num_computed_tokens=sum(step.num_tokens for step in run.steps),
        num_recomputed_tokens=0,
        num_output_tokens=sum(len(answer.token_ids) for answer in run.answers),
        gather_scratch_bytes=0,
        block_table_bytes=0,
        seconds=run.seconds,
    )


def paged_figures(run: PagedRun, history: PoolHistory) -> Figures:
    """The right column."""
    runner, scheduler = run.engine.runner, run.engine.scheduler
    return Figures(
        kv_bytes=runner.kv_cache_bytes,
        most_at_once=max(history.num_running),
        live_average=float(history.shares[:, SlotState.TOKENS].mean()),
        live_fullest=float(history.shares[:, SlotState.TOKENS].max()),
        num_steps=len(run.events),
        num_computed_tokens=sum(event.num_tokens for event in run.events),
        num_recomputed_tokens=scheduler.num_recomputed_tokens,
        num_output_tokens=sum(len(output.outputs[0].token_ids) for output in run.outputs),
        gather_scratch_bytes=runner.most_gather_bytes,
        block_table_bytes=runner.block_table_bytes,
        seconds=run.seconds,
    )


def _shares(frames: Sequence[Frame]) -> npt.NDArray[np.float64]:
    return np.array([shares(frame) for frame in frames])
