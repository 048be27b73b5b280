"""Where every GiB goes: the engine's memory line by line, with nothing left over.

    budget = weights + activations + fragmentation + outside PyTorch + buffers + graphs + pool + unused

The lines are written before the pool is allocated, from what was measured then. One of them can only be known later:
CUDA graphs hold the pool's addresses, so they are captured when it exists. Their line is what was reserved for them
until `with_graphs` puts what was measured in its place; the ledger keeps both numbers, and the difference goes to or
comes from what is unused.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from paged.blocks import blocks_for
from paged.config import EngineConfig
from paged.model.memory_budget import OVERHEAD_BLOCKS, budget_of, is_sized_by_share, most_blocks_of_use
from paged.model.memory_profile import MemoryNeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLedger:
    """What an engine does with its memory, in bytes.

    Attributes:
        sized_by: what decided the pool's size, in words.
        budget: what the lines share out. On a GPU gpu_memory_utilization of its memory, or all that was free where the
            pool's size was given; on a CPU what is taken.
        needs: everything but the pool, CUDA graphs as they were reserved, and what the device has.
        kv_pool: K and V of all layers, with the scales that go with blocks.
        graphs_measured: what CUDA graphs really took; None if none were captured.
        host_swap_pool: host memory for preempted requests. Not part of a GPU's budget; nor is
        host_block_tables: the block tables, which live on the host.
        num_blocks, block_size, max_model_len: the pool in blocks, null and trash block included, and what they hold.
        notes: what else decided.

    Example: a GPU with 100 GiB, nine tenths of it allowed.
        >>> needs = MemoryNeeds(device="GPU", total=100 * 2**30, free_at_start=99 * 2**30, weights=16 * 2**30,
        ...                     activations=4 * 2**30, graphs=2**30)
        >>> ledger = MemoryLedger(sized_by="gpu_memory_utilization=0.9", budget=90 * 2**30, needs=needs,
        ...                       kv_pool=68 * 2**30, num_blocks=34816, block_size=16, max_model_len=8192)
        >>> print(ledger.with_graphs(2**29))
        Memory of GPU (100.00 GiB), pool sized by gpu_memory_utilization=0.9        GiB       %
          weights                                                                16.000    17.8
          activations of the largest step                                         4.000     4.4
          CUDA graphs (reserved: 1.000 GiB)                                       0.500     0.6
          KV pool                                                                68.000    75.6
          unused                                                                  1.500     1.7
          together                                                               90.000   100.0
        Beside it: 1.000 GiB in use when the engine started
        Pool: 34,816 blocks of 16 tokens, 2 of them null and trash: 557,024 tokens, or 67.9 sequences of 8,192 tokens
    """

    sized_by: str
    budget: int
    needs: MemoryNeeds
    kv_pool: int
    graphs_measured: int | None = None
    host_swap_pool: int = 0
    host_block_tables: int = 0
    num_blocks: int
    block_size: int
    max_model_len: int
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """A name for people."""
        return self.needs.device

    @property
    def weights(self) -> int:
        """Bytes of the model's parameters and buffers."""
        return self.needs.weights

    @property
    def activations(self) -> int:
        """Bytes that the largest step adds at its peak."""
        return self.needs.activations

    @property
    def graphs_reserved(self) -> int:
        """Bytes that were kept free for CUDA graphs when the pool was sized."""
        return self.needs.graphs

    @property
    def graphs(self) -> int:
        """Bytes of CUDA graphs: measured, or reserved as long as they are not."""
        return self.needs.graphs if self.graphs_measured is None else self.graphs_measured

    @property
    def lines(self) -> dict[str, int]:
        """Bytes by name; they sum to `budget`. What is unused is below 0 if graphs took more than was left for them."""
        used = {**self.needs.lines, "CUDA graphs": self.graphs, "KV pool": self.kv_pool}
        return {**used, "unused": self.budget - sum(used.values())}

    @property
    def unused(self) -> int:
        """Bytes of the budget that no line takes."""
        return self.lines["unused"]

    @property
    def total_used(self) -> int:
        """Bytes that all lines but the unused one take together."""
        return self.budget - self.unused

    @property
    def most_allocated(self) -> int:
        """Bytes of the lines that are tensors: what `torch.cuda.max_memory_allocated()` may come to."""
        return self.total_used - self.needs.fragmentation - self.needs.outside_torch

    @property
    def num_tokens(self) -> int:
        """Tokens that the pool holds, if no block is shared."""
        return (self.num_blocks - OVERHEAD_BLOCKS) * self.block_size

    @property
    def num_full_sequences(self) -> float:
        """Sequences of max_model_len that the pool holds at once; more where windows let blocks go."""
        return (self.num_blocks - OVERHEAD_BLOCKS) / blocks_for(self.max_model_len, self.block_size)

    def with_graphs(self, measured: int) -> "MemoryLedger":
        """The ledger after the CUDA graphs were captured, which took so many bytes."""
        return replace(self, graphs_measured=measured)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it: the attributes, the lines, and what follows from them."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "needs"}
        return {
            **plain,
            "notes": list(self.notes),
            "device": self.device,
            "total": self.needs.total,
            "free_at_start": self.needs.free_at_start,
            "lines": self.lines,
            "graphs_reserved": self.graphs_reserved,
            "total_used": self.total_used,
            "num_tokens": self.num_tokens,
            "num_full_sequences": self.num_full_sequences,
        }

    def __str__(self) -> str:
        """The table, in GiB and per cent of the budget, and what the pool holds."""
        total = "" if self.needs.total is None else f" ({self.needs.total / 2**30:,.2f} GiB)"
        title = f"Memory of {self.device}{total}, pool sized by {self.sized_by}"
        rows = [(f"  {self._label(name)}", size) for name, size in self.lines.items() if size]
        rows.append(("  together", self.budget))
        width = max(len(title), *(len(label) for label, _ in rows))
        text = [f"{title:<{width}} {'GiB':>10} {'%':>7}"]
        text += [f"{label:<{width}} {_in_gib(size):>10} {100 * size / self.budget:>7.1f}" for label, size in rows]
        if self.needs.total is not None and self.needs.free_at_start is not None:
            held = self.needs.total - self.needs.free_at_start
            text.append(f"Beside it: {_in_gib(held)} GiB in use when the engine started")
        on_host = (("swap pool", self.host_swap_pool), ("block tables", self.host_block_tables))
        if any(size for _, size in on_host):
            text.append("On the host: " + ", ".join(f"{name} {_in_gib(size)} GiB" for name, size in on_host if size))
        full = int(10 * self.num_full_sequences) / 10  # rounded down: 0.99 of a sequence is not one
        text.append(
            f"Pool: {self.num_blocks:,} blocks of {self.block_size} tokens, {OVERHEAD_BLOCKS} of them null and trash: "
            f"{self.num_tokens:,} tokens, or {full:,.1f} sequences of {self.max_model_len:,} tokens"
        )
        return "\n".join([*text, *(f"Note: {note}" for note in self.notes)])

    def _label(self, name: str) -> str:
        if name == "unused" and self.unused < 0:
            return "over the budget"
        if name == "CUDA graphs":
            reserved = f"{_in_gib(self.graphs_reserved)} GiB"
            return f"{name} (reserved)" if self.graphs_measured is None else f"{name} (reserved: {reserved})"
        return name


