"""Writing golden files: which cases, and what the folder can tell of what is declared.

The cases are the directed ones of `verify`, one round of them. If fewer are wanted, those are left out that exercise
nothing new; if more, there are further rounds. Of each kind of poison one case has companions, the same with one region
clean, so that a leak has a source although the kernel cannot be called again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save

from paged.oracle.case import Case
from paged.oracle.declarations import Capabilities, Conventions, Profile
from paged.oracle.directed import LONG, Turns, directed
from paged.oracle.expected import Expected, solve
from paged.oracle.golden.files import any_rows, digest, expected_tensors, input_tensors
from paged.oracle.golden.manifest import MANIFEST, Entry, Manifest
from paged.oracle.inputs import FEW, MUST_MASK, MUST_NOT_READ, REGIONS, Inputs, materialise
from paged.oracle.trial import declared_names, exercises

# What no folder can tell, and why.
NEVER = (
    "block numbers beyond 65535: a file would hold hundreds of megabytes",
    "drawn cases: files hold directed ones",
    "relations between calls: the kernel cannot be called again",
)
NOT_IN_FILES = {
    "strided_caches": "caches in files are dense",
    "strided_tables": "tables in files are dense",
    "batch_invariant": "the kernel cannot be called again",
}
POISONED = {"nan": MUST_NOT_READ, "huge": MUST_MASK}


def export(
    folder: Path | str,
    *,
    capabilities: Capabilities | None = None,
    profile: Profile | None = None,
    conventions: Conventions | None = None,
    num_cases: int | None = None,
    seed: int = 0,
) -> Manifest:
    """Write golden files and their manifest.

    The same arguments give the same bytes. On another machine, whose sums may have another order, that holds for all
    inputs; what is expected may differ in its last digits.

    Args:
        folder: made if it is not there; there must be nothing in it.
        capabilities, profile, conventions: as for `verify`.
        num_cases: how many cases; None: one round of directed ones. Companions of poisoned cases are counted extra.
        seed: of the numbers.

    Returns:
        The manifest; its `not_exercised` is what the folder cannot tell.

    Raises:
        ValueError: a folder with something in it, no cases, or declarations that contradict one another.
        OSError: the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> manifest = export(tempfile.mkdtemp(), capabilities=Capabilities(decode_only=True), num_cases=1)
        >>> manifest.entries[0].case.sequences
        ((1, 1), (1, 15), (1, 16), (1, 17), (1, 32), (1, 33), (1, 83))
    """
    capabilities, profile = capabilities or Capabilities(), profile or Profile()
    conventions = (conventions or Conventions()).agree_with(capabilities)
    if num_cases is not None and num_cases < 1:
        raise ValueError(f"there must be at least one case, got {num_cases}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: golden files go into a folder of their own")
    with _one_thread():
        dense = replace(capabilities, strided_caches=False, strided_tables=False)
        cases = _cases(Turns(dense, conventions, seed), profile, num_cases)
        entries = _write(folder, cases, profile, conventions)
    missing = _not_exercised(capabilities, entries)
    manifest = Manifest(capabilities, profile, conventions, seed, tuple(entries), missing)
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


def _write(folder: Path, cases: Sequence[Case], profile: Profile, conventions: Conventions) -> list[Entry]:
    """A file for each case and companion."""
    entries: list[Entry] = []
    seen: set[str] = set()
    for case, poisoned in _with_companions(cases, conventions):
        inputs, expected = _solved(case, profile, conventions, poisoned)
        tensors = input_tensors(inputs)
        if digest(tensors) in seen:  # nothing lies in the region that is clean
            continue
        seen.add(digest(tensors))
        content = save(tensors | expected_tensors(expected, conventions))
        name = f"{len(entries):03d}_{case.recipe}_{case.name.removeprefix('case_')}"
        if poisoned is not None:
            (clean,) = set(POISONED[case.poison]) - set(poisoned)
            name += f"_clean_{clean}"
        entry = _entry(name, sha256(content).hexdigest(), inputs, expected, conventions, poisoned)
        (folder / entry.file).write_bytes(content)
        entries.append(entry)
    return entries


@contextmanager
def _one_thread() -> Iterator[None]:
    """How many threads there are decides the order of sums, and so the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cases(turns: Turns, profile: Profile, count: int | None) -> list[Case]:
    """So many directed cases, in their order: what exercises most of what the others do not comes in first."""
    candidates: list[Case] = []
    while not candidates or len(candidates) < (count or 0):
        candidates += [case for case in directed(turns, 1) if case.first_block < FEW]
    if count is None or count == len(candidates):
        return candidates
    tells = [_tells(*_solved(case, profile, turns.conventions)) for case in candidates]
    chosen, told = [0], set(tells[0])  # the first one is the probe that names tokens
    while len(chosen) < count:
        rest = [i for i in range(len(candidates)) if i not in chosen]
        best = max(rest, key=lambda i: len(tells[i] - told))  # the first of those that tell most
        chosen.append(best)
        told |= tells[best]
    return [candidates[i] for i in sorted(chosen)]


