"""Judging outputs that were written to a file: the same checks as `verify`, and the same diagnosis as far as it goes.

Each case is made again from the manifest, and the outputs are looked up by what the kernel was called with, so they
stand for a kernel that can be asked for what is in the folder and for nothing else: which token is missing, which
other attention explains the outputs, and which poisoned region they follow from can be told; smaller cases cannot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from paged.oracle.calls import Result
from paged.oracle.case import Case
from paged.oracle.declarations import Capabilities
from paged.oracle.diagnose import diagnose
from paged.oracle.golden.files import EXPECTED, digest, expected_tensors, input_tensors, read_tensors
from paged.oracle.golden.manifest import MANIFEST, Entry, Manifest, read_manifest
from paged.oracle.guard import Mishap
from paged.oracle.inputs import Inputs
from paged.oracle.report import Failure, Report
from paged.oracle.trial import Outcome, Trial
from paged.oracle.verify import MOST_COMPARED, MOST_DIAGNOSED, MOST_FAULTS, alike, settings_of

# Names that an error lists.
MOST_NAMED = 3
# Sums in another order differ in their last digits, which in float64 is not much less than the bound itself.
SHARE = 0.5
# Bounds are sums of positive numbers, which differ by hardly more than one of them is rounded.
SAME_BOUND = 2.0**-20


class Record:
    """What a kernel returned, looked up by its inputs: it takes a `Caller`'s place in a `Trial`.

    Args:
        results: by the `digest` of the tensors that the kernel was called with.
        capabilities: as declared.
    """

    def __init__(self, results: Mapping[str, Result], capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self._results = results

    @property
    def hung(self) -> Mishap | None:
        """Nothing that was written down hangs."""
        return None

    def __call__(self, inputs: Inputs) -> Result | Mishap:
        """The result of a call with these inputs, or that there is none."""
        found = self._results.get(digest(input_tensors(inputs)))
        return Mishap("returns", "there is no golden file of this case") if found is None else found


@dataclass(frozen=True)
class Golden:
    """A golden file that was read: what the manifest says of it, the hash of its inputs, and what is right."""

    entry: Entry
    inputs: str
    expected: dict[str, Tensor]


def judge_files(folder: Path | str, output: Path | str) -> Report:
    """Say whether the outputs in a file are right and, if not, what is wrong with them.

    Args:
        folder: with golden files.
        output: a safetensors file with a tensor `<name>.out` [T, Hq, Dv] for each file of the folder, in the query's
            dtype, float32 or float64; where a log-sum-exp is declared `<name>.lse` [T, Hq], float32 or float64, too.

    Raises:
        ValueError: a file of the folder is not what the manifest says, or not what this version makes of its case; a
            tensor is missing, unknown, or has another shape or dtype.
        OSError: a file cannot be read.

    Example: the right answers, but for one number.
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from paged.oracle.golden.export import export
        >>> folder = Path(tempfile.mkdtemp())
        >>> manifest = export(folder / "golden", capabilities=Capabilities(decode_only=True), num_cases=1)
        >>> (name,) = [entry.name for entry in manifest.entries]
        >>> out = read_tensors(folder / "golden" / f"{name}.safetensors")[0]["out"].bfloat16()
        >>> save_file({f"{name}.out": out}, folder / "right.safetensors")
        >>> judge_files(folder / "golden", folder / "right.safetensors").ok
        True
        >>> out[3, 0, 5] += 1
        >>> save_file({f"{name}.out": out}, folder / "wrong.safetensors")
        >>> judge_files(folder / "golden", folder / "wrong.safetensors").failures[0].details[0]
        ('where', 'sequence 3, query row 0 (position 16), head 0, dim 5')
    """
    folder, output = Path(folder), Path(output)
    manifest = read_manifest(folder)
    goldens = _read_goldens(folder, manifest)
    results = _read_results(output, manifest)
    by_inputs = {golden.inputs: results[golden.entry.name] for golden in goldens}
    record = Record(by_inputs, manifest.capabilities)
    # Not one shape may be asked for beyond those in the folder.
    trial = Trial(record, manifest.profile, manifest.conventions, max_shapes=0)
    outcomes = {}
    for golden in goldens:
        entry = golden.entry
        outcome = trial(entry.case, entry.poisoned)
        _compare(golden, outcome, folder / entry.file, manifest)
        if outcome.ok:
            trial.note(outcome)
        outcomes[entry.name] = outcome
    failures = _failures(trial, manifest.entries, outcomes)
    missing = list(manifest.not_exercised)
    if trial.undecided:
        missing.append(f"{trial.undecided} rows: rounding may do anything there")
    settings = settings_of(manifest.capabilities, manifest.profile, manifest.conventions) | {"seed": f"{manifest.seed}"}
    return Report(f"{output}", len(goldens), failures, tuple(missing), dict(sorted(trial.slack.items())), settings)


def _read_goldens(folder: Path, manifest: Manifest) -> list[Golden]:
    """All golden files, held against their hashes."""
    goldens, changed = [], []
    for entry in manifest.entries:
        tensors, found = read_tensors(folder / entry.file)
        if found != entry.sha256:
            changed.append(entry.file)
        else:
            goldens.append(
                Golden(entry, digest(tensors), {name: tensors[name] for name in EXPECTED if name in tensors})
            )
    if changed:
        raise ValueError(f"{folder}: not the files that {MANIFEST} describes, by their sha256: {_listed(changed)}")
    return goldens


def _read_results(output: Path, manifest: Manifest) -> dict[str, Result]:
    """A kernel's results by the names of the files, all of them there and none too many."""
    tensors, _ = read_tensors(output)
    wanted = [f"{entry.name}.out" for entry in manifest.entries]
    if manifest.capabilities.lse is not None:
        wanted += [f"{entry.name}.lse" for entry in manifest.entries]
    known = {f"{entry.name}.{what}" for entry in manifest.entries for what in ("out", "lse")}
    for problem, names in (
        ("missing", [name for name in wanted if name not in tensors]),
        ("no result of a file in the folder", sorted(set(tensors) - known)),
    ):
        if names:
            raise ValueError(f"{output}: {problem}: {_listed(names)}")
    results = {}
    for entry in manifest.entries:
        out, lse = tensors[f"{entry.name}.out"], tensors.get(f"{entry.name}.lse")
        rows = (entry.case.num_queries, entry.case.num_heads)
        dtypes = tuple(dict.fromkeys((entry.case.dtype, "float32", "float64")))
        _check(f"{output}: {entry.name}.out", out, (*rows, entry.case.value_dim), dtypes)
        if lse is not None:
            _check(f"{output}: {entry.name}.lse", lse, rows, ("float32", "float64"))
        results[entry.name] = Result(out, lse)
    return results


