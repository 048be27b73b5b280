"""The face of the oracle: `verify` a kernel, `check` one case, `replay` a line of a report.

    report = verify(my_kernel, capabilities=Capabilities(dtypes=("float16",), window=True, lse="e"))
    print(report)
    assert report.ok

A budget is a number of cases, not of seconds: the same kernel gets the same verdict on any machine. First come directed
cases, then drawn ones, then relations between calls; who fails the first is not asked the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from paged.oracle.adapters import Adapter, Kernel, adapter_named
from paged.oracle.calls import Caller
from paged.oracle.case import Case
from paged.oracle.declarations import Capabilities, Conventions, Profile
from paged.oracle.diagnose import diagnose, mishap_failure
from paged.oracle.directed import Turns, directed
from paged.oracle.drawn import cases, search
from paged.oracle.guard import Mishap, kernel_named
from paged.oracle.judge import EVIDENCE
from paged.oracle.reduce import reduce
from paged.oracle.relations import relations
from paged.oracle.report import Failure, Report, as_arguments
from paged.oracle.trial import Outcome, Trial, declared_names


@dataclass(frozen=True)
class Budget:
    """How much is tried: rounds of directed cases, drawn cases, and cases that relations are tried on."""

    rounds: int
    drawn: int
    related: int


BUDGETS = {"fast": Budget(1, 100, 6), "standard": Budget(4, 800, 30), "long": Budget(16, 10_000, 200)}
# So many failing cases are made smaller, in search of so many different faults.
MOST_DIAGNOSED, MOST_FAULTS = 6, 3
# And an explanation is held against so many cases that fail alike.
MOST_COMPARED = 4


def verify(
    kernel: Kernel | str,
    *,
    capabilities: Capabilities | None = None,
    profile: Profile | None = None,
    conventions: Conventions | None = None,
    adapter: str | Adapter = "contract",
    device: str = "cpu",
    budget: str = "fast",
    seed: int = 0,
    max_shapes: int | None = None,
    time_limit: float = 60.0,
    trace: bool = True,
) -> Report:
    """Say whether a paged attention kernel is right and, if not, what it gets wrong.

    Args:
        kernel: a callable with the contract's arguments (see `paged.attention.gathered.paged_attention`), or of any
            other kind with an adapter; or "module:function".
        capabilities: what it can do; None: `Capabilities()`, bfloat16 without any feature.
        profile: where it rounds; None: like FlashAttention.
        conventions: where it differs from the contract on purpose; None: nowhere.
        adapter: a name, or an object that calls it (see `paged.oracle.adapters`).
        device: torch's name of the one it runs on.
        budget: "fast", "standard" or "long", a number of cases.
        seed: of the values and the draw.
        max_shapes: at most so many different shapes are asked for, for kernels that are compiled for each; None: any.
        time_limit: seconds for a call, ten times as many for the first; a kernel that takes longer hangs.
        trace: whether failing cases are made smaller and traced to a fault; else the first one ends it, as it is.

    Raises:
        ValueError: declarations that contradict one another or that the adapter cannot express, an unknown adapter or
            budget. Nothing that the kernel does raises.

    Example:
        >>> from paged.attention.gathered import paged_attention
        >>> verify(paged_attention, capabilities=Capabilities(dtypes=("float32",), window=True, lse="e")).ok
        True
    """
    if budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}; there are {', '.join(BUDGETS)}")
    capabilities, profile = capabilities or Capabilities(), profile or Profile()
    conventions = (conventions or Conventions()).agree_with(capabilities)
    settings = settings_of(capabilities, profile, conventions) | {"budget": budget, "seed": str(seed)}
    way = adapter_named(adapter, capabilities)
    found, name = kernel_named(kernel), _kernel_name(kernel)
    if isinstance(found, Mishap):
        return Report(name, 0, (mishap_failure(found),), settings=settings)
    caller = Caller(found, way, capabilities, time_limit)
    trial = Trial(caller, profile, conventions, device, max_shapes)
    failures, skipped = _try_all(trial, BUDGETS[budget], seed, trace)
    missing = skipped if failures else [*skipped, *_not_exercised(trial)]
    again = _arguments(capabilities, profile, conventions, adapter)
    failures = [replace(failure, declared=again) for failure in failures]
    return Report(name, trial.num_cases, tuple(failures), tuple(missing), dict(sorted(trial.slack.items())), settings)


def check(
    kernel: Kernel | str,
    case: Case,
    *,
    capabilities: Capabilities | None = None,
    profile: Profile | None = None,
    conventions: Conventions | None = None,
    adapter: str | Adapter = "contract",
    device: str = "cpu",
    time_limit: float = 60.0,
) -> Report:
    """Judge one case, as it is, without making it smaller.

    Args:
        case: what to compute; what it asks for is taken as declared.
        kernel, capabilities, profile, conventions, adapter, device, time_limit: as for `verify`.

    Example: a kernel that ignores the window.
        >>> from paged.attention.gathered import paged_attention
        >>> def forgetful(*tensors, window=None, **wishes):
        ...     return paged_attention(*tensors, **wishes)
        >>> report = check(forgetful, Case(sequences=((1, 34),), window=17))
        >>> report.failures[0].fault
        'window is ignored'
    """
    capabilities = capabilities or _as_asked(case)
    profile = profile or Profile()
    conventions = (conventions or Conventions()).agree_with(capabilities)
    way = adapter_named(adapter, capabilities)
    found, name = kernel_named(kernel), _kernel_name(kernel)
    settings = settings_of(capabilities, profile, conventions)
    if isinstance(found, Mishap):
        return Report(name, 0, (mishap_failure(found),), settings=settings)
    trial = Trial(Caller(found, way, capabilities, time_limit), profile, conventions, device)
    outcome = trial(case)
    trial.note(outcome)
    failures = () if outcome.ok else (diagnose(trial, outcome),)
    undecided = [f"{trial.undecided} rows: rounding may do anything there"] if trial.undecided else []
    return Report(name, trial.num_cases, failures, tuple(undecided), trial.slack, settings)


def replay(kernel: Kernel | str, case: str | Case, **declared: object) -> Report:
    """Run the line that a report ends with.

    Args:
        kernel: as for `verify`.
        case: the case's JSON, or the case.
        declared: as for `check`.
    """
    case = Case.from_json(case) if isinstance(case, str) else case
    return check(kernel, case, **declared)  # type: ignore[arg-type]


def _try_all(trial: Trial, budget: Budget, seed: int, trace: bool) -> tuple[list[Failure], list[str]]:
    """Directed cases, drawn ones, relations; faults, and what was left out because of them."""
    turns = Turns(trial.capabilities, trial.conventions, seed)
    related: list[Case] = []
    failing: list[Outcome] = []
    for case in directed(turns, budget.rounds):
        if not trial.affords(case):
            continue
        try:
            outcome = trial(case)
        except MemoryError:  # blocks far apart take address space; what was left out shows as not exercised
            continue
        if outcome.ok:
            trial.note(outcome)
            if case.recipe == "random" and case.poison == "none" and case.first_block == 1 and case.strides != "far":
                related.append(case)
        else:
            failing.append(outcome)
        if trial.caller.hung is not None or (failing and not trace):
            break
    if failing:
        return _faults(trial, failing, trace), ["drawn cases and relations: not tried, since directed cases fail"]
    failed: dict[Case, Outcome] = {}

    def fails(case: Case) -> bool:
        return _fails(trial, case, failed)

    smallest = search(cases(trial.capabilities, trial.conventions), budget.drawn, seed, fails)
    if smallest is not None:
        # Not tried once more: a kernel that remembers other calls may pass this time.
        return _faults(trial, [failed[smallest]], trace), ["relations: not tried, since drawn cases fail"]
    return _relate(trial, related[:: max(1, len(related) // budget.related)][: budget.related])


def _fails(trial: Trial, case: Case, failed: dict[Case, Outcome]) -> bool:
    """Try a drawn case, and note it if it passes; if it fails, its outcome is kept."""
    if trial.caller.hung is not None or not trial.affords(case):
        return False
    outcome = trial(case)
    if outcome.ok:
        trial.note(outcome)
    else:
        failed[case] = outcome
    return not outcome.ok


def _faults(trial: Trial, failing: Sequence[Outcome], trace: bool) -> list[Failure]:
    """Different faults of the cases that fail, each traced to a small case."""
    if not trace:
        return [_as_it_is(outcome) for outcome in failing]
    faults: dict[str, Failure] = {}
    for outcomes in alike(failing)[:MOST_DIAGNOSED]:
        if len(faults) < MOST_FAULTS and (trial.caller.hung is None or not faults):
            failure = _traced(trial, outcomes)
            faults.setdefault(failure.fault, failure)
    return list(faults.values())


def alike(failing: Sequence[Outcome]) -> list[list[Outcome]]:
    """Cases that fail in the same way with the same features, together: they are one fault as a rule."""
    kinds: dict[tuple[object, ...], list[Outcome]] = {}
    for outcome in failing:
        case = outcome.case
        features = (case.window is None, case.softcap is None, case.alibi, case.sinks, case.kv_scales is None)
        kind = (outcome.symptom, *features, case.strides, case.padding, case.repeat)
        kinds.setdefault(kind, []).append(outcome)
    return list(kinds.values())


def _as_it_is(outcome: Outcome) -> Failure:
    """A case that fails, and by which checks."""
    case = outcome.case
    if isinstance(outcome.result, Mishap):
        return mishap_failure(outcome.result, case)
    assert outcome.judgement is not None, "a result was judged"
    checks = ", ".join(finding.check for finding in outcome.judgement.findings)
    evidence = EVIDENCE[outcome.judgement.findings[0].check]
    return Failure(f"fails {checks}", "-", evidence, case.to_json(), case.describe())


def _traced(trial: Trial, outcomes: Sequence[Outcome]) -> Failure:
    """Make the first of some cases that fail alike smaller, then find out what is wrong with it."""
    outcome = outcomes[0]
    if trial.caller.hung is not None and isinstance(outcome.result, Mishap):
        return mishap_failure(outcome.result, outcome.case)

    def fails(case: Case) -> bool:
        return trial.affords(case) and trial(case).symptom == outcome.symptom

    small, steps = reduce(outcome.case, trial.capabilities, fails)
    original = "" if small == outcome.case else f"(made smaller in {steps} steps from {outcome.case.describe()})"
    again = trial(small)
    # A kernel that fails now and then may pass at last; then the first outcome is what there is.
    return diagnose(trial, outcome if again.ok else again, outcomes[:MOST_COMPARED], original)


def _relate(trial: Trial, cases: list[Case]) -> tuple[list[Failure], list[str]]:
    """Relations between calls; the first that does not hold, of each kind."""
    failures: dict[str, Failure] = {}
    tried: set[str] = set()
    for index, case in enumerate(cases):
        broken, names = relations(trial, case, cases[index - 1])
        tried |= names
        for one in broken:
            failure = Failure(
                fault=f"two calls that must agree do not: {one.relation}",
                letter="R" if one.relation == "again" else "-",
                evidence="exact, bit for bit",
                case=case.to_json(),
                description=case.describe(),
                details=(("what happened", one.words),),
            )
            failures.setdefault(one.relation, failure)
    if "nondeterministic" in tried:
        return list(failures.values()), ["relations: the same call gives other bits each time"]
    trial.exercised |= {"batch_invariant"} & {"batch_invariant" if "batch" in tried else ""}
    missing = {"again", "renamed blocks", "unused slots", "negated values", "moved powers"} - tried
    return list(failures.values()), [f"relation {name}: no case was fit for it" for name in sorted(missing)]


def _not_exercised(trial: Trial) -> list[str]:
    """What was declared, or is checked as a rule, and could not be exercised."""
    can, did = trial.capabilities, trial.exercised
    words = [f"{name}: declared, but no case could tell" for name in sorted(declared_names(can) - did)]
    if can.lse is None:
        words.append("log-sum-exp: not returned; it is the sharpest check of keys")
    if "offsets beyond 2^31 numbers" not in did:
        words.append("offsets beyond 2^31 numbers: needs strided_caches, and address space")
    if trial.max_shapes is not None:
        words.append(f"cases of other shapes than the first {trial.max_shapes}: max_shapes")
    if trial.undecided:
        words.append(f"{trial.undecided} rows: rounding may do anything there")
    return words


def settings_of(*declarations: Capabilities | Profile | Conventions) -> dict[str, str]:
    """What was declared and is not the default, as text.

    Example:
        >>> settings_of(Capabilities(window=True), Profile(), Conventions(empty_lse="any"))
        {'window': 'True', 'empty_lse': 'any'}
    """
    return {
        field.name: str(getattr(declared, field.name))
        for declared in declarations
        for field in fields(declared)
        if getattr(declared, field.name) != field.default
    }


def _arguments(capabilities: Capabilities, profile: Profile, conventions: Conventions, adapter: str | Adapter) -> str:
    """What `replay` has to be told for a case to be the same; an adapter of one's own by the name of its class."""
    given = as_arguments(capabilities=capabilities, profile=profile, conventions=conventions)
    own = repr(adapter) if isinstance(adapter, str) else f"{type(adapter).__name__}()"
    return ", ".join(filter(None, (given, "" if adapter == "contract" else f"adapter={own}")))


def _as_asked(case: Case) -> Capabilities:
    """Capabilities that allow what a case asks for."""
    return Capabilities(
        dtypes=(case.dtype,),
        kv_dtypes=(case.kv_dtype,),
        head_dims=(case.head_dim,),
        value_dims=(case.value_dim,),
        query_groups=(case.query_group,),
        block_sizes=(case.block_size,),
        table_dtypes=(case.table_dtype,),
        window=case.window is not None,
        softcap=case.softcap is not None,
        alibi=case.alibi,
        sinks=case.sinks,
        kv_scales=case.kv_scales,  # type: ignore[arg-type]
        negative_padding=case.padding == "negative",
        repeated_blocks=case.repeat is not None,
        strided_caches=case.strides != "dense",
        strided_tables=case.sliced_table,
    )


def _kernel_name(kernel: object) -> str:
    if isinstance(kernel, str):
        return kernel
    module, name = getattr(kernel, "__module__", None), getattr(kernel, "__qualname__", None)
    return f"{module}:{name}" if module and name else type(kernel).__name__
