"""What comes out: the same objects, with the same fields, as vLLM's."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sequence's answer so far.

    Attributes:
        index: which of the request's samples it is.
        text: the detokenized output; without the stop string that ended it, and empty without a tokenizer.
        token_ids: the sampled tokens, a stop token included.
        finish_reason: "stop", "length", "abort", or None while it grows.
        stop_reason: the stop string or the stop token id that ended it; None for an end-of-sequence token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's answer so far.

    Attributes:
        request_id: the name it was added under.
        prompt: its text, None if it came as token ids.
        prompt_token_ids: its tokens.
        outputs: one answer for each sample.
        finished: whether all of them have ended.
        num_preemptions: how often the request lost its blocks and was computed again.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_preemptions: int = 0
