"""Runs Steps: the model with its pools, the batch builder and the sampler, on one device."""

import logging
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paged.batch import AttentionInputs, Batch, BatchBuilder
from paged.config import EngineConfig
from paged.kv_pool import LayerCache, bytes_per_block, storage_bytes
from paged.model.attention_form import choose_form
from paged.model.calibration import calibrate
from paged.model.decode_graphs import CannotBeCaptured, DecodeGraphs, capture_sizes, captures_in_order
from paged.model.flex_inputs import FlexInputs, FlexInputsBuilder
from paged.model.fused_projections import fuse_projections
from paged.model.largest_steps import largest_steps
from paged.model.loading import LoadedModel
from paged.model.memory_budget import most_blocks_for_flex, num_blocks_for, num_host_blocks_for
from paged.model.memory_ledger import MemoryLedger, open_ledger
from paged.model.memory_profile import TRIAL_BLOCKS, MemoryNeeds, measure_needs, release_unused, snapshot
from paged.model.paged_attention import find_attention
from paged.model.pools import Pools
from paged.model.shared_prefix import PrefixFinder
from paged.sampling import Logprobs, TokenLogprobs, logprobs_of, sample, token_logprobs
from paged.step import Step
from paged.transfer import to_host

logger = logging.getLogger(__name__)

# Shapes are dynamic, but sizes 0 and 1 and one or two attention groups still make graphs of their own. Past its limit
# the compiler would raise (fullgraph), so leave room for all of them.
RECOMPILE_LIMIT = 64
# With dynamic shapes this analysis may end the compilation with a bare AssertionError (pytorch issues 181563, 197077).
COMPILE_OPTIONS = {"triton.coalesce_tiling_analysis": False}
# What a captured graph takes beside the memory that all share: its kernels' arguments.
BYTES_OF_A_GRAPH = 4 * 2**20


