"""How many broken kernels the oracle finds, and how many the tests of other projects would.

    python benchmarks/mutation.py --jobs 2                      everything; about a quarter of an hour on two cores
    python benchmarks/mutation.py --suites FlashMLA oracle --mutants nan_tail no_maximum
    python benchmarks/mutation.py --fill docs/mutation.md       write what was found last into the page

Every mutant of attention in paged/oracle/mutants/ is handed to the oracle and to each suite of suites/published.py; so
is every right variant, which none of them may refuse. A cell is one of

    K   killed: at least one call is not accepted, or raises
    .   survived: its output differs from that of the kernel it was made of, and every call is accepted
    o   survived: no call makes it differ by more than the order of a sum does
    -   unreachable: the suite never passes what the mutant is about

Writers and block managers have judges of their own, and get a line each.
"""

import argparse
import json
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from common import RESULTS, Result, describe, environment, markdown, save
from suites.calls import made
from suites.marks import ACCEPTED, BLIND, FLAGGED, KILLED, PASSED, UNREACHABLE, Twins, alarm, mark
from suites.published import SUITES, Suite
from tqdm import tqdm

from paged.oracle import Report, verify, verify_manager, verify_write
from paged.oracle.mutants import ATTENTION_MUTANTS, ATTENTION_VARIANTS, CLASSES, Mutant, Variant
from paged.oracle.mutants.managers import MANAGERS, RIGHT_MANAGERS
from paged.oracle.mutants.writers import RIGHT_WRITERS, WRITERS

ORACLE = "oracle"


# ------------------------------------------------------------------------------------------------------ all the columns

Task = tuple[str, tuple[str, ...]]
Cells = dict[str, dict[str, str]]


def asked(task: Task) -> Cells:
    """Marks of some mutants, and alarms of some variants, by name, in one column."""
    column, names = task
    torch.set_num_threads(1)
    mutants = [mutant for mutant in ATTENTION_MUTANTS if mutant.name in names]
    variants = [variant for variant in ATTENTION_VARIANTS if variant.name in names]
    if column == ORACLE:
        marks = {one.name: ACCEPTED if _report(one).ok else KILLED for one in mutants}
        alarms = {}
        for one in variants:
            report = _report(one)
            alarms[one.name] = PASSED if report.ok else FLAGGED
            if not report.ok:  # what is wrong with a right kernel has to be looked into
                print(report, file=sys.stderr, flush=True)
    else:
        suite = suite_named(column)
        calls = [made(setup, seed) for seed, setup in enumerate(suite.setups)]
        twins = Twins(calls)
        marks = {one.name: mark(one, twins) for one in mutants}
        alarms = {one.name: alarm(one, calls) for one in variants}
    return {column: marks | alarms}


def _report(one: Mutant | Variant) -> Report:
    declared = {"profile": one.profile, "conventions": one.conventions} if isinstance(one, Variant) else {}
    return verify(one.kernel, capabilities=one.capabilities, budget="fast", **declared)


def suite_named(name: str) -> Suite:
    """The suite of this name.

    Raises:
        ValueError: there is none.
    """
    for suite in SUITES:
        if suite.name == name:
            return suite
    raise ValueError(f"no suite {name!r}; there are {', '.join(suite.name for suite in SUITES)} and {ORACLE}")


def tasks(columns: Sequence[str], names: Sequence[str]) -> Iterator[Task]:
    """What can be done side by side: the oracle takes mutants one by one, a suite all, as it draws its calls."""
    for column in columns:
        if column == ORACLE:
            yield from ((column, (name,)) for name in names)
        else:
            yield column, tuple(names)


def run(columns: Sequence[str], names: Sequence[str], jobs: int) -> Cells:
    """Every column's marks, by name of the mutant or variant."""
    cells: Cells = {column: {} for column in columns}
    todo = list(tasks(columns, names))
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for marked in tqdm(pool.imap_unordered(asked, todo), total=len(todo), desc="tasks", disable=None):
            for column, marks in marked.items():
                cells[column] |= marks
    return cells


def judged() -> dict[str, list[int]]:
    """Of writers and managers: mutants found, mutants, right ones flagged, right ones."""

    def counted(judge: Callable[[type], bool], broken: Sequence[type], right: Sequence[type]) -> list[int]:
        return [
            sum(not judge(kind) for kind in broken),
            len(broken),
            sum(not judge(kind) for kind in right),
            len(right),
        ]

    return {
        "writers": counted(
            lambda kind: verify_write(kind(), capabilities=kind.capabilities).ok, WRITERS, RIGHT_WRITERS
        ),
        "managers": counted(
            lambda kind: verify_manager(kind, capabilities=kind.capabilities).ok, MANAGERS, RIGHT_MANAGERS
        ),
    }


def result_of(columns: Sequence[str], names: Sequence[str], jobs: int, *, everybody: bool) -> Result:
    """All that the tables are made of.

    Args:
        columns, names: who is asked about whom.
        jobs: processes side by side.
        everybody: writers and managers as well, where the oracle is one of the columns.
    """
    cells = run(columns, names, jobs)

    def of(one: Mutant | Variant) -> dict[str, str]:
        return {column: cells[column][one.name] for column in columns}

    chosen = [suite for suite in SUITES if suite.name in columns]
    mutants = [one for one in ATTENTION_MUTANTS if one.name in names]
    variants = [one for one in ATTENTION_VARIANTS if one.name in names]
    return {
        "benchmark": "mutation",
        "environment": environment("cpu"),
        "columns": list(columns),
        "suites": [
            {"name": suite.name, "source": suite.source, "rule": suite.rule, "scaled": suite.scaled} for suite in chosen
        ],
        "mutants": [
            {"name": one.name, "class": one.bug_class, "thread": one.thread, "marks": of(one)} for one in mutants
        ],
        "variants": [{"name": one.name, "alarms": of(one)} for one in variants],
        "judged": judged() if everybody and ORACLE in columns else {},
    }


