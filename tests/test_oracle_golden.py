"""Golden files: what is in them, who is right by them, what is no golden file, and the whole way round through C++.

The files are read here by their format, header and bytes, and what is right is held against `reference.attention`.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paged.attention.gathered import paged_attention
from paged.cli import main
from paged.oracle import Capabilities, Conventions, export, judge_files, verify
from paged.oracle.adapters import Contract
from paged.oracle.golden.manifest import Manifest, read_manifest
from paged.oracle.inputs import materialise
from paged.oracle.trial import declared_names
from reference.attention import attention

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


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> tuple[Path, Manifest]:
    """A folder in which everything is declared."""
    folder = tmp_path_factory.mktemp("golden") / "all"
    return folder, export(folder, capabilities=CAN, num_cases=24)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Manifest]:
    """One round of directed cases of a plainer kernel."""
    folder = tmp_path_factory.mktemp("plain") / "all"
    return folder, export(folder, capabilities=PLAIN)


# --- what is in the files ---------------------------------------------------------------------------------------------


def test_few_files_exercise_all_that_is_declared(golden):
    _, manifest = golden
    told = {name for entry in manifest.entries for name in entry.exercises}
    assert declared_names(CAN) <= told
    recipes = ("uniform", "needle", "pair", "staircase", "random", "large", "negative")
    assert {f"recipe {recipe}" for recipe in recipes} | {"poison nan", "poison huge"} <= told
    assert all("declared" not in words for words in manifest.not_exercised)
    assert len([entry for entry in manifest.entries if entry.poisoned is None]) == 24


def test_what_cannot_be_in_files_is_said(tmp_path):
    can = replace(CAN, strided_caches=True, batch_invariant=True, lse=None, head_dims=(16, 24, 32))
    manifest = export(tmp_path / "golden", capabilities=can, num_cases=1)
    words = "\n".join(manifest.not_exercised)
    for said in ("strided_caches: caches", "batch_invariant: the kernel", "log-sum-exp: not", "head_dim 32: declared"):
        assert said in words
    assert all(entry.case.strides == "dense" for entry in manifest.entries)


def test_a_file_is_what_the_manifest_says(golden):
    folder, manifest = golden
    written = json.loads((folder / "manifest.json").read_text())
    assert (written["format"], written["version"], written["seed"]) == ("paged golden files", 1, 0)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *(file["file"] for file in written["files"])}
    short = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}
    for file, entry in zip(written["files"], manifest.entries, strict=True):
        content = (folder / file["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        tensors = raw(folder / file["file"])
        about = {
            name: (short.get(t["dtype"], "F8_E4M3"), tuple(t["shape"])) for name, t in sorted(file["tensors"].items())
        }
        assert about == {name: (dtype, array.shape) for name, (dtype, array) in sorted(tensors.items())}
        inputs = materialise(entry.case, manifest.conventions, poisoned=entry.poisoned)
        for name in ("query", "key_cache", "value_cache", "block_tables", "seq_lens", "query_start_loc"):
            bits = getattr(inputs, name).contiguous().flatten().view(torch.uint8).numpy()
            assert bits.tobytes() == tensors[name][1].tobytes(), name
        for name in ("scale", "window", "softcap"):
            assert file[name] == (tensors[name][1].item() if name in tensors else None)
    assert read_manifest(folder) == manifest


def test_what_is_expected_is_attention(golden):
    """Of every small case, by the reference, over keys and values gathered from the file through its table."""
    folder, manifest = golden
    compared = 0
    for entry in manifest.entries:
        case = entry.case
        if case.kv_scales is not None or max(n for _, n in case.sequences) > 200 or entry.poisoned is not None:
            continue
        tensors, starts = load_file(folder / entry.file), [0]
        wishes = {name: tensors[name].item() for name in ("scale", "window", "softcap") if name in tensors}
        wishes |= {name: tensors[name] for name in ("alibi_slopes", "sinks") if name in tensors}
        for index, (query_len, seq_len) in enumerate(case.sequences):
            starts.append(starts[-1] + query_len)
            blocks = tensors["block_tables"][index].long()
            slots = (blocks[:, None] * case.block_size + torch.arange(case.block_size)).flatten()[:seq_len]
            keys, values = (tensors[name].double().flatten(0, 1)[slots] for name in ("key_cache", "value_cache"))
            rows = slice(starts[-2], starts[-1])
            out, lse = attention(tensors["query"][rows], keys, values, **wishes)
            torch.testing.assert_close(tensors["out"][rows], out, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(tensors["lse"][rows], lse, rtol=1e-11, atol=1e-11)
        compared += 1
    assert compared >= 10


def test_the_same_arguments_give_the_same_bytes(plain, tmp_path):
    """In a program of its own, with other hashes of strings and more threads."""
    folder, _ = plain
    declared = tmp_path / "declared.json"
    declared.write_text(json.dumps({"capabilities": asdict(PLAIN)}))
    command = [sys.executable, "-m", "paged.cli", "oracle", "export", tmp_path / "other", "--capabilities", declared]
    environment = os.environ | {"PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "3"}
    subprocess.run([*map(str, command)], check=True, cwd=ROOT, env=environment, capture_output=True)
    one, other = ({path.name: path.read_bytes() for path in place.iterdir()} for place in (folder, tmp_path / "other"))
    assert one == other
    # Long enough for sums to be split among threads.
    assert any(case["case"]["sequences"] == [[1, 8192]] for case in json.loads(one["manifest.json"])["files"])


# --- who is right -----------------------------------------------------------------------------------------------------


def last_of_full_block(query, keys, values, tables, seq_lens, starts, **wishes):
    """Loses the last token of a sequence that fills its last block."""
    lost = (seq_lens % keys.shape[1] == 0) & (seq_lens > 1)
    shifted = torch.where(lost, seq_lens - 1, seq_lens).int()
    return paged_attention(query, keys, values, tables, shifted, starts, **wishes)


def no_window(*tensors, window=None, **wishes):
    return paged_attention(*tensors, **wishes)


def no_sinks(*tensors, sinks=None, **wishes):
    return paged_attention(*tensors, **wishes)


def other_base(*tensors, **wishes):
    out, lse = paged_attention(*tensors, **wishes)
    return out, lse / np.log(2)


def first_block_by_head(query, keys, values, *rest, **wishes):
    """Values of the neighbouring KV head."""
    return paged_attention(query, keys, values.roll(1, dims=2), *rest, **wishes)


def reads_tails(query, keys, values, tables, seq_lens, starts, **wishes):
    """A weight of 0 for what lies behind the last token, which NaN survives."""
    out, lse = paged_attention(query, keys, values, tables, seq_lens, starts, **wishes)
    for index, length in enumerate(seq_lens.tolist()):
        if length % keys.shape[1]:
            tail = values[int(tables[index, length // keys.shape[1]]), length % keys.shape[1] :]
            out[int(starts[index]) : int(starts[index + 1])] += 0 * tail.float().sum().to(out.dtype)
    return out, lse


def test_a_right_kernel_is_right(golden, tmp_path):
    folder, manifest = golden
    save_file(results_of(manifest), tmp_path / "out.safetensors")
    report = judge_files(folder, tmp_path / "out.safetensors")
    assert report.ok, str(report)
    assert report.num_cases == len(manifest.entries)
    assert 0.01 < max(report.slack.values()) < 1


@pytest.mark.parametrize("kernel", [last_of_full_block, no_window, other_base, first_block_by_head, reads_tails])
def test_the_diagnosis_is_that_of_verify(kernel, plain, tmp_path):
    folder, manifest = plain
    save_file(results_of(manifest, kernel), tmp_path / "out.safetensors")
    report = judge_files(folder, tmp_path / "out.safetensors")
    called = verify(kernel, capabilities=PLAIN)
    assert not report.ok
    assert report.failures[0].fault in {failure.fault for failure in called.failures}
    assert report.failures[0].letter in {failure.letter for failure in called.failures}


def test_a_lost_token_has_a_name(plain, tmp_path):
    folder, manifest = plain
    save_file(results_of(manifest, last_of_full_block), tmp_path / "out.safetensors")
    failure = judge_files(folder, tmp_path / "out.safetensors").failures[0]
    details = dict(failure.details)
    length = json.loads(failure.case)["sequences"][0][1]
    place = r"\(block \d+, slot \d+, physical block \d+\)"
    assert re.match(rf"token {length - 1} {place} was not counted", details["cause"])
    assert details["file"] in {entry.name for entry in manifest.entries}
    assert "passes with" not in details, "nothing is known of cases that are not in the folder"
    assert any("-" in line for line in failure.picture)


def test_what_all_wrong_files_have_in_common_is_said(golden, tmp_path):
    folder, manifest = golden
    save_file(results_of(manifest, no_sinks), tmp_path / "out.safetensors")
    details = judge_files(folder, tmp_path / "out.safetensors").failures[0].details
    assert any("sinks" in words for heading, words in details if words.startswith("all of them and no other have"))


def test_a_bound_is_the_whole_check(golden, tmp_path):
    """One element off by 0.7 of its bound is right, by 1.3 wrong, whatever the query's dtype: both in float32."""
    folder, manifest = golden
    right = results_of(manifest)
    entry = next(entry for entry in manifest.entries if entry.case.recipe == "needle")
    tensors = load_file(folder / entry.file)
    for what, place in (("out", (1, 0, 3)), ("lse", (1, 0))):
        for share in (0.7, 1.3):
            changed = tensors[what].float()
            changed[place] = tensors[what][place] + share * tensors[f"{what}_bound"][place]
            save_file(right | {f"{entry.name}.{what}": changed}, tmp_path / "out.safetensors")
            report = judge_files(folder, tmp_path / "out.safetensors")
            assert report.ok == (share < 1), str(report)


