"""LLM: the face a user sees, with vLLM's names."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from paged.config import EngineConfig
from paged.engine import Engine
from paged.model import MemoryLedger
from paged.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from paged.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

Prompt = str | Mapping[str, Any]
Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A model that answers many prompts at once.

    Args:
        model: "tiny" (ships with the package), a local folder, or a hub name.
        arguments: every other setting of `EngineConfig`, by keyword.

    Raises:
        ModelNotFound, UnsupportedModel: the model is not there, or cannot be paged.
        ValueError: a setting out of its range.

    Example:
        >>> llm = LLM(model="tiny", max_model_len=256)                                     # doctest: +SKIP
        >>> outputs = llm.generate(["To be, or not"], SamplingParams(temperature=0))       # doctest: +SKIP
        >>> outputs[0].outputs[0].text                                                     # doctest: +SKIP
    """

    def __init__(self, model: str, **arguments: Any) -> None:
        self.engine = Engine(EngineConfig.from_arguments({"model": model, **arguments}))
        self._num_requests = 0

    @property
    def memory_ledger(self) -> MemoryLedger:
        """Where the engine's memory goes, line by line; `print(llm.memory_ledger)` shows a table."""
        return self.engine.memory_ledger

    def get_tokenizer(self) -> Any:
        """The tokenizer, None with `skip_tokenizer_init=True`."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given no sampling_params."""
        return self.engine.default_sampling_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer prompts.

        Args:
            prompts: one or many; each a text, {"prompt": text} or {"prompt_token_ids": [...]}.
            sampling_params: one for all prompts, or one for each; None for the model's defaults.
            use_tqdm: show progress, on a terminal only.

        Returns:
            One output for each prompt, in their order.

        Raises:
            ValueError: a prompt or its wishes cannot be served. Then nothing is generated, and the LLM stays usable.
        """
        prompt_list = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params_list = [
            replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
            for params in self._params_for(prompt_list, sampling_params)
        ]
        return self._answer(prompt_list, params_list, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """Search the likeliest answers, instead of drawing one token after another.

        Args:
            prompts, use_tqdm: as in `generate`.
            params: width, length and scoring, for all prompts.

        Returns:
            One output for each prompt, in their order; its `sequences` are the `beam_width` best answers, best first.

        Raises:
            ValueError: as in `generate`, or a beam_width that the engine or the vocabulary is too small for.

        Example:
            >>> (output,) = llm.beam_search("To be, or", BeamSearchParams(4, max_tokens=8))      # doctest: +SKIP
            >>> [(beam.text, beam.cum_logprob) for beam in output.sequences]                     # doctest: +SKIP
        """
        if not isinstance(params, BeamSearchParams):
            raise ValueError(f"beam_search wants BeamSearchParams, got {params!r}")
        prompt_list = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        outputs = self._answer(prompt_list, [params] * len(prompt_list), use_tqdm=use_tqdm)
        return [BeamSearchOutput(tuple(self._beams(output))) for output in outputs]

    def _beams(self, output: RequestOutput) -> Iterator[BeamSearchSequence]:
        """The answers of a beam search as vLLM gives them: prompt and output together."""
        tokenizer = self.get_tokenizer()
        for answer in output.outputs:
            tokens = (*output.prompt_token_ids, *answer.token_ids)
            yield BeamSearchSequence(
                tokens=tokens,
                text=None if tokenizer is None else tokenizer.decode(tokens),
                cum_logprob=answer.cumulative_logprob or 0.0,
                score=answer.score,
                logprobs=answer.logprobs or (),
                finish_reason=answer.finish_reason,
            )

    def _answer(
        self,
        prompts: Sequence[Prompt],
        params_list: Sequence[SamplingParams | BeamSearchParams],
        *,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Run requests to their end."""
        if self.engine.has_unfinished_requests:
            raise ValueError(
                "the engine has unfinished requests that this call did not add; run them to their end with "
                "engine.step, or abort them"
            )
        request_ids: list[str] = []
        finished: dict[str, RequestOutput] = {}
        try:
            for prompt, params in zip(prompts, params_list, strict=True):
                request_id = str(self._num_requests)
                self._num_requests += 1
                self.engine.add_request(request_id, _content(prompt), params)
                request_ids.append(request_id)
            self._run(finished, len(request_ids), use_tqdm)
        finally:
            # After an error or Ctrl-C nothing of this call stays in the engine.
            for request_id in request_ids:
                if request_id not in finished:
                    self.engine.abort_request(request_id)
        return [finished[request_id] for request_id in request_ids]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations.

        Args:
            messages: one conversation or many; each a list of {"role": ..., "content": ...}.
            sampling_params, use_tqdm: as in `generate`.
            chat_template: how a conversation becomes a text (Jinja); None for the tokenizer's own.
            add_generation_prompt: end the text with the beginning of an answer.
            continue_final_message: leave the last message open, to be gone on with.
            tools: descriptions that the template may use.
            chat_template_kwargs: whatever else it may use.

        Raises:
            ValueError: no tokenizer, no template, a conversation that the template refuses, or as in `generate`.
        """
        tokenizer = self.get_tokenizer()
        if tokenizer is None:
            raise ValueError("chat needs a tokenizer (skip_tokenizer_init=True was given); use generate with token ids")
        if chat_template is None and tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; give one with chat_template=, or use generate")
        single = bool(messages) and isinstance(messages[0], Mapping)
        prompts = []
        for conversation in [messages] if single else messages:
            try:
                text = tokenizer.apply_chat_template(
                    conversation,
                    tools=tools,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=False,
                    **(chat_template_kwargs or {}),
                )
            except Exception as error:  # a template is a program of its own, and may raise anything
                raise ValueError(f"the chat template refuses {reprlib.repr(conversation)}: {error}") from error
            # The template writes the special tokens itself.
            prompts.append({"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _run(self, finished: dict[str, RequestOutput], total: int, use_tqdm: bool) -> None:
        num_input = num_output = 0
        # disable=None is tqdm's way to say: only on a terminal.
        with tqdm(total=total, desc="Processed prompts", disable=None if use_tqdm else True) as bar:
            while self.engine.has_unfinished_requests:
                for output in self.engine.step():
                    if output.finished:
                        finished[output.request_id] = output
                        num_input += len(output.prompt_token_ids)
                        num_output += sum(len(completion.token_ids) for completion in output.outputs)
                        seconds = max(bar.format_dict["elapsed"], 1e-9)
                        bar.set_postfix_str(
                            f"est. speed input: {num_input / seconds:.2f} toks/s, "
                            f"output: {num_output / seconds:.2f} toks/s",
                            refresh=False,
                        )
                        bar.update(1)

    def _params_for(
        self, prompts: list[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * len(prompts)
        if not isinstance(sampling_params, Sequence) or isinstance(sampling_params, str):
            raise ValueError(
                f"sampling_params must be a SamplingParams or a list of them, got {sampling_params!r}; "
                "beam_search takes BeamSearchParams"
            )
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts and {len(sampling_params)} sampling_params were given; give one for all, or "
                "one for each"
            )
        for i, params in enumerate(sampling_params):
            if not isinstance(params, SamplingParams):
                raise ValueError(f"sampling_params[{i}] must be a SamplingParams, got {params!r}")
        return list(sampling_params)


def _content(prompt: Prompt) -> str | Sequence[int]:
    """The text or the token ids of a prompt."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        token_ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
        if token_ids is not None and not isinstance(token_ids, str):
            ids: Sequence[int] = token_ids
            return ids
        if isinstance(text, str):
            return text
    raise ValueError(f"a prompt is a text, {{'prompt': text}} or {{'prompt_token_ids': [...]}}; got {prompt!r}")
