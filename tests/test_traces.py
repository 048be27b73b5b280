"""Traces: every format and every bad row, what is changed and said about it, and lengths that are drawn."""

import csv
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paged.traces import Piece, Trace, TraceError, TraceRequest, load, request_of
from paged.traces.sharegpt import file_tokenizer, tiny_tokenizer
from paged.traces.synthetic import (
    ALPACA,
    SHAREGPT,
    clipped_mean,
    fixed,
    generator,
    like,
    lognormal,
    uniform,
    with_rate,
    with_system_prompts,
    workload,
)

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109"
)
LENGTHS = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n74,918,992,0.08\n41.0,950,991,0.04\n"
MOONCAKE = (
    '{"timestamp": 0, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}\n'
    '{"timestamp": 1500, "input_length": 1030, "output_length": 7, "hash_ids": [46, 48, 49]}\n'
)
TALK = [("human", "why?"), ("gpt", "so."), ("human", "ah"), ("gpt", "yes!!")]


def sharegpt(*talks: list[tuple[str, str]]) -> str:
    return json.dumps(
        [{"id": 1, "conversations": [{"from": a, "value": b} for a, b in talk]} for talk in talks], indent=1
    )


def lengths(trace: Trace) -> list[tuple[float, int, int]]:
    return [(r.arrival, r.num_prompt_tokens, r.num_output_tokens) for r in trace]


@pytest.fixture
def write(tmp_path):
    """A file with some content, whose name says nothing about the format."""

    def written(content: str) -> Path:
        file = tmp_path / "trace.txt"
        file.write_bytes(content.encode())
        return file

    return written


def data(*names: str) -> Path:
    """A published file, or a skip: see the heads of paged/traces/formats.py and benchmarks/throughput.py."""
    folder = os.environ.get("PAGED_DATA")
    if folder is None or not Path(folder, *names).is_file():
        pytest.skip(f"needs {'/'.join(names)} in the folder that PAGED_DATA names; it is not part of the repository")
    return Path(folder, *names)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_azure(write):
    trace = load(write(AZURE))
    (first, *one), (second, *two) = lengths(trace)
    assert (one, two) == ([374, 44], [396, 109])
    # A number of seconds since 1970 has 24 bits behind the point at most.
    assert first == 0
    assert second == pytest.approx(4.3145790, abs=2**-21)
    assert not trace.can_share


def test_lengths(write):
    assert lengths(load(write(LENGTHS))) == [(0, 74, 918), (0, 41, 950)]


def test_mooncake_prompts_share_what_their_hashes_share(write):
    trace = load(write(MOONCAKE))
    assert lengths(trace) == [(0, 600, 52), (1.5, 1030, 7)]
    one, two = (request.prompt_token_ids() for request in trace)
    assert one[:512] == two[:512]
    assert set(one[512:]).isdisjoint(two)
    assert len(set(two)) == len(two) == 1030
    assert trace.can_share
    assert trace.requests[0].answer.seed not in {piece.seed for request in trace for piece in request.prompt}


def test_mooncake_answers_are_no_prompts(write):
    """Whatever numbers the hashes are: no answer has the tokens of a prompt."""
    rows = [{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [i]} for i in range(9)]
    trace = load(write("\n".join(map(json.dumps, rows))))
    assert len({piece.seed for request in trace for piece in (*request.prompt, request.answer)}) == 18


def test_sharegpt_first_turns(write):
    file = write(sharegpt(TALK, [("system", "Be kind."), *TALK[2:], *TALK]))
    trace = load(file, tokenize=list)
    assert lengths(trace) == [(0, 4, 3), (0, 2, 5)]


def test_sharegpt_all_turns_share_what_was_said(write):
    trace = load(write(sharegpt(TALK, TALK[:2])), tokenize=list, multi_turn=True)
    assert lengths(trace) == [(0, 4, 3), (0, 9, 5), (0, 4, 3)]
    first, second, again = trace
    quoted = [*first.prompt_token_ids(), *first.answer.token_ids]
    assert list(second.prompt_token_ids()[:7]) == quoted
    assert again.prompt == first.prompt


