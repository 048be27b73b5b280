"""Which KV head a query head reads, how many dims take part, and the scale of the scores."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from paged.oracle.case import Case
from paged.oracle.exact import Problem
from paged.oracle.hypotheses.alternative import Alternative


def scales_of_scores(problem: Problem, case: Case) -> Iterator[Alternative]:
    """Scores that are scaled otherwise, or not computed at all."""
    plain, scale = 1 / math.sqrt(case.head_dim), problem.scale
    for changed, said in (
        (plain, "the scale is taken to be 1 / sqrt(D)"),
        (1.0, "the scale is ignored"),
        (scale * plain, "the scale is multiplied by 1 / sqrt(D)"),
        (scale**2, "the scale is applied twice"),
        (scale * math.sqrt(case.head_dim / case.value_dim), "the scale is corrected for the width of a value"),
        (scale / math.log(2), "the scores are not brought to base 2 with the exponential"),
        (scale * math.log(2), "the exponential is to base 2, the scores are not"),
    ):
        if changed != scale:
            yield Alternative(said, "N", None, problem.replace(scale=changed))
    blind = tuple(torch.zeros_like(key) for key in problem.keys)
    yield Alternative("keys are ignored: all weights are equal", "L", None, problem.replace(keys=blind))


def widths(problem: Problem, case: Case) -> Iterator[Alternative]:
    """Dims that are left out, or meet others."""
    for key, width in _cuts(case.head_dim):
        cut = torch.arange(case.head_dim) < width
        said = f"only the first {width} of {case.head_dim} dims of queries and keys are multiplied"
        changed = problem.replace(keys=tuple(key * cut for key in problem.keys))
        yield Alternative(said, "N", None, changed, key=f"multiplied: {key}")
    for key, width in _cuts(case.value_dim):
        cut = torch.arange(case.value_dim) < width
        said = f"dims of the output from {width} on are 0"
        yield Alternative(
            said, "N", None, problem.replace(values=tuple(v * cut for v in problem.values)), key=f"summed: {key}"
        )
    if case.head_dim == case.value_dim and case.kv_scales is None:
        yield Alternative("values are read from the keys", "E", None, problem.replace(values=problem.keys))
        yield Alternative("keys are read from the values", "E", None, problem.replace(keys=problem.values))
        exchanged = problem.replace(keys=problem.values, values=problem.keys)
        yield Alternative("keys and values are exchanged", "E", None, exchanged)
    for name, words in (("keys", "keys"), ("values", "values")):
        width = case.head_dim if name == "keys" else case.value_dim
        for rows, columns in ((8, 2), (2, 8), (4, 2), (2, 4), (2, width // 2), (width // 2, 2)):
            if width % (rows * columns) == 0 and width > 2:
                turned = tuple(_regrouped(tensor, rows, columns) for tensor in getattr(problem, name))
                said = f"dims of {words} are in another order: {rows} groups of {columns} taken for {columns} of {rows}"
                yield Alternative(
                    said, "E", None, problem.replace(**{name: turned}), key=_pattern(words, rows, columns, width)
                )


def sharing(problem: Problem, case: Case) -> Iterator[Alternative]:
    """Query heads that read another KV head's keys, values, or both."""
    heads, kv_heads = torch.arange(case.num_heads), case.num_kv_heads
    if kv_heads == 1:
        return
    power = 1 << (case.query_group.bit_length() - 1)
    for words, other in (
        ("KV head h % Hkv instead of h // G", heads % kv_heads),
        ("KV head h", heads.clamp(max=kv_heads - 1)),
        ("KV head 0", torch.zeros_like(heads)),
        ("KV head h // G with G rounded down to a power of 2", (heads // power).clamp(max=kv_heads - 1)),
        ("KV heads in reverse order", kv_heads - 1 - problem.kv_heads),
    ):
        if torch.equal(other, problem.kv_heads):
            continue
        yield Alternative(f"query head h reads {words}", "M", None, problem.replace(kv_heads=other))
        for name in ("values", "keys"):
            apart = _by_query_head(problem, other if name == "keys" else None, other if name == "values" else None)
            yield Alternative(f"of {name}, query head h reads {words}", "M", None, apart)


def _by_query_head(problem: Problem, of_keys: Tensor | None, of_values: Tensor | None) -> Problem:
    """The same with a KV head of its own for each query head, of which keys or values may be another's."""
    own = problem.kv_heads
    return problem.replace(
        kv_heads=torch.arange(len(own)),
        keys=tuple(key[:, own if of_keys is None else of_keys] for key in problem.keys),
        values=tuple(value[:, own if of_values is None else of_values] for value in problem.values),
    )


def _cuts(width: int) -> Iterator[tuple[str, int]]:
    """Where dims may end, each with a name that does not depend on the width."""
    cuts = {f"multiple of {step}": width // step * step for step in (8, 16, 32)}
    cuts |= {"64": 64, "128": 128, "all but the last": width - 1, "half": width // 2}
    seen = set()
    for name, cut in cuts.items():
        if 0 < cut < width and cut not in seen:
            seen.add(cut)
            yield name, cut


def _regrouped(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """[n, H, D] with every rows x columns dims transposed."""
    parts = tensor.reshape(*tensor.shape[:2], tensor.shape[2] // (rows * columns), rows, columns)
    return parts.transpose(3, 4).flatten(2)


def _pattern(words: str, rows: int, columns: int, width: int) -> str:
    """A name for an order of dims that does not depend on the width."""
    return f"{words} in {'half' if rows == width // 2 else rows} x {'half' if columns == width // 2 else columns}"