def _check(where: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{where} has shape {list(tensor.shape)}; it has to be {list(shape)}")
    if dtype not in dtypes:
        raise ValueError(f"{where} has dtype {dtype}; it has to be {' or '.join(dtypes)}")


def _compare(golden: Golden, outcome: Outcome, path: Path, manifest: Manifest) -> None:
    """That a file holds what this version makes of its case: or a verdict would not be about what the kernel saw."""
    if outcome.expected is None:
        raise ValueError(f"{path}: other inputs than this version of paged makes of the case; export it anew")
    ours, theirs = expected_tensors(outcome.expected, manifest.conventions), golden.expected
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    wrong = [] if shapes == {name: tensor.shape for name, tensor in theirs.items()} else list(EXPECTED)
    for name in ("out", "lse") if not wrong else ():
        one, other, bound, their_bound = ours[name], theirs[name], ours[f"{name}_bound"], theirs[f"{name}_bound"]
        right = (one == other) | (one.isnan() & other.isnan()) | ((one - other).abs() <= SHARE * bound)
        same_bound = (bound == their_bound) | ((bound / their_bound - 1).abs() <= SAME_BOUND)
        wrong += [] if right.all() else [name]
        wrong += [] if same_bound.all() else [f"{name}_bound"]
    if wrong:
        raise ValueError(f"{path}: this version of paged computes another {', '.join(wrong)}; export it anew")


def _failures(trial: Trial, entries: Sequence[Entry], outcomes: Mapping[str, Outcome]) -> tuple[Failure, ...]:
    """Different faults of the files that fail, each diagnosed from its most telling one."""
    failing = [entry for entry in entries if not outcomes[entry.name].ok]
    # Companions tell where a leak comes from; they are no cases of their own unless nothing else fails.
    whole = [entry for entry in failing if entry.poisoned is None] or failing
    accompanied = {entry.case for entry in entries if entry.poisoned is not None}
    ordered = sorted(whole, key=lambda entry: _how_telling(entry.case, entry.case in accompanied))
    faults: dict[str, Failure] = {}
    for group in alike([outcomes[entry.name] for entry in ordered])[:MOST_DIAGNOSED]:
        if len(faults) < MOST_FAULTS:
            failure = diagnose(trial, group[0], group[:MOST_COMPARED])
            names = [entry.name for entry in ordered if any(outcomes[entry.name] is outcome for outcome in group)]
            faults.setdefault(failure.fault, replace(failure, details=(*failure.details, ("file", names[0]))))
    # What cannot be named is the same fault as a rule, in files that tell less.
    named = [failure for failure in faults.values() if failure.letter != "-"] or list(faults.values())
    shared = _shared(entries, failing) if failing else []
    return tuple(replace(failure, details=(*failure.details, *shared)) for failure in named)


def _how_telling(case: Case, accompanied: bool) -> tuple[int, int]:
    """For sorting: exact probes that name a token, then leaks that have a source, then what is clean; small ones first.

    Args:
        case: that fails.
        accompanied: whether it has companions with one region clean.
    """
    clean = case.poison == "none"
    rank = 0 if clean and case.recipe == "uniform" else 1 if accompanied else 2 if clean else 3
    return rank, sum(query_len * seq_len for query_len, seq_len in case.sequences) * case.num_heads


def _shared(entries: Sequence[Entry], failing: Sequence[Entry]) -> list[tuple[str, str]]:
    """How many files fail, and what all of those exercise and none that passes."""
    passing = [entry for entry in entries if entry not in failing]
    details = [("files", f"{len(failing)} of {len(entries)} fail")]
    only = set.intersection(*(set(entry.exercises) for entry in failing))
    only = only.difference(*(entry.exercises for entry in passing))
    if passing and only:
        details.append(("", f"all of them and no other have: {', '.join(sorted(only))}"))
    return details


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
