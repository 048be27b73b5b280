"""How long a step takes, as a straight line in what it does; coefficients are fitted to steps that were measured.

    seconds  =  per_step  +  per_token * tokens computed  +  per_context_token * tokens of K and V read
                          +  per_sequence * sequences

The first is reading the weights and launching kernels, the second matrix products, the third reading the cache, the
last what the host and the sampler do for each. What a line leaves out: a small step is bound by the weights and a large
one by arithmetic, with a corner between them, so that a coefficient alone is no speed of the hardware; and attention
within a long prompt is quadratic. The files in `costs/` name the steps they were fitted to, and how far they are off on
these. `benchmarks/step_cost.py` makes them.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paged.traces.trace import TraceError

COSTS = Path(__file__).parent / "costs"
COEFFICIENTS = ("per_step", "per_token", "per_context_token", "per_sequence")


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds for each thing that a step does.

    Attributes:
        name: of the GPU and the model.
        per_step, per_token, per_context_token, per_sequence: seconds.
        kv_bytes_per_token: of the model, K and V in all layers; turns bytes of memory into tokens.

    Example: 4 ms, and 30 ns for each token of context.
        >>> cost = StepCost(name="some", per_step=4e-3, per_token=0, per_context_token=30e-9, per_sequence=0)
        >>> round(cost.seconds(num_tokens=8, num_context_tokens=100_000, num_sequences=8) * 1e3, 3)
        7.0
    """

    name: str
    per_step: float
    per_token: float
    per_context_token: float
    per_sequence: float
    kv_bytes_per_token: int | None = None

    def seconds(
        self, *, num_tokens: float, num_context_tokens: float, num_sequences: float, num_copied_tokens: float = 0
    ) -> float:
        """Of one step.

        Args:
            num_tokens: computed.
            num_context_tokens: tokens whose K and V its attention reads, the computed ones included.
            num_sequences: rows.
            num_copied_tokens: tokens whose K and V are read once more and written somewhere else.
        """
        return (
            self.per_step
            + self.per_token * num_tokens
            + self.per_context_token * (num_context_tokens + 2 * num_copied_tokens)
            + self.per_sequence * num_sequences
        )


@dataclass(frozen=True)
class MeasuredStep:
    """A step, or the mean of several: a straight line is as right for a mean as for each.

    Attributes:
        what: for people.
        num_tokens, num_context_tokens, num_sequences: as in `StepCost.seconds`.
        seconds: measured.
    """

    what: str
    num_tokens: float
    num_context_tokens: float
    num_sequences: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """What was fitted, and how far it is off.

    Attributes:
        cost: the coefficients.
        errors: for each measured step, fitted over measured seconds, less one.
    """

    cost: StepCost
    errors: tuple[float, ...]

    @property
    def mean_error(self) -> float:
        """Mean of the absolute relative errors."""
        return sum(map(abs, self.errors)) / len(self.errors)


def fit(name: str, steps: Sequence[MeasuredStep], kv_bytes_per_token: int | None = None) -> Fit:
    """The coefficients, none of them negative, with the least sum of squared relative errors.

    Of four coefficients any may be zero: each of these choices is solved, and the best one without a negative
    coefficient is kept, so the answer is exact. Of two that the steps cannot tell apart, because one number is always a
    multiple of the other in them, one is zero.

    Raises:
        TraceError: no steps.

    Example:
        >>> steps = [MeasuredStep("", n, 10 * n * n, n, 1e-3 + 2e-6 * n + 5e-7 * n * n) for n in (1, 8, 64, 256)]
        >>> found = fit("example", steps).cost
        >>> round(found.per_step, 9), round(found.per_token + found.per_sequence, 9), round(found.per_context_token, 12)
        (0.001, 2e-06, 5e-08)
    """
    if not steps:
        raise TraceError("a cost cannot be fitted to no steps")
    rows = np.array([[1.0, s.num_tokens, s.num_context_tokens, s.num_sequences] for s in steps])
    rows /= np.array([[s.seconds] for s in steps])  # so that residuals are relative errors
    scale = np.abs(rows).max(axis=0) + 1e-300
    best, least = np.zeros(4), float("inf")
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(4), size) for size in range(1, 5)):
        columns = list(chosen)
        found, *_ = np.linalg.lstsq(rows[:, columns] / scale[columns], np.ones(len(steps)), rcond=None)
        found /= scale[columns]
        misfit = float(((rows[:, columns] @ found - 1) ** 2).sum())
        # Fewer coefficients come first, and more have to be better by more than rounding.
        if (found >= 0).all() and misfit < least - 1e-12:
            best, least = np.zeros(4), misfit
            best[columns] = found
    cost = StepCost(
        name=name,
        kv_bytes_per_token=kv_bytes_per_token,
        **dict(zip(COEFFICIENTS, best.tolist(), strict=True)),
    )
    return Fit(cost, tuple((rows @ best - 1).tolist()))


def save(path: Path, found: Fit, steps: Sequence[MeasuredStep], source: dict[str, Any]) -> None:
    """Write a cost file: the coefficients, the steps they were fitted to, and where these are from."""
    content = {
        **asdict(found.cost),
        "mean_error": round(found.mean_error, 4),
        "largest_error": round(max(map(abs, found.errors)), 4),
        "source": source,
        "steps": [asdict(step) for step in steps],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def load_cost(name: str | Path) -> StepCost:
    """A cost that ships with the package, by name, or one of a file.

    Raises:
        TraceError: there is none, or the file is no cost; the message lists the names there are.

    Example:
        >>> load_cost("h200-llama-3-8b").kv_bytes_per_token
        131072
    """
    known = sorted(path.stem for path in COSTS.glob("*.json"))
    path = COSTS / f"{name}.json" if str(name) in known else Path(name)
    try:
        content = json.loads(path.read_text())
        return StepCost(
            name=content["name"],
            kv_bytes_per_token=content["kv_bytes_per_token"],
            **{key: float(content[key]) for key in COEFFICIENTS},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{name} is no cost file ({error}); there are: {', '.join(known)}") from error
