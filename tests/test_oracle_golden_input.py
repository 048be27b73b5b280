"""`paged oracle export` and `paged oracle judge`, and what is no golden file or no output: an error in a line."""

import json
import shutil
from pathlib import Path

import pytest
from golden_files import BAD, last_of_full_block, results_of, small_folder
from safetensors.torch import save_file

from paged.cli import main
from paged.oracle.golden.manifest import read_manifest


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return small_folder(tmp_path_factory.mktemp("small"))


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
