"""What happens to logits before anything is drawn: bans, biases and penalties. Pure functions of tensors.

The order is vLLM's: allowed tokens, bans, biases, then the penalties.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paged.transfer import to_device


@dataclass(frozen=True, slots=True)
class Edits:
    """Numbers to add to single logits: a bias, or minus infinity for a token that is banned.

    Attributes:
        rows, token_ids: [E] int64, where.
        values: [E] float32, what.
    """

    rows: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Allowed:
    """Rows in which only some tokens may be sampled.

    Attributes:
        rows: [A] int64.
        mask: [A, V] bool, True where a token is allowed.
    """

    rows: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties on tokens that were seen before, for each of S rows.

    Attributes:
        repetition, frequency, presence: [S] float32.
        prompt_seen: [S, V] bool, tokens of the prompt.
        output_counts: [S, V] int32, how often each token is in the output.
    """

    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    prompt_seen: Tensor
    output_counts: Tensor


def adjust(logits: Tensor, allowed: Allowed | None, edits: Edits | None, penalties: Penalties | None) -> Tensor:
    """Apply what a step's requests wish for.

    Args:
        logits: [S, V]; not changed.
        allowed, edits, penalties: None where no row wishes for any.

    Returns:
        [S, V].

    Example: token 0 is banned, token 2 was seen twice.
        >>> ban = Edits(torch.tensor([0]), torch.tensor([0]), torch.tensor([-torch.inf]))
        >>> one = torch.ones(1)
        >>> seen, counts = torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[0, 0, 2]])
        >>> adjust(torch.ones(1, 3), None, ban, Penalties(one, one * 0.5, one * 0, seen, counts))
        tensor([[-inf, 1., 0.]])
    """
    if allowed is not None:
        kept = torch.where(allowed.mask, logits[allowed.rows], -torch.inf)
        logits = logits.index_copy(0, allowed.rows, kept)
    if edits is not None:
        logits = logits.index_put((edits.rows, edits.token_ids), edits.values.to(logits.dtype), accumulate=True)
    if penalties is not None:
        in_output = penalties.output_counts > 0
        factor = penalties.repetition[:, None].to(logits.dtype)
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(penalties.prompt_seen | in_output, repeated, logits)
        logits = logits - penalties.frequency[:, None] * penalties.output_counts
        logits = logits - penalties.presence[:, None] * in_output
    return logits


class TokenCounts:
    """Which tokens the sequences of R rows have seen, kept on the device, so that the host need not wait for them.

    Args:
        num_rows: R.
        vocab_size: V.
        device: of the tensors.

    Attributes:
        prompt_seen: [R, V] bool.
        output_counts: [R, V] int32.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.prompt_seen = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        self.output_counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)

    def begin(self, row: int, prompt_token_ids: tuple[int, ...], output_token_ids: tuple[int, ...]) -> None:
        """A sequence takes a row; it may have been preempted, so that it has output already."""
        device = self.prompt_seen.device
        self.prompt_seen[row] = False
        self.prompt_seen[row, to_device(np.array(prompt_token_ids, np.int64), device)] = True
        self.output_counts[row] = 0
        output = to_device(np.array(output_token_ids, np.int64), device)
        self.output_counts[row].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def add(self, rows: Tensor, token_ids: Tensor) -> None:
        """Count sampled tokens.

        Args:
            rows: [S] int64, no row twice.
            token_ids: [S] int64.
        """
        self.output_counts[rows, token_ids] += 1
