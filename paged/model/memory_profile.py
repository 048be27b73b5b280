"""What the engine takes beside its pool, measured on the GPU before the pool exists.

Three counters tell different things, and each is needed:

    used      total - free, from the driver: everything on the device, other processes' memory included
    reserved  what PyTorch has taken from the driver. It keeps what tensors gave back, to hand it out again
    allocated what tensors take of that now

    used     |======= reserved =========================|== CUDA context, kernels, other processes ==|
    reserved |======= allocated ============|-- kept ---|

What steps need is `allocated` at its peak. What is missing on the device is `reserved`: between the two lie holes that
no tensor fits into (fragmentation), and the last bytes of whole pages of 2 MiB. What neither counts (kernels that are
loaded when they are first called, handles of libraries) is the difference between `used` and `reserved`, and how much
of it is the engine's own is how much it grew since the engine started.

Measuring is kept thin: it reads counters and hands them on. What they mean is arithmetic (`needs_between`), which a
test can do without a GPU; what follows from that is decided in paged/model/memory_budget.py.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from paged.config import EngineConfig
from paged.kv_pool import storage_bytes

# Blocks of the pool that the largest steps run on: the null block, one that every table names, the trash block.
TRIAL_BLOCKS = 3
# PyTorch takes memory from the driver in pages of this size, and a large tensor begins with a page of its own.
PAGE = 2 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """The counters of a GPU at one moment, in bytes.

    Attributes:
        name: of the device.
        total, free: of the device, as its driver says.
        allocated, reserved: by this process through PyTorch, as it says itself.
    """

    name: str
    total: int
    free: int
    allocated: int
    reserved: int

    @property
    def outside_torch(self) -> int:
        """Bytes in use that PyTorch did not take: CUDA contexts, loaded kernels, other processes."""
        return self.total - self.free - self.reserved


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What an engine takes beside its pool, in bytes, line by line.

    Attributes:
        device: a name for people.
        total, free_at_start: of the GPU, and what was free of it before the weights were loaded; None on a CPU, where
            only weights and buffers are known.
        weights: parameters and buffers of the model.
        activations: what the largest step adds at its peak, with what libraries keep for their work (cuBLAS).
        fragmentation: what PyTorch holds beside that and no tensor uses.
        outside_torch: what the device lost to neither since the engine started: loaded kernels, libraries' handles.
        buffers: tensors that stay from step to step, such as the sampler's counts. Reserved, even if made later.
        graphs: reserved for CUDA graphs, which can only be captured when the pool exists.
    """

    device: str
    total: int | None = None
    free_at_start: int | None = None
    weights: int
    activations: int = 0
    fragmentation: int = 0
    outside_torch: int = 0
    buffers: int = 0
    graphs: int = 0

    @property
    def lines(self) -> dict[str, int]:
        """Bytes of every line by its name in tables and errors."""
        return {
            "weights": self.weights,
            "activations of the largest step": self.activations,
            "fragmentation": self.fragmentation,
            "kernels and libraries (outside PyTorch)": self.outside_torch,
            "persistent buffers": self.buffers,
            "CUDA graphs": self.graphs,
        }

    @property
    def together(self) -> int:
        """Bytes of all lines."""
        return sum(self.lines.values())


def gib(num_bytes: int) -> str:
    """Bytes as people read them.

    Example:
        >>> gib(3 * 2**29), gib(5 * 2**20)
        ('1.50 GiB', '5.0 MiB')
    """
    if abs(num_bytes) < 2**20:
        return f"{num_bytes:,} bytes"
    return f"{num_bytes / 2**30:,.2f} GiB" if abs(num_bytes) >= 2**27 else f"{num_bytes / 2**20:,.1f} MiB"


def snapshot(device: torch.device) -> DeviceMemory | None:
    """Read the counters, once nothing is held that nobody needs; None where the device is no GPU."""
    if device.type != "cuda":
        return None
    release_unused(device)
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(
        name=torch.cuda.get_device_name(device),
        total=total,
        free=free,
        allocated=torch.cuda.memory_allocated(device),
        reserved=torch.cuda.memory_reserved(device),
    )


