"""The sampling wishes of the persistent rows, and what the sampler gets of them in a step.

Most wishes are a number for each row. Those that concern single tokens are rare, so they are kept apart and cost
nothing in a step in which nobody has any.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from paged.sampling.adjust import Allowed, Edits, Penalties, TokenCounts
from paged.sampling.sampler import SamplingInputs
from paged.sampling_params import GREEDY_BELOW
from paged.step import Admission, Sample
from paged.transfer import to_device


class Wishes:
    """Sampling wishes of R rows.

    Args:
        num_rows: R.
        vocab_size: V; what "all tokens" means as a top_k.
        device: where the sampler runs.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._num_rows, self._vocab_size, self._device = num_rows, vocab_size, device
        self._temperature = np.zeros(num_rows, np.float32)
        self._top_k = np.zeros(num_rows, np.int64)
        self._top_p = np.zeros(num_rows, np.float32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._seeds = np.zeros(num_rows, np.int64)
        self._repetition = np.ones(num_rows, np.float32)
        self._frequency = np.zeros(num_rows, np.float32)
        self._presence = np.zeros(num_rows, np.float32)
        self._bias: dict[int, dict[int, float]] = {}
        self._allowed: dict[int, Tensor] = {}  # row -> [V] bool
        self._num_logprobs: dict[int, int] = {}
        self._num_prompt_logprobs: dict[int, int] = {}
        self._counts: TokenCounts | None = None  # made for the first request that needs it
        self._wishing: set[int] = set()  # rows that wish for anything but the most likely token

    @property
    def most_bytes(self) -> int:
        """Most bytes that stay on the device, when every row has penalties and allowed tokens: [R, V] of each.

        A count is four bytes, and whether the prompt has a token and whether it is allowed one byte each.
        """
        return self._num_rows * self._vocab_size * (torch.int32.itemsize + 2 * torch.bool.itemsize)

    def admit(self, admission: Admission) -> None:
        """A sequence takes a row: its wishes replace those of whoever had it before."""
        row, params = admission.row, admission.sampling_params
        self._temperature[row] = params.temperature
        self._top_k[row] = min(params.top_k, self._vocab_size) if params.top_k > 0 else self._vocab_size
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seeds[row] = (admission.seed + 2**63) % 2**64 - 2**63  # seed + index may leave 64 bits
        self._repetition[row] = params.repetition_penalty
        self._frequency[row] = params.frequency_penalty
        self._presence[row] = params.presence_penalty
        self._bias[row] = dict(params.logit_bias or {})
        self._allowed.pop(row, None)
        if params.allowed_token_ids is not None:
            mask = torch.zeros(self._vocab_size, dtype=torch.bool)
            mask[list(params.allowed_token_ids)] = True
            self._allowed[row] = to_device(mask.numpy(), self._device)
        for wanted, wishes in (
            (params.logprobs, self._num_logprobs),
            (params.prompt_logprobs, self._num_prompt_logprobs),
        ):
            wishes.pop(row, None)
            if wanted is not None:
                wishes[row] = self._vocab_size if wanted == -1 else min(wanted, self._vocab_size)
        plain = params.temperature < GREEDY_BELOW and not (
            params.has_penalties or params.logit_bias or params.allowed_token_ids is not None
        )
        if plain and params.logprobs is None:
            self._wishing.discard(row)
        else:
            self._wishing.add(row)
        if params.has_penalties:
            if self._counts is None:
                self._counts = TokenCounts(self._num_rows, self._vocab_size, self._device)
            self._counts.begin(row, admission.prompt_token_ids, admission.output_token_ids)

    def take_largest(self, samples: Sequence[Sample]) -> bool:
        """Whether each of these samples is simply the most likely token, and nothing else is asked about it."""
        banning = [sample for sample in samples if sample.banned_token_ids]
        return not banning and self._wishing.isdisjoint([sample.row for sample in samples])

    def inputs(self, samples: Sequence[Sample], positions: np.ndarray) -> SamplingInputs:
        """What the sampler needs to know.

        Args:
            samples: the S samples of a step.
            positions: [S], the position that each sampled token will have.
        """
        rows = np.array([sample.row for sample in samples], np.int64)
        temperature, top_k, top_p, min_p = (
            wish[rows] for wish in (self._temperature, self._top_k, self._top_p, self._min_p)
        )
        return SamplingInputs(
            temperature=self._tensor(temperature),
            top_k=self._tensor(top_k),
            top_p=self._tensor(top_p),
            min_p=self._tensor(min_p),
            seeds=self._tensor(self._seeds[rows]),
            positions=self._tensor(positions),
            all_greedy=bool((temperature < GREEDY_BELOW).all()),
            any_truncated=bool((top_k < self._vocab_size).any() or (top_p < 1).any()),
            any_min_p=bool((min_p > 0).any()),
            allowed=self._allowed_rows(rows),
            edits=self._edits(samples),
            penalties=self._penalties(rows),
        )

    def num_logprobs(self, rows: Sequence[int]) -> int | None:
        """Most likely tokens that one of these rows wants beside each sampled token; None if none wants any."""
        return max((self._num_logprobs[row] for row in rows if row in self._num_logprobs), default=None)

    def num_prompt_logprobs(self, rows: Sequence[int]) -> int | None:
        """The same for the tokens of their prompts."""
        return max((self._num_prompt_logprobs[row] for row in rows), default=None)

    def count(self, rows: Tensor, token_ids: Tensor) -> None:
        """Note sampled tokens; rows and token_ids [S] int64 on the device."""
        if self._counts is not None:
            self._counts.add(rows, token_ids)

    def _allowed_rows(self, rows: np.ndarray) -> Allowed | None:
        found = [i for i, row in enumerate(rows.tolist()) if row in self._allowed] if self._allowed else []
        if not found:
            return None
        masks = torch.stack([self._allowed[int(rows[i])] for i in found])
        return Allowed(self._tensor(np.array(found, np.int64)), masks)

    def _edits(self, samples: Sequence[Sample]) -> Edits | None:
        """Biases, and minus infinity for what is banned."""
        edits = [
            (i, token, value)
            for i, sample in enumerate(samples)
            for token, value in (
                *self._bias[sample.row].items(),
                *((banned, -np.inf) for banned in sample.banned_token_ids),
            )
        ]
        if not edits:
            return None
        rows, tokens, values = zip(*edits, strict=True)
        return Edits(
            self._tensor(np.array(rows, np.int64)),
            self._tensor(np.array(tokens, np.int64)),
            self._tensor(np.array(values, np.float32)),
        )

    def _penalties(self, rows: np.ndarray) -> Penalties | None:
        repetition, frequency, presence = self._repetition[rows], self._frequency[rows], self._presence[rows]
        if self._counts is None or not ((repetition != 1) | (frequency != 0) | (presence != 0)).any():
            return None
        place = self._tensor(rows)
        return Penalties(
            repetition=self._tensor(repetition),
            frequency=self._tensor(frequency),
            presence=self._tensor(presence),
            prompt_seen=self._counts.prompt_seen[place],
            output_counts=self._counts.output_counts[place],
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self._device)
