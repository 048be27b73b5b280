"""docs/oracle.md, as somebody reads it: every program on the page runs and says what the page says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "oracle.md").read_text()


def blocks(section: str, language: str) -> list[str]:
    """The programs or outputs of one section, in their order."""
    text = PAGE[PAGE.index(f"## {section}") :].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def assert_says(printed: str, page: str) -> None:
    """Every line of the page was printed, in its order; "..." on the page stands for anything."""
    at = 0
    for line in page.splitlines():
        pattern = re.compile(".*".join(map(re.escape, line.strip().split("..."))))
        found = pattern.search(printed, at)
        assert found, f"the page says {line!r}, which was not printed:\n{printed}"
        at = found.end()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With the page's kernel in it."""
    monkeypatch.chdir(tmp_path)
    (kernel,), (declared,) = blocks("In one minute", "python"), blocks("In one minute", "json")
    (tmp_path / "my_kernel.py").write_text(kernel)
    (tmp_path / "declared.json").write_text(declared)
    json.loads(declared)
    return tmp_path


def test_in_one_minute(folder):
    (console,) = blocks("In one minute", "console")
    command, _, expected = console.partition("\n")
    assert command.startswith("$ paged check ")
    paged = [sys.executable, "-m", "paged.cli", *command.split()[2:]]
    done = subprocess.run(paged, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert_says(done.stdout, expected)


def test_from_python_and_from_pytest(folder):
    verified, marked = blocks("From Python, and from pytest", "python")
    scope: dict[str, object] = {}
    exec((folder / "my_kernel.py").read_text(), scope)
    with pytest.raises(AssertionError):
        exec(verified, scope)
    kernel = "import pytest\nfrom my_kernel import attend as my_kernel\n\n"
    program = kernel + marked.replace('"float16"', '"bfloat16"').replace(', device="cuda"', ", decode_only=True")
    (folder / "test_it.py").write_text(program.replace(', window=True, lse="e"', ""))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"], capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"a last block that is full is not read" in done.stdout


def test_writers(capsys):
    (program,), (expected,) = blocks("Writers", "python"), blocks("Writers", "text")
    exec(program, {})
    assert_says(capsys.readouterr().out, expected)


def test_block_managers(capsys):
    (program,), (expected,) = blocks("Block managers", "python"), blocks("Block managers", "text")
    exec(program, {})
    assert_says(capsys.readouterr().out, expected)
