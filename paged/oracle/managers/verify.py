"""The judge of block managers: does every table lead to what its sequence wrote, and is every block free or in use?

    report = verify_manager(MyManager, capabilities=ManagerCapabilities(prefix_caching=True))
    print(report)

A manager is made for a pool of a few blocks, so that it runs out and reuses blocks all the time, and lists of
operations are carried out on it: directed ones first, then drawn ones. What fails is made smaller, and printed as the
operations that break it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from paged.oracle.diagnose import MISHAPS
from paged.oracle.drawn import search
from paged.oracle.guard import Guard, Mishap, kernel_named, raised
from paged.oracle.managers.asking import ManagerFault
from paged.oracle.managers.bookkeeping import Bookkeeping
from paged.oracle.managers.operations import ManagerCase, cases, directed, kinds_of, reduce
from paged.oracle.managers.protocol import ManagerCapabilities
from paged.oracle.report import Failure, Report

# Makes a manager, of `num_blocks` blocks of `block_size` tokens.
Maker = Callable[[int, int], Any]
BUDGETS = {"fast": 250, "standard": 2_000, "long": 20_000}
MOST_FAULTS = 3


@dataclass(frozen=True)
class ManagerOutcome:
    """What came of one list of operations: the first fault or None, and the operations in words up to there."""

    case: ManagerCase
    fault: ManagerFault | None
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """The fault's name, or nothing."""
        return "" if self.fault is None else self.fault.fault


def verify_manager(
    make_manager: Maker | str,
    *,
    capabilities: ManagerCapabilities | None = None,
    budget: str = "fast",
    seed: int = 0,
    time_limit: float = 10.0,
) -> Report:
    """Say whether a block manager keeps its books, whatever is done with it.

    Args:
        make_manager: called with (num_blocks, block_size), makes one with the verbs of
            `paged.oracle.managers.protocol`; or "module:function".
        capabilities: what it can do; None: `ManagerCapabilities()`, which is to allocate, append, fork and free.
        budget: "fast", "standard" or "long", a number of lists of operations.
        seed: of the draw.
        time_limit: seconds for a list of operations; a manager that takes longer hangs.

    Raises:
        ValueError: an unknown budget. Nothing that the manager does raises.

    Example: this project's own blocks, and what is left of them if forks are not counted.
        >>> from paged.oracle.managers.protocol import OwnBlocks
        >>> verify_manager(OwnBlocks, capabilities=OwnBlocks.CAPABILITIES).ok
        True
        >>> class Uncounted(OwnBlocks):
        ...     def fork(self, name, twin):
        ...         super().fork(name, twin)
        ...         for block in self.table(twin):
        ...             self._pool.release(block)
        ...         return ()
        >>> report = verify_manager(Uncounted, capabilities=OwnBlocks.CAPABILITIES)
        >>> dict(report.failures[0].details)["operations"]
        'A = allocate(1 new token); B = fork(A); append(A, 1 token); append(B, 1 token)'
    """
    if budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}; there are {', '.join(BUDGETS)}")
    can = capabilities or ManagerCapabilities()
    found, name = kernel_named(make_manager), _name_of(make_manager)
    settings = _settings(can) | {"budget": budget, "seed": str(seed)}
    if isinstance(found, Mishap):
        return Report(name, 0, (_not_made(found),), settings=settings)
    trial = ManagerTrial(found, can, time_limit)
    failing = []
    for case in directed(can):
        outcome = trial(case)
        if outcome.fault is not None:
            failing.append(outcome)
        if trial.guard.hung is not None:
            break
    skipped: tuple[str, ...] = ()
    if failing:
        skipped = ("drawn lists of operations: not tried, since directed ones fail",)
    else:
        smallest = search(cases(can), BUDGETS[budget], seed, lambda case: trial.fails(case))
        failing = [] if smallest is None else [trial.last_failing]
    faults: dict[str, Failure] = {}
    for outcome in failing:
        if outcome.name not in faults and len(faults) < MOST_FAULTS:
            faults[outcome.name] = _failure(trial, outcome)
    missing = skipped or trial.not_exercised()
    return Report(name, trial.num_cases, tuple(faults.values()), missing, settings=settings)


def replay_manager(
    make_manager: Maker | str,
    case: str | ManagerCase,
    *,
    capabilities: ManagerCapabilities | None = None,
    time_limit: float = 10.0,
) -> Report:
    """Run one list of operations, as it is: the line that a report ends with.

    Args:
        case: its JSON, or the case.
        make_manager, capabilities, time_limit: as for `verify_manager`.
    """
    case = ManagerCase.from_json(case) if isinstance(case, str) else case
    can = capabilities or ManagerCapabilities()
    found, name = kernel_named(make_manager), _name_of(make_manager)
    if isinstance(found, Mishap):
        return Report(name, 0, (_not_made(found),), settings=_settings(can))
    outcome = ManagerTrial(found, can, time_limit)(case)
    failures = () if outcome.fault is None else (_described(outcome),)
    return Report(name, 1, failures, settings=_settings(can))


