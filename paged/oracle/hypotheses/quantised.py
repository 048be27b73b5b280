"""Scales of stored numbers: ignored, divided by, or those of another tensor, head or token."""

from collections.abc import Iterator

import torch
from torch import Tensor

from paged.oracle.exact import Problem
from paged.oracle.hypotheses.alternative import Alternative
from paged.oracle.inputs import Inputs

# A factor [n, Hkv, 1] for each sequence.
Factors = list[Tensor]


def quantised(inputs: Inputs) -> Iterator[Alternative]:
    """Every mistake with the scales, where a case has them; else only codes that are read as another format's."""
    problem, case = inputs.problem, inputs.case
    if case.kv_dtype == "float8_e4m3fn":
        halved = problem.replace(
            keys=tuple(key / 2 for key in problem.keys), values=tuple(value / 2 for value in problem.values)
        )
        yield Alternative("codes are read as half of what they mean (e4m3fnuz)", "O", None, halved)
    if inputs.k_scale is None or inputs.v_scale is None:
        return
    k, v = (_by_token(inputs, torch.as_tensor(scale).cpu().double()) for scale in (inputs.k_scale, inputs.v_scale))
    yield unscaled(problem, k, v)
    yield from _one_or_both(problem, k, v, "ignored", [1 + 0 * s for s in k], [1 + 0 * s for s in v])
    yield from _one_or_both(problem, k, v, "divided by, not multiplied with", [1 / s for s in k], [1 / s for s in v])
    yield _changed(problem, k, v, "values are scaled with k_scale", None, k)
    yield _changed(problem, k, v, "keys are scaled with v_scale", v, None)
    yield _changed(problem, k, v, "k_scale and v_scale are exchanged", v, k)
    larger = [s.clamp(min=1.0) for s in k], [s.clamp(min=1.0) for s in v]
    yield from _one_or_both(problem, k, v, "taken for 1 where they are smaller", *larger)
    for said, other in _elsewhere(inputs):
        yield from _one_or_both(problem, k, v, said, *other)


def without_scales(inputs: Inputs) -> Problem | None:
    """What would be right if all scales were 1; None where a case has none."""
    if inputs.k_scale is None or inputs.v_scale is None:
        return None
    k, v = (_by_token(inputs, torch.as_tensor(scale).cpu().double()) for scale in (inputs.k_scale, inputs.v_scale))
    return unscaled(inputs.problem, k, v).problem


def unscaled(problem: Problem, k: Factors, v: Factors) -> Alternative:
    """Both scales ignored."""
    ones = [1 + 0 * s for s in k]
    return _changed(problem, k, v, "k_scale and v_scale are ignored", ones, ones)


def _one_or_both(
    problem: Problem, k: Factors, v: Factors, said: str, keys: Factors, values: Factors
) -> Iterator[Alternative]:
    yield _changed(problem, k, v, f"k_scale and v_scale are {said}", keys, values)
    yield _changed(problem, k, v, f"v_scale is {said}", None, values)
    yield _changed(problem, k, v, f"k_scale is {said}", keys, None)


def _changed(
    problem: Problem, k: Factors, v: Factors, said: str, keys: Factors | None, values: Factors | None
) -> Alternative:
    """With other scales of keys, values, or both."""

    def scaled(tensors: tuple[Tensor, ...], old: Factors, new: Factors | None) -> tuple[Tensor, ...]:
        if new is None:
            return tensors
        return tuple(tensor / a * b for tensor, a, b in zip(tensors, old, new, strict=True))

    changed = problem.replace(keys=scaled(problem.keys, k, keys), values=scaled(problem.values, v, values))
    return Alternative(said, "O", None, changed)


def _elsewhere(inputs: Inputs) -> Iterator[tuple[str, tuple[Factors, Factors]]]:
    """Scales that are looked up in the wrong place: words, and those of keys and values."""
    scales = [torch.as_tensor(scale).cpu().double() for scale in (inputs.k_scale, inputs.v_scale) if scale is not None]
    if scales[0].dim() == 0:
        return
    if scales[0].dim() == 1:
        first = [_by_token(inputs, scale[:1].expand_as(scale)) for scale in scales]
        yield "one number for all heads, the first one's", (first[0], first[1])
        return
    turned = [_by_token(inputs, s.transpose(1, 2).reshape(s.shape)) for s in scales]
    yield "read as [Hkv, P] where they are [P, Hkv]", (turned[0], turned[1])
    lengths = [seq_len for _, seq_len in inputs.case.sequences]
    if max(lengths) <= scales[0].shape[0] * scales[0].shape[1]:
        in_order = [[s.flatten(0, 1)[:length, :, None] for length in lengths] for s in scales]
        yield "looked up by a token's position, not by its slot", (in_order[0], in_order[1])


def _by_token(inputs: Inputs, scale: Tensor) -> Factors:
    """A scale as [n, Hkv, 1] of each sequence."""
    case = inputs.case
    scales = []
    for sequence, (_, seq_len) in enumerate(case.sequences):
        if scale.dim() == 3:
            table = inputs.block_tables[sequence].cpu().long()[: case.blocks_of(sequence)]
            scales.append(scale[table].reshape(-1, case.num_kv_heads, 1)[:seq_len])
        else:
            scales.append(scale.expand(seq_len, case.num_kv_heads)[..., None])
    return scales
