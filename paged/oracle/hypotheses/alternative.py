"""What all hypotheses have in common: an attention with one thing changed, a name, and a class of bugs."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from paged.oracle.exact import Problem, final_scores

# From a problem and the index of a sequence to what each query sees [Q, n].
Sight = Callable[[Problem, int], Tensor]


@dataclass(frozen=True)
class Alternative:
    """An attention with one thing changed.

    Attributes:
        fault: what it is called in a report.
        letter: its class in the catalogue of real bugs, A to R.
        declare: the declaration that would make it right, or None for a plain mistake.
        problem: what it computes.
        key: the same in every case, where `fault` names a number that depends on the case; "": `fault` itself.
    """

    fault: str
    letter: str
    declare: str | None
    problem: Problem
    key: str = ""

    @property
    def name(self) -> str:
        """By which it is known again in another case."""
        return self.key or self.fault


def seeing(problem: Problem, sight: Sight) -> Problem:
    """A problem in which each query sees other keys.

    Example: two equal scores, of which the second is not seen.
        >>> import torch
        >>> from paged.oracle.exact import answer
        >>> ones = torch.ones(2, 1, 1, dtype=torch.float64)
        >>> values = torch.tensor([[[1.0]], [[3.0]]], dtype=torch.float64)
        >>> problem = Problem((ones[:1],), (ones,), (values,), (1,), torch.tensor([0]), scale=1.0)
        >>> answer(seeing(problem, lambda problem, index: torch.tensor([[True, False]])))[0].item()
        1.0
    """
    return problem.replace(rule=lambda given, index: final_scores(given, index, sight(given, index)))