class StepResult(NamedTuple):
    """What a step brought.

    Attributes:
        token_ids: a token for each of its samples, in order; None where the logits were no numbers.
        logprobs: of each of them, or None if no row wants any.
        prompt_logprobs: of the prompt tokens that are scored, row after row.
    """

    token_ids: list[int | None]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was handed to the device, which may still be running it.

    Attributes:
        sampled: [2, S] int64 on the host, a token for each of its samples, and 1 for those whose logits were no
            numbers, or 0; not there before `copied`.
        copied: when they have arrived; None on a CPU, which has run the step already.
        logprobs, prompt_logprobs: what some row wants to know of the sampled tokens and of its prompt's, and those
            tokens, still on the device; None if no row does.
    """

    sampled: Tensor
    copied: torch.cuda.Event | None
    logprobs: tuple[Logprobs, Tensor] | None
    prompt_logprobs: tuple[Logprobs, Tensor] | None

    def result(self) -> StepResult:
        """What the step brought; waits for it, and for no step behind it if no row wants log probabilities."""
        if self.copied is not None:
            self.copied.synchronize()
        return StepResult(
            [None if bad else token for token, bad in zip(*self.sampled.tolist(), strict=True)],
            None if self.logprobs is None else token_logprobs(*self.logprobs),
            [] if self.prompt_logprobs is None else token_logprobs(*self.prompt_logprobs),
        )


class ModelRunner:
    """A model over a paged KV cache.

    Args:
        loaded: the model, as `load_model` gives it.

    Attributes:
        num_blocks, num_host_blocks: blocks of the pool and of the one in host memory, null and trash blocks included.
        memory_ledger: where the memory goes.
        pools: the layers' pools, and the one in host memory.
        attention_form: "gathered", "fused" or "flex".
        graphs: CUDA graphs of decode steps; None if there are none.
        sliding_window: keys further back than this are read by no layer; None if some layer reads all.
        num_cascade_steps: steps so far in which a prefix that rows share was read once (paged/attention/cascade.py).
        most_gather_bytes: most bytes that gathered copies of K and V took in one layer so far, modelled.

    Raises:
        UnsupportedModel: a layer is not paged.
        ValueError: the pool would be too small.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._model, config = loaded.model, loaded.config
        self._eager = loaded.device.type == "cpu" if config.enforce_eager is None else config.enforce_eager
        self._calls = find_attention(self._model)
        self.attention_form = choose_form(config, loaded, self._calls, eager=self._eager)
        windows = [call.window for call in self._calls if call.window is not None]
        self.sliding_window = max(windows) if len(windows) == len(self._calls) else None
        self._shapes = [call.shape for call in self._calls]
        # Attention is computed in float32 at least, so that is what gathered copies are made in.
        gathered_dtype = torch.promote_types(loaded.dtype, torch.float32)
        self._most_gathered_bytes_of_a_block = max(
            bytes_per_block([shape], config.block_size, gathered_dtype) for shape in self._shapes
        )
        self._prepare_layers(loaded)
        self._builder = self._make_builder(loaded)
        self._flex = self._make_flex_builder(loaded) if self.attention_form == "flex" else None
        self._prefixes = self._make_prefix_finder(loaded)
        self.pools = Pools(
            self._calls,
            block_size=config.block_size,
            dtype=loaded.kv_dtype,
            device=loaded.device,
            in_inference_mode=self._flex is not None,
        )
        self.graphs: DecodeGraphs | None = None
        self._capture_sizes = [] if self._flex is None else _capture_sizes(config)
        self._capture_seconds = config.cudagraph_capture_seconds

        # From here on in the order in which one thing decides the next: what steps need, then how large the pool is,
        # and then the graphs, which hold the pool's addresses.
        started = time.perf_counter()
        self.most_gather_bytes = self.num_cascade_steps = 0
        needs = self._measure(loaded)
        self.most_gather_bytes = self.num_cascade_steps = 0  # by requests, not by what was run to measure
        measured = time.perf_counter()
        self.memory_ledger: MemoryLedger = self._open_pools(loaded, needs)
        if self._capture_sizes:
            self.graphs, graph_bytes = self._capture(loaded, self._capture_sizes)
            self.memory_ledger = self.memory_ledger.with_graphs(graph_bytes)
        self.start_up_seconds = {
            "profile and compile": measured - started,
            "pool and capture": time.perf_counter() - measured,
        }

    def _prepare_layers(self, loaded: LoadedModel) -> None:
        """Make the model's layers call our attention, and compile them unless the engine is eager."""
        if loaded.kv_dtype == torch.float8_e4m3fn:
            calibrate(loaded)
        self._model.set_attn_implementation(f"paged_{self.attention_form}")
        if self._eager:
            return
        fuse_projections(self._model)
        # Each decoder layer, the parent of its attention module: one graph serves them all.
        names = {id(module): name for name, module in self._model.named_modules()}
        for call in self._calls:
            layer = self._model.get_submodule(names[id(call.module)].rpartition(".")[0])
            layer.compile(fullgraph=True, dynamic=True, options=COMPILE_OPTIONS)

    def _make_builder(self, loaded: LoadedModel) -> BatchBuilder:
        """What turns Steps into tensors."""
        config = loaded.config
        assert config.max_model_len is not None, "filled in when the model was loaded"
        return BatchBuilder(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            vocab_size=loaded.vocab_size,
            device=loaded.device,
            fine_groups=self._eager and self.attention_form == "gathered",
            with_groups=self.attention_form != "flex",
        )

    def _make_flex_builder(self, loaded: LoadedModel) -> FlexInputsBuilder:
        """What keeps block tables on the device, for the flex form."""
        config = loaded.config
        assert config.max_model_len is not None, "filled in when the model was loaded"
        return FlexInputsBuilder(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            num_kv_heads=max(shape.num_kv_heads for shape in self._shapes),
            group=max(call.num_heads // call.shape.num_kv_heads for call in self._calls),
            windows=[call.window for call in self._calls],
            device=loaded.device,
        )

    def _make_prefix_finder(self, loaded: LoadedModel) -> PrefixFinder | None:
        """What finds the prefixes that rows share; None where no layer could make use of one."""
        config = loaded.config
        calls = [call for call in self._calls if call.window is None]
        if self._flex is None or not config.enable_cascade_attention or not calls:
            return None
        return PrefixFinder(
            self._builder.block_tables,
            block_size=config.block_size,
            group=max(call.num_heads // call.shape.num_kv_heads for call in calls),
            block_bytes=min(bytes_per_block([call.shape], config.block_size, loaded.kv_dtype) for call in calls),
        )

    def _new_graphs(self) -> DecodeGraphs:
        assert self._flex is not None, "only this form is captured"
        with_cascade = self._prefixes is not None
        return DecodeGraphs(self._forward, self._flex, self._builder.last_token_ids, with_cascade=with_cascade)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Compile what graphs need; the time that takes is part of what they may take."""
        if self._capture_sizes:
            started = time.perf_counter()
            self._new_graphs().warm_up(self._capture_sizes, seconds=self._capture_seconds)
            self._capture_seconds = max(0.0, self._capture_seconds - (time.perf_counter() - started))

    @torch.inference_mode()
    def _capture(self, loaded: LoadedModel, sizes: list[int]) -> tuple[DecodeGraphs, int]:
        """CUDA graphs of decode steps over the pool that is there now, and the bytes they take."""
        before = snapshot(loaded.device)
        graphs = self._new_graphs()
        graphs.capture(sizes, seconds=self._capture_seconds)
        release_unused(loaded.device)
        after = snapshot(loaded.device)
        assert before is not None, "this form runs on a GPU"
        assert after is not None, "this form runs on a GPU"
        return graphs, max(0, before.free - after.free)

    def _graph_bytes(self, loaded: LoadedModel) -> int:
        """What CUDA graphs will take, from one that is captured for a try; if none can be, there will be none."""
        try:
            # All graphs share one memory, which the largest fills; each takes a little of its own.
            _, num_bytes = self._capture(loaded, self._capture_sizes[-1:])
        except CannotBeCaptured as error:
            logger.warning("decode steps will not run as CUDA graphs: %s", error)
            self._capture_sizes = []
            return 0
        num_graphs = len(captures_in_order(self._capture_sizes, with_cascade=self._prefixes is not None))
        return num_bytes + num_graphs * BYTES_OF_A_GRAPH

    def _measure(self, loaded: LoadedModel) -> MemoryNeeds:
        """What is taken beside the pool: on a GPU the largest steps are run on a pool that is just large enough."""
        config, on_cpu = loaded.config, loaded.memory_at_start is None

        def run_largest_steps() -> None:
            self._allocate(TRIAL_BLOCKS)
            for step in largest_steps(config):
                self.run(step)
            self._builder.reset()

        on_device = [self._builder.last_token_ids] + ([] if self._flex is None else [self._flex.block_tables])
        needs = measure_needs(
            config,
            loaded.device,
            loaded.memory_at_start,
            weights=[*self._model.parameters(), *self._model.buffers()],
            buffers=self._builder.sampling_state_bytes
            + (self.block_table_bytes if on_cpu else storage_bytes(on_device)),
            block_bytes=self.pools.block_bytes,
            num_pool_tensors=self.pools.num_tensors,
            run_largest_steps=run_largest_steps,
            warm_up=self._warm_up,
        )
        if self._capture_sizes:
            needs = replace(needs, graphs=self._graph_bytes(loaded))
        # So that the pool gets pages of its own, and not those that steps will want again.
        release_unused(loaded.device)
        return needs

    def _open_pools(self, loaded: LoadedModel, needs: MemoryNeeds) -> MemoryLedger:
        """The pool, as large as the needs leave room for, the one in host memory, and the ledger of it all."""
        config = loaded.config
        most_blocks = None if self._flex is None else most_blocks_for_flex(self._shapes, config.block_size)
        self.num_blocks = num_blocks_for(config, self._shapes, loaded.kv_dtype, needs, most_blocks=most_blocks)
        self._allocate(self.num_blocks)
        self.num_host_blocks = num_host_blocks_for(config, self.pools.block_bytes)
        self.pools.allocate_on_host(self.num_host_blocks)
        return open_ledger(
            config,
            needs,
            num_blocks=self.num_blocks,
            kv_pool=self.kv_cache_bytes,
            host_swap_pool=self.pools.num_host_bytes,
            host_block_tables=0 if loaded.memory_at_start is None else self.block_table_bytes,
            most_blocks=most_blocks,
        )

    def _allocate(self, num_blocks: int) -> None:
        self.pools.allocate(num_blocks)
        if self._flex is not None:
            self._flex.set_trash_block(num_blocks - 1)

    @property
    def num_graph_steps(self) -> int:
        """Steps that were run as a CUDA graph so far, instead of one kernel at a time."""
        return 0 if self.graphs is None else self.graphs.num_steps

    @property
    def caches(self) -> list[LayerCache]:
        """Of every layer, all tensors that are indexed by block (`Pools.caches`)."""
        return self.pools.caches

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes that the pool takes, measured."""
        return self.pools.num_bytes

    @property
    def block_table_bytes(self) -> int:
        """Bytes of the persistent block tables."""
        return self._builder.block_table_bytes

    def run(self, step: Step) -> StepResult:
        """Run one step and wait for what it brings."""
        return self.launch(step).result()

    @torch.inference_mode()
    def launch(self, step: Step) -> StepInFlight:
        """Hand one step to the device: the model, the sampler, and log probabilities for the rows that want them.

        A GPU is not waited for, so that the host can plan and launch the next step meanwhile. (Moving blocks to or from
        the host's pool does wait.) Steps run in the order in which they are launched.
        """
        self.pools.move_blocks(step)
        self._builder.replay(step)
        if self._flex is not None:
            self._flex.replay(step)
        first_blocks = None if self._prefixes is None else self._prefixes.first_blocks(step)
        self.num_cascade_steps += first_blocks is not None
        logits: Tensor | None = None
        if self.graphs is not None and self.graphs.fits(step):
            logits, sampled = self.graphs.run(step, first_blocks)
            if self._builder.takes_largest(step):
                return StepInFlight(*_on_its_way_to_host(sampled), None, None)
        batch = self._builder.tensors(step)
        if self.attention_form == "gathered":
            blocks = max(group.block_tables.numel() for group in batch.attention.groups)
            self.most_gather_bytes = max(self.most_gather_bytes, blocks * self._most_gathered_bytes_of_a_block)
        if logits is None:
            logits = self._logits(step, batch, first_blocks)
        num_samples = len(batch.sampled)
        token_ids, broken = sample(logits[:num_samples], batch.sampling)
        self._builder.count(batch, token_ids)
        on_host = _on_its_way_to_host(torch.stack([token_ids, broken]))

        logprobs = prompt_logprobs = None
        if batch.num_logprobs is not None:
            logprobs = (logprobs_of(logits[:num_samples], token_ids, batch.num_logprobs), token_ids)
        if batch.num_prompt_logprobs is not None:
            targets = batch.prompt_targets
            prompt_logprobs = (logprobs_of(logits[num_samples:], targets, batch.num_prompt_logprobs), targets)
        return StepInFlight(*on_host, logprobs, prompt_logprobs)

    def _logits(self, step: Step, batch: Batch, first_blocks: np.ndarray | None) -> Tensor:
        """[S + Q, V]: the logits of the tokens that are sampled from, then those of prompt tokens that are scored."""
        wanted = torch.cat([batch.sampled, batch.prompt_tokens])
        if self._flex is None:
            return self._forward(batch.token_ids, batch.positions, batch.attention, wanted)
        token_ids, positions, slots = batch.token_ids, batch.positions, batch.attention.slot_mapping
        if len(token_ids) == 1:  # a size of 1 would make a graph of its own
            token_ids, positions = (torch.nn.functional.pad(x, (0, 1)) for x in (token_ids, positions))
            trash = self._flex.slots(torch.full_like(slots, self._flex.padded_row), torch.zeros_like(slots))
            slots = torch.cat([slots, trash])
        return self._forward(token_ids, positions, self._flex.build(step, slots, first_blocks), wanted)

    def _forward(
        self, token_ids: Tensor, positions: Tensor, inputs: AttentionInputs | FlexInputs, wanted: Tensor | int = 0
    ) -> Tensor:
        """The model: [T] tokens at their positions -> [W, V] logits of the wanted ones, 0 for all."""
        # Sizes that happen to be equal at the first call (three prompts, a pool of three blocks) need not be later. But
        # numbers (an epsilon, a scale) never change; taken for variables, they make the compiler begin a second time.
        with (
            torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, specialize_float=True),
            torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        ):
            output = self._model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                attention_inputs=inputs,
                logits_to_keep=wanted,
                use_cache=False,
            )
        logits: Tensor = output.logits[0]
        return logits


def _on_its_way_to_host(sampled: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The same numbers on the host, and when they are there; None if they are there already."""
    on_host = to_host(sampled)
    return on_host, torch.cuda.current_stream(sampled.device).record_event() if sampled.is_cuda else None


def _capture_sizes(config: EngineConfig) -> list[int]:
    """Batch sizes that decode steps are to be captured for."""
    sizes = config.cudagraph_capture_sizes
    return capture_sizes(config.max_num_seqs) if sizes is None else sorted(set(sizes))