def open_ledger(
    config: EngineConfig,
    needs: MemoryNeeds,
    *,
    num_blocks: int,
    kv_pool: int,
    host_swap_pool: int = 0,
    host_block_tables: int = 0,
    most_blocks: int | None = None,
) -> MemoryLedger:
    """The ledger of an engine whose pool has just been allocated.

    Args:
        config, needs, most_blocks: what `num_blocks_for` got.
        num_blocks: what it gave.
        kv_pool, host_swap_pool: bytes of the pools, measured.
        host_block_tables: bytes of the block tables on the host; on a CPU they belong to `needs.buffers`.
    """
    assert config.max_model_len is not None, "filled in when the model was loaded"
    notes = []
    if needs.total is None:
        notes.append("activations are not measured on a CPU")
    if is_sized_by_share(config):
        if num_blocks == most_blocks:
            notes.append(f"FlexAttention indexes with 32 bits: it reaches no more than {most_blocks:,} blocks")
        elif num_blocks == most_blocks_of_use(config):
            notes.append(
                f"max_num_seqs={config.max_num_seqs} sequences of max_model_len={config.max_model_len} fill no more"
            )
    return MemoryLedger(
        sized_by=_sized_by(config, needs),
        budget=needs.together + kv_pool if needs.total is None else budget_of(config, needs),
        needs=needs,
        kv_pool=kv_pool,
        host_swap_pool=host_swap_pool,
        host_block_tables=host_block_tables,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        notes=tuple(notes),
    )


def _sized_by(config: EngineConfig, needs: MemoryNeeds) -> str:
    for name in ("num_gpu_blocks_override", "kv_cache_memory_bytes"):
        if getattr(config, name) is not None:
            return f"{name}={getattr(config, name)}"
    if needs.total is None:
        return "the default of a CPU"
    return f"gpu_memory_utilization={config.gpu_memory_utilization}"


def _in_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f}"
