"""The tables of docs/performance.md, from the committed JSON and nothing else.

    python benchmarks/report.py                                 print every table that there is a result for
    python benchmarks/report.py --fill docs/performance.md      put them where the page has a place for them
    python benchmarks/report.py --check docs/performance.md     fail if the page says anything else

A place is a pair of comments, and what stands between them is replaced:

    <!-- figure: attention -->
    <!-- end -->
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import attention
import decode_step
import flex_options
import mixed_step
import products
import shared_prefix
import start_up
import sweeps
import throughput
from common import RESULTS, Result, describe

PLACE = re.compile(r"<!-- figure: (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Where a figure comes from: a file of results, what makes a table of it, and the command that makes the file."""

    file: str
    table: Callable[[Result], str | None]
    command: str


TRACE = "--trace AzureLLMInferenceTrace_conv.csv"
FIGURES = {
    "course": Source("throughput", throughput.course_table, f"throughput.py {TRACE} --baselines reference"),
    "attention": Source("attention", attention.tables, "attention.py"),
    "attention-prefill": Source("attention_prefill", attention.tables, "attention.py --prefill"),
    "flex-options": Source("flex_options", flex_options.tables, "flex_options.py"),
    "products": Source("products", products.tables, "products.py"),
    "decode-step": Source("decode_step", decode_step.tables, "decode_step.py --profile"),
    "shared-prefix": Source("shared_prefix", shared_prefix.tables, "shared_prefix.py"),
    "mixed-step": Source("mixed_step", mixed_step.tables, "mixed_step.py"),
    "throughput": Source("throughput", throughput.tables, f"throughput.py {TRACE} --baselines ..."),
    "throughput-lengths": Source(
        "throughput_lengths",
        throughput.tables,
        "throughput.py --lengths sharegpt_8k_filtered_stats_llama2_tokenizer.csv",
    ),
    "samples": Source("samples", throughput.tables, "throughput.py --samples"),
    "sweep-memory": Source("sweep_memory", sweeps.tables, f"sweeps.py --only memory {TRACE}"),
    "sweep-block-size": Source("sweep_block_size", sweeps.tables, f"sweeps.py --only block-size {TRACE}"),
    "start-up": Source("start_up", start_up.tables, "start_up.py"),
}


def figure(name: str, results: Path) -> str | None:
    """A table and where it was measured; None without a result.

    Raises:
        ValueError: no figure of this name.
    """
    if name not in FIGURES:
        raise ValueError(f"no figure {name!r}; there are {', '.join(FIGURES)}")
    file = results / f"{FIGURES[name].file}.json"
    if not file.is_file():
        return None
    result: Result = json.loads(file.read_text())
    table = FIGURES[name].table(result)
    if table is None:
        return None
    found = result["environment"]
    return f"{table}\n\n{describe(found)}: `{found['command']}`"


def filled(page: str, results: Path) -> str:
    """The page with every place filled in; a figure that was not measured says how to."""

    def fill(place: re.Match[str]) -> str:
        name = place["name"]
        text = figure(name, results) or f"*Not measured yet:* `python benchmarks/{FIGURES[name].command}`"
        return f"<!-- figure: {name} -->\n\n{text}\n\n<!-- end -->"

    return PLACE.sub(fill, page)


def main() -> None:
    """Print, fill or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--fill", type=Path, help="a page to write the tables into")
    what.add_argument("--check", type=Path, help="a page that has to say what the results say")
    arguments = parser.parse_args()
    if arguments.fill:
        arguments.fill.write_text(filled(arguments.fill.read_text(), arguments.results))
    elif arguments.check:
        page = arguments.check.read_text()
        if filled(page, arguments.results) != page:
            raise SystemExit(
                f"{arguments.check} does not say what {arguments.results.name}/*.json say; run "
                f"`python benchmarks/report.py --fill {arguments.check}`"
            )
    else:
        for name in FIGURES:
            text = figure(name, arguments.results)
            if text is not None:
                print(f"## {name}\n\n{text}\n")


if __name__ == "__main__":
    main()
