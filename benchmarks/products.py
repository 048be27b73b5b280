"""The matrix products of a decoder layer, and what those of a whole step take at least.

    python benchmarks/products.py
    python benchmarks/products.py --models llama-3-8b --tokens 1 64

Q, K and V apart and as one product, gate and up likewise, o, down, and the output projection: at 1, 64, 256 tokens, as
decodes have them, and at 1024 and 4096, as prompts do. "library" is `torch.nn.functional.linear`; "compiled" is the
same under torch.compile with `coordinate_descent_tuning`, which makes a sum of a product with one token, as the engine
has it compiled for a batch of one. Replays of a CUDA graph are timed; weights take turns until the L2 cache is passed
over.

A step is all layers and the output projection of as many rows as sample, 256 at most; nothing else is in it, so no
step that uses these products is faster. Results are held against float64 on some rows and columns before they are
timed.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from attention import TIMES_L2, TOLERANCES, relative_error
from common import (
    SHAPES,
    ModelShape,
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
    publish,
    time_calls,
)
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import linear

Form = Callable[[Tensor, Tensor], Tensor]

# Rows that sample in one step, at most: a prompt of thousands of tokens samples once.
MOST_SAMPLED = 256
CHECKED = 8


@dataclass(frozen=True)
class Product:
    """x @ weight.T: `columns` numbers of each token become `rows`."""

    name: str
    rows: int
    columns: int

    def bytes_moved(self, tokens: int, itemsize: int) -> int:
        """Weight and input read once, output written once."""
        return (self.rows * self.columns + tokens * (self.rows + self.columns)) * itemsize

    def flop(self, tokens: int) -> int:
        """A multiplication and an addition for each weight and token."""
        return 2 * tokens * self.rows * self.columns


def layer_products(shape: ModelShape, *, fused: bool) -> list[Product]:
    """The products of a decoder layer, in their order.

    >>> [(each.name, each.rows) for each in layer_products(SHAPES["qwen3-0.6b"], fused=True)]
    [('qkv', 4096), ('o', 1024), ('gate_up', 6144), ('down', 1024)]
    """
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inputs = {"q": query, "k": kv, "v": kv}, {"gate": shape.intermediate, "up": shape.intermediate}
    attention, feed_forward = (
        [Product("".join(parts) if number == 0 else "_".join(parts), sum(parts.values()), shape.hidden)]
        if fused
        else [Product(name, rows, shape.hidden) for name, rows in parts.items()]
        for number, parts in enumerate(inputs)
    )
    return [
        *attention,
        Product("o", shape.hidden, query),
        *feed_forward,
        Product("down", shape.hidden, shape.intermediate),
    ]


def head_product(shape: ModelShape) -> Product:
    """The output projection."""
    return Product("lm_head", shape.vocab, shape.hidden)


def compiled() -> Form:
    """The library's function as the compiler makes it for these shapes: a sum where there is one token."""
    return torch.compile(
        lambda x, weight: linear(x, weight),
        fullgraph=True,
        dynamic=False,
        options={"coordinate_descent_tuning": True},
    )


FORMS: dict[str, Callable[[], Form]] = {"library": lambda: linear, "compiled": compiled}


def some(size: int) -> list[int]:
    """A few places, the first and the last among them.

    >>> some(3), some(100)
    ([0, 1, 2], [0, 14, 28, 42, 57, 71, 85, 99])
    """
    return sorted({round(i * (size - 1) / (CHECKED - 1)) for i in range(CHECKED)})


def error_of(out: Tensor, x: Tensor, weight: Tensor) -> float:
    """Of some rows and columns, relative to float64; NaN if there is one."""
    tokens, rows = some(len(x)), some(len(weight))
    expected = x[tokens].double().cpu() @ weight[rows].double().cpu().T
    return relative_error(out[tokens][:, rows], expected)


