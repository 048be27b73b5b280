"""Pictures of simulations: what the pool did under each policy, and what waiting cost at each rate."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from paged.memory.plots import COLOURS, HATCHES, LABELS, STACK, shares_over_time
from paged.memory.states import SlotState
from paged.traces.records import Floats, Simulation

# A picture is about so many points wide; more steps than that are averaged.
MOST_COLUMNS = 1000
LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MARKERS = ("o", "s", "^", "D", "v", "P")


def thinned_shares(shares: Floats, most: int = MOST_COLUMNS) -> Floats:
    """Means over runs of steps, so that at most `most` rows are left; each still sums to one.

    Example:
        >>> thinned_shares(np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), most=2).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    width = -(-len(shares) // most)
    starts = np.arange(0, len(shares), width)
    sizes = np.diff(np.append(starts, len(shares)))
    means: Floats = np.add.reduceat(shares, starts, axis=0) / sizes[:, None]
    return means


def shares_of_policies(runs: Sequence[Simulation], *, caption: str) -> Figure:
    """The shares of the same pool over the steps of each run, one below the other.

    Raises:
        ValueError: the pools differ in size; then a picture of both would mislead.
    """
    sizes = {run.num_slots for run in runs}
    if len(sizes) > 1:
        raise ValueError(f"pools of {sorted(sizes)} slots; only pools of one size can be compared in one picture")
    figure = Figure(figsize=(10, 1 + 1.9 * len(runs)), dpi=110, layout="constrained")
    for ax, run in zip(figure.subplots(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
        columns = thinned_shares(run.steps.shares)
        shares_over_time(ax, columns, num_steps=len(columns))
        mean = run.mean_shares()[SlotState.TOKENS]
        while_queued = "while somebody waits" if run.queued.any() else "nobody ever waits"
        ax.set_title(
            f"{run.policy}: {mean:.1%} token states, {while_queued}; at most {run.steps.num_running.max()} running; "
            f"{run.num_recomputed_tokens:,} tokens computed twice",
            loc="left",
            fontsize=9,
        )
        width = -(-len(run.steps) // MOST_COLUMNS)
        ax.set_xlabel("step" if width == 1 else f"step / {width} (means)", fontsize=8)
    handles = [
        Patch(facecolor=COLOURS[state], hatch=HATCHES.get(state, ""), label=LABELS[state])
        for state in STACK
        if any(run.steps.slots[:, state].any() for run in runs)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(caption, fontsize=8, color="#4d4d4d", x=0.01, ha="left")
    return figure


def latency_against_rate(ax: Axes, curves: dict[str, list[tuple[float, float]]]) -> list[Any]:
    """One curve for each policy: normalised latency, seconds a token, over requests a second.

    Args:
        ax: where to draw.
        curves: policy -> (rate, seconds), in order of rate.

    Returns:
        The lines.
    """
    lines = [
        ax.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, markersize=4)[0]
        for (name, points), colour, marker in zip(curves.items(), LINES, MARKERS, strict=False)
    ]
    ax.set_xlabel("requests a second")
    ax.set_ylabel("mean of latency / output tokens, s")
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    return lines