def test_sharegpt_counts_tokens_of_a_tokenizer(write):
    tokenize = tiny_tokenizer()
    ((_, prompt, output),) = lengths(load(write(sharegpt([("user", "To be, or not to be"), ("assistant", "Ay.")]))))
    assert (prompt, output) == (len(tokenize("To be, or not to be")), len(tokenize("Ay.")))
    with pytest.raises(TraceError, match="no tokenizer"):
        file_tokenizer(Path("nowhere"))


@pytest.mark.parametrize(("content", "found"), [(AZURE, "azure"), (LENGTHS, "lengths"), (MOONCAKE, "mooncake")])
def test_the_format_is_in_the_content(write, content, found):
    file = write("\ufeff\n" + content)
    assert load(file) == load(file, found)
    with pytest.raises(TraceError, match=f"not of the format sharegpt: its content is that of {found}"):
        load(file, "sharegpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("  \n\n", "is empty"),
        (
            "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,3\n",
            "wanted is a CSV with the columns TIMESTAMP, ContextTokens",
        ),
        ("hello", "begins with 'hello'"),
        ('{"question": 3}', "not one of those known"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no usable rows"),
        ("[]", "no usable rows"),
        ("[3, ", "trace.txt:1: .*conversations"),
        ('[{"conversations": [}', "trace.txt:1: no JSON from here on"),
        ("\x00\xff", "trace.txt"),
    ],
)
def test_files_that_are_no_trace(write, content, message):
    with pytest.raises(TraceError, match=message):
        load(write(content))


def test_no_file_and_no_format(write, tmp_path):
    with pytest.raises(TraceError, match=r"nowhere\.csv cannot be read"):
        load(tmp_path / "nowhere.csv")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(TraceError, match="latin cannot be read"):
        load(tmp_path / "latin")
    with pytest.raises(TraceError, match="no format 'csv'; there are: auto, azure"):
        load(write(AZURE), "csv")


BAD_ROWS = [
    (AZURE, "2023-11-16 18:15:51,0,44", 4, "ContextTokens is '0'"),
    (AZURE, "2023-11-16 18:15:51,12,", 4, "GeneratedTokens is ''"),
    (AZURE, "2023-11-16 18:15:51,12", 4, "GeneratedTokens is ''"),
    (AZURE, "2023-11-16 18:15:51,12.5,3", 4, "ContextTokens is '12.5'"),
    (AZURE, "2023-11-16 18:15:51,-3,3", 4, "ContextTokens is '-3'"),
    (AZURE, "2023-11-16 18:15:51,nan,3", 4, "ContextTokens is 'nan'"),
    (AZURE, "2023-11-16 18:15:51,inf,3", 4, "ContextTokens is 'inf'"),
    (AZURE, "2023-11-16 18:15:51,9999999,3", 4, "has to be 1 to 1048576"),
    (AZURE, "yesterday,12,3", 4, "TIMESTAMP is 'yesterday'"),
    (AZURE, "2023-13-16 18:15:51,12,3", 4, "month must be"),
    (LENGTHS.rstrip(), "many,3,3,3", 4, "num_prefill_tokens is 'many'"),
    (MOONCAKE.rstrip(), '{"timestamp": 0, "input_length": 600', 3, "delimiter|Expecting"),
    (MOONCAKE.rstrip(), '{"timestamp": 0, "input_length": 600, "output_length": 5}', 3, "has no 'hash_ids'"),
    (MOONCAKE.rstrip(), MOONCAKE.split("\n")[0].replace("600", "1600"), 3, "2 hash_ids for 1600 tokens"),
    (MOONCAKE.rstrip(), MOONCAKE.split("\n")[0].replace("[46, 47]", '[46, "47"]'), 3, "not a list of integers"),
    (MOONCAKE.rstrip(), MOONCAKE.split("\n")[0].replace('p": 0', 'p": -1'), 3, "timestamp is -1"),
    (MOONCAKE.rstrip(), MOONCAKE.split("\n")[0].replace('p": 0', 'p": true'), 3, "timestamp is True"),
    (MOONCAKE.rstrip(), "[]", 3, "list indices"),
]


