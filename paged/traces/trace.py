"""A workload: when each request comes, how long its prompt and its answer are, and which prompts begin alike.

No text is kept, and no list of tokens. What a token is does not change what it costs; but whether two prompts share
their first tokens does, since then they can share blocks. So a prompt is a few pieces; equal pieces are equal tokens:

    turn 1    [system prompt][question 1]                                   -> answer 1
    turn 2    [system prompt][question 1][answer 1][question 2]             -> answer 2

The ids that the scheduler compares are made from the pieces when a request arrives, and forgotten when it has ended.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# A piece's tokens have ids of their own: `seed * PIECE_SPAN + offset`.
PIECE_SPAN = 1 << 20


class TraceError(ValueError):
    """A trace, or a wish about one, cannot be used; the message names the file and the line if there is one."""


class Piece(NamedTuple):
    """Some tokens with an identity: two pieces of one seed have the same tokens, as far as the shorter one goes.

    Example:
        >>> list(Piece(seed=3, num_tokens=2).token_ids)
        [3145728, 3145729]
    """

    seed: int
    num_tokens: int

    @property
    def token_ids(self) -> range:
        """Ids that no piece of another seed has."""
        return range(self.seed * PIECE_SPAN, self.seed * PIECE_SPAN + self.num_tokens)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload.

    Attributes:
        arrival: seconds after the trace begins.
        prompt: its pieces, in order.
        answer: what it will get; a later prompt that quotes the answer has this piece.
        num_samples: answers wanted, all of the same length.

    Raises:
        TraceError: no prompt, no answer, a negative time, or a piece too long for ids of its own.

    Example:
        >>> request = TraceRequest(0.5, (Piece(0, 100), Piece(1, 20)), Piece(2, 30))
        >>> request.num_prompt_tokens, request.num_output_tokens, len(request.prompt_token_ids())
        (120, 30, 120)
    """

    arrival: float
    prompt: tuple[Piece, ...]
    answer: Piece
    num_samples: int = 1

    def __post_init__(self) -> None:
        sizes = [piece.num_tokens for piece in (*self.prompt, self.answer)]
        if not self.prompt or min(sizes) < 1 or max(sizes) > PIECE_SPAN:
            raise TraceError(
                f"a request of {self.num_prompt_tokens} prompt tokens in {len(self.prompt)} pieces and "
                f"{self.num_output_tokens} output tokens; each has to be 1 to {PIECE_SPAN}"
            )
        if not self.arrival >= 0 or self.num_samples < 1:
            raise TraceError(f"arrival {self.arrival} s and {self.num_samples} samples; at least 0 and 1 are needed")

    @property
    def num_prompt_tokens(self) -> int:
        """Of all pieces."""
        return sum(piece.num_tokens for piece in self.prompt)

    @property
    def num_output_tokens(self) -> int:
        """Of one sample."""
        return self.answer.num_tokens

    def prompt_token_ids(self) -> tuple[int, ...]:
        """Made on demand: a million requests of a thousand tokens would not fit in memory."""
        return tuple(itertools.chain.from_iterable(piece.token_ids for piece in self.prompt))


def request_of(arrival: float, num_prompt_tokens: int, num_output_tokens: int, *, number: int) -> TraceRequest:
    """A request that shares nothing with any other `number`."""
    return TraceRequest(arrival, (Piece(2 * number, num_prompt_tokens),), Piece(2 * number + 1, num_output_tokens))


