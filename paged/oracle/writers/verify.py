"""The judge of writers: do the keys and values of new tokens go into their slots, and nothing else anywhere?

    report = verify_write(my_reshape_and_cache, capabilities=WriteCapabilities(negative_slots=True))
    print(report)

A writer is called as `write(key, value, key_cache, value_cache, slot_mapping)`, with `k_scale=` and `v_scale=` if they
are declared; one with another order of arguments is wrapped in a line of Python. After each call the whole pool is
compared bit for bit, and everything that was only to be read as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from paged.kv_pool import write
from paged.oracle.diagnose import MISHAPS
from paged.oracle.drawn import search
from paged.oracle.guard import FIRST_CALL, Guard, Mishap, bits, kernel_named
from paged.oracle.report import Failure, Report
from paged.oracle.writers.case import WriteCapabilities, WriteCase
from paged.oracle.writers.cases import affords_many_blocks, cases, directed, reduce
from paged.oracle.writers.inputs import WriteInputs, materialise
from paged.oracle.writers.judge import judge
from paged.oracle.writers.report import Outcome, failure

Writer = Callable[..., Any]


@dataclass(frozen=True)
class WriteBudget:
    """How much is tried: rounds of directed cases, and drawn ones."""

    rounds: int
    drawn: int


BUDGETS = {"fast": WriteBudget(1, 60), "standard": WriteBudget(4, 500), "long": WriteBudget(16, 6_000)}
# So many failing cases are made smaller, in search of so many different faults.
MOST_DIAGNOSED, MOST_FAULTS = 5, 3


def verify_write(
    kernel: Writer | str,
    *,
    capabilities: WriteCapabilities | None = None,
    device: str = "cpu",
    budget: str = "fast",
    seed: int = 0,
    time_limit: float = 60.0,
) -> Report:
    """Say whether a writer puts every token into its slot and leaves all else as it was.

    Args:
        kernel: a callable as above, or "module:function".
        capabilities: what it can do; None: `WriteCapabilities()`, bfloat16 without any feature.
        device: torch's name of the one it runs on.
        budget: "fast", "standard" or "long", a number of cases.
        seed: of the numbers and the draw.
        time_limit: seconds for a call, ten times as many for the first; a writer that takes longer hangs.

    Raises:
        ValueError: an unknown budget. Nothing that the writer does raises.

    Example: this project's own writer, and one that forgets the values.
        >>> verify_write(pool_write).ok
        True
        >>> def forgetful(key, value, key_cache, value_cache, slot_mapping):
        ...     key_cache.flatten(0, 1)[slot_mapping] = key
        >>> report = verify_write(forgetful)
        >>> report.failures[0].fault, report.failures[0].details[0][1].split(":")[0]
        ('tokens are not written', 'value cache, slot 16 = block 1, offset 0, head 0, dim 0')
    """
    if budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}; there are {', '.join(BUDGETS)}")
    can = capabilities or WriteCapabilities()
    found, name = kernel_named(kernel), _name_of(kernel)
    settings = _settings(can) | {"budget": budget, "seed": str(seed)}
    if isinstance(found, Mishap):
        return Report(name, 0, (_not_called(found),), settings=settings)
    trial = WriteTrial(found, can, device, time_limit)
    failing = []
    for case in directed(can, seed, BUDGETS[budget].rounds):
        outcome = trial(case)
        if outcome is not None and not outcome.ok:
            failing.append(outcome)
        if trial.guard.hung is not None:
            break
    if failing:
        skipped = ("drawn cases: not tried, since directed cases fail",)
        faults = tuple(_faults(trial, failing))
        return Report(name, trial.num_cases, faults, skipped, settings=settings)
    failed: dict[WriteCase, Outcome] = {}

    def fails(case: WriteCase) -> bool:
        outcome = None if trial.guard.hung is not None else trial(case)
        if outcome is not None and not outcome.ok:
            failed[case] = outcome
        return case in failed

    smallest = search(cases(can), BUDGETS[budget].drawn, seed, fails)
    if smallest is not None:
        # Not tried once more: a writer that fails now and then may pass this time.
        failing.append(failed[smallest])
    faults = tuple(_faults(trial, failing))
    return Report(name, trial.num_cases, faults, trial.not_exercised(), settings=settings)


def replay_write(
    kernel: Writer | str,
    case: str | WriteCase,
    *,
    capabilities: WriteCapabilities | None = None,
    device: str = "cpu",
    time_limit: float = 60.0,
) -> Report:
    """Judge one case, as it is: the line that a report ends with.

    Args:
        case: its JSON, or the case.
        kernel, capabilities, device, time_limit: as for `verify_write`.

    Example:
        >>> replay_write(pool_write, '{"sequences": [[14, 3]]}').ok
        True
    """
    case = WriteCase.from_json(case) if isinstance(case, str) else case
    can = capabilities or WriteCapabilities()
    found, name = kernel_named(kernel), _name_of(kernel)
    if isinstance(found, Mishap):
        return Report(name, 0, (_not_called(found),), settings=_settings(can))
    trial = WriteTrial(found, can, device, time_limit)
    outcome = trial(case)
    if outcome is None:
        return Report(name, 0, (), (f"{case.describe()}: not enough address space",), settings=_settings(can))
    failures = () if outcome.ok else (failure(outcome, trial.passes),)
    return Report(name, trial.num_cases, failures, settings=_settings(can))


def pool_write(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, **scales: Tensor
) -> None:
    """This project's own writer, `paged.kv_pool.write`, with the judge's order of arguments."""
    write(key_cache, value_cache, key, value, slot_mapping, **scales)


class WriteTrial:
    """Tries cases on one writer, and remembers what was exercised.

    Attributes:
        guard: it is called by.
        num_cases: tried so far.
    """

    def __init__(self, kernel: Writer, capabilities: WriteCapabilities, device: str, time_limit: float) -> None:
        self.guard = Guard(time_limit, FIRST_CALL)
        self.num_cases = 0
        self._kernel, self._can, self._device = kernel, capabilities, device
        self._exercised: set[str] = set()

    def __call__(self, case: WriteCase) -> Outcome | None:
        """Call the writer once; None where this machine cannot make the tensors (far blocks take address space)."""
        try:
            inputs = materialise(case, self._device)
        except (RuntimeError, MemoryError):
            if case.strides == "far":
                return None
            raise
        self.num_cases += 1
        returned = self.guard(lambda: self._call(inputs))
        mishap = returned if isinstance(returned, Mishap) else _mishap(inputs, returned)
        if case.duplicates and self._can.duplicate_slots == "refused" and case.num_tokens > 1:
            mishap = self._refused(inputs, mishap)
            return Outcome(case, inputs, mishap, None if mishap else judge(_without_tokens(inputs), self._can))
        outcome = Outcome(case, inputs, mishap, None if mishap else judge(inputs, self._can))
        if outcome.ok:
            self._note(case)
        return outcome

    def passes(self, case: WriteCase) -> bool:
        """Whether a case is right, or cannot be tried any more."""
        if self.guard.hung is not None:
            return True
        outcome = self(case)
        return outcome is None or outcome.ok

    def not_exercised(self) -> tuple[str, ...]:
        """What was declared and could not be tried, in words."""
        wanted = {"slots beyond 2^31 numbers"} if self._can.strided_caches else set()
        words = [f"{name}: not enough address space" for name in sorted(wanted - self._exercised)]
        if not affords_many_blocks(self._can):
            words.append("blocks beyond 65535: the pool would be too large; declare a small block size and head dim")
        flags = ("negative_slots", "strided_inputs", "strided_caches", "longer_keys", "duplicate_slots")
        return (*words, *(f"{name}: not declared" for name in flags if not getattr(self._can, name)))

    def _call(self, inputs: WriteInputs) -> Any:
        wishes = {} if inputs.k_scale is None else {"k_scale": inputs.k_scale.view}
        wishes |= {} if inputs.v_scale is None else {"v_scale": inputs.v_scale.view}
        rooms = (inputs.key, inputs.value, inputs.key_cache, inputs.value_cache, inputs.slot_mapping)
        return self._kernel(*(room.view for room in rooms), **wishes)

    def _refused(self, inputs: WriteInputs, mishap: Mishap | None) -> Mishap | None:
        """A call that must raise: what else happened."""
        if mishap is None:
            return Mishap("returns", "two tokens have one slot, and nothing was raised although 'refused' is declared")
        return None if mishap.kind == "raises" else mishap

    def _note(self, case: WriteCase) -> None:
        if case.strides == "far":
            self._exercised.add("slots beyond 2^31 numbers")


def _without_tokens(inputs: WriteInputs) -> WriteInputs:
    """The same, as if nothing had been asked for: then no slot may change."""
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return WriteInputs(**(values | {"tokens": ()}))


def _mishap(inputs: WriteInputs, returned: Any) -> Mishap | None:
    """Whether the writer returned something else than nothing or its tensors, or wrote where it should read."""
    several = returned if isinstance(returned, tuple | list) else (returned,)
    if not all(one is None or isinstance(one, Tensor) for one in several):
        return Mishap("returns", f"returned a {type(returned).__name__}; a writer writes in place and returns nothing")
    for name, room in (("key_cache", inputs.key_cache), ("value_cache", inputs.value_cache)):
        if bits(room.room).shape != room.before.shape:
            return Mishap("shape", f"{name} has another shape after the call: {list(room.room.shape)}")
    for name, room in inputs.read_only().items():
        changed = room.changed()
        if changed.any():
            first = [int(i) for i in changed.nonzero()[0]]
            return Mishap("writes", f"{name} was written to: {int(changed.sum())} elements changed, the first {first}")
    return None


def _faults(trial: WriteTrial, failing: list[Outcome]) -> list[Failure]:
    """Different faults of the cases that fail, each traced to a small case."""
    faults: dict[str, Failure] = {}
    seen: set[tuple[object, ...]] = set()
    for outcome in failing:
        case = outcome.case
        kind = (outcome.symptom, case.strides, case.inputs, case.skips, case.duplicates, case.recipe)
        if kind in seen or len(seen) == MOST_DIAGNOSED or len(faults) == MOST_FAULTS:
            continue
        seen.add(kind)
        found = _traced(trial, outcome)
        faults.setdefault(found.fault, found)
    return list(faults.values())


def _traced(trial: WriteTrial, outcome: Outcome) -> Failure:
    """Make a case smaller, then say what is wrong with it."""

    def fails(case: WriteCase) -> bool:
        tried = None if trial.guard.hung is not None else trial(case)
        return tried is not None and not tried.ok and tried.symptom == outcome.symptom

    small, steps = reduce(outcome.case, trial._can, fails)
    original = "" if small == outcome.case else f"(made smaller in {steps} steps from {outcome.case.describe()})"
    again = None if trial.guard.hung is not None else trial(small)
    # A writer that fails now and then may pass at last; then the first outcome is what there is.
    return failure(again if again is not None and not again.ok else outcome, trial.passes, original)


def _not_called(mishap: Mishap) -> Failure:
    return Failure(MISHAPS[mishap.kind], "-", "exact", details=(("what happened", mishap.message),))


def _settings(can: WriteCapabilities) -> dict[str, str]:
    return {f.name: str(getattr(can, f.name)) for f in fields(can) if getattr(can, f.name) != f.default}


def _name_of(kernel: object) -> str:
    if isinstance(kernel, str):
        return kernel
    module, name = getattr(kernel, "__module__", None), getattr(kernel, "__qualname__", None)
    return f"{module}:{name}" if module and name else type(kernel).__name__
