"""The baseline: static batching over a contiguous cache, greedy, one batch after another.

    take the next `num_rows` requests  ->  run them together until the last one has ended  ->  take the next

Whoever ends early keeps its row until then, and every row is as long as the longest sequence that might come: that is
where the memory goes. The model is transformers' own; only its attention function is ours, and it is as naive as the
rest: write K and V into the rows, multiply with the whole of them, mask, softmax.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from reference.cache import ContiguousCache
from reference.reservation import ContiguousPool


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: its tokens, and when its answer ends."""

    request_id: str
    token_ids: tuple[int, ...]
    max_tokens: int
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request got.

    Attributes:
        token_ids: the sampled tokens.
        finish_reason: "stop" after an end-of-sequence token, else "length".
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Held:
    """What one request holds of the pool during a step; the first `num_tokens` slots of it are written."""

    request_id: str
    first_slot: int
    num_slots: int
    num_tokens: int
    finished: bool


@dataclass(frozen=True, slots=True)
class StepLog:
    """The pool during one step, after the step's K and V are written."""

    held: tuple[Held, ...]
    num_running: int
    num_waiting: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """The answers, in the order of the prompts, and what it took."""

    answers: tuple[Answer, ...]
    steps: tuple[StepLog, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class CallInfo:
    """What the attention function has to know of one forward pass over [B, T] tokens.

    Attributes:
        positions: [B, T].
        real: [B, T], False for padding, which is not written and whose output nobody reads.
        num_keys: slots of a row that anybody attends to.
    """

    cache: ContiguousCache
    positions: Tensor
    real: Tensor
    num_keys: int


def contiguous_attention(
    module: nn.Module,
    query: Tensor,  # [B, Hq, T, D]
    key: Tensor,  # [B, Hkv, T, D]
    value: Tensor,  # [B, Hkv, T, D]
    attention_mask: Tensor | None,
    *,
    scaling: float,
    call: CallInfo,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention over the rows of the cache, in the model's dtype."""
    layer: int = getattr(module, "layer_idx")  # noqa: B009 (mypy takes attributes of modules for tensors)
    rows, columns = call.real.nonzero(as_tuple=True)
    positions = call.positions[rows, columns]
    call.cache.write(layer, rows, positions, key[rows, :, columns], value[rows, :, columns])

    batch, num_heads, num_queries = query.shape[:3]
    keys = call.cache.keys[layer][:batch, : call.num_keys].transpose(1, 2)  # [B, Hkv, K, D]
    values = call.cache.values[layer][:batch, : call.num_keys].transpose(1, 2)
    grouped = query.reshape(batch, keys.shape[1], -1, num_queries, query.shape[3])  # [B, Hkv, G, T, D]
    scores = torch.einsum("bhgtd,bhkd->bhgtk", grouped, keys) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = call.positions[:, :, None] - torch.arange(call.num_keys, device=query.device)  # [B, T, K]
    hidden = distance < 0
    if sliding_window is not None:
        hidden = hidden | (distance >= sliding_window)
    scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).reshape(1, keys.shape[1], -1, 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., : call.num_keys]
    out = torch.einsum("bhgtk,bhkd->bthgd", weights, values)  # [B, T, Hkv, G, D]
    return out.reshape(batch, num_queries, num_heads, -1), None


NAME = "reference_contiguous"
AttentionInterface.register(NAME, contiguous_attention)


class ReferenceEngine:
    """Static batching of one model over a contiguous cache.

    Args:
        model: transformers' causal LM, in evaluation mode.
        num_rows: requests in a batch, and rows of the cache.
        max_model_len: slots of each row.
        eos_token_ids: tokens that end an answer; None takes the model's generation config's.

    Example (the model folder is any that transformers loads):
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("folder")                       # doctest: +SKIP
        >>> engine = ReferenceEngine(model, num_rows=4, max_model_len=1024)              # doctest: +SKIP
        >>> engine.generate([Prompt("a", (5, 6, 7), max_tokens=8)]).answers[0].token_ids # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_rows: int,
        max_model_len: int,
        eos_token_ids: Collection[int] | None = None,
    ) -> None:
        self.model = model
        self.cache = ContiguousCache(
            model.config, num_rows=num_rows, max_model_len=max_model_len, dtype=model.dtype, device=model.device
        )
        self.pool = ContiguousPool(num_rows * max_model_len)
        eos = model.generation_config.eos_token_id if eos_token_ids is None else eos_token_ids
        self._eos_token_ids = {eos} if isinstance(eos, int) else set(eos or ())

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt]) -> Run:
        """Answer all prompts.

        Raises:
            ValueError: a prompt and its answer are longer than a row.
        """
        for prompt in prompts:
            length = len(prompt.token_ids) + prompt.max_tokens
            if not prompt.token_ids or length > self.cache.max_model_len:
                raise ValueError(
                    f"request {prompt.request_id!r} has {len(prompt.token_ids)} tokens and wants "
                    f"{prompt.max_tokens} more; a row has {self.cache.max_model_len} slots"
                )
        self.model.set_attn_implementation(NAME)
        started = time.perf_counter()
        answers: list[Answer] = []
        steps: list[StepLog] = []
        size = self.cache.num_rows
        for first in range(0, len(prompts), size):
            waiting = max(0, len(prompts) - first - size)
            answers += self._run_batch(prompts[first : first + size], waiting, steps)
        return Run(tuple(answers), tuple(steps), time.perf_counter() - started)

    def _run_batch(self, prompts: Sequence[Prompt], num_waiting: int, steps: list[StepLog]) -> list[Answer]:
        """Run some prompts together until all have ended."""
        reserved = [self.pool.reserve(prompt.request_id, self.cache.max_model_len) for prompt in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        reasons: list[str | None] = [None for _ in prompts]
        fresh = [list(prompt.token_ids) for prompt in prompts]  # tokens whose K and V do not exist yet
        written = [0 for _ in prompts]
        while not all(reasons):
            logits = self._forward(fresh, written)
            best = logits.argmax(dim=-1).tolist()
            written = [n + len(tokens) for n, tokens in zip(written, fresh, strict=True)]
            held = tuple(
                Held(r.request_id, r.first_slot, r.num_slots, n, reason is not None)
                for r, n, reason in zip(reserved, written, reasons, strict=True)
            )
            num_tokens = sum(len(tokens) for tokens in fresh)
            steps.append(StepLog(held, reasons.count(None), num_waiting, num_tokens))
            for i, prompt in enumerate(prompts):
                fresh[i] = []
                if reasons[i] is None:
                    token = best[i]
                    outputs[i].append(token)
                    reasons[i] = self._reason(prompt, outputs[i])
                    fresh[i] = [] if reasons[i] else [token]
        for prompt in prompts:
            self.pool.release(prompt.request_id)
        return [
            Answer(prompt.request_id, prompt.token_ids, tuple(output), str(reason))
            for prompt, output, reason in zip(prompts, outputs, reasons, strict=True)
        ]

    def _forward(self, fresh: list[list[int]], written: list[int]) -> Tensor:
        """[B, V]: the logits after each row's last fresh token. Rows without one are computed all the same."""
        device = self.model.device
        width = max(len(tokens) for tokens in fresh)
        token_ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in fresh], device=device)
        lengths = torch.tensor([len(tokens) for tokens in fresh], device=device)
        columns = torch.arange(width, device=device)
        real = columns < lengths[:, None]
        positions = torch.where(real, torch.tensor(written, device=device)[:, None] + columns, 0)
        num_keys = max(n + len(tokens) for n, tokens in zip(written, fresh, strict=True) if tokens)
        output = self.model(
            input_ids=token_ids,
            position_ids=positions,
            use_cache=False,
            call=CallInfo(self.cache, positions, real, num_keys),
        )
        logits: Tensor = output.logits[torch.arange(len(fresh), device=device), (lengths - 1).clamp(min=0)]
        return logits

    def _reason(self, prompt: Prompt, output: list[int]) -> str | None:
        if output[-1] in self._eos_token_ids and not prompt.ignore_eos:
            return "stop"
        return "length" if len(output) == prompt.max_tokens else None