@dataclass(frozen=True)
class Trace:
    """A workload, in order of arrival.

    Every method gives another trace, whose notes say what was changed or left out: a figure made from a part of a trace
    is not one of the trace.

    Attributes:
        name: where it is from.
        requests: in order of arrival.
        notes: what was done to it, a sentence each.

    Raises:
        TraceError: there is no request, or they are not in order.

    Example:
        >>> trace = Trace("two", (request_of(0, 50, 9, number=0), request_of(1, 300, 9, number=1)))
        >>> trace.clipped(max_prompt=200).notes
        ('1 of 2 prompts cut to 200 tokens',)
        >>> trace.first(1).num_prompt_tokens, trace.scaled(0.5).requests[1].arrival
        (50, 0.5)
    """

    name: str
    requests: tuple[TraceRequest, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.requests:
            raise TraceError(f"{self.name} has no requests" + "".join(f"; {note}" for note in self.notes))
        arrivals = [request.arrival for request in self.requests]
        if any(later < earlier for earlier, later in itertools.pairwise(arrivals)):
            raise TraceError(f"{self.name}: its requests are not in order of arrival")

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[TraceRequest]:
        return iter(self.requests)

    @property
    def num_prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Of all requests and samples."""
        return sum(request.num_output_tokens * request.num_samples for request in self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(request.num_prompt_tokens + request.num_output_tokens for request in self.requests)

    @property
    def can_share(self) -> bool:
        """Whether two prompts have a piece in common, so that a prefix cache could find something."""
        seen: set[int] = set()
        for request in self.requests:
            seeds = {piece.seed for piece in request.prompt}
            if not seen.isdisjoint(seeds):
                return True
            seen |= seeds | {request.answer.seed}
        return False

    def describe(self) -> str:
        """One line.

        Example:
            >>> Trace("one", (request_of(0, 50, 9, number=0),)).describe()
            'one: 1 request, 50.0 prompt and 9.0 output tokens on average, all at once'
        """
        count, span = len(self.requests), self.requests[-1].arrival - self.requests[0].arrival
        answers = sum(request.num_samples for request in self.requests)
        requests = f"{count:,} request{'s' if count > 1 else ''}"
        pace = f"{(count - 1) / span:.2f} a second" if span > 0 else "all at once"
        return (
            f"{self.name}: {requests}, {self.num_prompt_tokens / count:,.1f} prompt and "
            f"{self.num_output_tokens / answers:,.1f} output tokens on average, {pace}"
        )

    def first(self, count: int) -> "Trace":
        """Its first requests only."""
        _check(count >= 1, f"the first {count} requests were asked for; at least 1 is needed")
        if count >= len(self.requests):
            return self
        return self._with(self.requests[:count], f"the first {count:,} of {len(self.requests):,} requests")

    def thinned(self, share: float, *, seed: int) -> "Trace":
        """Each request stays with this probability, so that a trace too busy for one GPU keeps its shape."""
        _check(0 < share <= 1, f"a share of {share} of the requests was asked for; it has to be in (0, 1]")
        stays = np.random.Generator(np.random.PCG64(seed)).random(len(self.requests)) < share
        kept = tuple(itertools.compress(self.requests, stays))
        return self._with(kept, f"thinned to {len(kept):,} of {len(self.requests):,} requests, seed {seed}")

    def scaled(self, factor: float) -> "Trace":
        """All times multiplied: 0.5 is twice as fast."""
        _check(0 <= factor < float("inf"), f"times cannot be multiplied by {factor}")
        return self.with_arrivals((r.arrival * factor for r in self.requests), f"times multiplied by {factor:g}")

    def with_arrivals(self, arrivals: Iterable[float], note: str) -> "Trace":
        """Other times of arrival, one for each request, in order."""
        moved = zip(self.requests, arrivals, strict=True)
        return self._with(tuple(dataclasses.replace(r, arrival=float(time)) for r, time in moved), note)

    def with_samples(self, num_samples: int) -> "Trace":
        """Every request wants so many answers."""
        changed = tuple(dataclasses.replace(request, num_samples=num_samples) for request in self.requests)
        return self._with(changed, f"{num_samples} samples of each request")

    def clipped(
        self, *, max_prompt: int | None = None, max_output: int | None = None, max_total: int | None = None
    ) -> "Trace":
        """Prompts cut to their first tokens, answers cut, and then answers cut so that both together fit.

        A request whose prompt alone leaves no room for an answer in `max_total` is left out, and the notes count it.
        """
        for name, limit in (("max_prompt", max_prompt), ("max_output", max_output), ("max_total", max_total)):
            _check(limit is None or limit >= 1, f"{name}={limit}: at least 1 is needed")
        trace = self
        if max_prompt is not None:
            cut = [_cut_prompt(request, max_prompt) for request in trace.requests]
            trace = trace._replaced(cut, f"prompts cut to {max_prompt:,} tokens")
        if max_output is not None:
            cut = [_cut_answer(request, max_output) for request in trace.requests]
            trace = trace._replaced(cut, f"outputs cut to {max_output:,} tokens")
        if max_total is not None:
            fits = tuple(request for request in trace.requests if request.num_prompt_tokens < max_total)
            if len(fits) < len(trace.requests):
                gone = len(trace.requests) - len(fits)
                trace = trace._with(fits, f"{gone:,} left out, their prompts leave no room in {max_total:,} tokens")
            cut = [_cut_answer(request, max_total - request.num_prompt_tokens) for request in trace.requests]
            trace = trace._replaced(cut, f"outputs cut so that prompt and output fit {max_total:,} tokens")
        return trace

    def dropped(self, *, max_prompt: int, max_total: int, min_tokens: int = 4) -> "Trace":
        """Without what is too long or too short, as vLLM's benchmark has ShareGPT (1024, 2048 and 4 there)."""
        kept = tuple(
            request
            for request in self.requests
            if min_tokens <= request.num_prompt_tokens <= max_prompt
            and request.num_output_tokens >= min_tokens
            and request.num_prompt_tokens + request.num_output_tokens <= max_total
        )
        gone = len(self.requests) - len(kept)
        return self._with(
            kept,
            f"{gone:,} of {len(self.requests):,} requests left out: fewer than {min_tokens} tokens in or out, more "
            f"than {max_prompt:,} in or {max_total:,} together",
        )

    def _replaced(self, changed: Sequence[TraceRequest], what: str) -> "Trace":
        """These requests instead; a note if any is another one."""
        count = sum(new is not old for new, old in zip(changed, self.requests, strict=True))
        return self._with(tuple(changed), f"{count:,} of {len(changed):,} {what}") if count else self

    def _with(self, requests: tuple[TraceRequest, ...], note: str) -> "Trace":
        return Trace(self.name, requests, (*self.notes, note))


def _cut_prompt(request: TraceRequest, limit: int) -> TraceRequest:
    pieces, room = [], limit
    for piece in request.prompt:
        if room > 0:
            pieces.append(Piece(piece.seed, min(piece.num_tokens, room)))
        room -= piece.num_tokens
    return dataclasses.replace(request, prompt=tuple(pieces)) if room < 0 else request


def _cut_answer(request: TraceRequest, limit: int) -> TraceRequest:
    answer = request.answer
    if answer.num_tokens <= limit:
        return request
    return dataclasses.replace(request, answer=Piece(answer.seed, limit))


def _check(right: bool, message: str) -> None:
    if not right:
        raise TraceError(message)
