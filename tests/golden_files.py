"""What the tests of golden files share: what is declared, outputs of kernels, files read by their format, C++ programs.

And what somebody may do to a folder and an output file, each with what is said of it.
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paged.attention.gathered import paged_attention
from paged.oracle import Capabilities, export
from paged.oracle.adapters import Contract
from paged.oracle.golden.manifest import Manifest
from paged.oracle.inputs import materialise

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "golden"
CAN = Capabilities(
    dtypes=("float32", "bfloat16", "float16"),
    kv_dtypes=("auto", "float8_e4m3fn"),
    head_dims=(16, 24),
    query_groups=(1, 2),
    block_sizes=(8, 16),
    window=True,
    softcap=True,
    alibi=True,
    sinks=True,
    kv_scales="head",
    lse="e",
    empty_rows=True,
)
PLAIN = replace(CAN, dtypes=("bfloat16",), kv_dtypes=("auto",), softcap=False, alibi=False, sinks=False, kv_scales=None)
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "I32": "<i4", "I64": "<i8"}

Kernel = Callable[..., object]


def results_of(manifest: Manifest, kernel: Kernel = paged_attention) -> dict[str, torch.Tensor]:
    """What a kernel makes of every file, as it would stand in an output file."""
    results = {}
    for entry in manifest.entries:
        inputs = materialise(entry.case, manifest.conventions, poisoned=entry.poisoned)
        out, lse = Contract().results(Contract().call(kernel, inputs, manifest.capabilities))
        results |= {f"{entry.name}.out": out.contiguous(), f"{entry.name}.lse": lse.contiguous()}
    return results


def raw(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """A safetensors file by its format: dtype and numbers (for narrow floats, their bits) of each tensor."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data, found = json.loads(content[8 : 8 + length]), content[8 + length :], {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        array = np.frombuffer(data[begin:end], dtype=NUMPY[about["dtype"]]).reshape(about["shape"])
        found[name] = about["dtype"], array
    return found


def last_of_full_block(query, keys, values, tables, seq_lens, starts, **wishes):
    """Loses the last token of a sequence that fills its last block."""
    lost = (seq_lens % keys.shape[1] == 0) & (seq_lens > 1)
    shifted = torch.where(lost, seq_lens - 1, seq_lens).int()
    return paged_attention(query, keys, values, tables, shifted, starts, **wishes)


def small_folder(folder: Path) -> Path:
    """A small golden folder, and the outputs of a right kernel beside it."""
    can = Capabilities(dtypes=("float16",), head_dims=(8,), block_sizes=(8,), lse="e")
    manifest = export(folder / "golden", capabilities=can, num_cases=2)
    save_file(results_of(manifest), folder / "out.safetensors")
    return folder