class ManagerTrial:
    """Tries lists of operations on new managers of one kind.

    Attributes:
        guard: they are called by.
        num_cases: lists tried so far.
        last_failing: the outcome of the list that failed last.
    """

    def __init__(self, make_manager: Maker, capabilities: ManagerCapabilities, time_limit: float) -> None:
        self.guard = Guard(time_limit)
        self.num_cases = 0
        self.last_failing = ManagerOutcome(ManagerCase(0, 1), None, ())
        self._make, self._can = make_manager, capabilities
        self._done: set[str] = set()

    def __call__(self, case: ManagerCase) -> ManagerOutcome:
        """Make a manager and carry the list out."""
        self.num_cases += 1
        words: list[str] = []
        result = self.guard(lambda: self._run(case, words))
        if isinstance(result, Mishap):
            running = f"{words[-1]}: " if words and result.kind == "hangs" else ""
            result = ManagerFault(MISHAPS[result.kind], "-", running + result.message)
        outcome = ManagerOutcome(case, result, tuple(words))
        if outcome.fault is not None:
            self.last_failing = outcome
        return outcome

    def fails(self, case: ManagerCase) -> bool:
        """Whether a list breaks the manager, as far as it can still be tried."""
        return self.guard.hung is None and self(case).fault is not None

    def not_exercised(self) -> tuple[str, ...]:
        """What was declared, or is tried as a rule, and never happened; and what was not declared."""
        wanted = {*kinds_of(self._can), "refused"}
        words = [f"{kind}: no list of operations came to it" for kind in sorted(wanted - self._done)]
        words += [
            f"{flag}: not declared" for flag in ("fork", "prefix_caching", "window") if not getattr(self._can, flag)
        ]
        if self._can.prefix_caching and self._can.eviction is None:
            words.append("order of eviction: not declared")
        return tuple(words)

    def _run(self, case: ManagerCase, words: list[str]) -> ManagerFault | None:
        """In the manager's thread: what is wrong. `words` grows while the operations run."""
        try:
            manager = self._make(case.num_blocks, case.block_size)
        except (Exception, SystemExit) as error:
            return ManagerFault("raises an exception", "-", f"when it is made: {raised(error)}")
        run = Bookkeeping(manager, case, self._can, words)
        try:
            run.run()
        except ManagerFault as fault:
            return fault
        finally:
            self._done |= run.done
        return None


def _failure(trial: ManagerTrial, outcome: ManagerOutcome) -> Failure:
    """Make a list smaller, then say what is wrong with it."""

    def fails(case: ManagerCase) -> bool:
        return trial.guard.hung is None and trial(case).name == outcome.name

    small, steps = reduce(outcome.case, fails)
    again = outcome if trial.guard.hung is not None else trial(small)
    original = "" if small == outcome.case else f"(made smaller in {steps} steps from {len(outcome.case.operations)})"
    # A manager that fails now and then may pass at last; then the first outcome is what there is.
    return _described(again if again.fault is not None else outcome, original)


def _described(outcome: ManagerOutcome, original: str = "") -> Failure:
    assert outcome.fault is not None, "it fails"
    case, fault = outcome.case, outcome.fault
    details = (
        ("operations", "; ".join(outcome.words)),
        ("what happened", fault.words),
        ("reproduce", f"paged.oracle.replay_manager(make_manager, '{case.to_json()}')"),
    )
    count = len(case.operations)
    description = f"{count} operation{'s' * (count != 1)}; pool of {case.num_blocks} blocks of {case.block_size} tokens"
    ignored = fault.fault == "freeing twice is not refused"
    declare = "ManagerCapabilities(double_free='ignored')" if ignored else None
    return Failure(fault.fault, fault.letter, "exact", None, description, original, details, declare=declare)


def _not_made(mishap: Mishap) -> Failure:
    return Failure(MISHAPS[mishap.kind], "-", "exact", details=(("what happened", mishap.message),))


def _settings(can: ManagerCapabilities) -> dict[str, str]:
    return {f.name: str(getattr(can, f.name)) for f in fields(can) if getattr(can, f.name) != f.default}


def _name_of(make_manager: object) -> str:
    if isinstance(make_manager, str):
        return make_manager
    module, name = getattr(make_manager, "__module__", None), getattr(make_manager, "__qualname__", None)
    return f"{module}:{name}" if module and name else type(make_manager).__name__
