"""Golden files from other languages: the C++ of examples/golden goes all the way round, the numbers are made anew."""

import importlib.util
import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import BAD, CAN, EXAMPLES, PLAIN, ROOT, build, raw, results_of, run_program, small_folder
from safetensors.torch import save_file

from paged.cli import main
from paged.oracle import Conventions, export
from paged.oracle.golden.manifest import Manifest
from paged.oracle.values import CODE_VALUE, cancelling_signs


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> tuple[Path, Manifest]:
    """A folder in which everything is declared."""
    folder = tmp_path_factory.mktemp("golden") / "all"
    return folder, export(folder, capabilities=CAN, num_cases=24)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return small_folder(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("programs")
    mistaken = build("attend", folder, "-DMISTAKE")
    return {"check": build("check", folder), "attend": build("attend", folder), "mistaken": mistaken}


# --- C++ --------------------------------------------------------------------------------------------------------------


def test_without_a_compiler_tests_are_skipped_but_fail_in_ci(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"needs a C\+\+ compiler"):
        build("check", tmp_path)
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match=r"needs a C\+\+ compiler"):
        build("check", tmp_path)


def test_a_kernel_in_cpp_goes_all_the_way_round(golden, programs, tmp_path, capsys):
    folder, manifest = golden
    output = tmp_path / "out.safetensors"
    assert run_program(programs["attend"], folder, output).returncode == 0
    checked = run_program(programs["check"], folder, output)
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.startswith(f"{len(manifest.entries)} files, 0 wrong; ")
    assert main(["oracle", "judge", str(folder), "--output", str(output)]) == 0


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


def test_the_program_that_checks_takes_anything_where_anything_is_right(programs, tmp_path):
    can = replace(PLAIN, block_sizes=(8,), head_dims=(16,))
    conventions = Conventions(empty_out="any", empty_lse="any")
    manifest = export(tmp_path / "golden", capabilities=can, conventions=conventions, num_cases=14)
    entry = next(entry for entry in manifest.entries if entry.any_rows["out"])
    for row, code in ((entry.any_rows["out"][0], 0), (entry.case.num_queries - 1, 1)):
        results = results_of(manifest)
        results[f"{entry.name}.out"][row] = torch.nan
        results[f"{entry.name}.lse"][row] = 5.0
        save_file(results, tmp_path / "out.safetensors")
        assert row in entry.any_rows["out"] or code == 1
        assert run_program(programs["check"], tmp_path / "golden", tmp_path / "out.safetensors").returncode == code


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
    far = [(1 << 40) + offset for offset in header[name]["data_offsets"]]
    lies = (
        {"data_offsets": far},
        {"data_offsets": [0, 1 << 40]},
        {"shape": [1 << 40]},
        {"dtype": "F4"},
        {"dtype": "C64"},
    )
    for change in lies:
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


def test_signs_are_those_of_the_oracle(values):
    tokens = [0, 1, 9, 69, 2**20 + 3, 2**39 + 2**20 + 72]
    signs = [[values.cancelling_sign(7, token, 1, dim, 9) for dim in range(9)] for token in tokens]
    assert signs == cancelling_signs(7, CODE_VALUE, np.array(tokens), 2, 9)[:, 1].tolist()


def test_inputs_can_be_made_from_what_the_documentation_says(values, tmp_path):
    """Query, keys and values of a random case and values of a uniform one, number by number, through the tables."""
    folder = tmp_path / "golden"
    manifest = export(folder, capabilities=PLAIN)
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
