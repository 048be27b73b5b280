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
import flex_options
import host_time
import mixed_step
import products
import profiling
import pytest
import report
import start_up
import sweeps
import throughput
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paged import SamplingParams
from paged.attention import flex, flex_kernel, gathered
from paged.step import RowPlan, Sample, Step

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


@pytest.mark.parametrize("module", [decode_step, flex_options, mixed_step, products, profiling, start_up])
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


def row_of(request_id, start, num_tokens):
    return RowPlan(request_id, 0, 0, start, (1,) * num_tokens, table_change=None, samples=(Sample(0),))


def test_what_a_step_holds():
    step = Step(rows=(row_of("a", 5, 1), row_of("b", 9, 1), row_of("c", 0, 3), row_of("d", 4, 2)))
    assert profiling.contents(step) == (2, 2, 7)
    assert profiling.contents(Step(rows=step.rows[:2])) == (2, 0, 2)
    assert profiling.contents(Step(rows=step.rows[2:])) == (0, 2, 5)
    assert profiling.contents(Step(rows=())) == (0, 0, 0)


def test_which_steps_are_graphs():
    def engine(**attributes):
        return argparse.Namespace(runner=argparse.Namespace(**attributes))

    captured = engine(graphs=argparse.Namespace(sizes=[1, 8], num_graph_steps=5))
    assert [profiling.is_graph(captured, decodes, prompts) for decodes, prompts in [(8, 0), (9, 0), (8, 1)]] == [
        True,
        False,
        False,
    ]
    assert not profiling.is_graph(engine(graphs=None), 1, 0)
    assert not profiling.is_graph(engine(graphs=argparse.Namespace(sizes=[])), 1, 0)
    assert profiling.num_graph_steps(captured) == 5
    assert profiling.num_graph_steps(engine(graphs=None)) is None
    assert profiling.num_graph_steps(engine(graphs=None, num_graph_steps=0)) == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_a_watched_engine_is_seen_whole_and_left_as_it_was(ahead):
    llm = common.load_engine(
        common.SHAPES["tiny"], device="cpu", max_model_len=64, max_num_seqs=4, async_scheduling=ahead
    )
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [i + 1] * 20} for i in range(2)]
    with profiling.watched(llm.engine) as launches:
        llm.generate(prompts, params, use_tqdm=False)
    steps = [(2, 0, 2)] * 2
    assert [(launch.decodes, launch.prompts, launch.tokens) for launch in launches] == [(0, 2, 40), *steps]
    assert llm.engine.num_steps == 3
    for launch in launches:
        assert launch.launch_seconds > 0
        assert 0 <= launch.wait_seconds < launch.wall_seconds
    llm.generate(prompts, params, use_tqdm=False)
    assert len(launches) == 3, "nobody watches any more"


def test_a_profile_says_where_every_microsecond_of_the_window_went():
    spans = [profiling.Span("nvjet_x", 0, 10), profiling.Span("nvjet_x", 12, 20), profiling.Span("odd", 100, 110)]
    (first, second) = profiling.largest_kernels(spans, steps=2, count=2)
    assert (first["name"], first["ms"], first["calls"]) == ("nvjet_x", 0.009, 1.0)
    assert (second["name"], second["group"]) == ("odd", "others")
    found = profiling.summarise(spans, steps=2)
    gaps = profiling.sorted_gaps(profiling.gap_lengths(spans))
    assert sum(gap["ms"] for gap in gaps.values()) == pytest.approx(2 * found["idle_ms"])
    assert 2 * (found["idle_ms"] + found["busy_ms"]) == pytest.approx(0.110)


# --------------------------------------------------------------------------------------------------- steps of a mix


def test_a_mix_that_is_none_is_refused():
    for text in ("255x1000", "0x5+0x7", "1x5+1x1", "ax1+1x1"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"fewer than 2 tokens|is not like"):
            mixed_step.Mix.parse(text)
    mix = mixed_step.Mix.parse("255x1000+1x830")
    assert (mix.tokens, mix.label) == (1085, "255 decodes at 1,000 + 1 prompt of 830")


