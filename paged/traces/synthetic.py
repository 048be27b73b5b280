"""Workloads that are drawn: lengths, arrivals, and prompts that begin alike. Everything from a seed.

The means of ShareGPT and Alpaca are the published ones (Kwon et al., SOSP 2023, figure 11). A mean does not say how
far lengths spread, and the spread decides how much a reservation wastes, so it is taken from elsewhere and said here:

    ShareGPT   the standard deviation of the logarithm, over the first turns of etalon's ShareGPT lengths (Llama-2
               tokens) with 4 to 1024 tokens, as vLLM's benchmark keeps them: 1.20 of 5,351 prompts, 1.01 of 5,641
               outputs (`benchmarks/kv_shares.py --spread FILE` prints both)
    Alpaca     nothing is known, so this is an assumption: as for ShareGPT, but 0.50 for prompts, which are a sentence

Lengths are clipped to what the model takes, and the median is chosen such that the mean after clipping is the published
one. Prompts and outputs are drawn independently.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paged.traces.trace import Piece, Trace, TraceError, TraceRequest, request_of

Lengths = Callable[[np.random.Generator, int], npt.NDArray[np.int64]]


def generator(seed: int) -> np.random.Generator:
    """The one kind of generator that is used here."""
    return np.random.Generator(np.random.PCG64(seed))


def fixed(num_tokens: int) -> Lengths:
    """All of one length."""
    _check(num_tokens >= 1, f"{num_tokens} tokens; at least 1 is needed")
    return lambda rng, count: np.full(count, num_tokens, np.int64)


def uniform(low: int, high: int) -> Lengths:
    """Every length from `low` to `high` equally often."""
    _check(1 <= low <= high, f"lengths from {low} to {high}; wanted is 1 <= low <= high")
    return lambda rng, count: rng.integers(low, high, count, endpoint=True)


def lognormal(*, mean: float, sigma: float, most: int) -> Lengths:
    """Most short and a few long, as in real traffic.

    Args:
        mean: of the tokens after clipping to 1 ... `most`.
        sigma: standard deviation of the logarithm before clipping.
        most: where longer ones are cut.

    Raises:
        TraceError: the mean is not between 1 and `most`, or sigma is negative.

    Example:
        >>> lengths = lognormal(mean=161.31, sigma=1.2, most=1024)(generator(0), 100_000)
        >>> round(float(lengths.mean())), int(lengths.max())
        (161, 1024)
    """
    _check(1 < mean < most and sigma >= 0, f"lognormal of mean {mean}, sigma {sigma}, cut at {most}: not possible")
    mu = _location(mean, sigma, most)
    return lambda rng, count: np.clip(np.rint(rng.lognormal(mu, sigma, count)), 1, most).astype(np.int64)


def clipped_mean(mu: float, sigma: float, most: int) -> float:
    """The mean of a lognormal variable, rounded and clipped to 1 ... `most`, from its distribution function.

    A whole number of tokens n is at least k with the probability that the variable is above k - 1/2; the mean is the
    sum of these probabilities.

    Example: without a spread it is the median.
        >>> round(clipped_mean(math.log(50), 1e-9, 1024), 6)
        50.0
    """
    scaled = (np.log(np.arange(1.5, most)) - mu) / (sigma * math.sqrt(2))
    return most - math.fsum(0.5 * (1 + math.erf(value)) for value in scaled.tolist())


def _location(mean: float, sigma: float, most: int) -> float:
    """The mu for which `clipped_mean` is `mean`, by bisection."""
    if sigma == 0:
        return math.log(mean)
    low, high = -5 * sigma, math.log(most) + 5 * sigma + 1
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if clipped_mean(middle, sigma, most) < mean else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Published:
    """Lengths of a data set whose means are published; the head of this file says where the spreads are from."""

    name: str
    mean_prompt: float
    sigma_prompt: float
    mean_output: float
    sigma_output: float


SHAREGPT = Published("ShareGPT-like", 161.31, 1.20, 337.99, 1.01)
ALPACA = Published("Alpaca-like", 19.31, 0.50, 58.45, 1.01)
# vLLM's benchmark keeps prompts of up to 1024 tokens; the models of the paper take 2048 in all.
MAX_PROMPT = 1024
MAX_MODEL_LEN = 2048


def like(data: Published, count: int, *, seed: int) -> Trace:
    """Requests with the published means, all at once: prompts up to 1024 tokens, and 2048 together.

    Example:
        >>> like(SHAREGPT, 1000, seed=0).describe()
        'ShareGPT-like: 1,000 requests, 149.8 prompt and 341.3 output tokens on average, all at once'
    """
    return workload(
        data.name,
        count,
        prompt=lognormal(mean=data.mean_prompt, sigma=data.sigma_prompt, most=MAX_PROMPT),
        # Beside the longest prompt there is room for so many, so that no answer is cut because of its prompt.
        output=lognormal(mean=data.mean_output, sigma=data.sigma_output, most=MAX_MODEL_LEN - MAX_PROMPT),
        seed=seed,
    )


def workload(name: str, count: int, *, prompt: Lengths, output: Lengths, seed: int) -> Trace:
    """`count` requests of drawn lengths, all at 0 s, that share nothing.

    Example:
        >>> trace = workload("small", 2, prompt=fixed(8), output=uniform(1, 3), seed=0)
        >>> [(request.num_prompt_tokens, request.num_output_tokens) for request in trace]
        [(8, 3), (8, 2)]
    """
    _check(count >= 1, f"{count} requests; at least 1 is needed")
    rng = generator(seed)
    prompts, outputs = prompt(rng, count).tolist(), output(rng, count).tolist()
    requests = [request_of(0.0, p, o, number=i) for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))]
    return Trace(name, tuple(requests), (f"lengths drawn with seed {seed}",))


def with_rate(trace: Trace, rate: float, *, seed: int, burstiness: float = 1.0) -> Trace:
    """The same requests, arriving at random.

    Args:
        trace: its own times are forgotten.
        rate: requests a second, on average; infinity for all at once.
        seed: of the times.
        burstiness: coefficient of variation of the time between two arrivals, which is gamma distributed: 1 is a
            Poisson process, 0 a clock, and more comes in bursts. (vLLM's --burstiness is 1 over its square.)

    Raises:
        TraceError: a rate that is not positive, or a negative burstiness.

    Example:
        >>> [r.arrival for r in with_rate(like(ALPACA, 3, seed=0), 2.0, seed=0, burstiness=0)]
        [0.5, 1.0, 1.5]
    """
    _check(rate > 0 and burstiness >= 0, f"rate {rate} and burstiness {burstiness}; wanted are > 0 and >= 0")
    if rate == math.inf:
        return trace.with_arrivals([0.0] * len(trace), "all at once")
    if burstiness == 0:
        gaps = np.full(len(trace), 1 / rate)
    else:
        shape = burstiness**-2
        gaps = generator(seed).gamma(shape, 1 / (rate * shape), len(trace))
    return trace.with_arrivals(
        np.cumsum(gaps).tolist(), f"arrivals at {rate:g} a second, coefficient of variation {burstiness:g}, seed {seed}"
    )


def with_system_prompts(trace: Trace, num_tokens: int, *, num_prompts: int = 1, seed: int = 0) -> Trace:
    """Each request gets one of a few system prompts before its own, drawn evenly.

    Example:
        >>> trace = with_system_prompts(like(ALPACA, 2, seed=0), 100)
        >>> trace.can_share, trace.requests[0].prompt[0] == trace.requests[1].prompt[0]
        (True, True)
    """
    _check(num_tokens >= 1 and num_prompts >= 1, f"{num_prompts} system prompts of {num_tokens} tokens: not possible")
    first = 1 + max(piece.seed for request in trace for piece in (*request.prompt, request.answer))
    choice = generator(seed).integers(0, num_prompts, len(trace)).tolist()
    requests = tuple(
        TraceRequest(r.arrival, (Piece(first + which, num_tokens), *r.prompt), r.answer, r.num_samples)
        for r, which in zip(trace, choice, strict=True)
    )
    note = f"{num_prompts} system prompt{'s' if num_prompts > 1 else ''} of {num_tokens} tokens, seed {seed}"
    return Trace(trace.name, requests, (*trace.notes, note))


def _check(right: bool, message: str) -> None:
    if not right:
        raise TraceError(message)
