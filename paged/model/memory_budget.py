"""How many blocks the pool gets, and the errors when there is no room."""

from collections.abc import Callable, Sequence

import torch

from paged.blocks import TableChange, blocks_for
from paged.config import EngineConfig
from paged.kv_pool import LayerShape, bytes_per_block
from paged.sampling_params import SamplingParams
from paged.step import Admission, RowPlan, Sample, Step
from paged.step_draft import MOST_PROMPT_TARGETS

CPU_POOL_BYTES = 2 * 2**30
# Blocks that no request can hold: the null and the trash block.
OVERHEAD_BLOCKS = 2


def num_blocks_for(
    config: EngineConfig,
    layers: Sequence[LayerShape],
    dtype: torch.dtype,
    device: torch.device,
    run_largest_steps: Callable[[], None],
) -> int:
    """Blocks of the pool, the null and the trash block included.

    In this order: `num_gpu_blocks_override` as it is; what `kv_cache_memory_bytes` holds; on a GPU, what
    `gpu_memory_utilization` leaves beside the weights and the largest step; on a CPU 2 GiB. The last two never take
    more than `max_num_seqs` sequences of `max_model_len` could fill.

    Args:
        config: the settings, `max_model_len` filled in.
        layers: what each layer keeps for a token.
        dtype, device: of the pool.
        run_largest_steps: called on a GPU, to see what memory is left beside the largest steps.

    Raises:
        ValueError: not even one block for a request, or not enough for one sequence of max_model_len.
    """
    assert config.max_model_len is not None, "filled in when the model was loaded"
    if config.num_gpu_blocks_override is not None:
        if config.num_gpu_blocks_override <= OVERHEAD_BLOCKS:
            raise ValueError(
                f"num_gpu_blocks_override={config.num_gpu_blocks_override} leaves no block for a request: the null and "
                f"the trash block take {OVERHEAD_BLOCKS}; give at least {OVERHEAD_BLOCKS + 1}"
            )
        return config.num_gpu_blocks_override
    block_bytes = bytes_per_block(layers, config.block_size, dtype)
    longest = blocks_for(config.max_model_len, config.block_size)
    if config.kv_cache_memory_bytes is not None:
        available = config.kv_cache_memory_bytes
        num_blocks = available // block_bytes
    else:
        on_gpu = device.type == "cuda"
        available = _left_on_gpu(config, device, run_largest_steps) if on_gpu else CPU_POOL_BYTES
        num_blocks = min(available // block_bytes, longest * config.max_num_seqs + OVERHEAD_BLOCKS)
    if num_blocks < longest + OVERHEAD_BLOCKS:
        fitting = max(0, num_blocks - OVERHEAD_BLOCKS) * config.block_size
        raise ValueError(
            f"one sequence of max_model_len={config.max_model_len} takes {longest} blocks of {block_bytes:,} bytes, "
            f"and with the null and the trash block {(longest + OVERHEAD_BLOCKS) * block_bytes:,} bytes; there are "
            f"{max(0, available):,}. Set max_model_len to at most {fitting}, or give the pool more memory "
            "(kv_cache_memory_bytes, gpu_memory_utilization)"
        )
    return int(num_blocks)


def num_host_blocks_for(config: EngineConfig, block_bytes: int) -> int:
    """Blocks of the pool in host memory that preempted requests are swapped to; 0 if they are not.

    What `swap_space` holds, but never more than `max_num_seqs` sequences of `max_model_len` could fill.

    Raises:
        ValueError: it does not hold one block.
    """
    if config.preemption_mode != "swap":
        return 0
    assert config.max_model_len is not None, "filled in when the model was loaded"
    num_blocks = int(config.swap_space * 2**30) // block_bytes
    if num_blocks <= OVERHEAD_BLOCKS:
        raise ValueError(
            f"swap_space={config.swap_space} GiB holds {num_blocks} blocks of {block_bytes:,} bytes, and the null and "
            f"the trash block take {OVERHEAD_BLOCKS}; give it more, or set preemption_mode='recompute'"
        )
    return min(num_blocks, blocks_for(config.max_model_len, config.block_size) * config.max_num_seqs + OVERHEAD_BLOCKS)


def largest_steps(config: EngineConfig) -> tuple[Step, Step]:
    """Two Steps that no other outgrows: prompts that fill the token budget, and decodes of sequences at full length.

    Both want log probabilities, as many as requests may have, and the prompts those of their own tokens too. (A beam
    search may want more than that, and swapping copies through memory of its own: what the share leaves holds that.)

    All block tables name block 1 alone, so that a pool of three blocks is enough to run them: what they compute is of
    no use, what memory they take is.
    """
    length, budget = config.max_model_len, config.max_num_batched_tokens
    assert length is not None, "filled in when the model was loaded"
    assert budget is not None, "filled in when the model was loaded"
    table = TableChange(0, (1,) * blocks_for(length, config.block_size))
    # The sampling that takes the most memory: it sorts.
    most = config.max_logprobs
    params = SamplingParams(temperature=1, top_k=2, top_p=0.5, logprobs=most, prompt_logprobs=most)
    admissions = tuple(Admission(row, params, seed=0) for row in range(config.max_num_seqs))

    def row(index: int, num_tokens: int) -> RowPlan:
        """The last tokens of a sequence, which see all of it."""
        return RowPlan(str(index), 0, index, length - num_tokens, (0,) * num_tokens, table, samples=(Sample(index),))

    sizes = [min(length, budget - first) for first in range(0, budget, length)][: config.max_num_seqs]
    prompts = tuple(row(index, size) for index, size in enumerate(sizes))
    num_targets = min(MOST_PROMPT_TARGETS, sizes[0])
    prompts = (prompts[0]._replace(prompt_targets=(0,) * num_targets), *prompts[1:])
    decodes = tuple(row(index, 1) for index in range(config.max_num_seqs))
    # Rows with a single token come first, as in every Step.
    prompts = tuple(sorted(prompts, key=lambda row: len(row.token_ids) > 1))
    return Step(prompts, admissions), Step(decodes, admissions)


def _left_on_gpu(config: EngineConfig, device: torch.device, run_largest_steps: Callable[[], None]) -> int:
    """Bytes of the GPU that are left for the pool.

    PyTorch keeps the memory that a step has used for the next one. So once the largest steps have run, what is in use
    is what will ever be, by weights, steps and other processes, and the pool may have the rest of the share allowed.
    """
    torch.cuda.empty_cache()
    run_largest_steps()
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization) - (total - free)
