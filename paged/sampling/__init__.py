"""From logits to tokens, and from tokens to text."""

from paged.sampling.detokenizer import Detokenizer
from paged.sampling.logprobs import Logprobs, TokenLogprobs, logprobs_of, token_logprobs
from paged.sampling.noise import gumbel_noise
from paged.sampling.sampler import SamplingInputs, sample, take_largest

__all__ = [
    "Detokenizer",
    "Logprobs",
    "SamplingInputs",
    "TokenLogprobs",
    "gumbel_noise",
    "logprobs_of",
    "sample",
    "take_largest",
    "token_logprobs",
]
