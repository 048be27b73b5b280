"""Paged attention in all its forms, against attention without paging and against what memory can move.

    python benchmarks/attention.py              decode: one query token a sequence
    python benchmarks/attention.py --prefill    a chunk of a prompt on its context

Every result is first held against float64 (`reference.attention`, on some of its rows) and only timed if it is right.
Blocks are drawn at random from a pool that is so large, and read in turns so, that the L2 cache does not hold what the
next call reads. "GB/s" counts live K and V once; "share" is that over what a copy within the memory moves on the same
GPU in the same run. "contiguous" is PyTorch's `scaled_dot_product_attention` over K and V that lie dense, in the layout
it likes best: no paging, and so the bound for the others.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
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
    module_if_there,
    new_figure,
    output_file,
    per_cent,
    publish,
    time_calls,
)
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from paged.attention import dense, fused, gathered
from reference.attention import attention as attention_by_definition

# Flex and FlashInfer are measured where they are.
flex = module_if_there("paged.attention.flex")
flashinfer = module_if_there("flashinfer")

# What may lie between a right result and float64, over the largest number of it: a few roundings of the dtype.
TOLERANCES = {torch.bfloat16: 0.02, torch.float32: 1e-4}
ROWS_CHECKED = 8
# A GPU's L2 cache is passed over this many times before anything is read again.
TIMES_L2 = 4

Calls = list[Callable[[], Tensor]]


@dataclass(frozen=True)
class Case:
    """What is attended: `batch` sequences whose last `query_len` of `context` tokens are queries.

    With `shortest`, contexts fall evenly from `context` to that, the longest first, as the engine orders them.
    """

    batch: int
    context: int
    block_size: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    query_len: int = 1
    shortest: int | None = None

    @property
    def contexts(self) -> list[int]:
        """Of each sequence.

        >>> Case(3, 100, 16, shortest=50).contexts, Case(2, 100, 16).contexts
        ([100, 75, 50], [100, 100])
        """
        spread = 0 if self.shortest is None else self.context - self.shortest
        return [self.context - spread * i // max(1, self.batch - 1) for i in range(self.batch)]

    @property
    def label(self) -> str:
        """As in the tables."""
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        if self.query_len > 1:
            return f"{self.query_len} on {self.context - self.query_len}, block {self.block_size}, {heads}"
        return f"B={self.batch}, T={self.length}, block {self.block_size}, {heads}"

    @property
    def length(self) -> str:
        """Of the contexts, for labels."""
        return str(self.context) if self.shortest is None else f"{self.shortest} to {self.context}"

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of live K and V."""
        return 2 * sum(self.contexts) * self.kv_heads * self.head_dim * itemsize

    @property
    def flop(self) -> int:
        """Operations of causal attention: two products, a multiplication and an addition each, per visible key."""
        before = self.context - self.query_len
        visible = self.query_len * before + self.query_len * (self.query_len + 1) // 2
        return 4 * self.batch * self.heads * self.head_dim * visible


DECODE = [
    *(Case(b, t, p) for b, t in [(64, 2048), (256, 1024), (8, 2048), (1, 8192)] for p in (16, 32)),
    Case(64, 2048, 16, heads=64, kv_heads=8, head_dim=64),
    Case(64, 2048, 16, heads=16, kv_heads=8),
    Case(64, 2048, 16, heads=28, kv_heads=4),
    Case(64, 2048, 16, heads=32, kv_heads=32),
]
PREFILL = [
    Case(1, context + chunk, block_size, query_len=chunk)
    for chunk, context in [(2048, 6144), (2048, 0), (512, 7680)]
    for block_size in (16, 32)
]
SMOKE_DECODE = [Case(3, 37, 4, heads=4, kv_heads=2, head_dim=16), Case(2, 16, 8, heads=2, kv_heads=2, head_dim=16)]
SMOKE_PREFILL = [Case(1, 24, 4, heads=4, kv_heads=2, head_dim=16, query_len=9)]