def test_operations_of_a_mix_by_hand():
    shape = common.SHAPES["llama-3-8b"]
    layer = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336
    mix = mixed_step.Mix(255, 1000, 2, 830)
    assert mix.flop(shape) == 2 * (32 * layer * (255 + 1660) + 128256 * 4096 * 257)


@pytest.mark.parametrize(("seats", "steady"), [(7, True), (4, False)])
def test_only_steps_of_the_wanted_mix_are_timed(seats, steady):
    """With too few seats a prompt has to wait for its turn, and then the steps are others than those in the label."""
    shape, mix = common.SHAPES["tiny"], mixed_step.Mix(3, 20, 2, 12)
    llm = common.load_engine(
        shape,
        device="cpu",
        max_model_len=20 + mixed_step.LASTING,
        max_num_seqs=seats,
        enable_prefix_caching=False,
        async_scheduling=True,
    )
    feeder = mixed_step.Feeder(llm.engine, shape.vocab, seed=0)
    row = mixed_step.measure(feeder, shape, mix, 4, "cpu", profile=False)
    feeder.end()
    assert not llm.engine.has_unfinished_requests
    if not steady:
        assert "of another mix" in row["error"]
        assert "seconds" not in row
        return
    assert row["overlapped_steps"] == 4
    assert row["tokens"] == 27
    assert row["tokens_per_second"] == pytest.approx(27 / row["seconds"])
    assert row["launch_seconds"] > 0


def test_host_functions_have_no_folders():
    stats = {
        ("/home/me/paged/model/runner.py", 1, "launch"): (2, 2, 0.25, 1.0, {}),
        ("/home/me/lib/other.py", 1, "slow"): (4, 4, 0.5, 0.5, {}),
        ("~", 0, "<built-in method f at 0x7f00>"): (2, 2, 0.125, 0.125, {}),
    }
    found = mixed_step.summarise_functions(stats, steps=2, count=2)
    assert [(f["name"], f["calls"], f["own_ms"]) for f in found["own"]] == [
        ("lib/other.py: slow", 2.0, 250.0),
        ("model/runner.py: launch", 1.0, 125.0),
    ]
    assert [(f["name"], f["all_ms"]) for f in found["paged"]] == [("model/runner.py: launch", 500.0)]
    assert mixed_step.summarise_functions(stats, 2, 3)["own"][2]["name"] == "<built-in method f>"


# ----------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-0.6b"])
def test_products_hold_every_weight_of_a_layer_once(name):
    shape = common.SHAPES[name]
    norms = 2 * shape.hidden + (2 * shape.head_dim if name.startswith("qwen3") else 0)
    for fused in (False, True):
        weights = sum(product.rows * product.columns for product in products.layer_products(shape, fused=fused))
        assert weights == shape.layer_parameters - norms
    assert products.head_product(shape).rows * shape.hidden == shape.vocab * shape.hidden
    product = products.Product("x", rows=3, columns=5)
    assert (product.flop(7), product.bytes_moved(7, 2)) == (2 * 7 * 15, (15 + 7 * 3 + 7 * 5) * 2)


def test_right_products_are_timed_and_wrong_ones_are_not(monkeypatch):
    def wrong(x, weight):
        out = torch.nn.functional.linear(x, weight)
        out[-1, -1] += 0.1
        return out

    def nothing(x, weight):
        return torch.nn.functional.linear(x, weight) * float("nan")

    monkeypatch.setitem(products.FORMS, "wrong", lambda: wrong)
    monkeypatch.setitem(products.FORMS, "nothing", lambda: nothing)
    product = products.Product("x", rows=40, columns=16)
    rows = {
        form: products.measure(product, 20, form, "cpu", torch.float32, 2) for form in ("library", "wrong", "nothing")
    }
    assert rows["library"]["tflop_per_s"] == pytest.approx(product.flop(20) / rows["library"]["seconds"] / 1e12)
    for form in ("wrong", "nothing"):
        assert "wrong" in rows[form]["error"]
        assert "seconds" not in rows[form]


