"""Find a model, load it with transformers, and refuse what cannot be paged before its weights are read."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from paged.config import EngineConfig
from paged.model.memory_budget import check_share_is_free
from paged.model.memory_profile import DeviceMemory, snapshot
from paged.model.support import (
    ModelNotFound,
    check_backend,
    check_behaviour,
    check_class,
    check_layers,
    longest_sequence,
)
from paged.quantisation import stored_dtype

TINY = Path(__file__).parent.parent / "tiny"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what the engine has to know of it.

    Attributes:
        model: transformers' module, on its device, in evaluation mode.
        tokenizer: None if none was wanted.
        config: the engine's settings with everything the model decides filled in.
        vocab_size: token ids run from 0 to this less 1.
        eos_token_ids: tokens that end a sequence.
        generation_config: what the checkpoint says of sampling.
        memory_at_start: the GPU before the weights were loaded; None on a CPU.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    config: EngineConfig
    vocab_size: int
    eos_token_ids: frozenset[int]
    generation_config: GenerationConfig
    memory_at_start: DeviceMemory | None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def kv_dtype(self) -> torch.dtype:
        """What K and V are stored in."""
        return stored_dtype(self.config.kv_cache_dtype, self.dtype)


def load_model(config: EngineConfig) -> LoadedModel:
    """Load model and tokenizer as the settings say.

    Raises:
        ModelNotFound: the name or folder leads nowhere, or a file is missing.
        UnsupportedModel: the model cannot be paged.
        ValueError: max_model_len is longer than the model allows, or the device cannot do what is asked of it,
            or has not the share of its memory free that is asked for.
    """
    source = locate(config.model)
    hf_config = _load_config(source, config)
    check_class(hf_config)
    check_layers(hf_config)
    config = config.with_model_len(longest_sequence(hf_config))
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, hf_config, device)
    check_kv_cache_dtype(config, dtype, device)
    memory_at_start = snapshot(device)
    check_share_is_free(config, memory_at_start)

    if config.load_format == "dummy":
        torch.manual_seed(config.seed)
        with device:
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, trust_remote_code=config.trust_remote_code)
        generation_config = GenerationConfig.from_model_config(hf_config)
    else:
        model = _load_weights(source, hf_config, config, dtype)
        generation_config = model.generation_config
    check_backend(type(model))
    model = model.to(device).eval()
    check_behaviour(model)

    tokenizer = (
        None if config.skip_tokenizer_init else _load_tokenizer(locate(config.tokenizer or config.model), config)
    )
    eos = generation_config.eos_token_id
    eos = hf_config.get_text_config().eos_token_id if eos is None else eos
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        config=config,
        vocab_size=hf_config.get_text_config().vocab_size,
        eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or ()),
        generation_config=generation_config,
        memory_at_start=memory_at_start,
    )


def locate(name: str) -> str:
    """What transformers loads from: the shipped folder for "tiny", a local folder, or a hub name as it is.

    Raises:
        ModelNotFound: it can be none of the three.
    """
    if name == "tiny":
        return str(TINY)
    if Path(name).is_dir():
        return name
    # A hub name is "organisation/model". Anything else would only make the hub's client wait for an answer.
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")) or Path(name).exists():
        raise ModelNotFound(
            f"no model {name!r}: give 'tiny' (the model that ships with paged), a folder with config.json and "
            "safetensors, or a hub name of the form 'organisation/model'"
        )
    return name


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto' or a torch device such as 'cpu' or 'cuda:0', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for and torch sees no GPU; use device='cpu'")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} was asked for and the last GPU is 'cuda:{torch.cuda.device_count() - 1}'")
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers, so nothing can be computed there; use 'cpu' or 'cuda'")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {_first_line(error)}") from error
    return device


def resolve_dtype(name: str, hf_config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is the checkpoint's, but float32 on a CPU, where halves are slow."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return getattr(hf_config, "dtype", None) or torch.float32


def check_kv_cache_dtype(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what the compiler would fail at in the first step.

    Raises:
        ValueError: fp8, compiled, on a GPU before compute capability 8.9 (pytorch issue 167082), or with float64, for
            which Triton has no kernel.
    """
    if device.type != "cuda" or config.enforce_eager or not config.kv_cache_dtype.startswith("fp8"):
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            f"kv_cache_dtype={config.kv_cache_dtype!r} cannot be compiled for this GPU: it has compute capability "
            f"{capability[0]}.{capability[1]} and fp8 needs 8.9; use kv_cache_dtype='int8' or enforce_eager=True"
        )
    if dtype == torch.float64:
        raise ValueError(
            f"kv_cache_dtype={config.kv_cache_dtype!r} cannot be compiled beside dtype='float64': a GPU has no cast "
            "between them; use another dtype, kv_cache_dtype='int8' or enforce_eager=True"
        )


def _load_config(source: str, config: EngineConfig) -> PretrainedConfig:
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ModelNotFound(f"the folder {source!r} has no config.json, so it holds no transformers model")
    try:
        return AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise ModelNotFound(f"the config of {source!r} could not be loaded: {_first_line(error)}") from error


def _load_weights(
    source: str, hf_config: PretrainedConfig, config: EngineConfig, dtype: torch.dtype
) -> PreTrainedModel:
    if Path(source).is_dir() and not list(Path(source).glob("*.safetensors")):
        raise ModelNotFound(
            f"the folder {source!r} has a config.json but no *.safetensors; add the weights, or use "
            "load_format='dummy' for random ones"
        )
    quiet = not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=hf_config,
            dtype=dtype,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged file may raise anything, from safetensors, json or torch
        raise ModelNotFound(f"the weights of {source!r} could not be loaded: {_first_line(error)}") from error
    finally:
        if quiet:
            logging.enable_progress_bar()
    # transformers would go on with random numbers in their place.
    if missing := sorted(report["missing_keys"]):
        raise ModelNotFound(
            f"the weights of {source!r} lack {len(missing)} tensors that {type(model).__name__} needs, the first one "
            f"{missing[0]!r}; is a file missing, or does config.json belong to another model?"
        )
    loaded: PreTrainedModel = model
    return loaded


def _load_tokenizer(source: str, config: EngineConfig) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # as above
        raise ModelNotFound(
            f"the tokenizer of {source!r} could not be loaded; name another with tokenizer=, or set "
            f"skip_tokenizer_init=True and give prompts as token ids: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """An error in one line: its kind, and what it says before it gives advice."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