def compiler() -> str | None:
    """The first one on the PATH."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build(program: str, folder: Path, *options: str) -> Path:
    """Compile one of the examples, without a warning."""
    if compiler() is None:
        reason = "needs a C++ compiler: none of c++, g++, clang++ is on the PATH"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    target = folder / "_".join([program, *options]).replace("-", "")
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Wpedantic", "-Werror", *options]
    subprocess.run([compiler(), *flags, str(EXAMPLES / f"{program}.cpp"), "-o", str(target)], check=True)
    return target


def run_program(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True, check=False)


def change_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "golden" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def change_file(folder: Path, change: Callable[[dict], object], *, hashed: bool) -> None:
    """Change the first golden file, and its hash in the manifest, too, as somebody who means well might."""
    manifest = json.loads((folder / "golden" / "manifest.json").read_text())
    path = folder / "golden" / manifest["files"][0]["file"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if hashed:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        change_manifest(folder, lambda manifest: manifest["files"][0].update(sha256=found))


def change_output(folder: Path, change: Callable[[dict, str], object]) -> None:
    tensors = load_file(folder / "out.safetensors")
    change(tensors, min(tensors).rpartition(".")[0])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "out.safetensors")


def of_files(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_manifest(folder, lambda manifest: manifest["files"][0].update(changes))


def of_output(what: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda folder: change_output(
        folder, lambda tensors, name: tensors.update({f"{name}.{what}": change(tensors[f"{name}.{what}"])})
    )


BAD = {
    "no folder": (lambda folder: shutil.rmtree(folder / "golden"), "No such file"),
    "no manifest": (lambda folder: (folder / "golden" / "manifest.json").unlink(), "manifest.json"),
    "no JSON": (lambda folder: (folder / "golden" / "manifest.json").write_text("{"), "is no JSON"),
    "no text": (lambda folder: (folder / "golden" / "manifest.json").write_bytes(b"\xff\xfe\x00"), "is no JSON"),
    "other JSON": (lambda folder: (folder / "golden" / "manifest.json").write_text("[1]"), "no manifest of golden"),
    "version": (lambda folder: change_manifest(folder, lambda m: m.update(version=2)), "reads version 1"),
    "no files": (lambda folder: change_manifest(folder, lambda m: m.update(files=[])), "one or more files"),
    "twice": (lambda folder: change_manifest(folder, lambda m: m["files"].append(m["files"][0])), "none of them twice"),
    "no seed": (lambda folder: change_manifest(folder, lambda m: m.pop("seed")), "is not complete: KeyError: 'seed'"),
    "no list": (lambda folder: change_manifest(folder, lambda m: m.update(files=5)), "is not complete: TypeError"),
    "declared": (lambda folder: change_manifest(folder, lambda m: m["declared"].update(speed={})), "unknown speed"),
    "a way out": (of_files(name="../golden"), "letters, digits and _"),
    "no case": (of_files(case={"sequences": [[1, 0]], "window": 0}), ": window must be at least 1"),
    "regions": (of_files(poisoned=["everywhere"]), "poisoned may name live, hidden"),
    "other case": (of_files(case={"sequences": [[1, 9]], "head_dim": 8, "value_dim": 8}), "it has to be [1, 1, 8]"),
    "hash": (lambda folder: change_file(folder, lambda t: t["out"].mul_(2), hashed=False), "by their sha256: 000_"),
    "other out": (lambda folder: change_file(folder, lambda t: t["out"].mul_(2), hashed=True), "another out; export"),
    "other bound": (
        lambda folder: change_file(folder, lambda t: t["lse_bound"].mul_(2), hashed=True),
        "another lse_bound; export",
    ),
    "other shape": (
        lambda folder: change_file(folder, lambda t: t.update(out=t["out"][:, 0].contiguous()), hashed=True),
        "another out, lse",
    ),
    "no bound": (lambda folder: change_file(folder, lambda t: t.pop("out_bound"), hashed=True), "another out, lse"),
    "other inputs": (lambda folder: change_file(folder, lambda t: t["scale"].mul_(2), hashed=True), "other inputs"),
    "cut file": (
        lambda folder: [path.write_bytes(path.read_bytes()[:-1]) for path in (folder / "golden").glob("*.safetensors")],
        "is no safetensors file",
    ),
    "no file": (
        lambda folder: [path.unlink() for path in (folder / "golden").glob("*.safetensors")],
        "No such file",
    ),
    "no output": (lambda folder: (folder / "out.safetensors").unlink(), "No such file"),
    "output a folder": (
        lambda folder: ((folder / "out.safetensors").unlink(), (folder / "out.safetensors").mkdir()),
        "Is a directory",
    ),
    "output no safetensors": (
        lambda folder: (folder / "out.safetensors").write_bytes(b"nonsense"),
        "is no safetensors file",
    ),
    "missing": (lambda folder: change_output(folder, lambda t, name: t.pop(f"{name}.out")), "missing: 000_"),
    "missing lse": (lambda folder: change_output(folder, lambda t, name: t.pop(f"{name}.lse")), ".lse"),
    "unknown": (
        lambda folder: change_output(folder, lambda t, name: t.update(stray=torch.ones(1))),
        "no result of a file in the folder: stray",
    ),
    "shape": (of_output("out", lambda out: out[:-1]), "it has to be [7, "),
    "shape of lse": (of_output("lse", lambda lse: lse[..., None]), ".lse has shape"),
    "dtype": (of_output("out", lambda out: out.bfloat16()), "has dtype bfloat16; it has to be float16 or float32 or"),
    "dtype of lse": (of_output("lse", lambda lse: lse.half()), "has dtype float16; it has to be float32 or float64"),
}
