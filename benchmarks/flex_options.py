"""How the decode kernel of `paged.attention.flex` should be cut: warps, stages and splits, by what they bring.

    python benchmarks/flex_options.py
    python benchmarks/flex_options.py --block-sizes 16 --warps 1 2 --stages 3 4 5

`pace_of` chooses warps and stages, `num_splits_for` the splits. Here both are set from outside: each pair of warps and
stages is compiled once for each block size, held against float64 on some rows, and timed on every case:
`attend_decode` alone, as a layer of the model calls it, with its plan made before. What flex chooses by itself is
**bold** in the tables. Where the pair cannot be built (too much shared memory) the table says so. "GB/s" counts live K
and V once; the L2 cache is passed over as in attention.py.
"""

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from attention import TOLERANCES, Calls, Case, Data, checked_rows, expected_rows, make_data, relative_error
from common import (
    Result,
    add_arguments,
    bars,
    copy_bandwidth,
    environment,
    first_line,
    fixed,
    free_memory,
    markdown,
    new_figure,
    output_file,
    per_cent,
    publish,
    time_calls,
)
from matplotlib.figure import Figure
from torch import Tensor

from paged.attention import flex, flex_kernel

# Sequences, the longest context, and the shortest if they are ragged.
SIZES = [(64, 2048, None), (256, 1024, None), (256, 2048, 64), (8, 2048, None), (1, 8192, None)]
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}
SMOKE_SIZES = [(3, 50, None), (2, 40, 20)]
SMOKE_HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 16}

Pace = tuple[int, int]


@dataclass(frozen=True)
class Prepared:
    """A case with its data, what is right, and the splits to try; `chosen` is flex's own number of them."""

    data: Data
    expected: Tensor
    splits: list[int]
    chosen: int


