"""How many blocks the pool gets, and the errors when there is no room."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from paged.blocks import blocks_for
from paged.config import EngineConfig
from paged.kv_pool import LayerShape, bytes_per_block
from paged.model.paged_attention import find_attention

CPU_POOL_BYTES = 2 * 2**30
# Blocks that no request can hold: the null and the trash block.
OVERHEAD_BLOCKS = 2


def num_blocks_for(config: EngineConfig, model: PreTrainedModel, layers: Sequence[LayerShape]) -> int:
    """Blocks of the pool, the null and the trash block included.

    In this order: `num_gpu_blocks_override` as it is; what `kv_cache_memory_bytes` holds; on a GPU, what
    `gpu_memory_utilization` leaves beside the weights and the largest step; on a CPU 2 GiB. The last two never take
    more than `max_num_seqs` sequences of `max_model_len` could fill.

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
    block_bytes = bytes_per_block(layers, config.block_size, model.dtype)
    longest = blocks_for(config.max_model_len, config.block_size)
    if config.kv_cache_memory_bytes is not None:
        available = config.kv_cache_memory_bytes
        num_blocks = available // block_bytes
    else:
        on_gpu = model.device.type == "cuda"
        available = _free_after_largest_step(config, model) if on_gpu else CPU_POOL_BYTES
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


def _free_after_largest_step(config: EngineConfig, model: PreTrainedModel) -> int:
    """Bytes of the GPU that are left for the pool: the share allowed, less what others and the largest step take."""
    assert config.max_num_batched_tokens is not None, "filled in when the model was loaded"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    find_attention(model, config.max_num_batched_tokens)
    workspace = torch.cuda.max_memory_allocated(model.device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    return int(total * config.gpu_memory_utilization) - (total - free) - workspace