@pytest.mark.parametrize("choice", ["any", "nan"])
def test_rows_that_see_no_key_are_judged_by_convention(choice, request, tmp_path):
    conventions = Conventions(empty_out=choice, empty_lse="any" if choice == "any" else "+inf")
    can = replace(PLAIN, window=False, block_sizes=(8,), head_dims=(16,))
    manifest = export(tmp_path / "golden", capabilities=can, conventions=conventions)
    results, free = results_of(manifest), 0
    for entry in manifest.entries:
        tensors = load_file(tmp_path / "golden" / entry.file)
        empty = (results[f"{entry.name}.lse"] == -torch.inf).any(dim=1)
        rows = [int(row) for row in empty.nonzero()[:, 0]]
        assert entry.any_rows == ({"out": rows, "lse": rows} if choice == "any" else {"out": [], "lse": []})
        if choice == "any":
            assert tensors["out_bound"][empty].isinf().all()
            assert tensors["lse_bound"][empty].isinf().all()
            assert not tensors["out_bound"][~empty].isinf().any()
        results[f"{entry.name}.out"][empty] = 123.0 if choice == "any" else torch.nan
        results[f"{entry.name}.lse"][empty] = torch.nan if choice == "any" else torch.inf
        free += len(rows)
    assert free > 3
    save_file(results, tmp_path / "out.safetensors")
    report = judge_files(tmp_path / "golden", tmp_path / "out.safetensors")
    assert report.ok, str(report)
    if compiler() is not None:
        check = request.getfixturevalue("programs")["check"]
        assert run_program(check, tmp_path / "golden", tmp_path / "out.safetensors").returncode == 0
    results[f"{manifest.entries[0].name}.out"][0] = 123.0
    save_file(results, tmp_path / "out.safetensors")
    assert not judge_files(tmp_path / "golden", tmp_path / "out.safetensors").ok


