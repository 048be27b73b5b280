"""What comes out: the same objects, with the same fields, as vLLM's."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely the model found a token, before any sampling wish.

    Attributes:
        logprob: natural logarithm of its probability.
        rank: 1 for the most likely token of the vocabulary.
        decoded_token: its text, None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sequence's answer so far.

    Attributes:
        index: which of the request's samples it is.
        text: the detokenized output; without the stop string that ended it, and empty without a tokenizer.
        token_ids: the sampled tokens, a stop token included.
        cumulative_logprob: sum of the sampled tokens' log probabilities, None unless they were wanted.
        score: what the answers of a beam search are compared by; None for samples.
        logprobs: for each sampled token, the most likely ones and itself; None unless they were wanted.
        finish_reason: "stop", "length", "abort", "error" (the step failed, or the logits were no numbers), or None
            while it grows.
        stop_reason: the stop string or the stop token id that ended it; None for an end-of-sequence token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    score: float | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """One answer of a beam search.

    Attributes:
        tokens: the prompt's tokens and the generated ones, as in vLLM; an end-of-sequence token included.
        text: their text, special tokens shown; None without a tokenizer.
        cum_logprob: sum of the generated tokens' log probabilities.
        score: what the answers were compared by (not in vLLM); None if the search ended with an error.
        logprobs: for each generated token, the candidates it was chosen from.
        finish_reason: "stop" for an end-of-sequence token, "length", or "error".
    """

    tokens: tuple[int, ...]
    text: str | None
    cum_logprob: float
    score: float | None
    logprobs: tuple[dict[int, Logprob], ...]
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """What `LLM.beam_search` gives for one prompt.

    Attributes:
        sequences: the answers, best first.
    """

    sequences: tuple[BeamSearchSequence, ...]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's answer so far.

    Attributes:
        request_id: the name it was added under.
        prompt: its text, None if it came as token ids.
        prompt_token_ids: its tokens.
        outputs: one answer for each sample, or the answers of a beam search, best first.
        finished: whether all of them have ended.
        prompt_logprobs: for each token of the prompt but the first, which has None; None unless they were wanted.
        num_cached_tokens: tokens of the prompt whose blocks were found in the prefix cache.
        num_preemptions: how often the request lost its blocks, to be computed again or copied back from the host.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