@dataclass(frozen=True)
class Data:
    """The tensors of a case: one pool, and several sets of sequences in it that share no block.

    Attributes:
        query: [T, Hq, D].
        key_cache, value_cache: [N, P, Hkv, D].
        tables: for each set, [B, M] int32.
        seq_lens: [B] int32.
        query_start_loc: [B + 1] int32.
    """

    case: Case
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    tables: list[Tensor]
    seq_lens: Tensor
    query_start_loc: Tensor

    @property
    def scale(self) -> float:
        """Of the scores."""
        return 1 / math.sqrt(self.case.head_dim)

    def dense(self, cache: Tensor, number: int) -> Tensor:
        """[B, K, Hkv, D]: one set's K or V without blocks."""
        return cache[self.tables[number].long()].flatten(1, 2)[:, : self.case.context]


def make_data(case: Case, device: str, dtype: torch.dtype, seed: int) -> Data:
    """Random tensors, and as many sets of sequences as it takes to pass over the L2 cache."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0
    num_sets = max(1, math.ceil(TIMES_L2 * cache_bytes / case.kv_bytes(dtype.itemsize)))
    blocks = math.ceil(case.context / case.block_size)
    num_blocks = num_sets * case.batch * blocks
    drawn = 1 + torch.randperm(num_blocks, generator=generator, device=device).int()
    pool = (num_blocks + 2, case.block_size, case.kv_heads, case.head_dim)
    key_cache, value_cache = normal(*pool), normal(*pool)
    for cache in (key_cache, value_cache):
        cache[0] = 0  # the null block
    ends = torch.arange(case.batch + 1, device=device, dtype=torch.int32) * case.query_len
    return Data(
        case,
        normal(case.batch * case.query_len, case.heads, case.head_dim),
        key_cache,
        value_cache,
        list(drawn.reshape(num_sets, case.batch, blocks).unbind()),
        torch.tensor(case.contexts, device=device, dtype=torch.int32),
        ends,
    )


def paged_calls(data: Data, paged_attention: Callable[..., tuple[Tensor, Tensor]]) -> Calls:
    """One call for each set of sequences, by the contract that all forms share."""

    def call(tables: Tensor) -> Tensor:
        return paged_attention(
            data.query,
            data.key_cache,
            data.value_cache,
            tables,
            data.seq_lens,
            data.query_start_loc,
            scale=data.scale,
            max_query_len=data.case.query_len,
        )[0]

    return [lambda tables=tables: call(tables) for tables in data.tables]


def compiled(paged_attention: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same function, compiled for fixed shapes and never falling back."""
    return torch.compile(paged_attention, fullgraph=True, dynamic=False)


def contiguous_calls(data: Data) -> Calls:
    """Dense K and V, heads outermost."""
    case = data.case
    query = data.query.reshape(case.batch, case.query_len, case.heads, case.head_dim).transpose(1, 2).contiguous()
    mask = None if case.query_len == 1 else causal_lower_right(case.query_len, case.context)

    def call(key: Tensor, value: Tensor) -> Tensor:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=data.scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(data.query.shape)

    calls = []
    for number in range(len(data.tables)):
        key = data.dense(data.key_cache, number).transpose(1, 2).contiguous()
        value = data.dense(data.value_cache, number).transpose(1, 2).contiguous()
        calls.append(lambda key=key, value=value: call(key, value))
    return calls


def flashinfer_calls(data: Data) -> Calls:
    """FlashInfer's hand-written kernels, planned outside of the clock."""
    assert flashinfer is not None, "only called where it is"
    case, device = data.case, data.query.device
    blocks = math.ceil(case.context / case.block_size)
    indptr = torch.arange(case.batch + 1, device=device, dtype=torch.int32) * blocks
    last = torch.full((case.batch,), (case.context - 1) % case.block_size + 1, device=device, dtype=torch.int32)
    calls = []
    for tables in data.tables:
        workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=device)
        pages = (indptr, tables.flatten(), last)
        shape = (case.heads, case.kv_heads, case.head_dim, case.block_size)
        options = {"q_data_type": data.query.dtype, "kv_data_type": data.query.dtype, "sm_scale": data.scale}
        if case.query_len == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(*pages, *shape, **options)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            wrapper.plan(data.query_start_loc, *pages, *shape, causal=True, **options)
        calls.append(lambda wrapper=wrapper: wrapper.run(data.query, (data.key_cache, data.value_cache)))
    return calls


