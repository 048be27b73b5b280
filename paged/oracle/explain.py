"""Which mistake is it? Other attentions, each with one thing wrong, of which one may be what the kernel computes.

A kernel that fails is compared with all of these as it was with the right answer: by bounds. If one of them explains
every element of what the kernel returned, that is the diagnosis, and if it is no mistake but a convention that was not
declared, the report says which declaration would make it right.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paged.oracle.calls import Result
from paged.oracle.declarations import Conventions, Profile
from paged.oracle.expected import Problem, answer, solve
from paged.oracle.inputs import Inputs
from paged.oracle.judge import judge


@dataclass(frozen=True)
class Alternative:
    """An attention with one thing changed.

    Attributes:
        fault: what it is called in a report.
        letter: its class in the catalogue of real bugs, A to R.
        declare: the declaration that would make it right, or None for a plain mistake.
        problem: what it computes.
    """

    fault: str
    letter: str
    declare: str | None
    problem: Problem


Call = tuple[Inputs, Result]


def explain(calls: Sequence[Call], profile: Profile, conventions: Conventions) -> Alternative | None:
    """The first alternative that explains all of some wrong results, or None.

    One small case is explained by many mistakes, several by one: who counts a token too many in a decode may have
    another window, no window, or windows that begin at blocks. What a case cannot tell from what is right, or does not
    have, is no evidence either way.

    Args:
        calls: inputs and results of calls that failed, the most telling one first.
        profile, conventions: as declared.
    """
    for alternative in alternatives(calls[0][0], conventions):
        if _explains(alternative, calls[0], profile, conventions) and all(
            _explains(other, call, profile, conventions) is not False
            for call in calls[1:]
            for other in alternatives(call[0], conventions)
            if other.fault == alternative.fault
        ):
            return alternative
    return None


def _explains(alternative: Alternative, call: Call, profile: Profile, conventions: Conventions) -> bool | None:
    """Whether every element of a result is as an alternative has it; None where that is what is right, too."""
    inputs, result = call
    case = inputs.case
    right_out, right_lse = answer(inputs.problem)
    out, lse = answer(alternative.problem)
    if _same(out, right_out) and (result.lse is None or _same(lse, right_lse)):
        return None
    # The bound is dear, so first a look from afar: nothing is explained that is off by a tenth.
    far = (result.out.double() - out).abs().nan_to_num(posinf=0.0) > 0.1 * (1 + out.abs())
    if far.any():
        return False
    expected = solve(alternative.problem, profile.roundoffs(case.dtype), recipe=case.recipe)
    return judge(case, result, expected, conventions).ok


def alternatives(inputs: Inputs, conventions: Conventions) -> Iterator[Alternative]:
    """Everything that is tried, conventions first."""
    yield from _conventions(inputs, conventions)
    yield from _features_ignored(inputs.problem)
    yield from _masks(inputs)
    yield from _scores(inputs)
    yield from _widths(inputs)
    yield from _heads_and_scales(inputs)


def _conventions(inputs: Inputs, conventions: Conventions) -> Iterator[Alternative]:
    problem = inputs.problem
    if problem.window is not None:
        counts = conventions.window_counts_self
        said = "w keys before the query and the query itself" if counts else "the query itself and w - 1 keys before it"
        changed = problem.replace(window=max(1, problem.window + (1 if counts else -1)))
        yield Alternative(f"the window is {said}", "G", f"Conventions(window_counts_self={not counts})", changed)
    if conventions.causal == "bottom_right":
        firsts = tuple(0 for _ in problem.first_positions)
        changed = problem.replace(first_positions=firsts)
        yield Alternative("the causal mask is aligned at the top left", "F", "Conventions(causal='top_left')", changed)
    else:
        lengths = zip(problem.keys, problem.queries, strict=True)
        changed = problem.replace(first_positions=tuple(len(key) - len(query) for key, query in lengths))
        declare = "Conventions(causal='bottom_right')"
        yield Alternative("the causal mask is aligned at the bottom right", "F", declare, changed)
    base = "2" if problem.lse_base == "e" else "e"
    yield Alternative(
        f"the log-sum-exp is to base {base}", "K", f"Capabilities(lse={base!r})", problem.replace(lse_base=base)
    )
    if problem.sinks is not None:
        included = not problem.lse_includes_sink
        said = "includes the sink" if included else "leaves the sink out"
        changed = problem.replace(lse_includes_sink=included)
        yield Alternative(f"the log-sum-exp {said}", "I", f"Conventions(lse_includes_sink={included})", changed)
    if problem.slopes is not None:
        for origin in sorted({"query", "last_key", "first_key"} - {problem.alibi_origin}):
            changed = problem.replace(alibi_origin=origin)
            said = f"ALiBi counts from the {origin.replace('_', ' ')}, which shifts the log-sum-exp"
            yield Alternative(said, "J", f"Conventions(alibi_origin={origin!r})", changed)
    for lse in sorted({"-inf", "+inf", "zero"} - {problem.empty_lse}):
        said = f"a row that sees no key has log-sum-exp {lse}"
        yield Alternative(said, "K", f"Conventions(empty_lse={lse!r})", problem.replace(empty_lse=lse))
    for out in sorted({"zero", "nan"} - {problem.empty_out}):
        said = f"a row that sees no key gives {out}"
        yield Alternative(said, "C", f"Conventions(empty_out={out!r})", problem.replace(empty_out=out))


def _features_ignored(problem: Problem) -> Iterator[Alternative]:
    for name, letter in (("window", "G"), ("softcap", "H"), ("slopes", "J"), ("sinks", "I")):
        if getattr(problem, name) is not None:
            word = {"slopes": "ALiBi is", "sinks": "sinks are"}.get(name, f"{name} is")
            yield Alternative(f"{word} ignored", letter, None, problem.replace(**{name: None}))


def _masks(inputs: Inputs) -> Iterator[Alternative]:
    problem = inputs.problem
    if problem.window is not None:
        for step, said in ((1, "one token too wide"), (-1, "one token too narrow")):
            if problem.window + step >= 1:
                changed = problem.replace(window=problem.window + step)
                yield Alternative(f"window edge off by one: {said}", "G", None, changed)
    for step, said in ((1, "one key too many"), (-1, "one key too few")):
        changed = problem.replace(first_positions=tuple(first + step for first in problem.first_positions))
        if problem.window is not None:
            changed = changed.replace(window=problem.window + step) if problem.window + step >= 1 else changed
        yield Alternative(f"causal edge off by one: {said}", "F", None, changed)
    lasts = tuple(len(key) for key in problem.keys)
    yield Alternative("there is no causal mask", "F", None, problem.replace(first_positions=lasts, window=None))


def _scores(inputs: Inputs) -> Iterator[Alternative]:
    problem, case = inputs.problem, inputs.case
    plain = 1 / math.sqrt(case.head_dim)
    for scale, said in (
        (plain, "the scale is taken to be 1 / sqrt(D)"),
        (1.0, "the scale is ignored"),
        (problem.scale * plain, "the scale is multiplied by 1 / sqrt(D)"),
        (problem.scale**2, "the scale is applied twice"),
        (problem.scale / math.log(2), "the scores are not brought to base 2 with the exponential"),
        (problem.scale * math.log(2), "the exponential is to base 2, the scores are not"),
    ):
        yield Alternative(said, "N", None, problem.replace(scale=scale))
    if problem.softcap is not None:
        changed = problem.replace(softcap=problem.softcap / problem.scale)
        yield Alternative("softcap comes before the scale", "H", None, changed)
    blind = tuple(torch.zeros_like(key) for key in problem.keys)
    yield Alternative("keys are ignored: all weights are equal", "L", None, problem.replace(keys=blind))
    if problem.slopes is not None:
        yield Alternative("ALiBi has the wrong sign", "J", None, problem.replace(slopes=-problem.slopes))
        by_kv_head = problem.slopes[: case.num_kv_heads][problem.kv_heads]
        yield Alternative("ALiBi's slopes are taken by KV head", "J", None, problem.replace(slopes=by_kv_head))
    if problem.sinks is not None:
        for sinks, said in (
            (problem.sinks * problem.scale, "sinks are scaled"),
            (problem.sinks[:1].expand_as(problem.sinks), "all heads have the first head's sink"),
            (problem.sinks + math.log(2), "the sink is counted twice"),
            (problem.sinks * math.log(2), "sinks are taken to base 2"),
        ):
            yield Alternative(said, "I", None, problem.replace(sinks=sinks))


def _widths(inputs: Inputs) -> Iterator[Alternative]:
    problem, case = inputs.problem, inputs.case
    for width in dict.fromkeys((case.head_dim // 16 * 16, 64)):
        if 0 < width < case.head_dim:
            cut = torch.arange(case.head_dim) < width
            changed = problem.replace(keys=tuple(key * cut for key in problem.keys))
            yield Alternative(f"only the first {width} dims of queries and keys are multiplied", "N", None, changed)
    for width in dict.fromkeys((case.value_dim // 16 * 16, 64)):
        if 0 < width < case.value_dim:
            cut = torch.arange(case.value_dim) < width
            changed = problem.replace(values=tuple(value * cut for value in problem.values))
            yield Alternative(f"dims of the output from {width} on are 0", "N", None, changed)
    if case.head_dim == case.value_dim and case.kv_scales is None:
        yield Alternative("values are read from the keys", "E", None, problem.replace(values=problem.keys))
        exchanged = problem.replace(keys=problem.values, values=problem.keys)
        yield Alternative("keys and values are exchanged", "E", None, exchanged)


def _heads_and_scales(inputs: Inputs) -> Iterator[Alternative]:
    problem, case = inputs.problem, inputs.case
    heads = torch.arange(case.num_heads)
    if case.num_kv_heads > 1:
        tiled = problem.replace(kv_heads=heads % case.num_kv_heads)
        yield Alternative("query head h reads KV head h % Hkv instead of h // G", "M", None, tiled)
        clamped = problem.replace(kv_heads=heads.clamp(max=case.num_kv_heads - 1))
        yield Alternative("query head h reads KV head h", "M", None, clamped)
        first = problem.replace(kv_heads=torch.zeros_like(heads))
        yield Alternative("all query heads read KV head 0", "M", None, first)
    if inputs.k_scale is None or inputs.v_scale is None:
        return
    k_scale, v_scale = (_by_token(inputs, scale) for scale in (inputs.k_scale, inputs.v_scale))
    keys, values = problem.keys, problem.values

    def scaled(tensors: tuple[Tensor, ...], factors: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor * factor for tensor, factor in zip(tensors, factors, strict=True))

    for said, k_factor, v_factor in (
        ("k_scale is ignored", [1 / s for s in k_scale], None),
        ("v_scale is ignored", None, [1 / s for s in v_scale]),
        ("k_scale and v_scale are ignored", [1 / s for s in k_scale], [1 / s for s in v_scale]),
        ("keys are divided by k_scale", [s**-2 for s in k_scale], None),
        ("values are divided by v_scale", None, [s**-2 for s in v_scale]),
        ("keys and values are divided by their scales", [s**-2 for s in k_scale], [s**-2 for s in v_scale]),
        ("values are multiplied with k_scale", None, [k / v for k, v in zip(k_scale, v_scale, strict=True)]),
        ("keys are multiplied with v_scale", [v / k for k, v in zip(k_scale, v_scale, strict=True)], None),
    ):
        changed = problem.replace(
            keys=keys if k_factor is None else scaled(keys, k_factor),
            values=values if v_factor is None else scaled(values, v_factor),
        )
        yield Alternative(said, "O", None, changed)


def _by_token(inputs: Inputs, scale: Tensor | float) -> list[Tensor]:
    """A scale as [n, Hkv, 1] of each sequence."""
    case, scale = inputs.case, torch.as_tensor(scale).cpu().double()
    scales = []
    for sequence, (_, seq_len) in enumerate(case.sequences):
        if scale.dim() == 3:
            table = inputs.block_tables[sequence].cpu().numpy()[: case.blocks_of(sequence)].astype(np.int64)
            scales.append(scale[torch.from_numpy(table)].reshape(-1, case.num_kv_heads, 1)[:seq_len])
        else:
            scales.append(scale.expand(seq_len, case.num_kv_heads)[..., None])
    return scales


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(torch.isclose(one, other, rtol=1e-9, atol=0.0, equal_nan=True).all())


def without(inputs: Inputs, feature: str) -> Problem | None:
    """What would be right if a feature were switched off: window, softcap, alibi, sinks or kv_scales.

    Returns:
        The problem without it, or None where the case does not have it.
    """
    problem = inputs.problem
    name = {"alibi": "slopes"}.get(feature, feature)
    if name == "kv_scales":
        ignored = (other for other in _heads_and_scales(inputs) if other.fault == "k_scale and v_scale are ignored")
        return next((other.problem for other in ignored), None)
    return None if getattr(problem, name) is None else problem.replace(**{name: None})
