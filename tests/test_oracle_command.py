"""`paged check` and the pytest plugin, as somebody with a kernel in a folder of their own uses them."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from paged.cli import main
from paged.oracle.declared import read_declarations

KERNELS = '''
import torch
from paged.attention.gathered import paged_attention

def right(*tensors, **wishes):
    return paged_attention(*tensors, **wishes)[0]

def short(query, key_cache, value_cache, block_tables, seq_lens, *rest, **wishes):
    return paged_attention(query, key_cache, value_cache, block_tables, (seq_lens - 1).clamp(min=1), *rest, **wishes)[0]

def forgets_window(*tensors, window=None, **wishes):
    return paged_attention(*tensors, **wishes)[0]

class Stacked:
    """Another order of arguments: one cache [2, N, P, Hkv, D]."""

    def call(self, kernel, inputs, capabilities):
        return kernel(torch.stack([inputs.key_cache, inputs.value_cache]), inputs)

    def results(self, returned):
        return returned, None

def stacked(cache, inputs):
    tensors = inputs.query, cache[0], cache[1], inputs.block_tables, inputs.seq_lens, inputs.query_start_loc
    return paged_attention(*tensors, scale=inputs.scale)[0]

NUMBER = 5
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with kernels, which is the current one."""
    (tmp_path / "my_kernels.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_kernels", raising=False)
    yield tmp_path
    sys.modules.pop("my_kernels", None)


def test_a_right_kernel(folder, capsys):
    assert main(["check", "my_kernels:right"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("ok    my_kernels:right: ")
    assert main(["check", "my_kernels:right"]) == 0
    assert capsys.readouterr().out == first, "the same report every time"


def test_a_wrong_kernel_and_its_report_for_programs(folder, capsys):
    assert main(["check", "my_kernels:short", "--dtype", "float32", "--json", "--junitxml", "report.xml"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    fault = report["failures"][0]
    assert fault["case"]["sequences"] == [[1, 2]]
    assert fault["description"].startswith("uniform float32: ")
    assert "was not counted" in fault["details"]["cause"]
    suite = ElementTree.parse(folder / "report.xml").getroot()
    assert suite.get("name") == "my_kernels:short"
    failures = suite.findall("testcase/failure")
    assert [each.get("message") for each in failures] == [each["fault"] for each in report["failures"]]


def test_declarations_from_a_file(folder, capsys):
    (folder / "declared.json").write_text(json.dumps({"capabilities": {"dtypes": ["float16"], "window": True}}))
    assert main(["check", "my_kernels:forgets_window"]) == 0, "a window was not declared"
    capsys.readouterr()
    assert main(["check", "my_kernels:forgets_window", "--capabilities", "declared.json"]) == 1
    out = capsys.readouterr().out
    assert "window is ignored" in out
    assert "dtypes=('float16',)" in out


def test_an_adapter_of_ones_own(folder, capsys):
    assert main(["check", "my_kernels:stacked", "--layout", "my_kernels:Stacked"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["my_kernels:missing"], "'my_kernels:missing' cannot be imported"),
        (["no_such_module:attend"], "No module named 'no_such_module'"),
        (["my_kernels"], "write module:function"),
        (["my_kernels:NUMBER"], "is a int, which cannot be called"),
        (
            ["my_kernels:right", "--layout", "nonsense"],
            "unknown adapter 'nonsense'; there are contract, flash_attention, ",
        ),
        (["my_kernels:right", "--layout", "mla"], "adapter 'mla' cannot express head_dim 64 with value_dim 64"),
        (["my_kernels:right", "--layout", "my_kernels:NUMBER"], "is a int, which cannot be called"),
        (["my_kernels:right", "--dtype", "half"], "dtypes may name"),
        (["my_kernels:right", "--capabilities", "missing.json"], "missing.json"),
        (["my_kernels:right", "--capabilities", "my_kernels.py"], "is no JSON"),
    ],
)
def test_what_cannot_be_checked_is_an_error_in_one_line(folder, capsys, arguments, said):
    assert main(["check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("paged: error: ")
    assert said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"capability": {}}', "unknown capability; there are capabilities, profile, conventions"),
        ('{"capabilities": {"windows": true}}', "unknown windows"),
        ('{"capabilities": 5}', "has to hold an object"),
        ("[]", "has to hold an object"),
        ('{"profile": {"p_dtype": "float1"}}', "p_dtype must be one of"),
        ('{"profile": {"exp_rel": "small"}}', "profile: '<=' not supported"),
    ],
)
def test_declarations_that_cannot_be(tmp_path, text, said):
    file = tmp_path / "declared.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_declarations(file)


TESTS = """
import pytest
from my_kernels import forgets_window, right, short

@pytest.mark.paged_kernel(dtypes=("float32",), budget="fast")
def test_right(paged_oracle):
    assert paged_oracle(right).ok

@pytest.mark.paged_kernel(dtypes=("float32",))
def test_short(paged_oracle):
    paged_oracle(short)

@pytest.mark.paged_kernel(dtypes=("float32",), window=True)
class TestWindow:
    def test_ignored(self, paged_oracle):
        paged_oracle(forgets_window)

    @pytest.mark.paged_kernel(window=False)
    def test_not_declared_here(self, paged_oracle):
        paged_oracle(forgets_window)

@pytest.mark.paged_kernel(windows=True)
def test_misspelt(paged_oracle):
    paged_oracle(right)
"""


def test_the_plugin_in_a_repository_of_kernels(folder):
    (folder / "test_kernels.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "-q", "test_kernels.py"]
    plugin = ["-p", "paged.pytest_plugin"] if not _is_installed() else []
    found = subprocess.run([*command, *plugin], capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "3 failed, 2 passed" in found.stdout
    assert "was not counted" in found.stdout
    assert "window is ignored" in found.stdout
    assert "what is declared cannot be: " in found.stdout
    assert "Traceback" not in found.stdout


def _is_installed() -> bool:
    """Whether the plugin is among the entry points: an older editable installation does not know it yet."""
    from importlib.metadata import entry_points  # noqa: PLC0415 (only here)

    return any(point.value == "paged.pytest_plugin" for point in entry_points(group="pytest11"))


def test_the_plugin_costs_other_projects_nothing():
    program = "import sys, paged.pytest_plugin; sys.exit(bool({'torch', 'hypothesis'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