# ----------------------------------------------------------------------------------------------------------- the tables


def totals(result: Result) -> str:
    """One row for each column: what becomes of all mutants, and how many right variants are refused."""
    rows = []
    for column in result["columns"]:
        found = Counter(mutant["marks"][column] for mutant in result["mutants"])
        alarms = Counter(variant["alarms"][column] for variant in result["variants"])
        asked_of = alarms[FLAGGED] + alarms[PASSED]
        marks = [found[KILLED], found[ACCEPTED], found[BLIND], found[UNREACHABLE]]
        rows.append([column, *marks, f"{alarms[FLAGGED]} of {asked_of}"])
    headers = ["suite", "killed", "differs, accepted", "never differs", "unreachable", "right variants refused"]
    lines = [f"{len(result['mutants'])} mutants of attention, {len(result['variants'])} right variants.\n"]
    lines.append(markdown(headers, rows))
    for what, (killed, broken, flagged, right) in result["judged"].items():
        lines.append(
            f"\nOf {what}, the oracle finds {killed} of {broken}, and refuses {flagged} of {right} right ones."
        )
    return "\n".join(lines)


def kill_table(result: Result) -> str:
    """A row for each mutant, by class."""
    rows = [
        [f"{mutant['class']} {mutant['name']}", *(mutant["marks"][column] for column in result["columns"])]
        for mutant in sorted(result["mutants"], key=lambda mutant: mutant["class"])
    ]
    return markdown(["mutant", *result["columns"]], rows)


def by_class(result: Result) -> str:
    """A row for each class of bugs: of the mutants that a suite reaches, how many it kills."""
    rows = []
    for letter in sorted({mutant["class"] for mutant in result["mutants"]}):
        marks = [mutant["marks"] for mutant in result["mutants"] if mutant["class"] == letter]
        cells = []
        for column in result["columns"]:
            found = [mark[column] for mark in marks if mark[column] != UNREACHABLE]
            cells.append(f"{found.count(KILLED)}/{len(found)}" if found else None)
        rows.append([f"{letter} {CLASSES[letter]}", len(marks), *cells])
    return markdown(["class", "mutants", *result["columns"]], rows)


def survivors(result: Result) -> str:
    """The mutants that the oracle lets pass, and who finds them."""
    rows = []
    for mutant in result["mutants"]:
        if mutant["marks"].get(ORACLE) == ACCEPTED:
            finders = [column for column in result["columns"] if mutant["marks"][column] == KILLED]
            rows.append([f"{mutant['class']} {mutant['name']}", ", ".join(finders) or None])
    return markdown(["mutant", "found by"], rows) if rows else "None."


def refused(result: Result) -> str:
    """The right variants that somebody refuses: false alarms."""
    rows = []
    for variant in result["variants"]:
        who = [column for column in result["columns"] if variant["alarms"][column] == FLAGGED]
        if who:
            rows.append([variant["name"], ", ".join(who)])
    return markdown(["right variant", "refused by"], rows) if rows else "None."


def sources(result: Result) -> str:
    """Where each suite was described from."""
    rows = [[suite["name"], f"`{suite['source']}`", suite["rule"], suite["scaled"]] for suite in result["suites"]]
    return markdown(["suite", "test", "rule", "what is smaller here"], rows)


PLACES = {"totals": totals, "classes": by_class, "survivors": survivors, "refused": refused, "sources": sources}


def filled(page: str, result: Result) -> str:
    """A page with every place filled in, which a pair of comments marks: `<!-- figure: totals -->`, `<!-- end -->`."""
    for name, table in PLACES.items():
        place = re.compile(rf"(<!-- figure: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = f"{table(result)}\n\n{describe(result['environment'])}" if name == "totals" else table(result)
        page = place.sub(lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page)
    return page


def main() -> None:
    """Ask everybody, print the tables, write the JSON."""
    every = [suite.name for suite in SUITES] + [ORACLE]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suites", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--mutants", nargs="+", metavar="NAME", help="default: all, and all right variants")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--json", type=Path, help="where the result goes; default: benchmarks/results/, if all is run")
    parser.add_argument("--fill", type=Path, help="a page to write the committed result into, and nothing else")
    arguments = parser.parse_args()
    if arguments.fill:
        result = json.loads((RESULTS / "mutation.json").read_text())
        arguments.fill.write_text(filled(arguments.fill.read_text(), result))
        return
    known = [one.name for one in [*ATTENTION_MUTANTS, *ATTENTION_VARIANTS]]
    names = arguments.mutants or known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no mutants or variants {', '.join(unknown)}")
    result = result_of(arguments.suites, names, arguments.jobs, everybody=arguments.mutants is None)
    print(f"{kill_table(result)}\n\n{totals(result)}\n\n{describe(result['environment'])}")
    if arguments.json or (arguments.mutants is None and arguments.suites == every):
        save(result, arguments.json or RESULTS / "mutation.json")


if __name__ == "__main__":
    main()
