"""Every knob and its default, in one place. Names and meanings are those of vLLM's engine arguments."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_per_head", "int8", "int8_per_token_head")
ATTENTION_FORMS = ("auto", "gathered", "fused", "flex")
SCHEDULING_POLICIES = ("fcfs", "priority")
PREEMPTION_MODES = ("recompute", "swap")
GENERATION_CONFIGS = ("auto", "vllm")

# Without a limit of its own, a step takes this many tokens, or one whole sequence if that is more.
DEFAULT_BATCHED_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine.

    Args:
        model: "tiny" (the model that ships with the package), a local folder, or a name on the model hub.
        tokenizer: folder or name, if it is not the model's.
        skip_tokenizer_init: load no tokenizer; prompts are token ids and outputs have no text.
        trust_remote_code, revision: handed to transformers.
        dtype: of weights and computation; "auto" takes the checkpoint's, float32 on a CPU.
        kv_cache_dtype: what K and V are stored in. "auto" is `dtype`. "fp8" (or "fp8_e4m3") has one scale for the K and
            one for the V of a layer, "fp8_per_head" one for each KV head (not in vLLM), both found at start;
            "int8_per_token_head" (or "int8") stores one beside each token and head.
        device: "auto" takes a GPU if there is one.
        load_format: "auto" and "safetensors" load weights; "dummy" makes random ones from the config alone.
        generation_config: whether sampling wishes that are not given come from the model's generation_config.json
            ("auto") or are neutral ("vllm").
        seed: of dummy weights, and of the noise of requests that bring no seed.
        max_model_len: longest sequence, prompt and output; None takes the config's.
        block_size: tokens a block of KV memory holds.
        num_gpu_blocks_override: blocks of the pool, null and trash block included; overrides every other size.
        kv_cache_memory_bytes: bytes of the pool; overrides gpu_memory_utilization.
        gpu_memory_utilization: share of the GPU's whole memory that this engine may take: weights, largest step, CUDA
            graphs and pool. What other processes hold does not count, but so much has to be free at start; hence 1
            never is, because the CUDA context takes some.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step; None takes 4096, or what other settings need if that is more.
        enable_chunked_prefill: compute a prompt that does not fit one step in several.
        long_prefill_token_threshold: most tokens of one prompt in one step; 0 for no such limit.
        enable_prefix_caching: share the blocks of prompts that begin alike, also with earlier ones.
        scheduling_policy: "fcfs" (first come, first served) or "priority" (lower first, then order of arrival).
        preemption_mode: what becomes of the K and V of a preempted request: "recompute" throws them away; "swap" copies
            them to host memory, as long as that has room.
        swap_space: GiB of host memory to swap to.
        max_logprobs: most log probabilities that a request may want for each token; -1 for no such limit.
        spare_blocks_per_seq: free blocks that stay for each running sequence when another is admitted (not in vLLM).
        enforce_eager: run without torch.compile; None does so on a CPU, where no C++ compiler is asked for.
        attention_form: "gathered", "fused", "flex", or "auto": gathered when eager; when compiled, flex on a GPU if
            it can serve the model and the cache, and fused otherwise.
        enable_cascade_attention: read a prefix that many decodes share once for all of them, in the flex form, where
            that pays (vLLM's switch is disable_cascade_attn). Layers with a sliding window do without.
        cudagraph_capture_sizes: batch sizes for which decode steps are captured as CUDA graphs, in the flex form; None
            chooses them, an empty list captures none.
        cudagraph_capture_seconds: once so many have passed, no further size is captured (not in vLLM).
        async_scheduling: plan and launch a step while the one before it still runs, where its tokens only matter to the
            device (docs/design.md). None does so on a GPU, unless enforce_eager; a CPU runs the steps itself, so it
            gains nothing.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the range.

    Example:
        >>> EngineConfig(model="tiny", block_size=0)
        Traceback (most recent call last):
        ValueError: block_size must be an integer >= 1, got 0
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    generation_config: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    preemption_mode: str = "recompute"
    swap_space: float = 4
    max_logprobs: int = 20
    spare_blocks_per_seq: int = 1
    enforce_eager: bool | None = None
    attention_form: str = "auto"
    enable_cascade_attention: bool = True
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    cudagraph_capture_seconds: float = 40.0
    async_scheduling: bool | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs"):
            self._check_positive(name)
        for name in ("max_model_len", "num_gpu_blocks_override", "kv_cache_memory_bytes", "max_num_batched_tokens"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        for name, least in (("spare_blocks_per_seq", 0), ("long_prefill_token_threshold", 0), ("max_logprobs", -1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        switches = "skip_tokenizer_init", "trust_remote_code", "enable_chunked_prefill", "enable_prefix_caching"
        for name in (*switches, "enable_cascade_attention"):
            self._check_choice(name, (True, False))
        for name in ("enforce_eager", "async_scheduling"):
            self._check_choice(name, (True, False, None))
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            raise ValueError(f"tokenizer must be a folder or a hub name, got {self.tokenizer!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        utilization = self.gpu_memory_utilization
        if not isinstance(utilization, int | float) or not 0 < utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {utilization!r}")
        sizes = self.cudagraph_capture_sizes
        if sizes is not None and not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"cudagraph_capture_sizes must be integers >= 1, got {sizes!r}")
        seconds = self.cudagraph_capture_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
            raise ValueError(f"cudagraph_capture_seconds must be a number >= 0, got {seconds!r}")
        space = self.swap_space
        if isinstance(space, bool) or not isinstance(space, int | float) or not 0 < space < math.inf:
            raise ValueError(f"swap_space must be a number of GiB > 0, got {space!r}")
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be 'tiny', a folder or a hub name, got {self.model!r}")
        self._check_choice("dtype", DTYPES)
        self._check_choice("kv_cache_dtype", KV_CACHE_DTYPES)
        self._check_choice("load_format", LOAD_FORMATS)
        self._check_choice("scheduling_policy", SCHEDULING_POLICIES)
        self._check_choice("preemption_mode", PREEMPTION_MODES)
        self._check_choice("attention_form", ATTENTION_FORMS)
        self._check_choice("generation_config", GENERATION_CONFIGS)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "EngineConfig":
        """A config from keyword arguments as a user writes them: a path for a model, a torch.dtype for a dtype.

        Raises:
            ValueError: an argument that does not exist; the message lists those that do.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise ValueError(f"unknown engine argument {', '.join(unknown)}; there are: {', '.join(known)}")
        values = dict(arguments)
        for name in ("model", "tokenizer"):
            if isinstance(values.get(name), os.PathLike):
                values[name] = os.fspath(values[name])
        for name in ("dtype", "device"):
            if name in values:
                values[name] = str(values[name]).removeprefix("torch.")
        return cls(**values)

    def with_model_len(self, longest: int) -> "EngineConfig":
        """The same settings with `max_model_len` and `max_num_batched_tokens` filled in.

        Args:
            longest: tokens that the model's positions allow.

        Raises:
            ValueError: max_model_len is longer than that, or a step cannot hold the longest sequence.
        """
        length = longest if self.max_model_len is None else self.max_model_len
        if length > longest:
            raise ValueError(f"max_model_len={length} is longer than the {longest} tokens that the model allows")
        batched = self.max_num_batched_tokens
        if batched is None:
            batched = max(DEFAULT_BATCHED_TOKENS, self.max_num_seqs, 0 if self.enable_chunked_prefill else length)
        if batched < length and not self.enable_chunked_prefill:
            raise ValueError(
                f"max_num_batched_tokens={batched} is less than max_model_len={length}: without chunked prefill a "
                "prompt is computed in one step, so the step has to hold the longest; raise the one, lower the other, "
                "or set enable_chunked_prefill=True"
            )
        if batched < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={batched} is less than max_num_seqs={self.max_num_seqs}: a step could not "
                "hold one token of every sequence; raise the one or lower the other"
            )
        return replace(self, max_model_len=length, max_num_batched_tokens=batched)

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")

    def _check_choice(self, name: str, choices: tuple[str | bool | None, ...]) -> None:
        value = getattr(self, name)
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")
