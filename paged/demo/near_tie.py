"""Two engines gave different tokens: is one of them wrong, or were two tokens equally good?

In float32, two right engines that add in different orders have logits that differ in the last digits. Where the two
best logits lie closer than those digits, either token is right, and everything after it differs. So the first
difference of a request is judged, by a third computation: transformers' own forward pass over the same tokens in
float64. It gives the true gap between the two tokens, and, beside the same pass in float32, the rounding error `e` of
a logit at this place. Each engine may be off by about `e` at each of the two logits, so a gap of at most `4 e` is a
near tie, and a larger one is a fault.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reference.engine import Answer


@dataclass(frozen=True)
class Difference:
    """The first token that differs between two answers to one request.

    Attributes:
        request_id: whose.
        position: which of the output's tokens.
        contiguous, paged: the token each engine gave; None if its answer had ended.
        gap: between their logits in float64; None if one answer had ended.
        bound: up to which a gap is a near tie; None likewise.
        near_tie: whether it is one.
    """

    request_id: str
    position: int
    contiguous: int | None
    paged: int | None
    gap: float | None
    bound: float | None
    near_tie: bool

    def __str__(self) -> str:
        where = f"request {self.request_id} differs first at output token {self.position}"
        tokens = f"contiguous {self.contiguous}, paged {self.paged}"
        if self.gap is None:
            return f"{where}: {tokens}; one answer ended where the other went on: WRONG"
        verdict = "a near tie" if self.near_tie else "WRONG: no near tie"
        return (
            f"{where}: {tokens}; their logits are {self.gap:.2e} apart, rounding explains {self.bound:.2e}: {verdict}"
        )


def compare(model: PreTrainedModel, answers: Sequence[Answer], paged: Mapping[str, Sequence[int]]) -> list[Difference]:
    """Compare answers token by token.

    Args:
        model: of both engines, in float32.
        answers: of the reference.
        paged: request -> tokens of the paged engine.

    Returns:
        The first difference of every request that has one.
    """
    differences = []
    for answer in answers:
        ours, theirs = tuple(paged[answer.request_id]), answer.token_ids
        if ours == theirs:
            continue
        position = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if position is None:  # one ended where the other went on: not a matter of rounding
            end = min(len(ours), len(theirs))
            contiguous = theirs[end] if len(theirs) > end else None
            more = ours[end] if len(ours) > end else None
            differences.append(Difference(answer.request_id, end, contiguous, more, None, None, near_tie=False))
            continue
        prefix = answer.prompt_token_ids + theirs[:position]
        gap, bound = judge(model, prefix, theirs[position], ours[position])
        differences.append(
            Difference(answer.request_id, position, theirs[position], ours[position], gap, bound, near_tie=gap <= bound)
        )
    return differences


def judge(model: PreTrainedModel, prefix: Sequence[int], first: int, second: int) -> tuple[float, float]:
    """The gap between two tokens' logits after `prefix`, in float64, and the largest gap that rounding explains."""
    rounded = _logits(model, prefix)
    exact = _logits(copy.deepcopy(model).double(), prefix)
    error = float((rounded - exact).abs().max())
    return float((exact[first] - exact[second]).abs()), 4 * error


@torch.inference_mode()
def _logits(model: PreTrainedModel, prefix: Sequence[int]) -> Tensor:
    model.set_attn_implementation("eager")
    output = model(input_ids=torch.tensor([prefix], device=model.device), use_cache=False)
    logits: Tensor = output.logits[0, -1].double()
    return logits
