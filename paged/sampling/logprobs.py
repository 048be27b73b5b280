"""Log probabilities of sampled tokens and of the most likely ones."""

from typing import NamedTuple

import torch
from torch import Tensor


class Logprobs(NamedTuple):
    """Log probabilities of S tokens and, beside each, of the K most likely ones in its place.

    Attributes:
        chosen: [S] float32, of the token itself.
        ranks: [S] int64, 1 + the number of tokens that are more likely.
        top: [S, K] float32, in falling order.
        top_token_ids: [S, K] int64.
    """

    chosen: Tensor
    ranks: Tensor
    top: Tensor
    top_token_ids: Tensor


def logprobs_of(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """Log probabilities under softmax(logits): the model's own, before any sampling wish.

    Args:
        logits: [S, V].
        token_ids: [S] int64.
        num_top: K, at most V.

    Example:
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> found = logprobs_of(logits, torch.tensor([2]), num_top=1)
        >>> found.chosen.exp(), found.ranks, found.top.exp(), found.top_token_ids
        (tensor([0.2000]), tensor([3]), tensor([[0.5000]]), tensor([[0]]))
    """
    logprobs = logits.log_softmax(dim=-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    chosen = logprobs.gather(-1, token_ids[:, None])  # [S, 1]
    top, top_token_ids = logprobs.topk(num_top, dim=-1)
    return Logprobs(chosen[:, 0], 1 + (logprobs > chosen).sum(dim=-1), top, top_token_ids)


class TokenLogprobs(NamedTuple):
    """The same for one token, on the host.

    Attributes:
        token_id: the token.
        logprob, rank: its own.
        top: (token id, log probability) of the most likely ones, in falling order.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


def token_logprobs(found: Logprobs, token_ids: Tensor) -> list[TokenLogprobs]:
    """Bring log probabilities to the host.

    Args:
        found: of S tokens.
        token_ids: [S] int64.
    """
    columns = (token_ids, found.chosen, found.ranks, found.top_token_ids, found.top)
    return [
        TokenLogprobs(token, logprob, rank, list(zip(top_ids, top, strict=True)))
        for token, logprob, rank, top_ids, top in zip(*(column.tolist() for column in columns), strict=True)
    ]