@pytest.mark.parametrize(("good", "bad", "line", "message"), BAD_ROWS)
def test_bad_rows_have_a_line_or_are_counted(write, good, bad, line, message):
    file = write(f"{good}\n{bad}\n")
    with pytest.raises(TraceError, match=rf"trace.txt:{line}: .*({message}).*--skip-bad"):
        load(file)
    trace = load(file, skip_bad=True)
    assert lengths(trace) == lengths(load(write(good)))
    assert trace.notes[0].startswith(f"1 bad rows left out, the first one line {line}: ")


@pytest.mark.parametrize(
    "talk",
    [
        [],
        [("gpt", "hello")],
        [("human", "hello")],
        [("human", "a"), ("human", "b")],
        [("human", ""), ("gpt", "what?")],
        [("human", "a"), ("gpt", "")],
    ],
)
def test_conversations_without_an_answer(write, talk):
    file = write(sharegpt(TALK, talk))
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if i > 2 and text == " {")
    with pytest.raises(TraceError, match=rf"trace.txt:{line}: nobody asks"):
        load(file, tokenize=list)
    assert load(file, tokenize=list, skip_bad=True).notes == (
        f"1 bad rows left out, the first one line {line}: nobody asks and gets an answer in this conversation",
    )


def test_lines_are_counted_from_the_first_one(write):
    with pytest.raises(TraceError, match=r"trace\.txt:6: TIMESTAMP"):
        load(write("\n\n" + AZURE + "\nbad,1,1"))


def test_rows_out_of_order_are_sorted_and_it_is_said(write):
    head, first, second = AZURE.split("\r\n")
    trace = load(write("\n".join([head, second, first])))
    assert trace.notes == ("rows sorted by time",)
    assert [request.num_prompt_tokens for request in trace] == [374, 396]
    assert trace.requests[0].arrival == 0


# --- published files, against csv and json of the standard library ----------------------------------------------------


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("azure-llm-2023", "AzureLLMInferenceTrace_conv.csv"), ("ContextTokens", "GeneratedTokens")),
        (("azure-llm-2023", "AzureLLMInferenceTrace_code.csv"), ("ContextTokens", "GeneratedTokens")),
        (
            ("etalon-lengths", "sharegpt_8k_filtered_stats_llama2_tokenizer.csv"),
            ("num_prefill_tokens", "num_decode_tokens"),
        ),
    ],
)
def test_published_csv(names, columns):
    file = data(*names)
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    expected = [tuple(int(float(row[column])) for column in columns) for row in rows]
    assert [(prompt, output) for _, prompt, output in lengths(load(file))] == expected