def release_unused(device: torch.device) -> None:
    """Give back to a GPU's driver what PyTorch keeps and no tensor uses; elsewhere there is nothing to do."""
    if device.type == "cuda":
        gc.collect()  # an engine before this one may lie in a circle of references
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def measure_needs(
    config: EngineConfig,
    device: torch.device,
    start: DeviceMemory | None,
    *,
    weights: Iterable[Tensor],
    buffers: int,
    block_bytes: int,
    num_pool_tensors: int,
    run_largest_steps: Callable[[], None],
    warm_up: Callable[[], None],
) -> MemoryNeeds:
    """Run the largest steps and see what they take. On a CPU nothing is run.

    They are run twice. The first time compiles, which takes memory of its own and loads kernels, and `warm_up` does
    likewise; the second time begins with nothing reserved in vain, as the steps will that are run beside the pool.

    Args:
        config: the settings, for the error.
        device: where the model is.
        start: the counters before the weights were loaded; None on a CPU.
        weights: parameters and buffers of the model, tensors that share memory counted once.
        buffers: bytes that stay from step to step. The largest steps must make all of them.
        block_bytes: of one block in all layers; the steps run on TRIAL_BLOCKS of them.
        num_pool_tensors: of all layers.
        run_largest_steps: allocates the small pool and runs `largest_steps` on it.
        warm_up: runs, on the small pool, whatever else compiles or chooses kernels when it is first run.

    Raises:
        ValueError: the largest steps do not fit the GPU at all.
    """
    weight_bytes = storage_bytes(weights)
    if start is None:
        return MemoryNeeds(device=str(device), weights=weight_bytes, buffers=buffers)
    try:
        run_largest_steps()
        warm_up()
        release_unused(device)
        torch.cuda.reset_peak_memory_stats(device)
        run_largest_steps()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the largest step does not fit {start.name}: of {gib(start.total)}, {gib(start.free)} were free at start, "
            f"the weights take {gib(weight_bytes)} of them, and steps of max_num_batched_tokens="
            f"{config.max_num_batched_tokens} and max_num_seqs={config.max_num_seqs} need more than the rest; lower "
            "one of the two or max_model_len, or take a smaller model or dtype"
        ) from error
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    outside_torch = total - free - torch.cuda.memory_reserved(device)
    return needs_between(
        start,
        peak_allocated=torch.cuda.max_memory_allocated(device),
        peak_reserved=torch.cuda.max_memory_reserved(device),
        outside_torch=outside_torch,
        weights=weight_bytes,
        buffers=buffers,
        trial_pool=TRIAL_BLOCKS * block_bytes,
        num_pool_tensors=num_pool_tensors,
    )


def needs_between(
    start: DeviceMemory,
    *,
    peak_allocated: int,
    peak_reserved: int,
    outside_torch: int,
    weights: int,
    buffers: int,
    trial_pool: int,
    num_pool_tensors: int,
) -> MemoryNeeds:
    """What the counters at start and at the peak of the largest steps mean; all in bytes.

    Args:
        start: before the weights were loaded.
        peak_allocated, peak_reserved: the most that PyTorch allocated and reserved during the steps.
        outside_torch: what the device has in use after them and PyTorch did not take.
        weights, buffers: known from their tensors.
        trial_pool: the small pool that the steps ran on, which the real one replaces.
        num_pool_tensors: of the real pool, each of which may waste most of a page.

    Example: 100 bytes were allocated before; 40 of weights, 10 of buffers, 3 of the trial pool; so 27 are activations.
        >>> start = DeviceMemory(name="GPU", total=1000, free=800, allocated=100, reserved=150)
        >>> needs = needs_between(start, peak_allocated=180, peak_reserved=236, outside_torch=57, weights=40,
        ...                       buffers=10, trial_pool=3, num_pool_tensors=0)
        >>> needs.activations, needs.fragmentation, needs.outside_torch
        (27, 6, 7)
    """
    allocated, reserved = peak_allocated - start.allocated, peak_reserved - start.reserved
    return MemoryNeeds(
        device=start.name,
        total=start.total,
        free_at_start=start.free,
        weights=weights,
        # Never below 0: somebody else in this process, or another one, may have let go of memory meanwhile.
        activations=max(0, allocated - weights - buffers - trial_pool),
        fragmentation=max(0, reserved - allocated) + num_pool_tensors * PAGE,
        outside_torch=max(0, outside_torch - start.outside_torch),
        buffers=buffers,
    )