@torch.inference_mode()
def measure(product: Product, tokens: int, form: str, device: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """One row: the error of a product and, if it is right, its time."""
    row: dict[str, Any] = {"product": product.name, "tokens": tokens, "form": form, "shape": asdict(product)}
    generator = torch.Generator(device).manual_seed(product.rows + tokens)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0
    weight_bytes = product.rows * product.columns * dtype.itemsize
    copies = max(1, math.ceil(TIMES_L2 * cache_bytes / weight_bytes))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    torch._dynamo.reset()
    try:
        x = normal(tokens, product.columns)
        weights = [normal(product.rows, product.columns) for _ in range(copies)]
        function = FORMS[form]()
        row["relative_error"] = error_of(function(x, weights[0]), x, weights[0])
        if not row["relative_error"] <= TOLERANCES[dtype]:
            return row | {"error": f"wrong: relative error {row['relative_error']:.2g}"}
        timing = time_calls([lambda w=weight: function(x, w) for weight in weights], device, repeats=repeats)
    except Exception as error:  # one that fails must not take the others with it
        return row | {"error": first_line(error)}
    row |= asdict(timing)
    row["gb_per_s"] = product.bytes_moved(tokens, dtype.itemsize) / timing.seconds / 1e9
    row["tflop_per_s"] = product.flop(tokens) / timing.seconds / 1e12
    return row


def measure_model(
    shape: ModelShape, tokens: list[int], device: str, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """All rows of a model; what has the same shape as another one (k and v; gate and up) is measured once."""
    rows = []
    every = dict.fromkeys(layer_products(shape, fused=False) + layer_products(shape, fused=True))
    for count in tokens:
        found: dict[tuple[int, int, int, str], dict[str, Any]] = {}
        todo = [(product, count, "library") for product in every]
        todo.append((head_product(shape), min(count, MOST_SAMPLED), "library"))
        if count == 1:
            todo += [(product, 1, "compiled") for product in layer_products(shape, fused=True)]
            todo.append((head_product(shape), 1, "compiled"))
        for product, number, form in todo:
            key = product.rows, product.columns, number, form
            if key not in found:
                found[key] = measure(product, number, form, device, dtype, repeats)
                row = found[key]
                speed = row.get("error") or f"{row['seconds'] * 1e6:,.1f} us, {row['gb_per_s']:,.0f} GB/s"
                print(f"{shape.name}, {product.name}, {number} tokens, {form}: {speed}", flush=True)
                free_memory(device)
            rows.append(found[key] | {"product": product.name, "step_tokens": count, "model": shape.name})
    return rows


WAYS = {"separate": ("library", False), "fused": ("library", True), "fused, compiled": ("compiled", True)}


def sums(rows: list[dict[str, Any]], shape: ModelShape, tokens: int, way: str) -> tuple[float, float] | None:
    """Seconds of (a layer's products, a step's) of so many tokens; None if one of them is missing.

    Args:
        rows: of one model.
        shape: of the model.
        tokens: of the step.
        way: one of WAYS.
    """
    form, fused = WAYS[way]
    seconds = {
        row["product"]: row["seconds"]
        for row in rows
        if (row["form"], row["step_tokens"]) == (form, tokens) and "error" not in row
    }
    wanted = [product.name for product in layer_products(shape, fused=fused)]
    if not {*wanted, "lm_head"} <= set(seconds):
        return None
    layer = sum(seconds[name] for name in wanted)
    return layer, shape.layers * layer + seconds["lm_head"]


def cell(row: dict[str, Any] | None) -> str | None:
    """Microseconds, GB/s, TFLOP/s."""
    if row is None:
        return None
    if "error" in row:
        return "wrong" if row["error"].startswith("wrong") else "fails"
    return f"{row['seconds'] * 1e6:,.1f} / {row['gb_per_s']:,.0f} / {row['tflop_per_s']:,.0f}"


def tables(result: Result) -> str:
    """For each model its products, a column for each number of tokens; and the sums."""
    parts = []
    for name in result["settings"]["models"]:
        shape = SHAPES[name]
        rows = [row for row in result["rows"] if row["model"] == shape.name]
        tokens = list(dict.fromkeys(row["step_tokens"] for row in rows))
        lines: list[list[str | None]] = []
        for product, form in dict.fromkeys((row["product"], row["form"]) for row in rows):
            of_line = {row["step_tokens"]: row for row in rows if (row["product"], row["form"]) == (product, form)}
            known = next(iter(of_line.values()))["shape"]
            title = f"{product}, {known['columns']:,} to {known['rows']:,}"
            lines.append([title if form == "library" else f"{title}, {form}", *(cell(of_line.get(t)) for t in tokens)])
        for way in WAYS:
            found = {count: sums(rows, shape, count, way) for count in tokens}
            if any(found.values()):
                lines.append([f"a layer, {way}: us", *(fixed(s[0] * 1e6) if s else None for s in found.values())])
        for way in WAYS:
            found = {count: sums(rows, shape, count, way) for count in tokens}
            if any(found.values()):
                title = f"a step, {shape.layers} layers and lm_head, {way}: ms"
                lines.append([title, *(fixed(s[1] * 1e3, 3) if s else None for s in found.values())])
        headers = [f"{shape.name}: us / GB/s / TFLOP/s", *("1 token" if t == 1 else f"{t:,} tokens" for t in tokens)]
        parts.append(markdown(headers, lines))
    text = "\n\n".join(parts)
    text += f"\n\nA copy moves {result['copy_bandwidth'] / 1e9:,.0f} GB/s (read and written) on the same device. "
    text += f"The output projection has the rows that sample, {MOST_SAMPLED} at most."
    problems = [
        f"- {row['model']}, {row['product']}, {row['tokens']} tokens, {row['form']}: {row['error']}"
        for row in result["rows"]
        if "error" in row
    ]
    return text + ("\n\n" + "\n".join(problems) if problems else "")


def plot(result: Result) -> Figure:
    """A step's products, each way: batches of decodes, and beside them prompts, which take far longer."""
    rows = result["rows"]
    every = list(dict.fromkeys((row["model"], row["step_tokens"]) for row in rows))
    shapes = {SHAPES[name].name: SHAPES[name] for name in result["settings"]["models"]}
    halves = [
        [point for point in every if point[1] <= MOST_SAMPLED],
        [point for point in every if point[1] > MOST_SAMPLED],
    ]
    halves = [points for points in halves if points]
    title = "The matrix products of a step: all layers and the output projection"
    figure, axes = new_figure(result, title, panels=len(halves), height=2 + 0.4 * max(map(len, halves)))
    for ax, points in zip(axes, halves, strict=True):
        series = {}
        for way in WAYS:
            found = [
                sums([row for row in rows if row["model"] == model], shapes[model], tokens, way)
                for model, tokens in points
            ]
            series[way] = [None if each is None else each[1] * 1e3 for each in found]
        bars(ax, [f"{model}, {tokens:,}" for model, tokens in points], series, unit="ms, by model and tokens")
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3-8b", "qwen3-0.6b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=20, help="measurements of which the median counts")
    arguments = parser.parse_args()
    device = arguments.device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if arguments.smoke:
        arguments.models, arguments.tokens, arguments.repeats = ["tiny"], [1, 6], 3
    bandwidth = copy_bandwidth(device)
    rows = []
    for name in arguments.models:
        rows += measure_model(SHAPES[name], arguments.tokens, device, dtype, arguments.repeats)
    result = {
        "benchmark": "products",
        "environment": environment(device),
        "settings": {"models": arguments.models, "dtype": str(dtype).removeprefix("torch.")},
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }
    publish(result, tables(result), plot(result), output_file(arguments, "products"))


if __name__ == "__main__":
    main()
