"""Pictures of a pool: its slots in address order, and what they did over time.

Every function draws what it is given into `ax` and returns the artists; none computes a share of its own, so a test of
the frames (`paged.memory.states`) is a test of the pictures. Colours are from the Okabe-Ito palette, which colour-blind
readers tell apart; waste is hatched as well, so that it also shows in grey.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.collections import PatchCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from paged.memory.states import Frame, SlotState

# From the bottom of the stack to its top.
STACK = (
    SlotState.TOKENS,
    SlotState.RESERVED,
    SlotState.INTERNAL,
    SlotState.EXTERNAL,
    SlotState.OVERHEAD,
    SlotState.CACHED,
    SlotState.FREE,
)
COLOURS = {
    SlotState.FREE: "#f2f2f2",
    SlotState.TOKENS: "#0072b2",
    SlotState.RESERVED: "#56b4e9",
    SlotState.INTERNAL: "#e69f00",
    SlotState.EXTERNAL: "#cc79a7",
    SlotState.OVERHEAD: "#4d4d4d",
    SlotState.CACHED: "#99d8c7",  # a tint of the palette's green: in grey between reserved and free
}
HATCHES = {SlotState.INTERNAL: "////", SlotState.EXTERNAL: r"\\\\"}
LABELS = {
    SlotState.FREE: "free",
    SlotState.TOKENS: "token states",
    SlotState.RESERVED: "reserved (will be used)",
    SlotState.INTERNAL: "internal (never used again)",
    SlotState.EXTERNAL: "external (gap too small)",
    SlotState.OVERHEAD: "overhead (null, trash)",
    SlotState.CACHED: "cached",
}


@dataclass(frozen=True)
class PoolHistory:
    """One pool over the steps of a run.

    Attributes:
        name: what to call it.
        frames: [steps] of frames, the pool during each step.
        shares: [steps, states] of `paged.memory.states.shares`.
        num_running, num_waiting: [steps] requests.
        outcome: one line on how the run ended, for the title of the lower panel.
    """

    name: str
    frames: Sequence[Frame]
    shares: npt.NDArray[np.float64]
    num_running: Sequence[int]
    num_waiting: Sequence[int]
    outcome: str

    @property
    def fullest_step(self) -> int:
        """The step during which most slots held live tokens."""
        return int(self.shares[:, SlotState.TOKENS].argmax())


def pool_map(ax: Axes, frame: Frame, *, slots_per_row: int) -> list[Any]:
    """The pool in address order, `slots_per_row` slots a row, like the map of a disk.

    Args:
        ax: where to draw.
        frame: [num_slots] uint8.
        slots_per_row: has to divide num_slots.

    Returns:
        The image and the hatching of each kind of waste that occurs.
    """
    grid = frame.reshape(-1, slots_per_row)
    colours = ListedColormap([COLOURS[state] for state in SlotState])
    last = len(SlotState) - 0.5
    image = ax.imshow(grid, cmap=colours, vmin=-0.5, vmax=last, aspect="auto", interpolation="nearest")
    artists: list[Any] = [image]
    for state, hatch in HATCHES.items():
        runs = [
            Rectangle((start - 0.5, row - 0.5), end - start, 1)
            for row, line in enumerate(grid == state)
            for start, end in _runs(line)
        ]
        if runs:
            hatching = PatchCollection(runs, facecolor="none", edgecolor="black", linewidth=0, hatch=hatch)
            artists.append(ax.add_collection(hatching))
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel(f"{frame.size:,} slots in address order, {slots_per_row} a row", fontsize=8)
    return artists


def shares_over_time(ax: Axes, shares: npt.NDArray[np.float64], *, num_steps: int) -> list[Any]:
    """What share of the pool was in each state, stacked, step by step.

    Args:
        ax: where to draw.
        shares: [steps, states]; each row sums to one.
        num_steps: where the axis ends, so that two runs can be drawn to the same scale.

    Returns:
        The areas, in the order of `STACK`.
    """
    assert np.allclose(shares.sum(axis=1), 1), "the shares of a step sum to the whole pool"
    areas = ax.stackplot(
        np.arange(len(shares)),
        *(shares[:, state] for state in STACK),
        colors=[COLOURS[state] for state in STACK],
        step="post",
    )
    for area, state in zip(areas, STACK, strict=True):
        area.set_linewidth(0)
        if state in HATCHES:
            area.set_hatch(HATCHES[state])
    ax.set_xlim(0, num_steps)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.set_xlabel("step")
    ax.spines[["top", "right"]].set_visible(False)
    return list(areas)


def side_by_side(left: PoolHistory, right: PoolHistory, *, caption: str) -> Figure:
    """Two pools of the same bytes at the same step, above their shares over time.

    The step is the fullest one of the run that is shorter. Both maps have the same rows and both time axes the same
    scale.

    Args:
        left, right: the runs.
        caption: seed, pool and workload, printed under the figure.

    Raises:
        ValueError: the pools differ in size; then a picture of both would mislead.
    """
    if left.frames[0].size != right.frames[0].size:
        raise ValueError(
            f"{left.name} has {left.frames[0].size} slots and {right.name} {right.frames[0].size}; only pools of the "
            "same size can stand side by side"
        )
    step = min((left, right), key=lambda history: len(history.frames)).fullest_step
    num_steps = max(len(left.frames), len(right.frames))
    figure = Figure(figsize=(12, 7), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=[1.1, 1])
    for column, history in enumerate((left, right)):
        above, below = axes[:, column]
        pool_map(above, history.frames[step], slots_per_row=_slots_per_row(history.frames[step].size))
        live = history.shares[step, SlotState.TOKENS]
        above.set_title(
            f"{history.name}\nstep {step}: {history.num_running[step]} running, {history.num_waiting[step]} waiting; "
            f"{live:.0%} of the pool holds live tokens",
            loc="left",
            fontsize=10,
        )
        shares_over_time(below, history.shares, num_steps=num_steps)
        below.axvline(step, color="black", linestyle=":", linewidth=1)
        below.set_title(history.outcome, loc="left", fontsize=10)
    axes[1, 0].set_ylabel("share of the same pool")
    handles = [
        Patch(facecolor=COLOURS[state], hatch=HATCHES.get(state, ""), label=LABELS[state])
        for state in STACK
        if max(left.shares[:, state].max(), right.shares[:, state].max()) > 0
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(caption, fontsize=8, color="#4d4d4d", x=0.01, ha="left")
    return figure


def check_picture(path: Path | None) -> None:
    """Find out before the work whether a picture can be written, as the flag --plot asks.

    Raises:
        ValueError: its folder does not exist, or its ending is no picture's.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"--plot {path} is a folder; name a file in it")
    endings = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in endings:
        raise ValueError(f"--plot {path}: a picture ends in .{', .'.join(sorted(endings))}")


def _runs(line: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, end) of each unbroken run of True."""
    edges = np.flatnonzero(np.diff(line.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _slots_per_row(num_slots: int) -> int:
    """The divisor of num_slots that makes a map about three times as wide as high."""
    divisors = [n for n in range(1, num_slots + 1) if num_slots % n == 0]
    return min(divisors, key=lambda n: abs(n * n / num_slots - 3))