def test_a_log_sum_exp_that_was_not_declared_is_judged_if_it_is_there(tmp_path):
    can = Capabilities(dtypes=("float32",), head_dims=(16,), block_sizes=(8,))
    manifest = export(tmp_path / "golden", capabilities=can, num_cases=3)
    results = results_of(replace(manifest, capabilities=replace(can, lse="e")))
    only_out = {name: tensor for name, tensor in results.items() if name.endswith(".out")}
    verdicts = []
    name = f"{manifest.entries[0].name}.lse"
    for given in (only_out, results, results | {name: results[name] + 0.1}):
        save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "out.safetensors")
        verdicts.append(judge_files(tmp_path / "golden", tmp_path / "out.safetensors").ok)
    assert verdicts == [True, True, False]


# --- what is not as it should be --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A small folder, and the outputs of a right kernel beside it."""
    folder = tmp_path_factory.mktemp("small")
    can = Capabilities(dtypes=("float16",), head_dims=(8,), block_sizes=(8,), lse="e")
    manifest = export(folder / "golden", capabilities=can, num_cases=2)
    save_file(results_of(manifest), folder / "out.safetensors")
    return folder


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


@pytest.mark.parametrize("what", list(BAD))
def test_bad_input_is_an_error_in_one_line(what, small, tmp_path, capsys):
    spoil, said = BAD[what]
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    arguments = ["oracle", "judge", str(folder / "golden"), "--output", str(folder / "out.safetensors")]
    assert main(arguments) == 0, "right as it is"
    capsys.readouterr()
    spoil(folder)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("paged: error: ")
    assert said in line


