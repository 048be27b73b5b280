"""Seconds from nothing to the first token, in a fresh process, with the compiler's caches empty and full.

    python benchmarks/start_up.py

"cold" has empty folders for Inductor's and Triton's caches, "warm" the folders that the cold start has filled. Weights
are random numbers made on the device, so reading a checkpoint from disk is not in it. The parts are those that the
engine's runner gives in `start_up_seconds`, if it does; importing torch, transformers and this package comes first, and
the first token of a prompt of 16 tokens last.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

from common import (  # noqa: E402 (importing is what is timed)
    SHAPES,
    Result,
    add_arguments,
    bars,
    environment,
    fixed,
    load_engine,
    markdown,
    new_figure,
    output_file,
    publish,
    run_in_new_process,
    synchronize,
)
from matplotlib.figure import Figure  # noqa: E402

from paged import SamplingParams  # noqa: E402

IMPORTED = time.perf_counter()


def start(point: dict[str, Any]) -> dict[str, Any]:
    """In this process: make an engine and its first token, and say how long each took."""
    device = point["device"]
    before = time.perf_counter()
    llm = load_engine(
        SHAPES[point["model"]],
        device=device,
        dtype="bfloat16" if device.startswith("cuda") else "float32",
        max_model_len=point["max_model_len"],
        max_num_seqs=point["max_num_seqs"],
        enforce_eager=point["enforce_eager"],
        **({} if device.startswith("cuda") else {"kv_cache_memory_bytes": 2**24}),
    )
    synchronize(device)
    ready = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": list(range(1, 17))}], params, use_tqdm=False)
    first = time.perf_counter()
    parts: dict[str, float] = getattr(llm.engine.runner, "start_up_seconds", None) or {}
    return {
        "import": IMPORTED - STARTED,
        "engine": ready - before,
        "parts": {name: float(seconds) for name, seconds in parts.items() if name not in ("import", "total")},
        "first_token": first - ready,
        "total": IMPORTED - STARTED + first - before,
    }


def split(row: dict[str, Any]) -> dict[str, float]:
    """The parts in order; what the engine does not account for is "other", and they sum to the total.

    >>> split({"import": 2.0, "engine": 5.0, "parts": {"weights": 1.0, "compile": 3.5}, "first_token": 0.5})
    {'import': 2.0, 'weights': 1.0, 'compile': 3.5, 'other': 0.5, 'first token': 0.5}
    """
    parts = {"import": row["import"], **row["parts"]}
    return parts | {"other": row["engine"] - sum(row["parts"].values()), "first token": row["first_token"]}


def tables(result: Result) -> str:
    """A line for each start, a column for each part."""
    rows = [row for row in result["rows"] if "error" not in row]
    names = list(dict.fromkeys(name for row in rows for name in split(row)))
    names.sort(key=("other", "first token").count)  # these two last, the others in their order
    lines = [
        [
            f"{row['model']}, {row['mode']}, {row['caches']}",
            *(fixed(split(row).get(name)) for name in names),
            fixed(row["total"]),
        ]
        for row in rows
    ]
    lines += [
        [f"{row['model']}, {row['mode']}, {row['caches']}: {row['error']}", *[None] * (len(names) + 1)]
        for row in result["rows"]
        if "error" in row
    ]
    return markdown(["seconds", *names, "to the first token"], lines)


def plot(result: Result) -> Figure:
    """Bars of the parts."""
    rows = [row for row in result["rows"] if "error" not in row]
    names = list(dict.fromkeys(name for row in rows for name in split(row)))
    figure, (ax,) = new_figure(result, "From nothing to the first token", height=2.5 + 0.16 * len(rows) * len(names))
    series = {name: [split(row).get(name) for row in rows] for name in names}
    bars(ax, [f"{row['model']}, {row['mode']}, {row['caches']}" for row in rows], series, unit="seconds")
    ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main() -> None:
    """Start each twice, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3-8b", "qwen3-0.6b"])
    parser.add_argument("--modes", nargs="+", choices=("compiled", "eager"), default=["compiled", "eager"])
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(start(json.loads(arguments.point))))
        return
    if arguments.smoke:
        arguments.models, arguments.modes = ["tiny"], ["eager"]
        arguments.max_num_seqs, arguments.max_model_len = 4, 64
    rows = []
    for model in arguments.models:
        for mode in arguments.modes:
            point = {
                "model": model,
                "device": arguments.device,
                "enforce_eager": mode == "eager",
                "max_num_seqs": arguments.max_num_seqs,
                "max_model_len": arguments.max_model_len,
            }
            with tempfile.TemporaryDirectory() as folder:
                caches = {
                    "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
                    "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
                }
                # Eager starts have nothing to find in the caches; the second one shows what the disk's cache gives.
                for name in ("cold", "warm"):
                    row = {"model": SHAPES[model].name, "mode": mode, "caches": name}
                    row |= run_in_new_process("start_up.py", ["--point", json.dumps(point)], **caches)
                    rows.append(row)
                    seconds = row.get("error") or f"{row['total']:.1f} s"
                    print(f"{row['model']}, {mode}, {name}: {seconds}", flush=True)
    result = {
        "benchmark": "start_up",
        "environment": environment(arguments.device),
        "settings": {"max_num_seqs": arguments.max_num_seqs, "max_model_len": arguments.max_model_len},
        "rows": rows,
    }
    publish(result, tables(result), plot(result), output_file(arguments, "start_up"))


if __name__ == "__main__":
    main()
