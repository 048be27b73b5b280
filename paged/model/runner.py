"""Runs Steps: the model with its pools, the batch builder and the sampler, on one device."""

from typing import NamedTuple

import torch
from torch import Tensor

from paged.batch import Batch, BatchBuilder
from paged.kv_pool import (
    LayerCache,
    allocate_layer,
    allocate_on_host,
    bytes_per_block,
    copy_blocks,
    storage_bytes,
    swap_blocks,
)
from paged.model.calibration import calibrate
from paged.model.largest_steps import largest_steps
from paged.model.loading import LoadedModel
from paged.model.memory_budget import num_blocks_for, num_host_blocks_for
from paged.model.memory_ledger import MemoryLedger, open_ledger
from paged.model.memory_profile import TRIAL_BLOCKS, MemoryNeeds, measure_needs, release_unused
from paged.model.paged_attention import find_attention
from paged.sampling import TokenLogprobs, logprobs_of, sample, token_logprobs
from paged.step import Step

# Shapes are dynamic, but sizes 0 and 1 and one or two attention groups still make graphs of their own. Past its limit
# the compiler would raise (fullgraph), so leave room for all of them.
RECOMPILE_LIMIT = 64
# With dynamic shapes this analysis may end the compilation with a bare AssertionError (pytorch issues 181563, 197077).
COMPILE_OPTIONS = {"triton.coalesce_tiling_analysis": False}


# Where the attention function finds the tensors of a layer's cache, in their order.
BUFFERS = ("key_cache", "value_cache", "key_scale", "value_scale")


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


