"""Other people's attention kernels before the oracle: the check that its constants are right.

    python benchmarks/judged_kernels.py
    python benchmarks/judged_kernels.py --budget standard --kernels "SDPA, flash" FlashInfer

The bounds of paged/oracle/expected.py were derived, not fitted. So kernels that thousands of people use must pass them,
and come near them: the slack is the largest error as a share of what is allowed. Kernels that know no blocks are given
gathered ones, a sequence at a time. What is declared of each (where it rounds, what it cannot do) is in its `Judged`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    Result,
    add_arguments,
    bars,
    environment,
    first_line,
    fixed,
    markdown,
    module_if_there,
    new_figure,
    output_file,
    publish,
)
from matplotlib.figure import Figure
from torch import Tensor

from paged.attention import flex, fused, gathered
from paged.oracle import Capabilities, Conventions, Profile, verify

HALVES = ("bfloat16", "float16")
CHECKS = ("exact probe", "hard bound", "log-sum-exp", "row statistics")
FEATURES: dict[str, Any] = {"window": True, "softcap": True, "alibi": True, "sinks": True, "empty_rows": True}


@dataclass(frozen=True)
class Judged:
    """A kernel and what is declared of it.

    Attributes:
        make: gives the kernel, or raises ImportError where it is not installed.
        capabilities, profile, conventions, adapter, max_shapes: as for `verify`.
        cpu_profile: where it rounds on a CPU; None where it does not run there.
    """

    make: Callable[[], Callable[..., Any]]
    capabilities: Capabilities
    profile: Profile = field(default_factory=Profile)
    conventions: Conventions = field(default_factory=Conventions)
    adapter: str = "contract"
    max_shapes: int | None = None
    cpu_profile: Profile | None = None


# ------------------------------------------------------------------------------------------ kernels that know no blocks


def by_sequence(attend: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The contract around `attend(query [1, Hq, Q, D], key and value [1, Hq, n, D], causal, scale)`.

    A lone query token, or as many as there are keys, need no mask but "causal"; others are taken one by one, each with
    the keys that it sees.
    """

    def kernel(
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        group = query.shape[1] // key_cache.shape[2]
        outs, lses = [], []
        for index, seq_len in enumerate(seq_lens.tolist()):
            first, last = query_start_loc[index : index + 2].tolist()
            blocks = block_tables[index, : -(-seq_len // key_cache.shape[1])]
            key, value = (
                cache[blocks].flatten(0, 1)[:seq_len].repeat_interleave(group, dim=1).transpose(0, 1)[None]
                for cache in (key_cache, value_cache)
            )
            rows = query[first:last].transpose(0, 1)[None]  # [1, Hq, Q, D]
            count = last - first
            whole = count in (1, seq_len)
            for part in [slice(0, count)] if whole else [slice(i, i + 1) for i in range(count)]:
                seen = seq_len - count + part.stop
                out, lse = attend(rows[:, :, part], key[:, :, :seen], value[:, :, :seen], count > 1 and whole, scale)
                outs.append(out[0].transpose(0, 1))
                lses.append(lse[0].transpose(0, 1)[: part.stop - part.start])
        return torch.cat(outs), torch.cat(lses)

    return kernel


def sdpa_flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """FlashAttention 2 as torch ships it, on a CPU torch's own."""
    if query.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def sdpa_cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's attention."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return found[0], found[1].reshape(*query.shape[:3])


def sdpa_efficient(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel that came from xFormers. Its log-sum-exp is padded to 32 rows."""
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return found[0], found[1][:, :, : query.shape[2]]


# ----------------------------------------------------------------------------------------------- kernels that know them


def flashinfer_kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """FlashInfer's prefill over pages, which decodes too; compiled at its first call.

    Raises:
        ImportError: it is not installed.
    """
    flashinfer = module_if_there("flashinfer")
    if flashinfer is None:
        raise ImportError("flashinfer is not installed")
    wrappers: dict[torch.device, Any] = {}

    def kernel(
        query: Tensor,
        cache: Tensor,
        qo_indptr: Tensor,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        *,
        sm_scale: float,
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        if query.device not in wrappers:
            workspace = torch.empty(256 << 20, dtype=torch.uint8, device=query.device)
            wrappers[query.device] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        wrapper = wrappers[query.device]
        wrapper.plan(
            qo_indptr,
            indptr,
            indices,
            last_page_len,
            query.shape[1],
            cache.shape[3],
            query.shape[2],
            cache.shape[2],
            causal=True,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            q_data_type=query.dtype,
            kv_data_type=cache.dtype,
        )
        return wrapper.run(query, cache, return_lse=True)

    return kernel


def jax_kernel() -> Callable[..., Tensor]:
    """JAX's paged attention for GPUs, written in Pallas; decodes only. It scales no scores, so the query is scaled.

    Raises:
        ImportError: JAX is not installed, or has none of it.
    """
    jax = module_if_there("jax")
    paged = module_if_there("jax.experimental.pallas.ops.gpu.paged_attention")
    if jax is None or paged is None:
        raise ImportError("jax is not installed")

    def kernel(
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        *,
        scale: float,
    ) -> Tensor:
        pages = [cache.permute(2, 0, 1, 3).contiguous() for cache in (key_cache, value_cache)]  # [Hkv, N, P, D]
        scaled = (query.float() * scale).to(query.dtype)
        tensors = [jax.dlpack.from_dlpack(tensor) for tensor in (scaled, *pages, block_tables, seq_lens)]
        # One partition, so that its pages need no common divisor with any other number.
        out = paged.paged_attention(*tensors, k_splits=1, pages_per_compute_block=1, interpret=not query.is_cuda)
        return torch.from_dlpack(out)

    return kernel


def _library(attend: Callable[..., tuple[Tensor, Tensor]], **declared: Any) -> Judged:
    return Judged(
        make=lambda: by_sequence(attend),
        capabilities=Capabilities(dtypes=HALVES, head_dims=(64, 128), query_groups=(1, 3, 8), lse="e"),
        **declared,
    )


def _own(form: Any, **changes: Any) -> Judged:
    can: dict[str, Any] = {
        "dtypes": (*HALVES, "float32"),
        "head_dims": (64, 128, 80),
        "query_groups": (1, 3, 8),
    } | changes
    return Judged(
        make=lambda: form.paged_attention,
        capabilities=Capabilities(**can, **FEATURES, lse="e"),
        cpu_profile=None if form is flex else Profile(),
        max_shapes=40 if form is flex else None,
    )


# In these the products of float32 are of float32: torch's default, "highest".
JUDGED = {
    "paged, gathered": _own(gathered, block_sizes=(16, 5)),
    "paged, fused": _own(fused, block_sizes=(16, 5)),
    "paged, flex": _own(flex, head_dims=(64, 128), block_sizes=(16, 32)),
    # On a CPU it has an exponential of its own for 16 bits, which is off by 5e-5 at 0 already.
    "SDPA, flash": _library(sdpa_flash, cpu_profile=Profile(exp_rel=2.0**-14)),
    "SDPA, cuDNN": _library(sdpa_cudnn),
    "SDPA, efficient": _library(sdpa_efficient),
    "FlashInfer": Judged(
        make=flashinfer_kernel,
        capabilities=Capabilities(
            dtypes=HALVES, head_dims=(64, 128), query_groups=(1, 4, 8), window=True, softcap=True, lse="2"
        ),
        profile=Profile(tanh_rel=2.0**-11),
        adapter="flashinfer",
    ),
    # Partial sums are stored in the query's dtype before they are divided, and what is unused is multiplied by 0.
    "JAX, Pallas": Judged(
        make=jax_kernel,
        capabilities=Capabilities(dtypes=HALVES, head_dims=(64, 128), query_groups=(1, 3, 8), decode_only=True),
        profile=Profile(q_prescale_dtype="bfloat16", split_dtype="bfloat16"),
        conventions=Conventions(unused_slots="masked"),
        max_shapes=40,
    ),
}


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(name: str, device: str, budget: str, seed: int) -> dict[str, Any]:
    """One row: the verdict on a kernel, and how near it came to each bound."""
    judged = JUDGED[name]
    row: dict[str, Any] = {"kernel": name}
    profile = judged.profile if device.startswith("cuda") else judged.cpu_profile
    if profile is None:
        return row | {"error": "needs a CUDA device"}
    try:
        kernel = judged.make()
    except ImportError as error:
        return row | {"error": first_line(error)}
    began = time.perf_counter()
    report = verify(
        kernel,
        capabilities=judged.capabilities,
        profile=profile,
        conventions=judged.conventions,
        adapter=judged.adapter,
        device=device,
        budget=budget,
        seed=seed,
        max_shapes=judged.max_shapes,
        time_limit=120.0,
    )
    print(report, flush=True)
    return row | {
        "ok": report.ok,
        "faults": [failure.fault for failure in report.failures],
        "cases": report.num_cases,
        "seconds": time.perf_counter() - began,
        "slack": report.slack,
        "not_exercised": list(report.not_exercised),
        "report": report.to_json(),
    }


def tables(result: Result) -> str:
    """The verdicts, in Markdown."""
    rows = []
    for row in result["kernels"]:
        if "error" in row:
            rows.append([row["kernel"], row["error"], *[None] * (len(CHECKS) + 2)])
            continue
        verdict = "right" if row["ok"] else "; ".join(row["faults"])
        slack = [fixed(row["slack"].get(check), 2) for check in CHECKS]
        rows.append([row["kernel"], verdict, *slack, row["cases"], fixed(row["seconds"])])
    headers = ["kernel", "verdict", *(f"{check}, share of what is allowed" for check in CHECKS), "cases", "s"]
    return markdown(headers, rows)


def plot(result: Result) -> Figure:
    """How near each kernel came to each bound."""
    rows = [row for row in result["kernels"] if "error" not in row]
    figure, (ax,) = new_figure(result, "How near right kernels come to the bounds", height=1.5 + 0.6 * len(rows))
    series = {check: [row["slack"].get(check) for row in rows] for check in CHECKS}
    bars(ax, [row["kernel"] for row in rows], series, unit="largest error as a share of what is allowed")
    ax.axvline(1, color="black", linewidth=1)
    ax.legend(fontsize=7, frameon=False)
    return figure


def main() -> None:
    """Judge, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=list(JUDGED), default=list(JUDGED), metavar="NAME")
    parser.add_argument("--budget", choices=["fast", "standard", "long"], default="standard")
    parser.add_argument("--seed", type=int, default=0)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.budget = "fast"
    kernels = [measure(name, arguments.device, arguments.budget, arguments.seed) for name in arguments.kernels]
    result: Result = {
        "benchmark": "judged_kernels",
        "environment": environment(arguments.device),
        "settings": {"budget": arguments.budget, "seed": arguments.seed},
        "kernels": kernels,
    }
    publish(result, tables(result), plot(result), output_file(arguments, "judged_kernels"))


if __name__ == "__main__":
    main()
