"""A kernel on trial: one case in, one outcome out, and a note of what has been exercised.

Passing a case with a window proves nothing about the window if it was so wide that nobody could tell. So a feature is
noted as exercised only where what is right without it is far outside what is allowed with it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from paged.oracle.calls import Result
from paged.oracle.case import Case
from paged.oracle.declarations import Capabilities, Conventions, Profile
from paged.oracle.exact import answer
from paged.oracle.expected import Expected, solve
from paged.oracle.explain import without
from paged.oracle.guard import Mishap
from paged.oracle.inputs import Inputs, materialise
from paged.oracle.judge import NAN, Judgement, judge

# How many times what is allowed the answer must move for a feature to count as exercised.
FAR = 8.0
FEATURES = ("window", "softcap", "alibi", "sinks", "kv_scales")


@dataclass(frozen=True)
class Outcome:
    """What came of one case.

    Attributes:
        inputs: of the call.
        result: what the kernel returned, or why it returned nothing that could be judged.
        judgement: None where there was nothing to judge.
        expected: what is right, or None likewise.
    """

    inputs: Inputs
    result: Result | Mishap
    judgement: Judgement | None = None
    expected: Expected | None = None

    @property
    def case(self) -> Case:
        """That was tried."""
        return self.inputs.case

    @property
    def ok(self) -> bool:
        """Whether the kernel was right."""
        return self.judgement is not None and self.judgement.ok

    @property
    def symptom(self) -> str:
        """What kind of failure it is, so that making a case smaller does not change the subject."""
        if isinstance(self.result, Mishap):
            return self.result.kind
        assert self.judgement is not None, "a result was judged"
        if self.judgement.ok:
            return "right"
        return NAN if self.judgement.findings[0].check == NAN else "wrong numbers"


class Asked(Protocol):
    """Who gives results: a kernel behind a `paged.oracle.calls.Caller`, or a record of what one has returned."""

    capabilities: Capabilities

    @property
    def hung(self) -> Mishap | None:
        """The verdict on the call that did not return, if one did not."""
        ...

    def __call__(self, inputs: Inputs) -> Result | Mishap:
        """The result of one call, or why there is none."""
        ...


@dataclass
class Trial:
    """A kernel, how it is called and by what it is judged.

    Attributes:
        caller: calls it.
        profile, conventions: as declared.
        device: torch's name of it.
        max_shapes: how many different shapes it may be asked for, or None; a compiled kernel is compiled for each.
        num_cases: cases tried so far.
        slack: for each check, the largest error so far as a share of what is allowed.
        exercised: names of what has been exercised so far.
        undecided: rows so far that could not be judged.
    """

    caller: Asked
    profile: Profile
    conventions: Conventions
    device: str = "cpu"
    max_shapes: int | None = None
    num_cases: int = 0
    slack: dict[str, float] = field(default_factory=dict)
    exercised: set[str] = field(default_factory=set)
    undecided: int = 0
    _shapes: set[tuple[object, ...]] = field(default_factory=set)

    @property
    def capabilities(self) -> Capabilities:
        """As declared."""
        return self.caller.capabilities

    def __call__(self, case: Case, poisoned: tuple[str, ...] | None = None) -> Outcome:
        """Try one case; `poisoned` as for `materialise`."""
        return self.judged(materialise(case, self.conventions, self.device, poisoned))

    def judged(self, inputs: Inputs) -> Outcome:
        """Call the kernel and judge what it returns."""
        self.num_cases += 1
        result = self.caller(inputs)
        if isinstance(result, Mishap):
            return Outcome(inputs, result)
        case = inputs.case
        roundoffs = self.profile.roundoffs(case.dtype)
        expected = solve(inputs.problem, roundoffs, recipe=case.recipe)
        return Outcome(inputs, result, judge(case, result, expected, self.conventions), expected)

    def affords(self, case: Case) -> bool:
        """Whether a case may be asked for without one shape too many; if so its shape is noted."""
        if self.max_shapes is None:
            return True
        inputs = materialise(case, self.conventions)
        tensors = inputs.tensors() | {"key_cache": inputs.key_cache, "value_cache": inputs.value_cache}
        shapes = tuple((name, tensor.shape, tensor.dtype, tensor.stride()) for name, tensor in sorted(tensors.items()))
        shape = (*shapes, case.window, case.softcap, inputs.scale)
        if shape not in self._shapes and len(self._shapes) >= self.max_shapes:
            return False
        self._shapes.add(shape)
        return True

    def note(self, outcome: Outcome) -> None:
        """Remember what a case that passed has exercised, and how close it came."""
        if outcome.judgement is None or outcome.expected is None:
            return
        for check, share in outcome.judgement.slack.items():
            self.slack[check] = max(share, self.slack.get(check, 0.0))
        self.undecided += outcome.judgement.undecided
        self.exercised |= exercises(outcome.inputs, outcome.expected, self.exercised)


def exercises(inputs: Inputs, expected: Expected, known: Collection[str] = ()) -> set[str]:
    """What a case exercises, by name: a feature only if the answer would be far outside of its bound without it.

    Args:
        inputs, expected: of the case.
        known: features that need not be tried any more.

    Example: among seven tokens a window of eight leaves nothing out.
        >>> def features(case):
        ...     inputs = materialise(case)
        ...     found = exercises(inputs, solve(inputs.problem, Profile().roundoffs("float32")))
        ...     return found & set(FEATURES)
        >>> features(Case(sequences=((1, 7),), window=8)), features(Case(sequences=((1, 7),), window=4))
        (set(), {'window'})
    """
    case = inputs.case
    found = {
        f"dtype {case.dtype}",
        f"kv_dtype {case.kv_dtype}",
        f"head_dim {case.head_dim}",
        f"value_dim {case.value_dim}",
        f"query_group {case.query_group}",
        f"block_size {case.block_size}",
        f"table_dtype {case.table_dtype}",
        *_traits(case, expected),
    }
    for feature in FEATURES:
        if feature not in known:
            problem = without(inputs, feature)
            if problem is not None and _moves(answer(problem)[0], expected):
                found.add(feature)
    return found


def declared_names(can: Capabilities) -> set[str]:
    """What should be exercised, by the names that `exercises` gives.

    Example:
        >>> sorted(declared_names(Capabilities(head_dims=(64,), query_groups=(1,), block_sizes=(16,), window=True)))
        ['block_size 16', 'dtype bfloat16', 'head_dim 64', 'query_group 1', 'table_dtype int32', 'window']
    """
    names = {f"dtype {dtype}" for dtype in can.dtypes}
    names |= {f"kv_dtype {dtype}" for dtype in can.kv_dtypes if dtype != "auto"}
    names |= {f"head_dim {width}" for width in can.head_dims}
    names |= {f"value_dim {width}" for width in can.value_dims or ()}
    names |= {f"query_group {group}" for group in can.query_groups}
    names |= {f"block_size {size}" for size in can.block_sizes}
    names |= {f"table_dtype {dtype}" for dtype in can.table_dtypes}
    flags = ("window", "softcap", "alibi", "sinks", "empty_rows", "negative_padding", "repeated_blocks")
    names |= {flag for flag in (*flags, "strided_caches", "strided_tables", "batch_invariant") if getattr(can, flag)}
    return names | {name for name in ("kv_scales", "lse") if getattr(can, name) is not None}


def _traits(case: Case, expected: Expected) -> Iterable[str]:
    """What a case exercises merely by being what it is."""
    if expected.empty.any() or any(0 in lengths for lengths in case.sequences):
        yield "empty_rows"
    if case.padding == "negative" and len({case.blocks_of(i) for i in range(len(case.sequences))}) > 1:
        yield "negative_padding"
    if case.repeat is not None and max(case.blocks_of(i) for i in range(len(case.sequences))) > case.repeat:
        yield "repeated_blocks"
    if case.strides != "dense":
        yield "strided_caches"
    if case.sliced_table and len(case.sequences) > 1:
        yield "strided_tables"
    if case.strides == "far":
        yield "offsets beyond 2^31 numbers"
    if expected.lse.isfinite().any():
        yield "lse"


def _moves(out: torch.Tensor, expected: Expected) -> bool:
    """Whether an answer is far outside what is allowed."""
    away = (out - expected.out).abs() / expected.bound
    return bool((away.nan_to_num(nan=0.0) > FAR).any())
