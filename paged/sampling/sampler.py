"""The sampler: a function of tensors alone, so that it runs on the device and no host waits for it.

In vLLM's order: bans, biases and penalties change the logits; greedy rows take the largest; the others are divided by
their temperature, cut by min_p, to the top k and then to the top p, and one token is drawn from what is left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from paged.sampling.adjust import Allowed, Edits, Penalties, adjust
from paged.sampling.noise import gumbel_noise
from paged.sampling_params import GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """What the sampler needs to know of S rows.

    The booleans are known on the host from the requests alone. They only leave out work that would change nothing.

    Attributes:
        temperature: [S] float32; below 1e-5 means greedy.
        top_k: [S] int64, V where all tokens are kept.
        top_p: [S] float32, 1 where all tokens are kept.
        min_p: [S] float32, 0 where all tokens are kept.
        seeds: [S] int64.
        positions: [S] int64, the position that the sampled token will have.
        all_greedy: no row draws.
        any_truncated: some row has a top_k or a top_p.
        any_min_p: some row has a min_p.
        allowed, edits, penalties: None where no row has any.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    all_greedy: bool
    any_truncated: bool
    any_min_p: bool = False
    allowed: Allowed | None = None
    edits: Edits | None = None
    penalties: Penalties | None = None


def sample(logits: Tensor, inputs: SamplingInputs) -> tuple[Tensor, Tensor]:
    """Choose one token for each row.

    Args:
        logits: [S, V], any floating type.
        inputs: the rows' wishes.

    Returns:
        token_ids [S] int64, and broken [S] bool: rows whose logits hold NaN, or nothing that may be sampled. Their
        tokens mean nothing.
    """
    if inputs.allowed or inputs.edits or inputs.penalties:
        logits = adjust(_at_least_float32(logits), inputs.allowed, inputs.edits, inputs.penalties)
    best, broken = take_largest(logits)
    if inputs.all_greedy:
        return best, broken
    logits = _at_least_float32(logits)
    greedy = inputs.temperature < GREEDY_BELOW  # [S]
    logits = logits / torch.where(greedy, 1.0, inputs.temperature)[:, None]
    if inputs.any_min_p:
        # p >= min_p * p_max, in logarithms: no softmax is needed.
        least = logits.amax(dim=-1, keepdim=True) + inputs.min_p[:, None].to(logits.dtype).log()
        logits = logits.masked_fill(logits < least, -torch.inf)
    if inputs.any_truncated:
        logits = keep_top(logits, inputs.top_k, inputs.top_p)
    drawn = (logits + gumbel_noise(inputs.seeds, inputs.positions, logits.shape[-1])).argmax(dim=-1)
    return torch.where(greedy, best, drawn), broken


def take_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely token of each row.

    Args:
        logits: [S, V], any floating type.

    Returns:
        token_ids [S] int64, and broken [S] bool: rows whose logits hold NaN, or nothing that may be sampled.
    """
    largest, best = logits.max(dim=-1)  # [S]; a NaN counts as the largest
    return best, largest.isnan() | (largest == -torch.inf)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Put every token outside the top k, and then outside the top p, at -inf.

    The top k keeps all that tie with the k-th. The top p (nucleus: Holtzman et al. 2019) keeps the smallest set of
    most likely tokens whose probabilities add up to at least p, hence always the most likely one and also the token
    that crosses the border.

    Args:
        logits: [S, V].
        top_k: [S], 1 to V.
        top_p: [S], in (0, 1].

    Returns:
        [S, V].

    Example: probabilities 0.5, 0.3, 0.2; 0.5 does not reach 0.6, so 0.3 stays too.
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> keep_top(logits, torch.tensor([3]), torch.tensor([0.6])).exp()
        tensor([[0.5000, 0.3000, 0.0000]])
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # [S, V]
    kth = ordered.gather(-1, (top_k - 1)[:, None])  # [S, 1]
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what more likely tokens add up to
    dropped = before >= top_p[:, None].to(before.dtype)
    dropped[:, 0] = False
    ordered = ordered.masked_fill(dropped & (top_p < 1)[:, None], -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)
