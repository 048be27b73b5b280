"""A writer of keys and values that is right, and written to be broken.

Each step is a method of a few lines, and a mutant is a subclass that overrides one of them. It shares no code with the
engine's own writer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from paged.oracle.writers.case import WriteCapabilities


@dataclass(frozen=True)
class Write:
    """One tensor's part of a call: what is written, into which cache, with which scale, and the other's scale."""

    name: str
    new: Tensor
    cache: Tensor
    slots: Tensor
    scale: Tensor | None
    other_scale: Tensor | None

    @property
    def block_size(self) -> int:
        """P."""
        return self.cache.shape[1]


class PlainWriter:
    """Reshape-and-cache, one token at a time.

    Attributes:
        letter: for mutants, the class of bug in the catalogue, A to R.
        threads: for mutants, public threads in which such a bug was reported, owner/repository#number.
        capabilities: what it is to be asked for.

    Example:
        >>> cache = torch.zeros(2, 2, 1, 1)
        >>> new = torch.ones(2, 1, 1)
        >>> PlainWriter()(new, new, cache, cache.clone(), torch.tensor([3, -1]))
        >>> cache.flatten().tolist()
        [0.0, 0.0, 0.0, 1.0]
    """

    letter: ClassVar[str] = ""
    threads: ClassVar[tuple[str, ...]] = ()
    capabilities: ClassVar[WriteCapabilities] = WriteCapabilities(
        dtypes=("bfloat16", "float32"),
        head_dims=(16, 12),
        block_sizes=(4, 5),
        slot_dtypes=("int64", "int32"),
        negative_slots=True,
        duplicate_slots="last",
        longer_keys=True,
        strided_caches=True,
    )

    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> Any:
        """Write in place; see `paged.oracle.writers.verify`."""
        self.write(Write("key", key, key_cache, slot_mapping, k_scale, v_scale))
        self.write(Write("value", value, value_cache, slot_mapping, v_scale, k_scale))

    def write(self, call: Write) -> None:
        """All tokens of one tensor."""
        for index in self.order(call):
            slot = int(call.slots[index])
            if self.is_skipped(call, slot):
                continue
            block, offset = self.place(call, slot)
            self.store(call, block, offset, self.row(call, index))

    def order(self, call: Write) -> list[int]:
        """The tokens, in the order in which they are written."""
        return list(range(len(call.slots)))

    def is_skipped(self, call: Write, slot: int) -> bool:
        """Whether a slot is none."""
        return slot < 0

    def place(self, call: Write, slot: int) -> tuple[int, int]:
        """Block and offset of a slot."""
        return slot // call.block_size, slot % call.block_size

    def row(self, call: Write, index: int) -> Tensor:
        """What is written for a token [Hkv, D]."""
        return call.new[index]

    def store(self, call: Write, block: int, offset: int, row: Tensor) -> None:
        """Put a row into its place, as codes if there are scales."""
        if call.cache.dtype == torch.int8 and call.scale is not None and call.scale.dim() == 3:
            codes, call.scale[block, offset] = self.with_scales(row)
            call.cache[block, offset] = codes
            return
        call.cache[block, offset] = self.codes(call, row)

    def codes(self, call: Write, row: Tensor) -> Tensor:
        """Numbers as the cache's dtype, divided by their scale."""
        if call.scale is None and call.cache.dtype.itemsize > 1:
            return row.to(call.cache.dtype)
        quotients = self.quotients(call, row.float())
        if call.cache.dtype == torch.int8:
            return self.rounded(quotients).clamp(-127, 127).to(torch.int8)
        largest = torch.finfo(call.cache.dtype).max
        return quotients.clamp(-largest, largest).to(call.cache.dtype)

    def quotients(self, call: Write, row: Tensor) -> Tensor:
        """Number / scale."""
        return row if call.scale is None else row / self.per_head(call.scale)

    def rounded(self, quotients: Tensor) -> Tensor:
        """To whole numbers."""
        return quotients.round()

    def with_scales(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and the scale of each vector."""
        scales = row.float().abs().amax(dim=-1) / 127
        quotients = torch.where(scales[:, None] > 0, row.float() / scales[:, None], 0.0)
        return self.rounded(quotients).clamp(-127, 127).to(torch.int8), scales

    def per_head(self, scale: Tensor) -> Tensor:
        """A scale that goes with [Hkv, D]."""
        return scale[:, None] if scale.dim() == 1 else scale


class Fp8Writer(PlainWriter):
    """The same into fp8, with a scale for each head."""

    capabilities = WriteCapabilities(
        dtypes=("bfloat16", "float16"), kv_dtypes=("float8_e4m3fn",), head_dims=(16, 7), block_sizes=(4,), scales="head"
    )


class Int8Writer(PlainWriter):
    """The same into int8, with a scale for each token and head, which is written."""

    capabilities = WriteCapabilities(kv_dtypes=("int8",), head_dims=(16, 7), block_sizes=(4,), scales="token")


class Int8TensorWriter(PlainWriter):
    """The same into int8, with one scale for each tensor."""

    capabilities = WriteCapabilities(kv_dtypes=("int8",), head_dims=(16, 7), block_sizes=(4,), scales="tensor")