def test_the_commands(tmp_path, capsys):
    declared, folder, output = tmp_path / "declared.json", tmp_path / "golden", tmp_path / "out.safetensors"
    declared.write_text(json.dumps({"capabilities": {"head_dims": [8], "block_sizes": [8], "lse": "e"}}))
    arguments = ["oracle", "export", str(folder), "--capabilities", str(declared), "--dtype", "float32", "--cases", "3"]
    assert main([*arguments, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    manifest = read_manifest(folder)
    assert manifest.capabilities.dtypes == ("float32",)
    assert written["files"] == len(manifest.entries)
    assert written["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*arguments[:2], str(tmp_path / "none"), "--cases", "0"]) == 2
    assert "at least one case, got 0" in capsys.readouterr().err
    assert main([*arguments[:2], str(declared)]) == 2
    assert "File exists" in capsys.readouterr().err
    save_file(results_of(manifest, last_of_full_block), output)
    assert main(["oracle", "judge", str(folder), "--output", str(output)]) == 1
    assert "was not counted" in capsys.readouterr().out
    assert main(["oracle", "judge", str(folder), "--output", str(output), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["failures"][0]["fault"] == "tokens are not counted"


# --- C++ --------------------------------------------------------------------------------------------------------------


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
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", *options]
    subprocess.run([compiler(), *flags, str(EXAMPLES / f"{program}.cpp"), "-o", str(target)], check=True)
    return target


def run_program(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("programs")
    mistaken = build("attend", folder, "-DMISTAKE")
    return {"check": build("check", folder), "attend": build("attend", folder), "mistaken": mistaken}


def test_a_kernel_in_cpp_goes_all_the_way_round(golden, programs, tmp_path, capsys):
    folder, manifest = golden
    output = tmp_path / "out.safetensors"
    assert run_program(programs["attend"], folder, output).returncode == 0
    checked = run_program(programs["check"], folder, output)
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.startswith(f"{len(manifest.entries)} files, 0 wrong; ")
    assert main(["oracle", "judge", str(folder), "--output", str(output)]) == 0
    # Not only within bounds: the same numbers as the engine's own, but for the rounding of those.
    for name, tensor in results_of(manifest).items():
        found = load_file(output)[name]
        torch.testing.assert_close(found, tensor.float(), rtol=2**-7, atol=2e-3 if name.endswith("out") else 1e-3)


def test_a_mistake_in_cpp_is_found_and_named(golden, programs, tmp_path, capsys):
    folder, _ = golden
    output = tmp_path / "out.safetensors"
    assert run_program(programs["mistaken"], folder, output).returncode == 0
    checked = run_program(programs["check"], folder, output)
    assert checked.returncode == 1
    assert re.search(r"^000_uniform_\w+\.out: row \d+, head 0, dim \d+: expected ", checked.stdout)
    assert main(["oracle", "judge", str(folder), "--output", str(output)]) == 1
    assert re.search(r"cause +token \d+ \(block \d+, slot (7|15), .*\) was not counted", capsys.readouterr().out)


def test_the_program_that_checks_reads_every_dtype_and_finds_one_element(golden, programs, tmp_path):
    """The engine's outputs in their own dtypes are right; one element that is not is named."""
    folder, manifest = golden
    results = results_of(manifest)
    assert {results[f"{entry.name}.out"].dtype for entry in manifest.entries} == {
        torch.float32,
        torch.float16,
        torch.bfloat16,
    }
    save_file(results, tmp_path / "right.safetensors", metadata={"made by": "out", "order": "any"})
    assert run_program(programs["check"], folder, tmp_path / "right.safetensors").returncode == 0
    for dtype in ("float32", "float16", "bfloat16"):
        name = next(entry.name for entry in manifest.entries if entry.case.dtype == dtype)
        for value in (1e3, torch.nan, -torch.inf):
            wrong = {key: tensor.clone() for key, tensor in results.items()}
            wrong[f"{name}.out"][2, 1, 5] = value
            save_file(wrong, tmp_path / "wrong.safetensors")
            checked = run_program(programs["check"], folder, tmp_path / "wrong.safetensors")
            assert checked.returncode == 1
            assert f"{name}.out: row 2, head 1, dim 5: expected " in checked.stdout
            assert "1 wrong" in checked.stdout


@pytest.mark.parametrize("what", ["missing", "missing lse", "shape", "output no safetensors", "no output", "no folder"])
def test_the_program_that_checks_refuses_what_it_cannot_read(what, small, programs, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    BAD[what][0](folder)
    checked = run_program(programs["check"], folder / "golden", folder / "out.safetensors")
    # A log-sum-exp is checked where there is one: whether it was declared stands in the manifest, which is not read.
    assert checked.returncode == (0 if what == "missing lse" else 2), checked.stdout
    assert checked.stderr.startswith("check: error: ") == (what != "missing lse")


def test_files_that_lie_about_their_size_are_refused(small, programs, tmp_path):
    output = (small / "out.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", output[:8])
    header = json.loads(output[8 : 8 + length])
    name = min(header)
    for change in ({"data_offsets": [0, 1 << 40]}, {"shape": [1 << 40]}, {"dtype": "F4"}, {"dtype": "C64"}):
        text = json.dumps(header | {name: header[name] | change}).encode()
        (tmp_path / "out.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + output[8 + length :])
        assert run_program(programs["check"], small / "golden", tmp_path / "out.safetensors").returncode == 2


# --- values in any language -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values():
    """The example in plain Python."""
    spec = importlib.util.spec_from_file_location("golden_values", EXAMPLES / "values.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not re.search(r"^(import|from) ", (EXAMPLES / "values.py").read_text(), re.MULTILINE)
    return module


def test_vectors_of_the_documentation(values):
    page = (ROOT / "docs" / "golden.md").read_text()
    lines = page.split("Test vectors", 1)[1].split("```text", 1)[1].split("```", 1)[0].strip().splitlines()
    assert len(lines) >= 6 + 1
    for line in lines[1:]:
        *place, bits, bfloat16, float32 = line.split()
        found = values.random_bits(*map(int, place))
        assert found == int(bits, 16)
        assert values.random_value(found, "bfloat16") == float(bfloat16)
        assert values.random_value(found, "float32") == float(float32)


def test_inputs_can_be_made_from_what_the_documentation_says(plain, values):
    """Query, keys and values of a random case and values of a uniform one, number by number, through the tables."""
    folder, manifest = plain
    for recipe in ("random", "uniform"):
        entry = next(e for e in manifest.entries if e.case.recipe == recipe and e.case.poison == "none")
        case, file = entry.case, raw(folder / entry.file)
        size, made = case.block_size, {}
        # Which token lies in which slot: those that no table names are nobody's, by where they lie.
        blocks, _ = file["key_cache"][1].shape[:2]
        owner = {slot: values.token_number(2**14, slot) for slot in range(size, blocks * size)}
        for sequence, (_, seq_len) in reversed(list(enumerate(case.sequences))):  # shared ones are the first one's
            for position in range(-(-seq_len // size) * size):
                block = int(file["block_tables"][1][sequence, position // size])
                owner[block * size + position % size] = values.token_number(sequence, position)
        tensors = {"value_cache": values.VALUE} | ({"key_cache": values.KEY} if recipe == "random" else {})
        for name, tensor in tensors.items():
            heads, dims = file[name][1].shape[2:]
            made[name] = [0.0] * (size * heads * dims) + [
                values.cancelling_sign(case.seed, owner[slot], head, dim, dims)
                if recipe == "uniform"
                else values.random_value(values.random_bits(case.seed, tensor, owner[slot], head, dim), case.kv_dtype)
                for slot in range(size, blocks * size)
                for head in range(heads)
                for dim in range(dims)
            ]
        if recipe == "random":
            heads, dims = file["query"][1].shape[1:]
            made["query"] = [
                values.random_value(
                    values.random_bits(
                        case.seed, values.QUERY, values.token_number(sequence, seq_len - query_len + i), head, dim
                    ),
                    case.dtype,
                )
                for sequence, (query_len, seq_len) in enumerate(case.sequences)
                for i in range(query_len)
                for head in range(heads)
                for dim in range(dims)
            ]
        for name, numbers in made.items():
            assert bfloat16_bits(numbers) == file[name][1].flatten().tolist(), (recipe, name)


def bfloat16_bits(numbers: list[float]) -> list[int]:
    """The bits of numbers that bfloat16 holds exactly: the upper half of a float32's."""
    words = [struct.unpack("<I", struct.pack("<f", number))[0] for number in numbers]
    assert all(word & 0xFFFF == 0 for word in words)
    return [word >> 16 for word in words]