class ModelRunner:
    """A model over a paged KV cache.

    Args:
        loaded: the model, as `load_model` gives it.

    Attributes:
        num_blocks, num_host_blocks: blocks of the pool and of the one in host memory, null and trash blocks included.
        memory_ledger: where the memory goes.
        caches: of every layer, all tensors that are indexed by block: key_cache [N, P, Hkv, D], value_cache
            [N, P, Hkv, Dv]; in int8 also key_scale and value_scale [N, P, Hkv].
        attention_form: "gathered" or "fused".
        sliding_window: keys further back than this are read by no layer; None if some layer reads all.
        most_gather_bytes: most bytes that gathered copies of K and V took in one layer so far, modelled.

    Raises:
        UnsupportedModel: a layer is not paged.
        ValueError: the pool would be too small.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._model, config = loaded.model, loaded.config
        assert config.max_model_len is not None, "filled in when the model was loaded"
        self.most_gather_bytes = 0
        self._eager = loaded.device.type == "cpu" if config.enforce_eager is None else config.enforce_eager
        self.attention_form = config.attention_form
        if self.attention_form == "auto":
            self.attention_form = "gathered" if self._eager else "fused"

        self._calls = find_attention(self._model)
        windows = [call.window for call in self._calls if call.window is not None]
        self.sliding_window = max(windows) if len(windows) == len(self._calls) else None
        shapes = [call.shape for call in self._calls]
        # Attention is computed in float32 at least, so that is what gathered copies are made in.
        gathered_dtype = torch.promote_types(loaded.dtype, torch.float32)
        self._most_gathered_bytes_of_a_block = max(
            bytes_per_block([shape], config.block_size, gathered_dtype) for shape in shapes
        )
        if loaded.kv_dtype == torch.float8_e4m3fn:
            calibrate(loaded)
        self._model.set_attn_implementation(f"paged_{self.attention_form}")
        if not self._eager:
            self._compile_layers()
        self._builder = BatchBuilder(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            vocab_size=loaded.vocab_size,
            device=loaded.device,
            fine_groups=self._eager and self.attention_form == "gathered",
        )

        needs = self._measure(loaded)
        self.num_blocks = num_blocks_for(config, shapes, loaded.kv_dtype, needs)
        self._allocate(self.num_blocks, loaded)
        self.num_host_blocks = num_host_blocks_for(config, bytes_per_block(shapes, config.block_size, loaded.kv_dtype))
        self._host_caches = [allocate_on_host(cache, self.num_host_blocks) for cache in self.caches]
        self.most_gather_bytes = 0
        self.memory_ledger: MemoryLedger = open_ledger(
            config,
            needs,
            num_blocks=self.num_blocks,
            kv_pool=self.kv_cache_bytes,
            host_swap_pool=storage_bytes(tensor for cache in self._host_caches for tensor in cache),
            host_block_tables=0 if loaded.memory_at_start is None else self.block_table_bytes,
        )

    def _measure(self, loaded: LoadedModel) -> MemoryNeeds:
        """What is taken beside the pool: on a GPU the largest steps are run on a pool that is just large enough."""
        config, on_cpu = loaded.config, loaded.memory_at_start is None

        def run_largest_steps() -> None:
            self._allocate(TRIAL_BLOCKS, loaded)
            for step in largest_steps(config):
                self.run(step)
            self._builder.reset()

        needs = measure_needs(
            config,
            loaded.device,
            loaded.memory_at_start,
            weights=[*self._model.parameters(), *self._model.buffers()],
            buffers=self._builder.sampling_state_bytes + (self.block_table_bytes if on_cpu else 0),
            block_bytes=bytes_per_block([call.shape for call in self._calls], config.block_size, loaded.kv_dtype),
            num_pool_tensors=len(self._calls) * (4 if loaded.kv_dtype == torch.int8 else 2),
            run_largest_steps=run_largest_steps,
        )
        # So that the pool gets pages of its own, and not those that steps will want again.
        release_unused(loaded.device)
        return needs

    def _allocate(self, num_blocks: int, loaded: LoadedModel) -> None:
        """Give every attention module a cache of so many blocks; what it had is let go."""
        self.caches: list[LayerCache] = []
        for call in self._calls:
            try:
                cache = allocate_layer(call.shape, num_blocks, loaded.config.block_size, loaded.kv_dtype, loaded.device)
            except RuntimeError as error:
                size = bytes_per_block([c.shape for c in self._calls], loaded.config.block_size, loaded.kv_dtype)
                raise ValueError(
                    f"a pool of {num_blocks:,} blocks takes {num_blocks * size:,} bytes, more than {loaded.device} has "
                    "left; give it fewer (num_gpu_blocks_override, kv_cache_memory_bytes, gpu_memory_utilization)"
                ) from error
            for name, tensor in zip(BUFFERS, cache, strict=False):  # only int8 has the last two
                call.module.register_buffer(name, tensor, persistent=False)
            self.caches.append(cache)

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes that the pool takes, measured: those of the tensors' storages."""
        return storage_bytes([tensor for cache in self.caches for tensor in cache])

    @property
    def block_table_bytes(self) -> int:
        """Bytes of the persistent block tables."""
        return self._builder.block_table_bytes

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Run one step: the model, the sampler, and log probabilities for the rows that want them."""
        self._move_blocks(step)
        batch = self._builder.build(step)
        if self.attention_form == "gathered":
            blocks = max(group.block_tables.numel() for group in batch.attention.groups)
            self.most_gather_bytes = max(self.most_gather_bytes, blocks * self._most_gathered_bytes_of_a_block)
        num_samples = len(batch.sampled)
        logits = self._logits(batch)
        token_ids, broken = sample(logits[:num_samples], batch.sampling)
        self._builder.count(batch, token_ids)

        logprobs: list[TokenLogprobs] | None = None
        if batch.num_logprobs is not None:
            found = logprobs_of(logits[:num_samples], token_ids, batch.num_logprobs)
            logprobs = token_logprobs(found, token_ids)
        prompt_logprobs: list[TokenLogprobs] = []
        if batch.num_prompt_logprobs is not None:
            found = logprobs_of(logits[num_samples:], batch.prompt_targets, batch.num_prompt_logprobs)
            prompt_logprobs = token_logprobs(found, batch.prompt_targets)
        tokens = [None if bad else token for token, bad in zip(token_ids.tolist(), broken.tolist(), strict=True)]
        return StepResult(tokens, logprobs, prompt_logprobs)

    def _move_blocks(self, step: Step) -> None:
        """Copy blocks before the step writes any. Swapping out comes first: the blocks may be others' targets then."""
        if step.swap_outs:
            swap_blocks(self.caches, self._host_caches, [(copy.source, copy.target) for copy in step.swap_outs])
        if step.swap_ins:
            swap_blocks(self._host_caches, self.caches, [(copy.source, copy.target) for copy in step.swap_ins])
        if step.copies:
            copy_blocks(self.caches, [(copy.source, copy.target) for copy in step.copies])

    def _logits(self, batch: Batch) -> Tensor:
        """[S + Q, V]: the logits of the tokens that are sampled from, then those of prompt tokens that are scored."""
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            output = self._model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                attention_inputs=batch.attention,
                logits_to_keep=torch.cat([batch.sampled, batch.prompt_tokens]),
                use_cache=False,
            )
        logits: Tensor = output.logits[0]
        return logits

    def _compile_layers(self) -> None:
        """Compile each decoder layer, the parent of its attention module: one graph serves them all."""
        names = {id(module): name for name, module in self._model.named_modules()}
        for call in self._calls:
            layer = self._model.get_submodule(names[id(call.module)].rpartition(".")[0])
            layer.compile(fullgraph=True, dynamic=True, options=COMPILE_OPTIONS)
