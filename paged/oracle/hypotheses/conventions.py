"""Where right kernels differ: what is a mistake only as long as it is not declared."""

from collections.abc import Iterator

from paged.oracle.declarations import Conventions
from paged.oracle.exact import Problem
from paged.oracle.hypotheses.alternative import Alternative


def undeclared(problem: Problem, conventions: Conventions) -> Iterator[Alternative]:
    """Every convention that was not declared.

    Args:
        problem: as it is meant.
        conventions: as declared.
    """
    yield from _positions(problem, conventions)
    yield from _log_sum_exps(problem)
    for out in sorted({"zero", "nan"} - {problem.empty_out}):
        said = f"a row that sees no key gives {out}"
        yield Alternative(said, "K", f"Conventions(empty_out={out!r})", problem.replace(empty_out=out))


def _positions(problem: Problem, conventions: Conventions) -> Iterator[Alternative]:
    if problem.window is not None:
        counts = conventions.window_counts_self
        said = "w keys before the query and the query itself" if counts else "the query itself and w - 1 keys before it"
        changed = problem.replace(window=max(1, problem.window + (1 if counts else -1)))
        yield Alternative(f"the window is {said}", "G", f"Conventions(window_counts_self={not counts})", changed)
    if conventions.causal == "bottom_right":
        changed = problem.replace(first_positions=tuple(0 for _ in problem.first_positions))
        yield Alternative("the causal mask is aligned at the top left", "F", "Conventions(causal='top_left')", changed)
    else:
        lengths = zip(problem.keys, problem.queries, strict=True)
        changed = problem.replace(first_positions=tuple(len(key) - len(query) for key, query in lengths))
        declare = "Conventions(causal='bottom_right')"
        yield Alternative("the causal mask is aligned at the bottom right", "F", declare, changed)


def _log_sum_exps(problem: Problem) -> Iterator[Alternative]:
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