def _with_companions(cases: Sequence[Case], conventions: Conventions) -> Iterator[tuple[Case, tuple[str, ...] | None]]:
    """Cases and which regions are poisoned: the one with most regions of each poison comes with its companions."""
    richest: dict[str, Case] = {}
    most: dict[str, int] = {}
    for case in cases:
        if case.poison != "none":
            inputs = materialise(case, conventions)
            regions = sum(bool((inputs.regions == REGIONS.index(region)).any()) for region in POISONED[case.poison])
            if regions > most.get(case.poison, 0):
                richest[case.poison], most[case.poison] = case, regions
    for case in cases:
        yield case, None
        if case == richest.get(case.poison):
            for clean in POISONED[case.poison]:
                yield case, tuple(region for region in POISONED[case.poison] if region != clean)


def _solved(
    case: Case, profile: Profile, conventions: Conventions, poisoned: tuple[str, ...] | None = None
) -> tuple[Inputs, Expected]:
    inputs = materialise(case, conventions, poisoned=poisoned)
    return inputs, solve(inputs.problem, profile.roundoffs(case.dtype), recipe=case.recipe)


def _tells(inputs: Inputs, expected: Expected) -> set[str]:
    """What a file exercises: what `verify` counts, and what makes directed cases different from one another."""
    case = inputs.case
    found = exercises(inputs, expected) | {f"recipe {case.recipe}", f"order {case.order}"}
    if case.poison != "none":
        found.add(f"poison {case.poison}")
    if any(query_len > 1 for query_len, _ in case.sequences):
        found.add("several queries of a sequence")
    if max(seq_len for _, seq_len in case.sequences) >= LONG:
        found.add(f"a context of {LONG}")
    if case.shared_blocks:
        found.add("shared_blocks")
    if case.extra_columns:
        found.add("extra_columns")
    return found


def _entry(
    name: str,
    file_hash: str,
    inputs: Inputs,
    expected: Expected,
    conventions: Conventions,
    poisoned: tuple[str, ...] | None,
) -> Entry:
    tensors = input_tensors(inputs) | expected_tensors(expected, conventions)
    about = {
        key: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for key, tensor in tensors.items()
    }
    rows = any_rows(expected, conventions)
    return Entry(name, file_hash, inputs.case, poisoned, tuple(sorted(_tells(inputs, expected))), rows, about)


def _not_exercised(capabilities: Capabilities, entries: Sequence[Entry]) -> tuple[str, ...]:
    """What was declared and no file can tell, then what none ever can."""
    told = {name for entry in entries for name in entry.exercises}
    words = []
    for name in sorted(declared_names(capabilities) - told):
        words.append(f"{name}: {NOT_IN_FILES.get(name, 'declared, but no file can tell')}")
    if capabilities.lse is None:
        words.append("log-sum-exp: not declared; it is the sharpest check of keys")
    return (*words, *NEVER)
