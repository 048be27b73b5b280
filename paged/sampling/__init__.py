"""From logits to tokens, and from tokens to text."""

from paged.sampling.detokenizer import Detokenizer
from paged.sampling.noise import gumbel_noise
from paged.sampling.sampler import SamplingInputs, sample

__all__ = ["Detokenizer", "SamplingInputs", "gumbel_noise", "sample"]