def test_a_sum_lacks_nothing():
    shape = common.SHAPES["tiny"]
    rows = made_up("products")["rows"]
    # q 1, k 2, v 3, o 4, gate 5, up 6, down 7; qkv 8, gate_up 9; lm_head 10 milliseconds.
    assert products.sums(rows, shape, 64, "separate") == pytest.approx((0.028, 0.066))
    assert products.sums(rows, shape, 64, "fused") == pytest.approx((0.028, 0.066))
    assert products.sums(rows, shape, 64, "fused, compiled") is None
    assert products.sums(rows, shape, 1, "separate") is None
    broken = [row | {"error": "OutOfMemoryError: no"} if row["product"] == "k" else row for row in rows]
    assert products.sums(broken, shape, 64, "separate") is None
    assert products.sums(broken, shape, 64, "fused") is not None


# ------------------------------------------------------------------------------------------------ options of a kernel


def test_options_reach_the_compiler_and_are_gone_afterwards():
    cache = torch.zeros(2, 32, 2, 128, dtype=torch.bfloat16)

    def ask():
        options = flex_kernel.kernel_options(cache, 128, 16, flex.pace_of(8, 1))
        return torch.zeros(options["num_warps"], options["num_stages"])

    before = ask().shape
    assert before != (4, 5)
    with flex_options.forced((4, 5)):
        assert torch.compile(ask, backend="eager", fullgraph=True)().shape == (4, 5)
    with flex_options.forced((1, 2)):
        assert torch.compile(ask, backend="eager", fullgraph=True)().shape == (1, 2)
    assert ask().shape == before


