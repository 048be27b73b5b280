"""What a request wishes for: how its tokens are chosen and when it ends."""

import enum
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

# Below this temperature the distribution is a single token in any floating point type: take it directly.
GREEDY_BELOW = 1e-5
# Between the two, logits divided by the temperature overflow half precision: vLLM's lower limit, and ours.
LOWEST_TEMPERATURE = 1e-2
MOST_SAMPLES = 16384
MOST_BEAMS = 1024
SCORINGS = ("vllm", "transformers")

logger = logging.getLogger(__name__)


class RequestOutputKind(enum.Enum):
    """What `Engine.step` returns of a request that goes on."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # nothing before the end


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling wishes of one request. Names, defaults and ranges are vLLM's.

    How tokens are chosen, in the order in which it happens to the logits:

    Args:
        allowed_token_ids: only these tokens may be generated.
        bad_words: strings that must not be generated: the last token of each is banned where the others came before.
        min_tokens: neither an end-of-sequence token nor a stop token before so many.
        logit_bias: added to the logits of these tokens; cut to [-100, 100].
        repetition_penalty: the logits of tokens in prompt or output are divided by it if positive, else multiplied.
            Above 0; 1 changes nothing.
        frequency_penalty: subtracted once for every time a token is in the output. In [-2, 2].
        presence_penalty: subtracted once if a token is in the output. In [-2, 2].
        temperature: the logits are divided by it; 0 takes the most likely token (greedy). In [0, 2].
        min_p: drop tokens less likely than this share of the most likely one. In [0, 1].
        top_k: keep the `top_k` most likely tokens (and all that tie with the last); 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum. In (0, 1].
        seed: makes the request's noise its own: the same tokens alone and in any batch. None (or -1) draws a
            seed from the engine's.

    How many there are, and when they end:

    Args:
        n: samples of the same prompt; sample i uses seed + i.
        max_tokens: most tokens to generate; None means up to max_model_len.
        stop: strings that end the output as soon as the text holds one; the text ends before it.
        include_stop_str_in_output: the text ends behind it instead.
        stop_token_ids: token ids that end the output; the id stays in `token_ids`.
        ignore_eos: go on after the model's end-of-sequence token.
        truncate_prompt_tokens: keep only so many tokens of the prompt, the last ones; -1 keeps max_model_len of them.

    What comes out:

    Args:
        logprobs: log probabilities of so many most likely tokens and of the one sampled; -1 for the whole vocabulary.
            They are those of the model, before anything above.
        prompt_logprobs: the same for each token of the prompt; its blocks are then not taken from the prefix cache.
        detokenize: whether to make text of the tokens.
        skip_special_tokens: leave special tokens out of the text.
        output_kind: what `Engine.step` returns of a request that goes on.

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

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._check_choosing()
        self._check_ending()
        self._check_output()
        # A frozen dataclass is changed here, before anybody has seen it, and never again.
        if GREEDY_BELOW <= self.temperature < LOWEST_TEMPERATURE:
            logger.warning("temperature=%s is raised to %s", self.temperature, LOWEST_TEMPERATURE)
            object.__setattr__(self, "temperature", LOWEST_TEMPERATURE)
        if self.greedy:
            self._require(self.n == 1, "n", "1 with temperature 0, where all samples are the same")
            for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                object.__setattr__(self, name, neutral)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        if self.logit_bias:
            cut = {token: min(100.0, max(-100.0, float(bias))) for token, bias in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", cut)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was written."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without noise."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that were seen before get other logits."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    def _check_choosing(self) -> None:
        temperature, top_p, repetition = self.temperature, self.top_p, self.repetition_penalty
        self._require(_is_number(temperature) and 0 <= temperature <= 2, "temperature", "a number in [0, 2]")
        self._require(_is_number(top_p) and 0 < top_p <= 1, "top_p", "in (0, 1]")
        self._require(
            _is_int(self.top_k) and self.top_k >= -1, "top_k", "an integer >= 1, or 0 or -1 to keep all tokens"
        )
        self._require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(_is_number(getattr(self, name)) and -2 <= getattr(self, name) <= 2, name, "in [-2, 2]")
        self._require(_is_number(repetition) and repetition > 0, "repetition_penalty", "a finite number above 0")
        self._require(
            self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**63),
            "seed",
            "a 64-bit integer or None",
        )
        self._require(
            self.logit_bias is None
            or (
                isinstance(self.logit_bias, Mapping)
                and all(_is_int(token) and _is_number(bias) for token, bias in self.logit_bias.items())
            ),
            "logit_bias",
            "a mapping from token ids to numbers",
        )
        self._require(
            self.allowed_token_ids is None or (_are_ints(self.allowed_token_ids) and len(self.allowed_token_ids) > 0),
            "allowed_token_ids",
            "a list of at least one integer",
        )
        self._require(
            self.bad_words is None or (_are_strings(self.bad_words) and all(word.strip() for word in self.bad_words)),
            "bad_words",
            "a list of strings that are not blank",
        )

    def _check_ending(self) -> None:
        self._require(_is_int(self.n) and 1 <= self.n <= MOST_SAMPLES, "n", f"an integer in [1, {MOST_SAMPLES}]")
        most = self.max_tokens
        self._require(
            most is None or (_is_int(most) and most >= 1),
            "max_tokens",
            "an integer >= 1, or None for up to max_model_len",
        )
        self._require(
            _is_int(self.min_tokens) and 0 <= self.min_tokens <= (math.inf if most is None else most),
            "min_tokens",
            f"an integer in [0, max_tokens={most}]",
        )
        self._require(
            self.stop is None or (isinstance(self.stop, str) and self.stop != "") or _are_strings(self.stop),
            "stop",
            "a non-empty string or a list of them",
        )
        self._require(
            self.stop_token_ids is None or _are_ints(self.stop_token_ids), "stop_token_ids", "a list of integers"
        )
        cut = self.truncate_prompt_tokens
        self._require(
            cut is None or (_is_int(cut) and (cut == -1 or cut >= 1)),
            "truncate_prompt_tokens",
            "an integer >= 1, or -1",
        )

    def _check_output(self) -> None:
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            self._require(isinstance(getattr(self, name), bool), name, "True or False")
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            self._require(
                wanted is None or (_is_int(wanted) and wanted >= -1),
                name,
                "an integer >= 0, or -1 for the whole vocabulary",
            )
        self._require(
            isinstance(self.output_kind, RequestOutputKind), "output_kind", "one of RequestOutputKind's members"
        )
        self._require(
            self.detokenize or not self.stop_strings, "detokenize", "True where there are stop strings to look for"
        )

    def _require(self, holds: bool, name: str, wanted: str) -> None:
        _require(self, holds, name, wanted)


@dataclass(frozen=True)
class BeamSearchParams:
    """Wishes of one beam search. The first five are vLLM's.

    Args:
        beam_width: beams that live at once, and answers that come out. In [1, 1024].
        max_tokens: most tokens to generate.
        ignore_eos: go on after the model's end-of-sequence token.
        temperature: above 0, each beam's candidates include one token drawn at this temperature, as in vLLM. In [0, 2];
            0 with scoring="transformers".
        length_penalty: answers are compared by log probability / length ** length_penalty, so more favours longer ones.
            In [-10, 10], beyond which long texts leave the numbers there are (vLLM has no limit).
        scoring: "vllm" or "transformers": what ends, what the length of an answer is, and when the search stops
            (`paged.beam_search` has the table).
        early_stopping: with scoring="transformers", when to stop: True as soon as there are beam_width answers; False
            if the best live beam scores no better than the worst of them; "never" if even at its longest it could not.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the range.

    Example:
        >>> BeamSearchParams(beam_width=0, max_tokens=8)
        Traceback (most recent call last):
        ValueError: beam_width must be an integer in [1, 1024], got 0
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    scoring: str = "vllm"
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        width, early = self.beam_width, self.early_stopping
        _require(
            self,
            _is_int(width) and 1 <= width <= MOST_BEAMS,
            "beam_width",
            f"an integer in [1, {MOST_BEAMS}]",
        )
        _require(self, _is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "an integer >= 1")
        _require(self, isinstance(self.ignore_eos, bool), "ignore_eos", "True or False")
        temperature = self.temperature
        _require(self, _is_number(temperature) and 0 <= temperature <= 2, "temperature", "a number in [0, 2]")
        penalty = self.length_penalty
        _require(self, _is_number(penalty) and -10 <= penalty <= 10, "length_penalty", "a number in [-10, 10]")
        _require(self, self.scoring in SCORINGS, "scoring", f"one of {', '.join(SCORINGS)}")
        _require(self, isinstance(early, bool) or early == "never", "early_stopping", "True, False or 'never'")
        if self.scoring == "transformers":
            _require(self, temperature == 0, "temperature", "0 with scoring='transformers'")
        else:
            _require(self, early is False, "early_stopping", "False with scoring='vllm', which never stops early")


def _require(params: SamplingParams | BeamSearchParams, holds: bool, name: str, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {getattr(params, name)!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ints(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(_is_int(item) for item in value)


def _are_strings(value: object) -> bool:
    return (
        isinstance(value, Collection)
        and not isinstance(value, str)
        and all(isinstance(item, str) and item for item in value)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
