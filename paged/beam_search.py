"""Beam search: keep the `beam_width` likeliest beginnings, and the `beam_width` best answers that have ended.

In every step each live beam brings candidates, its most likely next tokens. A candidate that ends the text becomes an
answer; the best of the others live on, whichever beams they come from:

    beams             candidates (log probability of the whole)        live on         branches
    0  "the"          "the cat" -1.2    "the dog" -1.9                 "the cat"       (parent 0, "cat")
    1  "a"            "a cat"   -2.3    "a dog"   -1.5                 "a dog"         (parent 1, "dog")

The K and V of a beam are its parent's, so going on is a fork of the parent's block table, and what is copied is one
partial block at most. There is no one beam search. These two count differently and stop differently:

                      scoring="vllm"                             scoring="transformers"
    candidates        the C likeliest tokens of every beam       the C best of all beams together
    may end           every candidate                            those among the beam_width best
    length of answer  prompt and output, without the end token   output, with the end token
    stops             after max_tokens                           when beam_width answers cannot be beaten any more

with C = (1 + number of end tokens, at least 2) * beam_width, so that enough live on even if all ends are likely. The
score of an answer is its log probability / length ** length_penalty. The first is what `vllm.LLM.beam_search` does, the
second what transformers' `generate(num_beams=...)` does, whose `early_stopping` says when answers count as unbeatable.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from paged.request import Branch
from paged.sampling import TokenLogprobs
from paged.sampling_params import BeamSearchParams


class Beam(NamedTuple):
    """A beginning, or a whole answer.

    Attributes:
        token_ids: what was generated.
        cum_logprob: sum of the log probabilities of these tokens.
        logprobs: each of these tokens with the candidates beside it.
        ended: whether the last token is an end-of-sequence token.
    """

    token_ids: tuple[int, ...] = ()
    cum_logprob: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    ended: bool = False


class Candidate(NamedTuple):
    """A token that a live beam may go on with, and the log probability of both together."""

    parent: int
    token: TokenLogprobs
    cum_logprob: float
    ended: bool


def num_candidates(beam_width: int, num_eos_tokens: int) -> int:
    """Candidates that enough beams can live on with, even if every end-of-sequence token is among every beam's.

    Example:
        >>> num_candidates(beam_width=4, num_eos_tokens=1)
        8
    """
    return max(2, 1 + num_eos_tokens) * beam_width


class BeamSearch:
    """One search.

    Args:
        params: its width, its length, its scoring.
        num_prompt_tokens: length of the prompt.
        max_tokens: most tokens to generate, already cut to what max_model_len leaves.
        eos_token_ids: tokens that end a beam; none if they are to be ignored.

    Attributes:
        num_candidates: most likely tokens that every live beam has to bring.
        live: the beams that go on, best first, in the order of the branches; a single empty one before the first step.
        answers: the best that have ended, best first; complete when `advance` has returned None.

    Example: a search of width one is greedy. It wants two candidates, lest the only one be the end.
        >>> search = BeamSearch(BeamSearchParams(1, 2), num_prompt_tokens=3, max_tokens=2, eos_token_ids=frozenset())
        >>> search.num_candidates
        2
        >>> search.advance([TokenLogprobs(7, -0.5, 1, [(7, -0.5), (8, -1.5)])])
        [Branch(parent=0, token=7)]
        >>> search.advance([TokenLogprobs(4, -0.25, 1, [(4, -0.25), (9, -2.5)])])
        >>> search.answers[0].token_ids, search.answers[0].cum_logprob
        ((7, 4), -0.75)
    """

    def __init__(
        self, params: BeamSearchParams, *, num_prompt_tokens: int, max_tokens: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._eos_token_ids = eos_token_ids
        self.num_candidates = num_candidates(params.beam_width, len(eos_token_ids))
        self.live = [Beam()]
        self.answers: list[Beam] = []

    def advance(self, found: Sequence[TokenLogprobs]) -> list[Branch] | None:
        """Take in a step.

        Args:
            found: for each live beam, the `num_candidates` most likely next tokens, and the one that was sampled.

        Returns:
            How the beams that live on continue those that lived, best first; None if the search is over.
        """
        # A step computes as many as anybody in the batch wants; what others want must not change what is found here.
        found = [tokens._replace(top=tokens.top[: self.num_candidates]) for tokens in found]
        width, by_transformers = self._params.beam_width, self._params.scoring == "transformers"
        is_last = len(self.live[0].token_ids) + 1 == self._max_tokens
        candidates = [candidate for parent, tokens in enumerate(found) for candidate in self._extend(parent, tokens)]
        # Python's sort leaves equals in their order, reversed or not: the candidates of the better beam come first.
        candidates.sort(key=lambda candidate: candidate.cum_logprob, reverse=True)
        going_on = [candidate for candidate in candidates if not candidate.ended][:width]
        if by_transformers:
            ending = [candidate for candidate in candidates[:width] if candidate.ended or is_last]
        else:
            ending = [candidate for candidate in candidates if candidate.ended] + (going_on if is_last else [])
        self.answers += [self._grown(candidate) for candidate in ending]
        self.answers = sorted(self.answers, key=self.score, reverse=True)[:width]
        self.live = [self._grown(candidate) for candidate in going_on]
        if is_last or (by_transformers and self._cannot_be_beaten()):
            return None
        return [Branch(candidate.parent, candidate.token.token_id) for candidate in going_on]

    def score(self, beam: Beam) -> float:
        """What answers are compared by: log probability / length ** length_penalty."""
        num_tokens = len(beam.token_ids)
        if self._params.scoring == "vllm":
            num_tokens += self._num_prompt_tokens - beam.ended
        return self._score(beam.cum_logprob, num_tokens)

    def _cannot_be_beaten(self) -> bool:
        """Whether `early_stopping` finds that enough answers are there."""
        if len(self.answers) < self._params.beam_width:
            return False
        if self._params.early_stopping is True:
            return True
        # With a positive penalty longer is better, so the best live beam might win at its longest. "never" reckons
        # with that; False takes it as it stands, which is a guess, and what transformers does by default.
        length = len(self.live[0].token_ids)
        if self._params.early_stopping == "never" and self._params.length_penalty > 0:
            length = self._max_tokens
        return self._score(self.live[0].cum_logprob, length) <= self.score(self.answers[-1])

    def _score(self, cum_logprob: float, num_tokens: int) -> float:
        return cum_logprob / math.pow(num_tokens, self._params.length_penalty)

    def _extend(self, parent: int, tokens: TokenLogprobs) -> list[Candidate]:
        """What a live beam may go on with."""
        options = [
            TokenLogprobs(token, logprob, rank, tokens.top) for rank, (token, logprob) in enumerate(tokens.top, 1)
        ]
        if tokens.token_id not in dict(tokens.top):  # drawn by a temperature above 0, from further down
            options.append(tokens)
        so_far = self.live[parent].cum_logprob
        return [
            Candidate(parent, option, so_far + option.logprob, option.token_id in self._eos_token_ids)
            for option in options
        ]

    def _grown(self, candidate: Candidate) -> Beam:
        """The beam that a candidate makes of its parent."""
        parent = self.live[candidate.parent]
        return Beam(
            (*parent.token_ids, candidate.token.token_id),
            candidate.cum_logprob,
            (*parent.logprobs, candidate.token),
            candidate.ended,
        )