def test_options_of_a_wrong_kernel_are_not_timed(monkeypatch):
    case = attention.Case(3, 37, 16, heads=4, kv_heads=2, head_dim=16)
    data = attention.make_data(case, "cpu", torch.float32, seed=0)
    prepared = flex_options.Prepared(data, attention.expected_rows(data), [1], 1)
    for fault, pace in ((0.0, (2, 3)), (3e-4, (1, 4)), (float("nan"), (1, 4))):
        out = prepared.expected + fault
        monkeypatch.setattr(flex, "attend_decode", lambda *_, out=out, **__: (out.float(), None))
        row = flex_options.measure(prepared, 1, pace, (2, 3), repeats=2, bandwidth=1e9)
        assert row["own_pace"] == (pace == (2, 3))
        assert ("error" in row, "gb_per_s" in row) == (fault != 0, fault == 0)
    assert flex_options.own_pace(data, 1) == (1, 4)


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
    kinds = {"with prompts": {"steps": 2, "tokens": 900.0, "seconds": 0.5, "wall_ms": 250.0}}
    kinds["with prompts"] |= {"launch_ms": 30.0, "wait_ms": 210.0}
    option = {"label": "B=8, T=2048, block 16", "splits": 8, "relative_error": 0.001, "own_splits": True}
    mixed = {
        "label": "1 prompt of 830",
        "seconds": 0.02,
        "mean_seconds": 0.021,
        "launch_seconds": 0.019,
        "wait_seconds": 0.0001,
    }
    mixed |= {"submit_seconds": 0.0002, "busy_seconds": 0.012, "tokens_per_second": 41500.0, "tflop_per_s": 600.0}
    made = ["q", "k", "v", "o", "gate", "up", "down", "qkv", "gate_up", "lm_head"]
    results = {
        "flex_options": {
            "settings": {},
            "copy_bandwidth": 4e12,
            "rows": [
                option | {"warps": 1, "stages": 4, "own_pace": True, "gb_per_s": 2000.0, "share_of_copy": 0.5},
                option | {"warps": 2, "stages": 3, "own_pace": False, "gb_per_s": 2500.0, "share_of_copy": 0.625},
                option | {"warps": 4, "stages": 3, "own_pace": False, "gb_per_s": 9e4, "error": "wrong: 0.7"},
                option | {"warps": 4, "stages": 5, "own_pace": False, "error": "OutOfResources: shared memory"},
            ],
        },
        "products": {
            "settings": {"models": ["tiny"]},
            "copy_bandwidth": 4e12,
            "rows": [
                {
                    "model": "tiny",
                    "product": name,
                    "step_tokens": 64,
                    "tokens": 64,
                    "form": "library",
                    "shape": {"columns": 64, "rows": 128},
                    "seconds": i / 1e3,
                    "gb_per_s": 5.0,
                    "tflop_per_s": 6.0,
                }
                for i, name in enumerate(made, 1)
            ],
        },
        "mixed_step": {
            "settings": {"model": "tiny"},
            "rows": [
                mixed | {"product_tflop_per_s": None},
                mixed | {"label": "another", "mean_seconds": 0.03, "busy_seconds": 0.019, "product_tflop_per_s": 700.0},
                {"label": "one more", "error": "2 of 5 steps were of another mix"},
            ],
        },
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
                served("paged", 256, 99, 20.0, **paged, kinds=kinds, overlapped_steps=8),
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
    ("flex-options", "flex_options"): [
        "| 1 x 4 | 2 x 3 | 4 x 3 | 4 x 5 |",
        "| B=8, T=2048, block 16, 8 splits | **2,000** | 2,500 | wrong | fails |",
        "| 1 x 4, 8 | 2,000 (50 %) | 2 x 3, 8 | 2,500 (62 %) | 0.800 | 1.0e-03 |",
        "4 x 5: OutOfResources: shared memory",
    ],
    ("products", "products"): [
        "| gate_up, 64 to 128 | 9,000.0 / 5 / 6 |",
        "| a layer, separate: us | 28,000.0 |",
        "| a step, 2 layers and lm_head, fused: ms | 66.000 |",
    ],
    ("mixed-step", "mixed_step"): [
        "| 1 prompt of 830 | 20.00 | 19.00 | 0.10 | 0.20 | 12.00 | 60 % | host | 41,500 | 600 / - |",
        "| another | 20.00 | 19.00 | 0.10 | 0.20 | 19.00 | 95 % | GPU | 41,500 | 600 / 700 |",
        "- another: the mean is 30.00 ms",
        "| one more: 2 of 5 steps were of another mix | - |",
    ],
    ("throughput", "throughput"): [
        "| paged, 256 at once, 99 requests | 20.00 | 200 | 600 | 5.0 | 3.0 | - |",  # not the baseline's requests
        "| paged, 256 at once, 64 requests | 12.00 | 120 | 360 | 5.3 | 3.0 | 16.00 |",
        "OutOfMemoryError: no | - |",
        "8 of 9 launched while another ran",
        "| with prompts | 2 | 900 | 0.50 | 250.00 | 30.00 | 210.00 |",
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
    kinds = paged["kinds"]
    assert sum(kind["steps"] for kind in kinds.values()) == paged["steps"]
    # The last token of a request is computed by nobody.
    computed = sum(kind["steps"] * kind["tokens"] for kind in kinds.values())
    assert computed == pytest.approx(workload.input_tokens + workload.output_tokens - 3)
    assert sum(kind["seconds"] for kind in kinds.values()) <= paged["seconds"]


def test_a_profile_in_the_middle_leaves_nobody_behind():
    shape = common.SHAPES["tiny"]
    lengths = [(20, 2), (7, 30), (33, 30)]
    workload = throughput.make_workload("w", lengths, most_prompt=32, most_output=30, vocab=shape.vocab, seed=0)
    llm = common.load_engine(shape, device="cpu", max_model_len=64, max_num_seqs=4, enable_prefix_caching=False)
    found = throughput.profile_middle(llm, workload, 3, "cpu", ended_share=0.25)
    assert not llm.engine.has_unfinished_requests
    assert {kind: (each["steps"], each["tokens"]) for kind, each in found["kinds"].items()} == {
        "decodes, no graph": (3, 2.0)
    }
    assert 0 < found["busy_share"] <= 1
    assert profiling.profile_table(found).startswith("| 3 steps, ")


def test_host_time_is_measured_part_by_part(monkeypatch):
    monkeypatch.setattr(host_time, "BATCHES", (1, 3))
    found = host_time.measure(smoke=True)
    assert min(found.values()) >= 0
    parts = [value for name, value in found.items() if name.startswith("parts") and name.endswith(" 3")]
    assert sum(parts[:-1]) > parts[-1] / 2, "most of a step is in some part"
    slower = {name: 2 * value for name, value in found.items()}
    assert host_time.lowest([slower, found]) == found
    table = host_time.table("parts", "part", found | {"parts | all | 3": 50.0}, slower | {"parts | all | 3": 100.0})
    assert "| part | 1 | 3 |" in table
    assert "100 → 50 (2.0) |" in table
