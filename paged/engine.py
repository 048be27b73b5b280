"""The engine: the loop that turns requests into tokens.

    add_request ->  schedule -> run -> update -> outputs  -> ...   one `step` at a time, until nobody is left

The scheduler decides in integers, the runner computes with tensors, and this file only carries one's results to the
other, detokenizes, and looks for stop strings.
"""

import hashlib
import operator
import reprlib
from collections.abc import Iterable
from typing import SupportsIndex

from paged.config import EngineConfig
from paged.memory.events import StepEvent, take_event
from paged.model import ModelRunner, load_model
from paged.outputs import CompletionOutput, RequestOutput
from paged.request import FinishReason, Request, Sequence
from paged.sampling import Detokenizer
from paged.sampling_params import SamplingParams
from paged.scheduler import Scheduler


class Engine:
    """Serves requests from one model over one pool of KV blocks.

    Args:
        config: every setting.

    Attributes:
        config: the settings, with what the model decides filled in.
        tokenizer: the model's, or None.
        scheduler: queues, blocks and counters.
        runner: the model and its pool.
        events: what the pool held at every step, kept only after `record_events()`.

    Example (see `LLM` for the short way):
        >>> engine = Engine(EngineConfig(model="tiny"))                                   # doctest: +SKIP
        >>> engine.add_request("a", "To be, or", SamplingParams(temperature=0))           # doctest: +SKIP
        >>> while engine.has_unfinished_requests:                                         # doctest: +SKIP
        ...     outputs = engine.step()
    """

    def __init__(self, config: EngineConfig) -> None:
        loaded = load_model(config)
        self.config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.vocab_size = loaded.vocab_size
        self.generation_config = loaded.generation_config
        self._eos_token_ids = loaded.eos_token_ids
        self.runner = ModelRunner(loaded)
        assert self.config.max_model_len is not None, "filled in when the model was loaded"
        assert self.config.max_num_batched_tokens is not None, "filled in when the model was loaded"
        self.max_model_len = self.config.max_model_len
        self.scheduler = Scheduler(
            num_blocks=self.runner.num_blocks,
            block_size=self.config.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            spare_blocks_per_seq=self.config.spare_blocks_per_seq,
        )
        self.events: list[StepEvent] | None = None
        self._detokenizers: dict[str, Detokenizer] = {}
        self._num_arrivals = 0

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished

    def record_events(self) -> list[StepEvent]:
        """Note from now on what the pool holds at every step; returns the list that grows."""
        self.events = []
        return self.events

    def add_request(
        self, request_id: str, prompt: str | Iterable[SupportsIndex], sampling_params: SamplingParams | None = None
    ) -> None:
        """Queue a request.

        Args:
            request_id: a name that no unfinished request has.
            prompt: a text, or token ids.
            sampling_params: its wishes; None for the defaults.

        Raises:
            ValueError: the prompt is empty, too long, or holds an unknown token; the wishes do not fit the model; or
                the request can never fit the pool. Nothing is queued then.
        """
        params = self.default_sampling_params() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"request {request_id!r} brings {params!r} where SamplingParams are wanted")
        token_ids = self._tokenize(request_id, prompt)
        self._check(request_id, token_ids, params)
        room = self.max_model_len - len(token_ids)
        request = Request(
            request_id,
            token_ids,
            params,
            block_table=self.scheduler.new_block_table(),
            seed=self._seed(params),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            eos_token_ids=self._eos_token_ids,
            prompt=prompt if isinstance(prompt, str) else None,
        )
        self.scheduler.add(request)
        self._num_arrivals += 1
        if self.tokenizer is not None:
            self._detokenizers[request_id] = Detokenizer(self.tokenizer, request.prompt_token_ids, params.stop_strings)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request and free its blocks. None if no such request is unfinished."""
        request = self.scheduler.abort(request_id)
        return None if request is None else self._output(request)

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the requests that got a token, with all their tokens so far."""
        step = self.scheduler.schedule()
        if step is None:
            return []
        if self.events is not None:
            self.events.append(take_event(step, self.scheduler))
        token_ids = self.runner.run(step)
        grown = self.scheduler.update(step, token_ids)
        for request, sequence in grown:
            self._detokenize(request, sequence)
        return [self._output(request) for request, _ in grown]

    def default_sampling_params(self) -> SamplingParams:
        """The wishes of a request that brings none: the checkpoint's, or neutral with `generation_config="vllm"`."""
        if self.config.generation_config == "vllm":
            return SamplingParams()
        stated = self.generation_config.to_diff_dict()
        names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_new_tokens": "max_tokens"}
        return SamplingParams(**{ours: stated[theirs] for theirs, ours in names.items() if theirs in stated})

    def _tokenize(self, request_id: str, prompt: str | Iterable[SupportsIndex]) -> list[int]:
        if not isinstance(prompt, str):
            try:
                return [_token_id(token) for token in prompt]
            except TypeError as error:
                raise ValueError(
                    f"request {request_id!r} brings {reprlib.repr(prompt)}; a text or token ids are wanted: {error}"
                ) from error
        if self.tokenizer is None:
            raise ValueError(
                f"request {request_id!r} brings a text and the engine has no tokenizer (skip_tokenizer_init=True); "
                "give token ids"
            )
        try:
            return list(self.tokenizer(prompt)["input_ids"])
        except (TypeError, UnicodeError) as error:
            raise ValueError(f"request {request_id!r} brings a text that cannot be encoded: {error}") from error

    def _check(self, request_id: str, token_ids: list[int], params: SamplingParams) -> None:
        """Refuse a prompt or wishes that the model cannot serve."""
        if not token_ids:
            raise ValueError(f"request {request_id!r} has an empty prompt; give at least one token")
        for token in (*token_ids, *(params.stop_token_ids or ())):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"request {request_id!r} holds token id {token!r}, and the model has ids 0 to {self.vocab_size - 1}"
                )
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"request {request_id!r} has a prompt of {len(token_ids)} tokens, which leaves no room for output in "
                f"max_model_len={self.max_model_len}; shorten it to at most {self.max_model_len - 1}"
            )
        if params.stop_strings and self.tokenizer is None:
            raise ValueError(
                f"request {request_id!r} has stop strings and the engine has no tokenizer to find them with"
            )

    def _seed(self, params: SamplingParams) -> int:
        """A request's own seed, or one drawn from the engine's seed and the number of its arrival."""
        if params.seed is not None and params.seed != -1:
            return params.seed
        return _mixed(self.config.seed, self._num_arrivals)

    def _detokenize(self, request: Request, sequence: Sequence) -> None:
        """Bring the text up to date with the sequence's last token, and end the sequence at a stop string."""
        detokenizer = self._detokenizers.get(request.request_id)
        if detokenizer is None:
            return
        ended_by_token = sequence.finish_reason is FinishReason.STOP
        if not ended_by_token:  # a token that ends the output is no part of its text
            detokenizer.append(sequence.token_ids[-1])
        if sequence.is_finished:
            detokenizer.finish()
        if detokenizer.stop_string is not None:
            sequence.stop_reason = detokenizer.stop_string
            if sequence.is_finished:
                sequence.finish_reason = FinishReason.STOP
            else:
                self.scheduler.finish(request, FinishReason.STOP, detokenizer.stop_string)

    def _output(self, request: Request) -> RequestOutput:
        detokenizer = self._detokenizers.get(request.request_id)
        if request.is_finished:
            self._detokenizers.pop(request.request_id, None)
        completions = tuple(
            CompletionOutput(
                index=sequence.index,
                text="" if detokenizer is None else detokenizer.text,
                token_ids=tuple(sequence.output_token_ids),
                finish_reason=None if sequence.finish_reason is None else sequence.finish_reason.value,
                stop_reason=sequence.stop_reason,
            )
            for sequence in request.sequences
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=completions,
            finished=request.is_finished,
            num_preemptions=request.num_preemptions,
        )


def _token_id(token: SupportsIndex) -> int:
    """A token id as a plain integer, whether it came from a list, an array or a tensor."""
    if isinstance(token, bool):
        raise TypeError("a bool is no token id")
    return operator.index(token)


def _mixed(seed: int, arrival: int) -> int:
    """A 64-bit seed from two numbers, different for each arrival and far from every other engine seed's."""
    digest = hashlib.blake2b(f"{seed} {arrival}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
