"""What a request wishes for: how its tokens are chosen and when it ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Below this temperature the distribution is a single token in any floating point type: take it directly.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling wishes of one request. Names, defaults and ranges are vLLM's.

    Args:
        temperature: the logits are divided by it; 0 takes the most likely token (greedy). In [0, 2].
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum. In (0, 1].
        top_k: keep the `top_k` most likely tokens (and all that tie with the last); 0 or -1 keeps all.
        max_tokens: most tokens to generate; None means up to max_model_len.
        seed: makes the request's noise its own: the same tokens alone and in any batch. None (or -1) draws a
            seed from the engine's.
        stop: strings that end the output as soon as the text holds one; the text ends before it.
        stop_token_ids: token ids that end the output; the id stays in `token_ids`.
        ignore_eos: go on after the model's end-of-sequence token.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the range.

    Example:
        >>> SamplingParams(temperature=0, max_tokens=4).greedy
        True
        >>> SamplingParams(stop="END").stop_strings
        ('END',)
        >>> SamplingParams(top_p=0)
        Traceback (most recent call last):
        ValueError: top_p must be in (0, 1], got 0
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = 16
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature <= 2):
            raise ValueError(f"temperature must be a number in [0, 2], got {self.temperature!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not (_is_int(self.top_k) and self.top_k >= -1):
            raise ValueError(f"top_k must be an integer >= 1, or 0 or -1 to keep all tokens, got {self.top_k!r}")
        if self.max_tokens is not None and not (_is_int(self.max_tokens) and self.max_tokens >= 1):
            raise ValueError(
                f"max_tokens must be an integer >= 1, or None for up to max_model_len, got {self.max_tokens!r}"
            )
        if self.seed is not None and not (_is_int(self.seed) and -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed must be a 64-bit integer or None, got {self.seed!r}")
        if not all(isinstance(string, str) and string for string in self.stop_strings):
            raise ValueError(f"stop must be a non-empty string or a list of them, got {self.stop!r}")
        if not all(_is_int(token) for token in self.stop_token_ids or ()):
            raise ValueError(f"stop_token_ids must hold integers, got {self.stop_token_ids!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was written."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without noise."""
        return self.temperature < GREEDY_BELOW


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
