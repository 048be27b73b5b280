"""The command line and the demo, as a user runs them."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from tiny_models import tiny_model

from paged.cli import main
from paged.demo.near_tie import Difference, compare, judge
from paged.model import runner
from paged.model.loading import TINY
from reference.engine import Prompt, ReferenceEngine


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Options that make a quick demo: five prompts, rows of 256."""
    file = tmp_path_factory.mktemp("demo") / "prompts.txt"
    file.write_text("To be\n\nWhat news, my lord?\nROMEO:\nThe king is dead, and long may live\nO\n", encoding="utf-8")
    return ["--prompts", str(file), "--max-model-len", "384", "--rows", "1"]


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paged.cli", *arguments], capture_output=True, text=True, check=False, **options
    )


def test_json_figures_and_picture(short, tmp_path, capsys):
    picture = tmp_path / "demo.png"
    assert main(["demo", "--json", "--plot", str(picture), *short]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens_equal"]
    contiguous, paged = result["contiguous"], result["paged"]
    assert contiguous["kv_bytes"] == paged["kv_bytes"] > 0
    assert contiguous["num_output_tokens"] == paged["num_output_tokens"]
    assert contiguous["most_at_once"] == 1 < paged["most_at_once"]
    assert paged["live_fullest"] > contiguous["live_fullest"]
    assert paged["num_steps"] < contiguous["num_steps"]
    assert paged["num_computed_tokens"] == contiguous["num_computed_tokens"] + paged["num_recomputed_tokens"]
    assert len(result["requests"]) == 5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_says_it_in_words(short, capsys):
    assert main(["demo", *short]) == 0
    out = capsys.readouterr().out
    assert "are equal" in out
    for row in ("KV bytes (measured)", "most requests at once", "of them recomputed", "gathered K and V", "seconds"):
        assert row in out
    assert "max_model_len 384" in out


def test_a_wrong_token_is_exit_code_1(short, monkeypatch, capsys):
    """Plant a fault in the paged engine's attention: one key too few is seen."""
    tensors = runner.BatchBuilder.tensors

    def faulty(self, step):
        batch = tensors(self, step)
        for group in batch.attention.groups:
            group.seq_lens.sub_((group.seq_lens > 20).int())
        return batch

    monkeypatch.setattr(runner.BatchBuilder, "tensors", faulty)
    assert main(["demo", *short]) == 1
    assert "WRONG: no near tie" in capsys.readouterr().out


def test_near_ties_are_told_from_faults():
    """Two tokens with the same row of the output matrix tie exactly; another token does not."""
    model = tiny_model("llama")
    prompt = Prompt("a", (5, 6, 7), 4)
    best, *_ = ReferenceEngine(model, num_rows=1, max_model_len=16).generate([prompt]).answers[0].token_ids
    other = (best + 1) % 128
    gap, bound = judge(model, prompt.token_ids, best, other)
    assert gap > 100 * bound > 0
    with torch.no_grad():
        model.get_output_embeddings().weight[other] = model.get_output_embeddings().weight[best]
    gap, bound = judge(model, prompt.token_ids, best, other)
    assert gap <= bound


def test_compare_finds_the_first_difference():
    model = tiny_model("llama")
    (answer,) = ReferenceEngine(model, num_rows=1, max_model_len=16).generate([Prompt("a", (5, 6, 7), 4)]).answers
    tokens = list(answer.token_ids)
    assert compare(model, [answer], {"a": tokens}) == []
    changed = [*tokens[:2], (tokens[2] + 1) % 128, tokens[3]]
    (difference,) = compare(model, [answer], {"a": changed})
    assert (difference.position, difference.contiguous, difference.paged) == (2, tokens[2], changed[2])
    assert not difference.near_tie
    (difference,) = compare(model, [answer], {"a": tokens[:3]})
    assert (difference.position, difference.contiguous, difference.paged) == (3, tokens[3], None)
    assert not difference.near_tie
    (difference,) = compare(model, [answer], {"a": [*tokens, 9]})
    assert (difference.position, difference.contiguous, difference.paged) == (4, None, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tny"], "no model 'tny'"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read"),
        (["--rows", "0"], "--rows 0"),
        (["--threads", "0"], "--threads 0"),
        (["--rows", "-1"], "--rows -1: at least 1 is needed"),
        (["--max-model-len", "1000", "--rows", "1"], "do not divide into blocks of 16"),
        (["--max-model-len", "256", "--rows", "1"], "too few for a request of 255 tokens; give more rows"),
        (["--rows", "1000000000"], "a cache of 1000000000 rows of 1024 slots does not fit"),
        (["--device", "meta"], "device 'meta' holds no numbers"),
        (["--plot", "."], "--plot . is a folder"),
        (["--device", "cuda:99"], "the last GPU is" if torch.cuda.is_available() else "torch sees no GPU"),
        (["--max-model-len", "99999"], "max_model_len=99999 is longer"),
        (["--plot", "nowhere/x.png"], "--plot nowhere/x.png: there is no folder nowhere"),
        (["--plot", "x.gif2"], "--plot x.gif2: a picture ends in"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("paged: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_prompts_file_with_a_byte_order_mark(tmp_path, capsys):
    (tmp_path / "bom.txt").write_text("\ufeffTo be\n", encoding="utf-8")
    options = ["--prompts", str(tmp_path / "bom.txt"), "--max-model-len", "384", "--rows", "1", "--json"]
    assert main(["demo", *options]) == 0
    assert json.loads(capsys.readouterr().out)["requests"][0]["prompt"] == "To be"


def test_an_end_token_that_only_the_config_names(short, tmp_path, capsys):
    """Both engines have to know it, and a difference in length is valid JSON."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "generation_config.json").write_text("{}")
    assert main(["demo", "--model", str(folder), "--json", *short]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_equal"]
    difference = Difference("a", 3, 5, None, None, None, near_tie=False)
    assert "WRONG" in str(difference)
    assert json.loads(json.dumps(asdict(difference), allow_nan=False))["gap"] is None


def test_an_empty_file_of_prompts(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(["demo", "--prompts", str(tmp_path / "empty.txt")]) == 2
    assert "holds no prompt" in capsys.readouterr().err


def test_help_is_quick_and_imports_no_torch():
    main_only = "import sys, paged.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", main_only], check=False).returncode == 0
    times = []
    for _ in range(3):
        started = time.perf_counter()
        result = run("--help")
        times.append(time.perf_counter() - started)
    assert result.returncode == 0
    assert "demo" in result.stdout
    assert min(times) < 0.5


def test_version_and_missing_command_and_typo():
    assert run("--version").stdout.startswith("paged 0.")
    assert run().returncode == 2
    typo = run("dmo")
    assert typo.returncode == 2
    assert "invalid choice: 'dmo'" in typo.stderr