def splits_to_try(chosen: int, num_blocks: int) -> list[int]:
    """Half of what flex would choose, that, and twice as many, if parts of one block at least are left.

    >>> splits_to_try(1, 128), splits_to_try(8, 128), splits_to_try(64, 100)
    ([1, 2], [4, 8, 16], [32, 64])
    """
    return [splits for splits in (chosen // 2, chosen, 2 * chosen) if 1 <= splits <= num_blocks]


def prepare(case: Case, device: str, dtype: torch.dtype, seed: int) -> Prepared:
    """Tensors, expected rows, and splits."""
    data = make_data(case, device, dtype, seed)
    num_blocks = data.tables[0].shape[1]
    chosen, splits = 1, [1]  # a CPU knows no other
    if device.startswith("cuda"):
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        chosen = flex.num_splits_for(case.batch, case.kv_heads, num_blocks, multiprocessors)
        splits = splits_to_try(chosen, num_blocks)
    return Prepared(data, expected_rows(data), splits, chosen)


def own_pace(data: Data, splits: int) -> Pace:
    """Warps and stages that flex uses if nobody interferes."""
    case = data.case
    pace = flex.pace_of(case.batch * splits * case.kv_heads, splits)
    options = flex_kernel.kernel_options(data.key_cache, data.value_cache.shape[3], flex_kernel.SMALLEST, pace)
    return options["num_warps"], options["num_stages"]


@contextmanager
def forced(pace: Pace) -> Iterator[None]:
    """Inside, every decode kernel is compiled with these warps and stages, also where flex would adjust them."""
    options_of = flex_kernel.kernel_options

    def options(cache: Tensor, value_dim: int, tile: int, wanted: Pace) -> dict[str, Any]:
        return {**options_of(cache, value_dim, tile, wanted), "num_warps": wanted[0], "num_stages": wanted[1]}

    def paced(_num_programs: int, _num_splits: int) -> Pace:  # no Mock: the compiler looks into no such thing
        return pace

    torch._dynamo.reset()
    with mock.patch.object(flex, "pace_of", paced), mock.patch.object(flex_kernel, "kernel_options", options):
        yield
    torch._dynamo.reset()


def calls_of(data: Data, splits: int) -> Calls:
    """One call for each set of sequences, planned outside of the clock, as the layers of a model share a plan."""
    plans = [
        flex.plan_decode(tables, data.seq_lens, block_size=data.case.block_size, num_splits=splits)
        for tables in data.tables
    ]

    def call(plan: flex.DecodePlan) -> Tensor:
        return flex.attend_decode(data.query, data.key_cache, data.value_cache, plan, scale=data.scale)[0]

    return [lambda plan=plan: call(plan) for plan in plans]


@torch.inference_mode()
def measure(prepared: Prepared, splits: int, pace: Pace, own: Pace, repeats: int, bandwidth: float) -> dict[str, Any]:
    """One row, inside of `forced`: the error and, if that is small, the speed."""
    data = prepared.data
    case = data.case
    row: dict[str, Any] = {"case": asdict(case), "splits": splits, "warps": pace[0], "stages": pace[1]}
    row["label"] = f"B={case.batch}, T={case.length}, block {case.block_size}"
    row["own_splits"] = splits == prepared.chosen
    row["own_pace"] = pace == own
    try:
        calls = calls_of(data, splits)
        row["relative_error"] = relative_error(calls[0]()[checked_rows(case)], prepared.expected)
        if not row["relative_error"] <= TOLERANCES[data.query.dtype]:
            return row | {"error": f"wrong: relative error {row['relative_error']:.2g}"}
        timing = time_calls(calls, data.query.device.type, repeats=repeats)
    except Exception as error:  # a kernel that does not fit must not take the others with it
        return row | {"error": first_line(error)}
    row |= asdict(timing)
    row["gb_per_s"] = case.kv_bytes(data.query.dtype.itemsize) / timing.seconds / 1e9
    row["share_of_copy"] = row["gb_per_s"] * 1e9 / bandwidth
    return row


def fastest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with most bytes a second; None if nothing was right."""
    return max((row for row in rows if "error" not in row), key=lambda row: row["gb_per_s"], default=None)


def own_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that flex would choose by itself; None if it was not tried or failed."""
    return next((row for row in rows if row["own_pace"] and row["own_splits"] and "error" not in row), None)


def cell(row: dict[str, Any] | None) -> str | None:
    """GB/s, bold if flex would choose these options itself."""
    if row is None:
        return None
    text = "fails" if "error" in row else f"{row['gb_per_s']:,.0f}"
    if "error" in row and row["error"].startswith("wrong"):
        text = "wrong"
    return f"**{text}**" if row["own_pace"] and row["own_splits"] else text


def tables(result: Result) -> str:
    """A line for each case and number of splits, a column for each pair of warps and stages; then choice and best."""
    rows = result["rows"]
    paces = sorted({(row["warps"], row["stages"]) for row in rows})
    lines: list[list[str | None]] = []
    for label, splits in dict.fromkeys((row["label"], row["splits"]) for row in rows):
        of_line = {
            (row["warps"], row["stages"]): row for row in rows if (row["label"], row["splits"]) == (label, splits)
        }
        parts = "whole" if splits == 1 else f"{splits} splits"
        lines.append([f"{label}, {parts}", *(cell(of_line.get(pace)) for pace in paces)])
    headers = ["GB/s of live K and V (warps x stages)", *(f"{warps} x {stages}" for warps, stages in paces)]
    text = markdown(headers, lines)

    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        of_label = [row for row in rows if row["label"] == label]
        best, own = fastest(of_label), own_row(of_label)
        errors = [row["relative_error"] for row in of_label if "error" not in row]
        lines.append(
            [
                label,
                None if own is None else f"{own['warps']} x {own['stages']}, {own['splits']}",
                None if own is None else f"{own['gb_per_s']:,.0f} ({per_cent(own['share_of_copy'])})",
                None if best is None else f"{best['warps']} x {best['stages']}, {best['splits']}",
                None if best is None else f"{best['gb_per_s']:,.0f} ({per_cent(best['share_of_copy'])})",
                None if best is None or own is None else fixed(own["gb_per_s"] / best["gb_per_s"], 3),
                f"{max(errors):.1e}" if errors else None,
            ]
        )
    headers = ["warps x stages, splits", "flex's own", "GB/s (of a copy)", "best", "GB/s (of a copy)", "own / best"]
    text += "\n\n" + markdown([*headers, "largest error"], lines)
    text += f"\n\nA copy moves {result['copy_bandwidth'] / 1e9:,.0f} GB/s (read and written) on the same device."
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "error" in row:
            named = f"{row['label']}, {row['splits']} splits, {row['warps']} x {row['stages']}"
            reasons.setdefault(row["error"], []).append(named)
    problems = [f"- {'; '.join(named)}: {reason}" for reason, named in reasons.items()]
    return text + ("\n\n" + "\n".join(problems) if problems else "")


def plot(result: Result) -> Figure:
    """What flex chooses beside the best of what was tried."""
    rows = result["rows"]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    of_label = {label: [row for row in rows if row["label"] == label] for label in labels}
    figure, (ax,) = new_figure(result, "Warps, stages and splits of the decode kernel: flex's choice and the best")

    def speeds(found: list[dict[str, Any] | None]) -> list[float | None]:
        return [None if row is None else row["gb_per_s"] for row in found]

    series = {
        "flex's own choice": speeds([own_row(of_label[label]) for label in labels]),
        "the best that was tried": speeds([fastest(of_label[label]) for label in labels]),
    }
    bars(ax, labels, series, unit="GB/s of live K and V")
    ax.axvline(result["copy_bandwidth"] / 1e9, color="black", linestyle=":", linewidth=1, label="a copy")
    ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[16, 32])
    parser.add_argument("--warps", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4, 5])
    parser.add_argument("--repeats", type=int, default=10, help="measurements of which the median counts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = arguments.device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    sizes, heads = (SMOKE_SIZES, SMOKE_HEADS) if arguments.smoke else (SIZES, HEADS)
    if arguments.smoke:
        arguments.warps, arguments.stages, arguments.block_sizes = [1, 2], [3], [16]
    bandwidth = copy_bandwidth(device)
    rows = []
    for block_size in arguments.block_sizes:
        cases = [
            prepare(Case(batch, context, block_size, shortest=shortest, **heads), device, dtype, arguments.seed)
            for batch, context, shortest in sizes
        ]
        owns = {(i, splits): own_pace(found.data, splits) for i, found in enumerate(cases) for splits in found.splits}
        # What flex would choose is among what is tried, whatever was asked for.
        paces = sorted({*itertools.product(arguments.warps, arguments.stages), *owns.values()})
        of_block_size = []
        for pace in paces:
            with forced(pace):
                for (i, splits), own in owns.items():
                    row = measure(cases[i], splits, pace, own, arguments.repeats, bandwidth)
                    of_block_size.append(((i, splits), row))
                    speed = row.get("error") or f"{row['seconds'] * 1e6:,.1f} us, {row['gb_per_s']:,.0f} GB/s"
                    print(f"{row['label']}, {splits} splits, {pace[0]} x {pace[1]}: {speed}", flush=True)
        rows += [row for _, row in sorted(of_block_size, key=lambda found: found[0])]
        del cases
        free_memory(device)
    result = {
        "benchmark": "flex_options",
        "environment": environment(device),
        "settings": {"dtype": str(dtype).removeprefix("torch."), "seed": arguments.seed, **heads},
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }
    publish(result, tables(result), plot(result), output_file(arguments, "flex_options"))


if __name__ == "__main__":
    main()
