"""Golden files: what is in them, and who is right by them.

The files are read here by their format, header and bytes, and what is right is held against `reference.attention`.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import CAN, PLAIN, ROOT, last_of_full_block, raw, results_of, small_folder
from safetensors.torch import load_file, save_file

from paged.attention.gathered import paged_attention
from paged.oracle import Capabilities, Conventions, export, judge_files, verify
from paged.oracle.golden.manifest import Manifest, read_manifest
from paged.oracle.inputs import materialise
from paged.oracle.trial import declared_names
from reference.attention import attention


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


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return small_folder(tmp_path_factory.mktemp("small"))


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
    assert any(case["case"]["sequences"] == [[1, 8197]] for case in json.loads(one["manifest.json"])["files"])


# --- who is right -----------------------------------------------------------------------------------------------------


def no_window(*tensors, window=None, **wishes):
    return paged_attention(*tensors, **wishes)


def no_sinks(*tensors, sinks=None, **wishes):
    return paged_attention(*tensors, **wishes)


def other_base(*tensors, **wishes):
    out, lse = paged_attention(*tensors, **wishes)
    return out, lse / np.log(2)


def values_of_next_head(query, keys, values, *rest, **wishes):
    """Each KV head has the values of the one before it."""
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


@pytest.mark.parametrize("kernel", [no_window, other_base, values_of_next_head, reads_tails])
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


def test_a_bound_is_the_whole_check(small, tmp_path):
    """One element off by 0.7 of its bound is right, by 1.3 wrong, whatever the query's dtype: both in float32."""
    right = load_file(small / "out.safetensors")
    name = read_manifest(small / "golden").entries[0].name
    tensors = load_file(small / "golden" / f"{name}.safetensors")
    for what, place in (("out", (1, 0, 3)), ("lse", (1, 0))):
        for share in (0.7, 1.3):
            changed = tensors[what].float()
            changed[place] = tensors[what][place] + share * tensors[f"{what}_bound"][place]
            save_file(right | {f"{name}.{what}": changed}, tmp_path / "out.safetensors")
            report = judge_files(small / "golden", tmp_path / "out.safetensors")
            assert report.ok == (share < 1), str(report)


@pytest.mark.parametrize("choice", ["any", "nan"])
def test_rows_that_see_no_key_are_judged_by_convention(choice, tmp_path):
    conventions = Conventions(empty_out=choice, empty_lse="any" if choice == "any" else "+inf")
    can = replace(PLAIN, window=False, block_sizes=(8,), head_dims=(16,))
    manifest = export(tmp_path / "golden", capabilities=can, conventions=conventions, num_cases=14)
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
    assert free > 0
    save_file(results, tmp_path / "out.safetensors")
    report = judge_files(tmp_path / "golden", tmp_path / "out.safetensors")
    assert report.ok, str(report)
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
