"""The engine: the loop that turns requests into tokens.

    add_request ->  schedule -> launch -> result -> update -> outputs -> ...   a `step` at a time, until nobody is left

The scheduler decides in integers, the runner computes with tensors, and this file only carries one's results to the
other, and looks for stop strings in what comes out. A step that fails ends the requests in it, and nobody else's.

A GPU would be idle while the host reads what one step sampled and plans the next. So where the scheduler can plan the
next one without those tokens, that one is launched before they are read:

    host      plan 1, launch 1 | plan 2, launch 2 | read 1, outputs | plan 3, launch 3 | read 2, outputs | ...
    device                     [       step 1       ][       step 2                   ][       step 3    ...
"""

import hashlib
import logging
import operator
import reprlib
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, SupportsIndex

from paged.answers import Answers, BeamAnswers
from paged.beam_search import BeamSearch, num_candidates
from paged.config import EngineConfig
from paged.memory.events import StepEvent, take_event
from paged.model import MemoryLedger, ModelRunner, load_model
from paged.model.runner import StepInFlight, StepResult
from paged.outputs import RequestOutput
from paged.request import FinishReason, Request, Sequence
from paged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from paged.scheduler import Scheduler
from paged.step import Step

logger = logging.getLogger(__name__)


class Launched(NamedTuple):
    """A step whose result was not read yet.

    Attributes:
        step: the plan.
        flight: who knows its result; None if it failed already.
    """

    step: Step
    flight: StepInFlight | None


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
        num_steps: steps launched so far.
        num_overlapped_steps: those among them that were planned and launched while another was in flight.

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
        logger.info("%s", self.memory_ledger)
        assert self.config.max_model_len is not None, "filled in when the model was loaded"
        assert self.config.max_num_batched_tokens is not None, "filled in when the model was loaded"
        self.max_model_len = self.config.max_model_len
        self.scheduler = Scheduler(
            num_blocks=self.runner.num_blocks,
            block_size=self.config.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            num_host_blocks=self.runner.num_host_blocks,
            enable_chunked_prefill=self.config.enable_chunked_prefill,
            long_prefill_token_threshold=self.config.long_prefill_token_threshold,
            policy=self.config.scheduling_policy,
            enable_prefix_caching=self.config.enable_prefix_caching,
            sliding_window=self.runner.sliding_window,
            spare_blocks_per_seq=self.config.spare_blocks_per_seq,
        )
        self.events: list[StepEvent] | None = None
        self.num_steps = 0
        self.num_overlapped_steps = 0
        self._plans_ahead = self.config.async_scheduling
        if self._plans_ahead is None:
            self._plans_ahead = loaded.device.type == "cuda" and not self.config.enforce_eager
        self._in_flight: deque[Launched] = deque()  # oldest first, two at most
        self._answers: dict[str, Answers] = {}
        self._beams: dict[str, BeamAnswers] = {}
        self._num_arrivals = 0

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished

    @property
    def memory_ledger(self) -> MemoryLedger:
        """Where the memory goes, line by line; `str()` of it is a table."""
        return self.runner.memory_ledger

    def record_events(self) -> list[StepEvent]:
        """Note from now on what the pool holds at every step; returns the list that grows.

        Steps are planned one after another then, even with `async_scheduling`: what the pool holds during a step is
        only known once the one before it has ended.
        """
        self.events = []
        return self.events

    def add_request(
        self,
        request_id: str,
        prompt: str | Iterable[SupportsIndex],
        sampling_params: SamplingParams | BeamSearchParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queue a request.

        Args:
            request_id: a name that no unfinished request has.
            prompt: a text, or token ids.
            sampling_params: its wishes; None for the defaults. With BeamSearchParams it is a beam search, whose one
                output holds the answers, best first.
            priority: lower is served first, with `scheduling_policy="priority"`.
            cache_salt: share cached blocks only with requests of the same salt.

        Raises:
            ValueError: the prompt is empty, too long, or holds an unknown token; the wishes do not fit the model; or
                the request can never fit the pool. Nothing is queued then.
        """
        params = self.default_sampling_params() if sampling_params is None else sampling_params
        beams = None
        if isinstance(params, BeamSearchParams):
            beams, params = params, self._one_beam(request_id, params)
        if not isinstance(params, SamplingParams):
            raise ValueError(f"request {request_id!r} brings {params!r} where SamplingParams are wanted")
        token_ids = self._tokenize(request_id, prompt)
        if params.truncate_prompt_tokens is not None:
            most = params.truncate_prompt_tokens
            token_ids = token_ids[-(self.max_model_len - 1 if most == -1 else most) :]
        self._check(request_id, token_ids, params)
        if beams is None:
            self._check_logprobs(request_id, params)
        room = self.max_model_len - len(token_ids)
        request = Request(
            request_id,
            token_ids,
            params,
            block_table=self.scheduler.new_block_table(),
            seed=self._seed(params),
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            eos_token_ids=self._eos_token_ids,
            bad_words=self._bad_words(params),
            priority=priority,
            cache_salt=cache_salt,
            prompt=prompt if isinstance(prompt, str) else None,
            beam_width=None if beams is None else beams.beam_width,
        )
        self.scheduler.add(request)
        self._num_arrivals += 1
        if beams is None:
            self._answers[request_id] = Answers(request, self.tokenizer)
        else:
            search = BeamSearch(
                beams,
                num_prompt_tokens=len(token_ids),
                max_tokens=request.max_tokens,
                eos_token_ids=request.eos_token_ids,
            )
            self._beams[request_id] = BeamAnswers(request, search, self.tokenizer)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request and free its blocks. None if no such request is unfinished."""
        request = self.scheduler.abort(request_id)
        self._drop_useless_steps()
        return None if request is None else self._output(request)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block; False if nothing was done, because a request is running."""
        return self.scheduler.reset_prefix_cache()

    def step(self) -> list[RequestOutput]:
        """Bring one step to its end; before that, launch the one behind it if that can be planned already.

        Returns:
            The requests that got a token, as their `output_kind` wants it. If the model or the sampler fails, the
            requests of the step, ended with the reason "error".
        """
        if not self._in_flight:
            step = self.scheduler.schedule()
            if step is None:
                return []
            if self.events is not None:
                self.events.append(take_event(step, self.scheduler))
            self._launch(step)
        launched = self._in_flight[0]
        if self._plans_ahead and self.events is None and len(self._in_flight) == 1 and launched.flight is not None:
            ahead = self.scheduler.schedule_ahead(launched.step)
            if ahead is not None:
                self.num_overlapped_steps += 1
                self._launch(ahead)
        outputs = self._end(launched)
        self._drop_useless_steps()
        return outputs

    def _launch(self, step: Step) -> None:
        self.num_steps += 1
        flight = None
        try:
            flight = self.runner.launch(step)
        except Exception:  # its requests are told when its turn comes: the step before it may have to be read first
            _log_failure(step)
        self._in_flight.append(Launched(step, flight))

    def _end(self, launched: Launched) -> list[RequestOutput]:
        """Read what the oldest step in flight brought, and hand it out."""
        step, result = launched.step, None
        if launched.flight is not None:
            try:
                result = launched.flight.result()
            except Exception:
                _log_failure(step)
        self._in_flight.popleft()
        if result is None:
            return [self._output(request) for request in self.scheduler.fail(step)]
        if result.prompt_logprobs:
            self._take_prompt_logprobs(step, result)
        grown: dict[str, Request] = {}
        owners = self.scheduler.update(step, result.token_ids)
        for i, (owner, token) in enumerate(zip(owners, result.token_ids, strict=True)):
            if owner is not None:
                request, sequence = owner
                grown[request.request_id] = request
                if token is not None:
                    self._append(request, sequence, result, i)
        for request in grown.values():
            if request.is_beam_search and not request.is_finished:
                self._branch(request)
        return [
            self._output(request) for request in grown.values() if not request.is_told_at_end or request.is_finished
        ]

    def _drop_useless_steps(self) -> None:
        """Forget what is in flight if nobody is left whom it could bring anything."""
        if not self.scheduler.has_unfinished:
            self._in_flight.clear()

    def default_sampling_params(self) -> SamplingParams:
        """The wishes of a request that brings none: the checkpoint's, or neutral with `generation_config="vllm"`."""
        if self.config.generation_config == "vllm":
            return SamplingParams()
        stated = self.generation_config.to_diff_dict()
        same = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        names = {**{name: name for name in same}, "max_new_tokens": "max_tokens"}
        found = {ours: stated.get(theirs) for theirs, ours in names.items()}
        return SamplingParams(**{name: value for name, value in found.items() if value is not None})

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
        named = (*(params.stop_token_ids or ()), *(params.logit_bias or ()), *(params.allowed_token_ids or ()))
        for token in (*token_ids, *named):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"request {request_id!r} holds token id {token!r}, and the model has ids 0 to {self.vocab_size - 1}"
                )
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"request {request_id!r} has a prompt of {len(token_ids)} tokens, which leaves no room for output in "
                f"max_model_len={self.max_model_len}; shorten it to at most {self.max_model_len - 1}"
            )
        for name in ("stop_strings", "bad_words"):
            if getattr(params, name) and self.tokenizer is None:
                raise ValueError(
                    f"request {request_id!r} has {name.replace('_', ' ')} and the engine has no tokenizer to find them "
                    "with"
                )

    def _check_logprobs(self, request_id: str, params: SamplingParams) -> None:
        """Refuse more log probabilities than the engine gives. (Beams take as many as they need to be compared.)"""
        most = self.config.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and most != -1 and (wanted == -1 or wanted > most):
                raise ValueError(
                    f"request {request_id!r} wants {name}={wanted} and the engine gives at most max_logprobs={most}; "
                    "raise that, or set it to -1 for no limit"
                )

    def _seed(self, params: SamplingParams) -> int:
        """A request's own seed, or one drawn from the engine's seed and the number of its arrival."""
        if params.seed is not None:
            return params.seed
        return _mixed(self.config.seed, self._num_arrivals)

    def _append(self, request: Request, sequence: Sequence, result: StepResult, index: int) -> None:
        """Take in a sampled token, and end its sequence if its text now holds a stop string."""
        logprobs = None if result.logprobs is None else result.logprobs[index]
        if request.is_beam_search:
            assert logprobs is not None, "beams are chosen by them"
            self._beams[request.request_id].append(logprobs)
            return
        stop = self._answers[request.request_id].append(sequence, logprobs)
        if stop is None:
            return
        if sequence.is_finished:
            sequence.finish_reason, sequence.stop_reason = FinishReason.STOP, stop
        else:
            self.scheduler.finish(request, FinishReason.STOP, stop, only=sequence)

    def _branch(self, request: Request) -> None:
        """All beams of a search were computed: let the best go on."""
        branches = self._beams[request.request_id].advance()
        if branches is None:
            self.scheduler.finish(request, FinishReason.LENGTH)
        else:
            self.scheduler.branch(request, branches)

    def _one_beam(self, request_id: str, beams: BeamSearchParams) -> SamplingParams:
        """What every single beam of a search wishes for."""
        num_eos = 0 if beams.ignore_eos else len(self._eos_token_ids)
        wanted = num_candidates(beams.beam_width, num_eos)
        if wanted > self.vocab_size:
            raise ValueError(
                f"request {request_id!r} wants beam_width={beams.beam_width}, which takes {wanted} candidates of each "
                f"beam, and the model has {self.vocab_size} tokens; lower it"
            )
        return SamplingParams(
            temperature=beams.temperature,
            max_tokens=beams.max_tokens,
            ignore_eos=beams.ignore_eos,
            logprobs=wanted,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _take_prompt_logprobs(self, step: Step, result: StepResult) -> None:
        first = 0
        for row in step.rows:
            if row.prompt_targets:
                last = first + len(row.prompt_targets)
                if self.scheduler.owner(row) is not None:
                    self._answers[row.request_id].add_prompt_logprobs(row.start + 1, result.prompt_logprobs[first:last])
                first = last

    def _bad_words(self, params: SamplingParams) -> list[tuple[int, ...]]:
        """Bad words as tokens, each as it is written at the start of a text and, if that differs, behind a space."""
        words = []
        for word in params.bad_words or ():
            for text in (word.lstrip(), f" {word.lstrip()}"):
                tokens = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[misc]
                if tokens not in words:
                    words.append(tokens)
        return words

    def _output(self, request: Request) -> RequestOutput:
        by_name: dict[str, Answers] | dict[str, BeamAnswers]
        by_name = self._beams if request.is_beam_search else self._answers
        answers = by_name[request.request_id]
        if request.is_finished:
            del by_name[request.request_id]
        return answers.output()


def _log_failure(step: Step) -> None:
    logger.exception("a step of %d tokens failed; its requests end with an error", step.num_tokens)


def _token_id(token: SupportsIndex) -> int:
    """A token id as a plain integer, whether it came from a list, an array or a tensor."""
    if isinstance(token, bool):
        raise TypeError("a bool is no token id")
    return operator.index(token)


def _mixed(seed: int, arrival: int) -> int:
    """A 64-bit seed from two numbers, different for each arrival and far from every other engine seed's."""
    digest = hashlib.blake2b(f"{seed} {arrival}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