def test_published_mooncake():
    """Equal hashes, and only they, are equal pieces."""
    file = data("mooncake-fast25", "conversation_trace.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    trace = load(file)
    assert [(r["timestamp"] / 1e3, r["input_length"], r["output_length"]) for r in rows] == lengths(trace)
    assert [len(request.prompt) for request in trace] == [len(row["hash_ids"]) for row in rows]
    hashes = [value for row in rows for value in row["hash_ids"]]
    seeds = [piece.seed for request in trace for piece in request.prompt]
    assert len(set(zip(hashes, seeds, strict=True))) == len(set(hashes)) == len(set(seeds))
    # What a cache without a limit would find of all blocks: 36.6 %, as others have counted.
    seen: set[int] = set()
    found = 0
    for request in trace:
        found += len(list(itertools.takewhile(seen.__contains__, (piece.seed for piece in request.prompt))))
        seen |= {piece.seed for piece in request.prompt}
    assert found / len(seeds) == pytest.approx(0.366, abs=0.0005)


# --- what is changed, and what is said about it -----------------------------------------------------------------------


def small() -> Trace:
    pieces = [((Piece(0, 30), Piece(1, 20)), Piece(2, 9)), ((Piece(0, 30), Piece(3, 100)), Piece(4, 50))]
    return Trace("small", tuple(TraceRequest(i, *piece) for i, piece in enumerate(pieces)))


def test_clipping_keeps_beginnings_and_is_never_silent():
    trace = small().clipped(max_prompt=40)
    assert [request.prompt for request in trace] == [(Piece(0, 30), Piece(1, 10)), (Piece(0, 30), Piece(3, 10))]
    assert trace.notes == ("2 of 2 prompts cut to 40 tokens",)
    assert small().clipped(max_prompt=30).requests[0].prompt == (Piece(0, 30),)
    trace = small().clipped(max_output=20, max_total=140)
    assert [(p, o) for _, p, o in lengths(trace)] == [(50, 9), (130, 10)]
    assert trace.notes == (
        "1 of 2 outputs cut to 20 tokens",
        "1 of 2 outputs cut so that prompt and output fit 140 tokens",
    )
    trace = small().clipped(max_total=130)
    assert (len(trace), trace.notes) == (1, ("1 left out, their prompts leave no room in 130 tokens",))
    assert small().clipped(max_prompt=130, max_output=50, max_total=180) == small()
    with pytest.raises(TraceError, match="small has no requests; 2 left out"):
        small().clipped(max_total=10)
    with pytest.raises(TraceError, match="max_prompt=0"):
        small().clipped(max_prompt=0)


def test_dropping_as_vllms_benchmark_does():
    requests = [(3, 9), (4, 3), (4, 4), (1024, 1024), (1024, 1025), (1025, 4)]
    trace = Trace("some", tuple(request_of(0, *pair, number=i) for i, pair in enumerate(requests)))
    kept = trace.dropped(max_prompt=1024, max_total=2048)
    assert [(p, o) for _, p, o in lengths(kept)] == [(4, 4), (1024, 1024)]
    assert "4 of 6 requests left out" in kept.notes[0]


def test_first_thinned_scaled_and_samples():
    trace = like(ALPACA, 5000, seed=1)
    assert trace.first(7).requests == trace.requests[:7]
    assert trace.first(7).notes[-1] == "the first 7 of 5,000 requests"
    assert trace.first(5000) is trace
    thin = trace.thinned(0.25, seed=3)
    assert thin == trace.thinned(0.25, seed=3) != trace.thinned(0.25, seed=4)
    assert abs(len(thin) - 1250) < 4 * math.sqrt(5000 * 0.25 * 0.75)
    assert set(thin.requests) <= set(trace.requests)
    assert small().scaled(3).requests[1].arrival == 3
    assert small().with_samples(4).num_output_tokens == 4 * small().num_output_tokens
    for wrong in (lambda: trace.first(0), lambda: trace.thinned(0, seed=0), lambda: trace.scaled(-1)):
        with pytest.raises(TraceError):
            wrong()


def test_requests_and_traces_that_cannot_be():
    for arguments in ((-1.0, 3, 3), (math.nan, 3, 3), (0, 0, 3), (0, 3, 0)):
        with pytest.raises(TraceError):
            request_of(*arguments, number=0)
    with pytest.raises(TraceError, match="in 0 pieces"):
        TraceRequest(0, (), Piece(0, 1))
    with pytest.raises(TraceError, match="not in order"):
        Trace("some", tuple(reversed(small().requests)))


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [SHAREGPT, ALPACA])
def test_drawn_lengths_have_the_published_means(published):
    trace = like(published, 100_000, seed=0)
    for found, mean in (
        ([r.num_prompt_tokens for r in trace], published.mean_prompt),
        ([r.num_output_tokens for r in trace], published.mean_output),
    ):
        assert abs(statistics.mean(found) - mean) < 4 * statistics.stdev(found) / math.sqrt(len(found))
        assert 1 <= min(found) <= max(found) <= 1024


def test_the_spread_is_that_of_what_is_not_clipped():
    drawn = lognormal(mean=100, sigma=0.7, most=5000)(generator(5), 50_000)
    assert np.log(drawn).std() == pytest.approx(0.7, rel=0.02)


