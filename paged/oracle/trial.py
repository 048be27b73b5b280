"""A kernel on trial: one case in, one outcome out, and a note of what has been exercised.

Passing a case with a window proves nothing about the window if it was so wide that nobody could tell. So a feature is
noted as exercised only where what is right without it is far outside what is allowed with it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from paged.oracle.calls import Caller, Result
from paged.oracle.case import Case
from paged.oracle.declarations import Capabilities, Conventions, Profile
from paged.oracle.expected import Expected, answer, solve
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

    caller: Caller
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
        case, expected = outcome.case, outcome.expected
        self.exercised |= {
            f"dtype {case.dtype}",
            f"kv_dtype {case.kv_dtype}",
            f"head_dim {case.head_dim}",
            f"value_dim {case.value_dim}",
            f"query_group {case.query_group}",
            f"block_size {case.block_size}",
            f"table_dtype {case.table_dtype}",
        }
        self.exercised |= set(_traits(case, expected))
        for feature in FEATURES:
            if feature not in self.exercised:
                problem = without(outcome.inputs, feature)
                if problem is not None and _moves(answer(problem)[0], expected):
                    self.exercised.add(feature)


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
    if case.strides == "far":
        yield "offsets beyond 2^31 numbers"
    if expected.lse.isfinite().any():
        yield "lse"


def _moves(out: torch.Tensor, expected: Expected) -> bool:
    """Whether an answer is far outside what is allowed."""
    away = (out - expected.out).abs() / expected.bound
    return bool((away.nan_to_num(nan=0.0) > FAR).any())
