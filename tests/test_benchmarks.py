"""The benchmarks' own arithmetic: workloads, floors, clocks, tables. Their figures need a GPU."""

import argparse
import csv
import doctest
import json
import statistics
import sys
from pathlib import Path

import attention
import common
import decode_step
import profiling
import pytest
import report
import start_up
import sweeps
import throughput
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paged.attention import gathered

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    "machine": "x86_64",
    "cpus": 2,
    "torch": "2.11.0",
    "transformers": "5.17.0",
    "python": "3.11",
    "paged": "0.1.0",
    "commit": None,
    "command": "python benchmarks/made_up.py",
}


@pytest.mark.parametrize("module", [decode_step, profiling, start_up])
def test_examples_in_docstrings(module):
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)


# ------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(("name", "parameters"), [("llama-3-8b", 8_030_261_248), ("qwen3-0.6b", 596_049_920)])
def test_shapes_have_the_published_number_of_parameters(name, parameters, tmp_path):
    shape = common.SHAPES[name]
    config = AutoConfig.from_pretrained(common.write_config(shape, tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters == parameters
    assert config.rope_parameters["rope_theta"] == shape.rope_theta
    assert config.eos_token_id is None


def test_floor_by_hand():
    """Llama-3-8B in bfloat16: 15.01 GB of weights without the embedding table, 131,072 bytes a token of K and V."""
    shape = common.SHAPES["llama-3-8b"]
    layer = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    weights = (32 * layer + 4096 + 128256 * 4096) * 2
    assert weights == 15_009_849_344
    assert shape.weight_bytes_read(64, itemsize=2) == weights + 64 * 4096 * 2
    assert shape.kv_bytes_per_token(2) == 131_072
    floor = common.floor_seconds(shape, batch=64, context=1087, itemsize=2, bytes_per_second=4.25e12)
    assert floor == pytest.approx((15.0103736e9 + 64 * 1087 * 131_072) / 4.25e12, rel=1e-6)
    assert floor == pytest.approx(5.67e-3, rel=2e-3), "the prototype's figure"


def test_a_tied_table_is_read_once():
    shape = common.SHAPES["qwen3-0.6b"]
    assert shape.weight_bytes_read(0, itemsize=2) == 2 * shape.parameters


# ---------------------------------------------------------------------------------------------------------- workloads


def write_trace(file, columns, rows):
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([columns, *rows])
    return file


@pytest.mark.parametrize("columns", [throughput.TRACE_COLUMNS, throughput.LENGTHS_COLUMNS])
def test_lengths_are_read_in_order_and_clipped(columns, tmp_path):
    trace = write_trace(tmp_path / "trace.csv", ("first", *columns), [("x", 5, 9), ("x", 3000, 0), ("x", 7, 600)])
    lengths = throughput.read_lengths(trace, columns, 3)
    assert lengths == [(5, 9), (3000, 0), (7, 600)]
    workload = throughput.make_workload("w", lengths, most_prompt=2048, most_output=512, vocab=50, seed=0)
    assert [(len(r.prompt), r.wanted) for r in workload.requests] == [(5, 9), (2048, 1), (7, 512)]
    assert all(0 <= token < 50 for request in workload.requests for token in request.prompt)
    assert (workload.input_tokens, workload.output_tokens) == (5 + 2048 + 7, 9 + 1 + 512)
    assert [len(r.prompt) for r in workload.first(2).requests] == [5, 2048]


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="not part of the repository"):
        throughput.read_lengths(tmp_path / "nowhere.csv", throughput.TRACE_COLUMNS, 1)
    trace = write_trace(tmp_path / "trace.csv", ("a", "b"), [(1, 2)])
    with pytest.raises(ValueError, match="ContextTokens and GeneratedTokens"):
        throughput.read_lengths(trace, throughput.TRACE_COLUMNS, 1)
    trace = write_trace(tmp_path / "trace.csv", throughput.TRACE_COLUMNS, [(1, 2)])
    with pytest.raises(ValueError, match="1 rows and 2 requests"):
        throughput.read_lengths(trace, throughput.TRACE_COLUMNS, 2)


def test_drawn_lengths_have_the_means():
    lengths = throughput.draw_lengths(20_000, (829, 264), seed=0)
    assert sum(prompt for prompt, _ in lengths) / 20_000 == pytest.approx(829, rel=0.03)
    assert sum(output for _, output in lengths) / 20_000 == pytest.approx(264, rel=0.03)


def test_the_mean_context_of_the_timed_steps_is_what_was_asked_for():
    """Everybody's prompt in one step, then the warm-up, then 20 timed steps around 100 tokens."""
    lengths = decode_step.plan(batch=4, context=100, steps=20, budget=4096)
    middle = lengths.prompt_tokens + decode_step.WARM_UP + 10
    assert abs(middle - 100) <= 2
    assert lengths.max_tokens > decode_step.WARM_UP + 20 + decode_step.PROFILED_STEPS


# ------------------------------------------------------------------------------------------------------------- clocks


def test_a_group_of_calls_is_timed_as_one_of_them():
    timing = common.time_calls([lambda: sum(range(30_000))] * 4, "cpu", repeats=5)
    one = common.time_calls([lambda: sum(range(30_000))], "cpu", repeats=5)
    assert timing.clock == "host"
    assert timing.low <= timing.seconds <= timing.high
    assert timing.low < 3 * one.low, "four calls are not one"


def test_profiles_count_overlaps_once():
    spans = [profiling.Span("flex_attention", 0, 3000), profiling.Span("nvjet_x", 2000, 5000)]
    found = profiling.summarise([*spans, profiling.Span("odd", 9000, 10_000)], steps=2)
    assert found["groups_ms"] == {"attention": 1.5, "matrix products": 1.5, "others": 0.5}
    assert (found["busy_ms"], found["idle_ms"], found["kernels"]) == (3.0, 2.0, 1.5)


# ---------------------------------------------------------------------------------------------------------- attention


def test_operations_and_bytes_by_hand():
    case = attention.Case(1, 5, 4, heads=4, kv_heads=2, head_dim=8, query_len=3)
    assert case.flop == 4 * 4 * 8 * (3 + 4 + 5)
    assert case.kv_bytes(2) == 5 * 2 * 2 * 8 * 2


@pytest.mark.parametrize("case", [*attention.SMOKE_DECODE, *attention.SMOKE_PREFILL], ids=lambda case: case.label)
def test_right_forms_are_timed_and_wrong_ones_are_not(case, monkeypatch):
    data = attention.make_data(case, "cpu", torch.float32, seed=0)
    expected = attention.expected_rows(data)

    def wrong(*args, **kwargs):
        out, lse = gathered.paged_attention(*args, **kwargs)
        out[-1, 0, 0] += 0.01
        return out, lse

    def fails(*args, **kwargs):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(attention.FORMS, "wrong", lambda data: attention.paged_calls(data, wrong))
    monkeypatch.setitem(attention.FORMS, "fails", lambda data: attention.paged_calls(data, fails))
    rows = {
        form: attention.measure(case, form, data, expected, repeats=2, bandwidth=1e9)
        for form in ("contiguous", "gathered", "wrong", "fails")
    }
    for form in ("contiguous", "gathered"):
        assert rows[form]["relative_error"] < 1e-5
        assert rows[form]["gb_per_s"] == pytest.approx(case.kv_bytes(4) / rows[form]["seconds"] / 1e9)
    assert "wrong" in rows["wrong"]["error"]
    assert "seconds" not in rows["wrong"]
    assert rows["fails"]["error"] == "RuntimeError: no such kernel"


# ------------------------------------------------------------------------------------------------- tables and figures


def test_a_table():
    assert common.markdown(["a", "b"], [["x", 1], ["y", None]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n| y | - |"
    with pytest.raises(AssertionError, match="2 columns and a row of 1"):
        common.markdown(["a", "b"], [["x"]])


def test_no_path_of_this_machine_is_written_down(tmp_path):
    words = [str(ROOT / "benchmarks" / "x.py"), "--trace", str(tmp_path / "a b.csv"), f"--output={tmp_path / 'o.json'}"]
    assert common.command_line([*words, "-n", "3"]) == "python benchmarks/x.py --trace 'a b.csv' --output=o.json -n 3"


def served(name, size, requests, speed, **more):
    speeds = {"requests_per_second": speed, "output_per_second": 10 * speed, "total_per_second": 30 * speed}
    row = {"name": name, "size": size, "requests": requests, "seconds": requests / speed, "peak_memory": 3 * 2**30}
    return row | speeds | more


def made_up(name):
    """A result as the script of this name writes it."""
    attended = {"relative_error": 0.001, "gb_per_s": 2000.0, "share_of_copy": 0.5, "tflop_per_s": 7.0, "clock": "graph"}
    case = attention.DECODE[0].label
    profile = {"groups_ms": {"attention": 2.0}, "busy_ms": 6.0, "idle_ms": 9.0, "kernels": 12.0}
    step = {"model": "Llama-3-8B", "batch": 64, "context": 1024.0, "seconds": 0.0075, "median_seconds": 0.0074}
    counted = {"num_steps": 64, "num_overlapped_steps": 63, "tokens_per_second": 8533.0}
    floor = {"floor_seconds": 0.005, "share_of_floor": 0.667}
    paged = {"live_share": 0.97, "most_running": 48, "steps": 9, "preemptions": 1, "kv_bytes": 2**31}
    results = {
        "attention": {
            "settings": {"prefill": False},
            "copy_bandwidth": 4e12,
            "rows": [
                {"label": case, "form": "gathered", **attended},
                {"label": case, "form": "flex", "error": "wrong: relative error 0.7", "relative_error": 0.7},
            ],
        },
        "decode_step": {
            "settings": {},
            "copy_bandwidth": 4e12,
            "rows": [step | counted | floor | {"profile": profile}],
        },
        "throughput": {
            "benchmark": "throughput",
            "settings": {"model": "Llama-3-8B", "block_size": 16},
            "workload": {"name": "W1", "synthetic": False, "requests": 99, "input_tokens": 7, "output_tokens": 5},
            "rows": [
                served("paged", 256, 99, 20.0, **paged),
                served("paged", 256, 64, 12.0, **paged),
                served("reference", 16, 64, 0.5, live_share=0.2, most_running=16, slots_per_sequence=2560),
                served("reference", 32, 64, 0.75, live_share=0.25, most_running=32, slots_per_sequence=2560),
                {"name": "generate", "size": 64, "requests": 64, "error": "OutOfMemoryError: no", "peak_memory": None},
            ],
        },
        "samples": {
            "benchmark": "samples",
            "settings": {},
            "rows": [
                {
                    "cascade": on,
                    "samples": 32,
                    "prompt_tokens": 8192,
                    "wanted": 128,
                    "seconds": s,
                    "output_per_second": 1,
                }
                for on, s in ((False, 4.0), (True, 2.0))
            ],
        },
        "sweep_memory": {
            "settings": {
                "only": "memory",
                "model": "tiny",
                "requests": 9,
                "most_prompt": 8,
                "most_output": 4,
                "max_num_seqs": 2,
                "synthetic": True,
            },
            "rows": [
                {"setting": {"gpu_memory_utilization": 0.5}} | served("", 2, 9, 3.0, **paged),
                {"setting": {"gpu_memory_utilization": 0.98}, "refused": "OutOfMemoryError: too much"},
            ],
        },
        "start_up": {
            "settings": {},
            "rows": [
                {
                    "model": "tiny",
                    "mode": "compiled",
                    "caches": "cold",
                    "import": 2.0,
                    "engine": 5.0,
                    "parts": {"weights": 1.0, "compile": 3.5},
                    "first_token": 0.5,
                    "total": 7.5,
                }
            ],
        },
    }
    return {"environment": ENVIRONMENT, **results[name]}


# What the table of a made-up result has to say: cells that were worked out by hand.
SAID = {
    ("attention", "attention"): ["2,000 (50 %) | wrong | 1.0e-03", "flex: wrong: relative error 0.7", "4,000 GB/s"],
    ("decode-step", "decode_step"): [
        "| Llama-3-8B, batch 64 | 1,024 | 7.50 | 7.40 | 5.00 | 67 % | 8,533 | 63 of 64 |",
        "| attention | 2.000 |",
        "unprofiled step less that | 1.500 |",
    ],
    ("throughput", "throughput"): [
        "| paged, 256 at once, 99 requests | 20.00 | 200 | 600 | 5.0 | 3.0 | - |",  # not the baseline's requests
        "| paged, 256 at once, 64 requests | 12.00 | 120 | 360 | 5.3 | 3.0 | 16.00 |",
        "OutOfMemoryError: no | - |",
        "*vLLM 0.25.1 (measured separately, the same kind of machine)* | 24.2 | 6,396 | 26,500 | - |",
    ],
    ("course", "throughput"): [
        "| 2,560 slots for each row",
        "mean over steps | 75.0 % | 3.0 % |",
        "| most requests at once | 32 | 48 |",
        "| throughput, requests/s | 0.75 | 12.00 |",
    ],
    ("samples", "samples"): ["| off | 4.00 | 1 |", "| on | 2.00 | 1 |"],
    ("sweep-memory", "sweep_memory"): [
        "synthetic lengths",
        "| gpu_memory_utilization=0.5 | 3.00 | 90 | 48 | 1 | 97 % | 2.0 |",
        "gpu_memory_utilization=0.98: OutOfMemoryError: too much",
    ],
    ("start-up", "start_up"): [
        "| seconds | import | weights | compile | other | first token | to the first token |",
        "| tiny, compiled, cold | 2.0 | 1.0 | 3.5 | 0.5 | 0.5 | 7.5 |",
    ],
}


@pytest.mark.parametrize(("figure", "name"), SAID, ids=[figure for figure, _ in SAID])
def test_tables_and_pictures_from_json(figure, name, tmp_path):
    result = json.loads(json.dumps(made_up(name)))
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    text = report.figure(figure, tmp_path)
    for words in SAID[figure, name]:
        assert words in text
    assert "torch 2.11.0" in text
    assert "`python benchmarks/made_up.py`" in text
    modules = {"sweep_memory": sweeps, "samples": throughput}
    picture = (modules.get(name) or sys.modules[name]).plot(result)
    for ax in picture.axes:
        assert ax.get_xlim()[0] == 0, "no axis is truncated"


def test_a_place_is_filled_in_and_stays_so(tmp_path):
    page = (
        "before\n\n<!-- figure: attention -->\n<!-- end -->\n\nafter\n\n<!-- figure: start-up -->\nold\n<!-- end -->\n"
    )
    (tmp_path / "attention.json").write_text(json.dumps(made_up("attention")))
    filled = report.filled(page, tmp_path)
    assert filled.startswith("before\n\n<!-- figure: attention -->\n\n| GB/s")
    assert "wrong | 1.0e-03" in filled
    assert "after" in filled
    assert "*Not measured yet:* `python benchmarks/start_up.py`" in filled
    assert "old" not in filled
    assert report.filled(filled, tmp_path) == filled
    with pytest.raises(ValueError, match="no figure 'nonsense'"):
        report.filled(page.replace("start-up", "nonsense"), tmp_path)


def test_without_the_naive_engine_there_is_no_comparison_with_it(tmp_path):
    result = made_up("throughput")
    result["rows"] = [row for row in result["rows"] if row["name"] != "reference"]
    (tmp_path / "throughput.json").write_text(json.dumps(result))
    assert report.figure("course", tmp_path) is None
    assert report.figure("throughput", tmp_path) is not None


def test_the_page_says_what_the_results_say():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert report.filled(page, common.RESULTS) == page, (
        "python benchmarks/report.py --fill docs/performance.md has not run"
    )
    assert set(report.PLACE.findall(page)) == set(report.FIGURES), "every figure has its place"


# -------------------------------------------------------------------------------------------------------------- whole


def test_a_process_brings_its_last_line_or_its_last_words(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, os, sys\nprint('noise')\nprint(json.dumps([sys.argv[1], os.environ['NAME']]))\n")
    assert common.run_in_new_process(str(script), ["a"], NAME="b") == ["a", "b"]
    script.write_text("print('{}')\nraise ValueError('no room')\n")
    assert common.run_in_new_process(str(script), []) == {"error": "ValueError: no room"}


def test_decode_steps_on_the_tiny_shape(tmp_path, monkeypatch, capsys):
    """All of one script: engine, clock, table, JSON, picture."""
    output = tmp_path / "decode_step.json"
    flags = ["--smoke", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/decode_step.py", *flags])
    decode_step.main()
    result = json.loads(output.read_text())
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert abs(row["context"] - 64) <= 3
        assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert output.with_suffix(".png").stat().st_size > 1000
    assert decode_step.tables(result) in capsys.readouterr().out


def test_figures_of_a_smoke_run_overwrite_no_result():
    asked = argparse.Namespace(smoke=False, output=Path("here.json"))
    assert common.output_file(asked, "x") == Path("here.json")
    assert common.output_file(argparse.Namespace(smoke=False, output=None), "x") == common.RESULTS / "x.json"
    smoke = common.output_file(argparse.Namespace(smoke=True, output=None), "x")
    assert common.RESULTS not in smoke.parents


def test_all_engines_serve_the_same_requests():
    """On the tiny shape: every request gets what it asked for, and shares of memory are shares."""
    shape = common.SHAPES["tiny"]
    workload = throughput.make_workload(
        "w", [(20, 9), (7, 3), (33, 5)], most_prompt=32, most_output=8, vocab=shape.vocab, seed=0
    )
    llm = common.load_engine(shape, device="cpu", max_model_len=64, max_num_seqs=4, enable_prefix_caching=False)
    paged = throughput.serve_paged(llm, workload)
    model = throughput.plain_model(shape, "cpu", torch.float32, seed=0)
    naive = throughput.serve_reference(model, workload, size=2)
    static = throughput.serve_generate(model, workload, size=2)
    assert (paged["requests"], naive["slots_per_sequence"], static["most_running"]) == (3, 37, 2)
    # Rows of 37 slots. Two of them for 8 steps, where the second request is done after 3; then one of them for 5.
    first = [(20 + s + (7 + s if s < 3 else 0)) / 74 for s in range(8)]
    assert naive["live_share"] == pytest.approx(statistics.mean([*first, *((32 + s) / 37 for s in range(5))]))
    assert naive["live_share"] < paged["live_share"] <= 1
    for row in (paged, naive, static):
        assert row["total_per_second"] == pytest.approx((20 + 7 + 32 + 8 + 3 + 5) / row["seconds"])
        assert row["output_per_second"] == pytest.approx(16 / row["seconds"])