@pytest.mark.parametrize(("mu", "sigma", "most"), [(4, 1.2, 1024), (2, 0.3, 50), (5, 2, 200)])
def test_the_mean_after_clipping_is_that_of_a_sum(mu, sigma, most):
    """Against numbers drawn, rounded and clipped."""
    drawn = np.clip(np.rint(np.exp(np.random.Generator(np.random.PCG64(9)).normal(mu, sigma, 400_000))), 1, most)
    assert abs(drawn.mean() - clipped_mean(mu, sigma, most)) < 4 * drawn.std() / math.sqrt(drawn.size)


def test_the_mean_of_three_lengths():
    """One, two and three tokens: their probabilities from the distribution function of the standard library."""
    below = statistics.NormalDist(0.5, 0.8).cdf
    one, two = below(math.log(1.5)), below(math.log(2.5)) - below(math.log(1.5))
    assert clipped_mean(0.5, 0.8, 3) == pytest.approx(one + 2 * two + 3 * (1 - one - two), rel=1e-12)


def test_fixed_and_uniform():
    trace = workload("some", 4000, prompt=fixed(7), output=uniform(2, 4), seed=0)
    assert {r.num_prompt_tokens for r in trace} == {7}
    counts = [sum(r.num_output_tokens == n for r in trace) for n in (2, 3, 4)]
    assert sum(counts) == 4000
    assert all(abs(count - 4000 / 3) < 4 * math.sqrt(4000 * 2 / 9) for count in counts)
    assert trace == workload("some", 4000, prompt=fixed(7), output=uniform(2, 4), seed=0)


@pytest.mark.parametrize("burstiness", [0, 0.5, 1, 3])
def test_arrivals_have_the_rate_and_the_variation(burstiness):
    trace = with_rate(like(ALPACA, 40_000, seed=0), 8.0, seed=2, burstiness=burstiness)
    gaps = np.diff([0.0, *(request.arrival for request in trace)])
    assert abs(gaps.mean() - 1 / 8) <= 4 * burstiness / 8 / math.sqrt(40_000) + 1e-12
    # The fourth moment of a gamma variable with a variation of 3 is large, and so is the error of the third digit.
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=0.08, abs=1e-9)
    assert trace == with_rate(like(ALPACA, 40_000, seed=0), 8.0, seed=2, burstiness=burstiness)


def test_all_at_once_and_wrong_rates():
    trace = with_rate(small(), math.inf, seed=0)
    assert [request.arrival for request in trace] == [0, 0]
    for rate, burstiness in ((0, 1), (-1, 1), (math.nan, 1), (1, -1)):
        with pytest.raises(TraceError):
            with_rate(trace, rate, seed=0, burstiness=burstiness)
    for wrong in (lambda: fixed(0), lambda: uniform(3, 2), lambda: lognormal(mean=9, sigma=1, most=5)):
        with pytest.raises(TraceError):
            wrong()


def test_system_prompts_are_shared_and_nothing_else():
    plain = like(ALPACA, 300, seed=0)
    trace = with_system_prompts(plain, 100, num_prompts=3, seed=1)
    firsts = [request.prompt[0] for request in trace]
    assert len(set(firsts)) == 3
    assert {piece.num_tokens for piece in firsts} == {100}
    rest = [piece.seed for r in trace for piece in (*r.prompt[1:], r.answer)]
    assert len(set(rest)) == len(rest) == 600
    assert set(rest).isdisjoint(piece.seed for piece in firsts)
    assert [r.prompt[1:] for r in trace] == [r.prompt for r in plain]


def test_the_spread_of_sharegpt_is_the_one_that_is_used():
    """Of first turns, which a file with a row for each turn does not mark: their prompt quotes nothing."""
    rows = lengths(load(data("etalon-lengths", "sharegpt_8k_filtered_stats_llama2_tokenizer.csv")))
    first = [b[1:] for a, b in itertools.pairwise([(0, math.inf, 0), *rows]) if b[1] < a[1] + a[2]]
    for column, sigma in enumerate((SHAREGPT.sigma_prompt, SHAREGPT.sigma_output)):
        kept = [math.log(pair[column]) for pair in first if 4 <= pair[column] <= 1024]
        assert statistics.pstdev(kept) == pytest.approx(sigma, abs=0.005)


def test_no_torch():
    program = (
        "import sys, paged.traces.command; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