def flex_calls(data: Data) -> Calls:
    """`attend_decode` as the layers of the engine call it: they share the plan of a step. Chunks are planned anew."""
    case, (query, caches) = data.case, (data.query, (data.key_cache, data.value_cache))
    if case.query_len > 1:
        return paged_calls(data, flex.paged_attention)
    num_splits = flex.splits_here(case.batch, case.kv_heads, data.tables[0].shape[1], query.device)
    plans = [
        flex.plan_decode(tables, data.seq_lens, block_size=case.block_size, num_splits=num_splits)
        for tables in data.tables
    ]
    return [lambda plan=plan: flex.attend_decode(query, *caches, plan, scale=data.scale)[0] for plan in plans]


def parts_calls(data: Data) -> Calls:
    """How the engine attends a long chunk on a GPU: context and chunk apart, gathering included."""
    case = data.case
    if case.query_len == 1 or not data.query.is_cuda:
        raise ValueError("for chunks of prompts on a GPU")
    context_len = case.context - case.query_len
    new = [data.dense(cache, 0)[0, context_len:].contiguous() for cache in (data.key_cache, data.value_cache)]

    def call(blocks: Tensor) -> Tensor:
        return dense.attend_in_parts(
            data.query, *new, data.key_cache, data.value_cache, blocks, context_len, scale=data.scale
        )[0]

    return [lambda tables=tables: call(tables[0, : math.ceil(context_len / case.block_size)]) for tables in data.tables]


FORMS: dict[str, Callable[[Data], Calls]] = {
    "contiguous": contiguous_calls,
    "gathered": lambda data: paged_calls(data, gathered.paged_attention),
    "gathered, compiled": lambda data: paged_calls(data, compiled(gathered.paged_attention)),
    "fused, compiled": lambda data: paged_calls(data, compiled(fused.paged_attention)),
}
if flex is not None:
    FORMS["flex"] = flex_calls
    FORMS["flex, planned anew"] = lambda data: paged_calls(data, flex.paged_attention)
    FORMS["prompts in parts (cuDNN)"] = parts_calls
if flashinfer is not None:
    FORMS["FlashInfer"] = flashinfer_calls


def checked_rows(case: Case) -> list[int]:
    """Some query tokens: the first, the last, and others evenly between."""
    num_tokens = case.batch * case.query_len
    return sorted({round(i * (num_tokens - 1) / (ROWS_CHECKED - 1)) for i in range(ROWS_CHECKED)})


