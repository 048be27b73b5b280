"""How many blocks the pool gets, and the errors when there is no room.

Nothing here asks a device: what is there and what is needed comes as numbers (paged/model/memory_profile.py), and what
follows from them is a function of these and the settings.

`gpu_memory_utilization` means what it means in vLLM: a share of the GPU's whole memory, for this engine alone. What
other processes hold does not count against it, but has to leave that much free when the engine starts. So two engines
with 0.45 each go together, and one with 0.9 beside another process that holds a fifth is refused at start.
"""

import math
from collections.abc import Sequence

import torch

from paged.blocks import blocks_for
from paged.config import EngineConfig
from paged.kv_pool import LayerShape, bytes_per_block
from paged.model.memory_profile import DeviceMemory, MemoryNeeds, gib

CPU_POOL_BYTES = 2 * 2**30
# Blocks that no request can hold: the null and the trash block.
OVERHEAD_BLOCKS = 2


def num_blocks_for(
    config: EngineConfig,
    layers: Sequence[LayerShape],
    dtype: torch.dtype,
    needs: MemoryNeeds,
    *,
    most_blocks: int | None = None,
) -> int:
    """Blocks of the pool, the null and the trash block included.

    In this order: `num_gpu_blocks_override` as it is; what `kv_cache_memory_bytes` holds; on a GPU, what
    `gpu_memory_utilization` leaves beside everything else; on a CPU 2 GiB. The last two never take more than
    `max_num_seqs` sequences of `max_model_len` could fill, nor more than `most_blocks`.

    Args:
        config: the settings, `max_model_len` filled in.
        layers: what each layer keeps for a token.
        dtype: of the pool.
        needs: what is taken beside the pool, and what the device has.
        most_blocks: more than these cannot be used (`most_blocks_for_flex`); None for no such limit.

    Raises:
        ValueError: a size that was asked for is more than can be had or used; no room beside weights and the largest
            step; or not enough for one sequence of max_model_len. The message has the numbers and what to change.
    """
    assert config.max_model_len is not None, "filled in when the model was loaded"
    block_bytes = bytes_per_block(layers, config.block_size, dtype)
    least = blocks_for(config.max_model_len, config.block_size) + OVERHEAD_BLOCKS
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
        if num_blocks <= OVERHEAD_BLOCKS:
            raise ValueError(
                f"num_gpu_blocks_override={num_blocks} leaves no block for a request: the null and the trash block "
                f"take {OVERHEAD_BLOCKS}; give at least {OVERHEAD_BLOCKS + 1}"
            )
        _check_given(f"num_gpu_blocks_override={num_blocks}", num_blocks, block_bytes, needs, most_blocks)
        return num_blocks
    if config.kv_cache_memory_bytes is not None:
        available = config.kv_cache_memory_bytes
        num_blocks = available // block_bytes
        _check_given(f"kv_cache_memory_bytes={available}", num_blocks, block_bytes, needs, most_blocks)
    else:
        available = CPU_POOL_BYTES if needs.total is None else budget_of(config, needs) - needs.together
        if available < (OVERHEAD_BLOCKS + 1) * block_bytes:
            raise _no_room(config, needs, available, least * block_bytes)
        num_blocks = min(available // block_bytes, most_blocks_of_use(config))
        if most_blocks is not None:
            num_blocks = min(num_blocks, most_blocks)
    if num_blocks < least:
        capped = num_blocks == most_blocks
        raise _too_long(config, needs, num_blocks, block_bytes, available=None if capped else available)
    return num_blocks


def most_blocks_of_use(config: EngineConfig) -> int:
    """Blocks that `max_num_seqs` sequences of `max_model_len` could fill, null and trash block included."""
    assert config.max_model_len is not None, "filled in when the model was loaded"
    return blocks_for(config.max_model_len, config.block_size) * config.max_num_seqs + OVERHEAD_BLOCKS


def most_blocks_for_flex(layers: Sequence[LayerShape], block_size: int) -> int:
    """Blocks that FlexAttention can reach: it indexes with 32 bits, so K and V stay below 2^31 numbers in each layer.

    Args:
        layers: what each layer keeps for a token.
        block_size: P.

    Returns:
        The largest N with N * P * Hkv * max(D, Dv) < 2^31 in every layer.

    Example: 8 KV heads of 128 and blocks of 16 make 2^14 numbers a block, so 2^17 blocks would be one too many.
        >>> most_blocks_for_flex([LayerShape(8, 128, 128)] * 32, 16)
        131071
    """
    numbers = max(block_size * layer.num_kv_heads * max(layer.head_dim, layer.value_dim) for layer in layers)
    return (2**31 - 1) // numbers


def num_host_blocks_for(config: EngineConfig, block_bytes: int) -> int:
    """Blocks of the pool in host memory that preempted requests are swapped to; 0 if they are not.

    What `swap_space` holds, but never more than `max_num_seqs` sequences of `max_model_len` could fill.

    Raises:
        ValueError: it does not hold one block.
    """
    if config.preemption_mode != "swap":
        return 0
    num_blocks = int(config.swap_space * 2**30) // block_bytes
    if num_blocks <= OVERHEAD_BLOCKS:
        raise ValueError(
            f"swap_space={config.swap_space} GiB holds {num_blocks} blocks of {block_bytes:,} bytes, and the null and "
            f"the trash block take {OVERHEAD_BLOCKS}; give it more, or set preemption_mode='recompute'"
        )
    return min(num_blocks, most_blocks_of_use(config))


def is_sized_by_share(config: EngineConfig) -> bool:
    """Whether gpu_memory_utilization decides: no other size was given."""
    return config.num_gpu_blocks_override is None and config.kv_cache_memory_bytes is None


def budget_of(config: EngineConfig, needs: MemoryNeeds) -> int:
    """Bytes of a GPU that the engine may take: the share, or all that was free where the pool's size was given."""
    assert needs.total is not None, "a CPU has no budget"
    assert needs.free_at_start is not None, "a CPU has no budget"
    return int(needs.total * config.gpu_memory_utilization) if is_sized_by_share(config) else needs.free_at_start


def check_share_is_free(config: EngineConfig, start: DeviceMemory | None) -> None:
    """Refuse a share of which others hold a part already, before any weights are loaded.

    Args:
        config: the settings.
        start: the GPU as the engine found it; None on a CPU, which has no share.

    Raises:
        ValueError: less is free than gpu_memory_utilization asks for. (Never where the pool's size was given.)
    """
    if start is None or not is_sized_by_share(config):
        return
    share = int(start.total * config.gpu_memory_utilization)
    if start.free >= share:
        return
    possible = math.floor(start.free / start.total * 1000) / 1000
    raise ValueError(
        f"gpu_memory_utilization={config.gpu_memory_utilization} of the {gib(start.total)} of {start.name} is "
        f"{gib(share)}, and {gib(start.free)} are free: other processes, this one's CUDA context and tensors hold "
        f"{gib(start.total - start.free)}. Set it to at most {possible}, or end what holds the memory"
    )


def _check_given(setting: str, num_blocks: int, block_bytes: int, needs: MemoryNeeds, most_blocks: int | None) -> None:
    """Refuse a size that was asked for if the pool could not be used, or would leave no room for steps beside it."""
    if most_blocks is not None and num_blocks > most_blocks:
        raise ValueError(
            f"{setting} makes {num_blocks:,} blocks, and FlexAttention, which indexes with 32 bits, reaches at most "
            f"{most_blocks:,} ({most_blocks * block_bytes:,} bytes); give the pool no more, or use another "
            "attention_form"
        )
    if needs.free_at_start is None:
        return
    left = needs.free_at_start - needs.together
    if num_blocks * block_bytes > left:
        raise ValueError(
            f"{setting} makes a pool of {num_blocks:,} blocks or {gib(num_blocks * block_bytes)}, and of the "
            f"{gib(needs.free_at_start)} of {needs.device} that were free at start, {_listed(needs)} take "
            f"{gib(needs.together)}; that leaves room for {max(0, left) // block_bytes:,} blocks. Give the pool fewer, "
            "or lower max_num_batched_tokens or max_num_seqs"
        )


def _no_room(config: EngineConfig, needs: MemoryNeeds, available: int, least_pool: int) -> ValueError:
    """The error when there is no room for any pool.

    Args:
        available: bytes left for the pool, below 0 if everything else alone exceeds the share.
        least_pool: bytes of a pool for one sequence of max_model_len; the share that is advised holds it.
    """
    if needs.total is None:
        return ValueError(
            f"a pool of {gib(available)}, which is what a CPU's takes by default, holds no block for a request; give "
            f"it at least kv_cache_memory_bytes={least_pool}"
        )
    share = f"the {gib(budget_of(config, needs))} that gpu_memory_utilization={config.gpu_memory_utilization} allows"
    verdict = f"{gib(-available)} more than {share}" if available < 0 else f"and {gib(available)} are left of {share}"
    advice = [
        _larger_share(needs, needs.together + least_pool),
        f"lower max_num_batched_tokens={config.max_num_batched_tokens} or max_num_seqs={config.max_num_seqs}",
        "use a smaller model or dtype",
    ]
    if available > 0:  # smaller K and V help only where something is left for them
        advice.append("store K and V in a byte a number (kv_cache_dtype)")
    return ValueError(
        f"no room for the pool: {_listed(needs)} take {gib(needs.together)}, {verdict} of the {gib(needs.total)} of "
        f"{needs.device}. {_alternatives(advice)}"
    )


def _too_long(
    config: EngineConfig, needs: MemoryNeeds, num_blocks: int, block_bytes: int, *, available: int | None
) -> ValueError:
    """The error when the pool holds less than one sequence of max_model_len.

    Args:
        num_blocks: the pool that could be had.
        available: bytes there are for it; None if they would do and FlexAttention could not reach them.
    """
    assert config.max_model_len is not None, "filled in when the model was loaded"
    longest = blocks_for(config.max_model_len, config.block_size)
    least_pool = (longest + OVERHEAD_BLOCKS) * block_bytes
    fitting = max(0, num_blocks - OVERHEAD_BLOCKS) * config.block_size
    advice = [f"set max_model_len to at most {fitting}"] if fitting else []
    if available is None:
        found = f"FlexAttention, which indexes with 32 bits, reaches {num_blocks:,} blocks"
        advice.append("use another attention_form")
    elif needs.total is None or not is_sized_by_share(config):
        found = f"there are {available:,}"
        advice.append(f"set kv_cache_memory_bytes to at least {least_pool}")
    else:
        found = (
            f"gpu_memory_utilization={config.gpu_memory_utilization} of {gib(needs.total)} leaves {available:,} beside "
            + _listed(needs)
        )
        advice.append(_larger_share(needs, needs.together + least_pool))
        advice.append("lower max_num_batched_tokens or max_num_seqs")
        advice.append("store K and V in a byte a number (kv_cache_dtype)")
    return ValueError(
        f"one sequence of max_model_len={config.max_model_len} takes {longest:,} blocks of {block_bytes:,} bytes, and "
        f"with the null and the trash block {least_pool:,} bytes; {found}. {_alternatives(advice)}"
    )


def _larger_share(needs: MemoryNeeds, num_bytes: int) -> str:
    """The advice to raise the share to so many bytes, or to get them free first."""
    assert needs.total is not None, "a CPU has no share"
    assert needs.free_at_start is not None, "a CPU has no share"
    share = math.ceil((num_bytes + 1) / needs.total * 1000) / 1000
    if int(needs.total * share) > needs.free_at_start:
        return f"take a GPU with {gib(num_bytes)} free (this one had {gib(needs.free_at_start)} at start)"
    return f"raise gpu_memory_utilization to at least {share}"


def _listed(needs: MemoryNeeds) -> str:
    """The lines that take anything, each with its size, as part of a sentence."""
    return ", ".join(f"{name} ({gib(size)})" for name, size in needs.lines.items() if size)


def _alternatives(advice: list[str]) -> str:
    """Several ways out, as a sentence."""
    sentence = ", or ".join(advice)
    return sentence[0].upper() + sentence[1:]
