"""The KV pool of every layer, and the one in host memory that blocks are swapped to."""

from collections.abc import Sequence

import torch

from paged.kv_pool import (
    LayerCache,
    allocate_layer,
    allocate_on_host,
    bytes_per_block,
    copy_blocks,
    storage_bytes,
    swap_blocks,
)
from paged.model.paged_attention import AttentionCall
from paged.step import Step

# The module's attributes where the attention function finds the tensors of a layer's cache, in their order.
CACHES = ("key_cache", "value_cache", "key_scale", "value_scale")


class Pools:
    """One pool for each layer, all with the same blocks: block 7 of a sequence is block 7 in every one of them.

    They hang on the attention modules, where the attention function finds them.

    Args:
        calls: the attention of every layer.
        block_size: P.
        dtype: of K and V.
        device: where they are.
        in_inference_mode: make the tensors in the mode in which steps run. Compiled code that is given some tensors
            from there and others from elsewhere is compiled twice, as they are of two kinds to the compiler.

    Attributes:
        caches: of every layer, all tensors that are indexed by block: key_cache [N, P, Hkv, D], value_cache
            [N, P, Hkv, Dv]; in int8 also key_scale and value_scale [N, P, Hkv].
        host_caches: the same in host memory, with blocks of their own.
    """

    def __init__(
        self,
        calls: Sequence[AttentionCall],
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        in_inference_mode: bool,
    ) -> None:
        self._calls, self._block_size, self._dtype, self._device = calls, block_size, dtype, device
        self._in_inference_mode = in_inference_mode
        self.caches: list[LayerCache] = []
        self.host_caches: list[LayerCache] = []

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers together."""
        return bytes_per_block([call.shape for call in self._calls], self._block_size, self._dtype)

    @property
    def num_tensors(self) -> int:
        """Tensors that the pools consist of."""
        return len(self._calls) * (4 if self._dtype == torch.int8 else 2)

    @property
    def num_bytes(self) -> int:
        """Bytes that the pools take, measured: those of the tensors' storages."""
        return storage_bytes(tensor for cache in self.caches for tensor in cache)

    @property
    def num_host_bytes(self) -> int:
        """The same of the host's."""
        return storage_bytes(tensor for cache in self.host_caches for tensor in cache)

    def allocate(self, num_blocks: int) -> None:
        """Give every attention module a cache of so many blocks; what it had is let go.

        Raises:
            ValueError: the device has no room for it.
        """
        self.caches = []
        for call in self._calls:
            try:
                with torch.inference_mode(self._in_inference_mode):
                    cache = allocate_layer(call.shape, num_blocks, self._block_size, self._dtype, self._device)
            except RuntimeError as error:
                raise ValueError(
                    f"a pool of {num_blocks:,} blocks takes {num_blocks * self.block_bytes:,} bytes, more than "
                    f"{self._device} has left; give it fewer (num_gpu_blocks_override, kv_cache_memory_bytes, "
                    "gpu_memory_utilization)"
                ) from error
            for name, tensor in zip(CACHES, cache, strict=False):  # only int8 has the last two
                # Of the sizes only the number of blocks ever changes, and a graph should know the others.
                torch._dynamo.mark_static(tensor, list(range(1, tensor.dim())))
                setattr(call.module, name, tensor)
            self.caches.append(cache)

    def allocate_on_host(self, num_blocks: int) -> None:
        """Make the host's, with so many blocks."""
        self.host_caches = [allocate_on_host(cache, num_blocks) for cache in self.caches]

    def move_blocks(self, step: Step) -> None:
        """Copy blocks before the step writes any. Swapping out comes first: the blocks may be others' targets then."""
        if step.swap_outs:
            swap_blocks(self.caches, self.host_caches, [(copy.source, copy.target) for copy in step.swap_outs])
        if step.swap_ins:
            swap_blocks(self.host_caches, self.caches, [(copy.source, copy.target) for copy in step.swap_ins])
        if step.copies:
            copy_blocks(self.caches, [(copy.source, copy.target) for copy in step.copies])