def expected_rows(data: Data) -> Tensor:
    """[rows, Hq, D]: the first set's `checked_rows` from the definition, in float64."""
    case = data.case
    keys, values = data.dense(data.key_cache, 0), data.dense(data.value_cache, 0)
    rows = []
    for token in checked_rows(case):
        sequence, offset = divmod(token, case.query_len)
        seen = case.contexts[sequence] - case.query_len + offset + 1
        key, value = keys[sequence, :seen].cpu(), values[sequence, :seen].cpu()
        out, _ = attention_by_definition(data.query[token : token + 1].cpu(), key, value, scale=data.scale)
        rows.append(out[0])
    return torch.stack(rows)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number; NaN if there is one."""
    return float((out.double().cpu() - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def measure(case: Case, form: str, data: Data, expected: Tensor, repeats: int, bandwidth: float) -> dict[str, Any]:
    """One row: the error of a form and, if it is right, its time."""
    row: dict[str, Any] = {"case": asdict(case), "label": case.label, "form": form, "sets": len(data.tables)}
    torch._dynamo.reset()
    try:
        calls = FORMS[form](data)
        row["relative_error"] = relative_error(calls[0]()[checked_rows(case)], expected)
        if not row["relative_error"] <= TOLERANCES[data.query.dtype]:
            return row | {"error": f"wrong: relative error {row['relative_error']:.2g}"}
        timing = time_calls(calls, data.query.device.type, repeats=repeats)
    except Exception as error:  # one form that fails must not take the others with it
        return row | {"error": first_line(error)}
    row |= asdict(timing)
    row["gb_per_s"] = case.kv_bytes(data.query.dtype.itemsize) / timing.seconds / 1e9
    row["share_of_copy"] = row["gb_per_s"] * 1e9 / bandwidth
    row["tflop_per_s"] = case.flop / timing.seconds / 1e12
    return row


def tables(result: Result) -> str:
    """A line for each case, a column for each form."""
    rows, prefill = result["rows"], result["settings"]["prefill"]
    forms = list(dict.fromkeys(row["form"] for row in rows))
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        cells: list[str | None] = [label]
        of_label = {row["form"]: row for row in rows if row["label"] == label}
        for form in forms:
            row = of_label.get(form, {})
            if "error" in row:
                cells.append("wrong" if row["error"].startswith("wrong") else "fails")
            elif not row:
                cells.append(None)
            else:
                speed = f"{row['gb_per_s']:,.0f} ({per_cent(row['share_of_copy'])})"
                cells.append(fixed(row["tflop_per_s"], 0) if prefill else speed)
        errors = [row["relative_error"] for row in of_label.values() if "error" not in row]
        lines.append([*cells, f"{max(errors):.1e}" if errors else None])
    unit = "TFLOP/s of causal work" if prefill else "GB/s of live K and V, share of a copy's"
    text = markdown([unit, *forms, "largest error"], lines)
    text += f"\n\nA copy moves {result['copy_bandwidth'] / 1e9:,.0f} GB/s (read and written) on the same device."
    problems = [f"- {row['label']}, {row['form']}: {row['error']}" for row in rows if "error" in row]
    launched = {row["form"] for row in rows if row.get("clock") == "events"}
    if launched:
        problems.append(f"- timed with their launches, because a CUDA graph could not hold them: {', '.join(launched)}")
    return text + ("\n\n" + "\n".join(problems) if problems else "")


def plot(result: Result) -> Figure:
    """Bars for each case."""
    rows, prefill = result["rows"], result["settings"]["prefill"]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    key = "tflop_per_s" if prefill else "gb_per_s"
    values = {(row["label"], row["form"]): row.get(key) for row in rows}
    title = "Attention over blocks, " + ("a chunk of a prompt" if prefill else "one query token a sequence")
    figure, (ax,) = new_figure(result, title, height=2 + 0.14 * len(labels) * len(forms))
    unit = "TFLOP/s of causal work" if prefill else "GB/s of live K and V"
    bars(ax, labels, {form: [values.get((label, form)) for label in labels] for form in forms}, unit=unit)
    if not prefill:
        ax.axvline(result["copy_bandwidth"] / 1e9, color="black", linestyle=":", linewidth=1, label="a copy")
    ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--prefill", action="store_true", help="chunks of prompts instead of decodes")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="default: all that there are")
    parser.add_argument("--repeats", type=int, default=20, help="measurements of which the median counts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = arguments.device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if arguments.smoke:
        cases = SMOKE_PREFILL if arguments.prefill else SMOKE_DECODE
    else:
        cases = PREFILL if arguments.prefill else DECODE
    bandwidth = copy_bandwidth(device)
    rows = []
    for case in cases:
        data = make_data(case, device, dtype, arguments.seed)
        expected = expected_rows(data)
        for form in arguments.forms:
            row = measure(case, form, data, expected, arguments.repeats, bandwidth)
            rows.append(row)
            speed = row.get("error") or f"{row['seconds'] * 1e6:,.1f} us, {row['gb_per_s']:,.0f} GB/s, {row['clock']}"
            error = f"{row['relative_error']:.1e}" if "relative_error" in row else "unknown"
            print(f"{case.label}, {form}: relative error {error}; {speed}", flush=True)
        del data
        free_memory(device)
    result = {
        "benchmark": "attention",
        "environment": environment(device),
        "settings": {"prefill": arguments.prefill, "dtype": str(dtype).removeprefix("torch."), "seed": arguments.seed},
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }
    output = output_file(arguments, "attention_prefill" if arguments.prefill else "attention")
    publish(result, tables(result), plot(result), output)


if __name__ == "__main__":
    main()
