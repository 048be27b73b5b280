"""What a request has been told: text, log probabilities, and the outputs made of them."""

from collections.abc import Sequence as SequenceOf
from typing import Any

from paged.beam_search import Beam, BeamSearch
from paged.outputs import CompletionOutput, Logprob, RequestOutput
from paged.request import Branch, FinishReason, Request, Sequence
from paged.sampling import Detokenizer, TokenLogprobs
from paged.sampling_params import RequestOutputKind


class Answers:
    """The answers to one request while they grow.

    Args:
        request: whose.
        tokenizer: makes text of tokens; None for no text.
    """

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self.request = request
        params = request.sampling_params
        self._decoder = tokenizer if params.detokenize else None
        self._texts: list[Detokenizer] = []
        if tokenizer is not None and params.detokenize:
            self._texts = [
                Detokenizer(
                    tokenizer,
                    request.prompt_token_ids,
                    params.stop_strings,
                    include_stop=params.include_stop_str_in_output,
                    skip_special_tokens=params.skip_special_tokens,
                )
                for _ in request.sequences
            ]
        self._logprobs: list[list[dict[int, Logprob]]] = [[] for _ in request.sequences]
        self._cumulative = [0.0 for _ in request.sequences]
        self._prompt_logprobs: list[dict[int, Logprob] | None] = [None] * len(request.prompt_token_ids)
        # Text that could still become a stop string is not given out before it is known not to.
        longest = max((len(stop) for stop in params.stop_strings), default=0)
        self._held_back = 0 if params.include_stop_str_in_output else max(0, longest - 1)
        self._gives_what_is_new = params.output_kind is RequestOutputKind.DELTA
        self._given = [(0, 0) for _ in request.sequences]  # tokens and characters given out, for DELTA

    def append(self, sequence: Sequence, logprobs: TokenLogprobs | None) -> str | None:
        """Take in the token that a sequence just got.

        Returns:
            The stop string that its text now holds, or None.
        """
        index, token = sequence.index, sequence.token_ids[-1]
        wanted = self.request.sampling_params.logprobs
        if logprobs is not None and wanted is not None:
            self._logprobs[index].append(_as_dict(logprobs, wanted, self._decoder))
            self._cumulative[index] += logprobs.logprob
        if not self._texts:
            return None
        text, reason = self._texts[index], sequence.finish_reason
        if reason is not FinishReason.STOP:  # a token that ends the output is no part of its text
            text.append(token)
        if reason is not None:
            text.finish()
        return text.stop_string

    def add_prompt_logprobs(self, start: int, logprobs: SequenceOf[TokenLogprobs]) -> None:
        """Take in the log probabilities of the prompt's tokens from position `start` on."""
        wanted = self.request.sampling_params.prompt_logprobs
        assert wanted is not None, "nobody computes what was not asked for"
        for position, found in enumerate(logprobs, start):
            self._prompt_logprobs[position] = _as_dict(found, wanted, self._decoder)

    def output(self) -> RequestOutput:
        """Everything so far, or what is new with RequestOutputKind.DELTA."""
        completions = [self._completion(sequence) for sequence in self.request.sequences]
        wants_prompt = self.request.sampling_params.prompt_logprobs is not None
        return _request_output(self.request, completions, tuple(self._prompt_logprobs) if wants_prompt else None)

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        index, params = sequence.index, self.request.sampling_params
        text = self._texts[index].text if self._texts else ""
        if not sequence.is_finished and self._held_back:
            text = text[: max(0, len(text) - self._held_back)]
        logprobs, num_tokens = self._logprobs[index], 0
        if self._gives_what_is_new:
            num_tokens, num_characters = self._given[index]
            self._given[index] = (sequence.num_output_tokens, len(text))
            text, logprobs = text[num_characters:], logprobs[num_tokens:]
        # What was given out before is not even looked at, so that a step costs the same however long the output is.
        tokens = sequence.token_ids[sequence.num_prompt_tokens + num_tokens :]
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=tuple(tokens),
            cumulative_logprob=None if params.logprobs is None else self._cumulative[index],
            logprobs=None if params.logprobs is None else tuple(logprobs),
            finish_reason=None if sequence.finish_reason is None else sequence.finish_reason.value,
            stop_reason=sequence.stop_reason,
        )


class BeamAnswers:
    """The answers to one beam search.

    Args:
        request: whose.
        search: the search.
        tokenizer: makes text of tokens; None for no text.
    """

    def __init__(self, request: Request, search: BeamSearch, tokenizer: Any) -> None:
        self.request = request
        self._search = search
        self._tokenizer = tokenizer
        self._found: list[TokenLogprobs] = []

    def append(self, candidates: TokenLogprobs) -> None:
        """Take in the candidates of the next beam, in the order of the beams."""
        self._found.append(candidates)

    def advance(self) -> list[Branch] | None:
        """How the beams go on, now that each of them has brought candidates; None if the search is over."""
        found, self._found = self._found, []
        return self._search.advance(found)

    def output(self) -> RequestOutput:
        """The answers; where the search did not come to its end, the beams that were live, without a score."""
        reason = self.request.sequences[0].finish_reason
        if reason is FinishReason.LENGTH:  # the search is over
            answers = [
                self._completion(i, beam, self._search.score(beam)) for i, beam in enumerate(self._search.answers)
            ]
        else:
            answers = [self._completion(i, beam, None) for i, beam in enumerate(self._search.live)]
        return _request_output(self.request, answers)

    def _completion(self, index: int, beam: Beam, score: float | None) -> CompletionOutput:
        reason = FinishReason.STOP if beam.ended else self.request.sequences[0].finish_reason
        text = "" if self._tokenizer is None else self._tokenizer.decode(beam.token_ids, skip_special_tokens=True)
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=beam.token_ids,
            cumulative_logprob=beam.cum_logprob,
            score=score,
            logprobs=tuple(_as_dict(found, -1, self._tokenizer) for found in beam.logprobs),
            finish_reason=None if reason is None else reason.value,
        )


def _request_output(
    request: Request,
    completions: SequenceOf[CompletionOutput],
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None,
) -> RequestOutput:
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=tuple(completions),
        finished=request.is_finished,
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=request.num_cached_tokens or 0,
        num_preemptions=request.num_preemptions,
    )


def _as_dict(found: TokenLogprobs, wanted: int, tokenizer: Any) -> dict[int, Logprob]:
    """The token itself first, then the most likely ones, as vLLM has it."""
    top = found.top if wanted == -1 else found.top[:wanted]
    entries = [(found.token_id, found.logprob, found.rank)]
    entries += [(token, logprob, rank) for rank, (token, logprob) in enumerate(top, 1) if token != found.token_id]
    return {
        token: Logprob(logprob, rank, None if tokenizer is None else tokenizer.decode([token]))
        for token, logprob, rank in entries
    }
