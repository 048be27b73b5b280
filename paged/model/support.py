"""Which models can be paged, and the reason for each that cannot.

transformers runs the model; only its attention is ours. That is right only if attention is all that remembers: every
layer has to call the registered attention function, see all tokens before its own (or a window of them), and compute
the same thing for a sequence whoever shares its batch. A model that breaks one of these would not fail. It would
write wrong text. So each is refused here, by name.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

PAGEABLE_LAYERS = {"full_attention", "sliding_attention"}


class ModelNotFound(ValueError):
    """The model's name or folder does not lead to a model."""


class UnsupportedModel(ValueError):
    """The model exists and would run, but not rightly with a paged KV cache."""


def check_class(config: PretrainedConfig) -> None:
    """Refuse a model class that does not take its attention from transformers' registry.

    Raises:
        UnsupportedModel: with the reason.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{config.model_type}: an encoder-decoder; only decoder-only causal LMs are paged")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        # Remote code brings a class of its own; it is checked once it is loaded.
        if getattr(config, "auto_map", None):
            return
        raise UnsupportedModel(f"{config.model_type}: transformers has no causal LM for {type(config).__name__}")
    check_backend(model_class)


def check_backend(model_class: type[PreTrainedModel]) -> None:
    """Refuse a class without `_supports_attention_backend`: it would ignore the registered attention in silence.

    Raises:
        UnsupportedModel: with the reason.
    """
    if not getattr(model_class, "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"{model_class.__name__} does not take its attention from transformers' AttentionInterface "
            "(_supports_attention_backend is not set), so it would run without the paged KV cache"
        )


def check_layers(config: PretrainedConfig) -> None:
    """Refuse layers that keep anything but K and V of every token, or that hide part of their mask.

    Raises:
        UnsupportedModel: with the reason.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - PAGEABLE_LAYERS
    if getattr(text, "attention_chunk_size", None):
        kinds.add("chunked_attention")
    if kinds:
        raise UnsupportedModel(
            f"{config.model_type}: layers of the kinds {', '.join(sorted(kinds))} cannot be paged, only "
            f"{' and '.join(sorted(PAGEABLE_LAYERS))}; recurrent layers keep a state instead of K and V, and chunked "
            "attention is hidden in a mask that the attention function never sees"
        )


@torch.inference_mode()
def check_behaviour(model: PreTrainedModel) -> None:
    """Refuse a model that looks at later tokens, or that counts positions in a way of its own.

    Both are asked of the model itself, run as it is: the logits of a token must not change with a token behind it, nor
    when the positions 0, 1, 2, ... are given instead of left to the model.

    Raises:
        UnsupportedModel: with the reason.
    """
    name = type(model).__name__
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 1, 5, 9, 2, 7]], device=model.device)
    ids = ids % model.config.get_text_config().vocab_size
    positions = torch.arange(ids.shape[1], device=model.device)[None].expand_as(ids)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    placed = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    # Both passes do the same arithmetic, so they differ by a few rounding errors at most; the square root of one is far
    # above that and far below what another model would make of it.
    tolerance = torch.finfo(model.dtype).eps ** 0.5 * float(logits.abs().max())
    if (logits[0, :-1] - logits[1, :-1]).abs().max() > tolerance:
        raise UnsupportedModel(
            f"{name}: the logits of a token change with the tokens behind it, so it is no causal LM (an encoder needs "
            "is_decoder=True in its config)"
        )
    if (logits - placed).abs().max() > tolerance:
        raise UnsupportedModel(f"{name}: its positions are not 0, 1, 2, ..., which is what packed sequences are given")


def check_windows(config: PretrainedConfig, windows: Sequence[int | None]) -> None:
    """Refuse a model that keeps its sliding window in a mask instead of handing it to the attention function.

    Args:
        config: the model's.
        windows: what each layer's call said.

    Raises:
        UnsupportedModel: fewer calls brought a window than layers have one.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        expected = list(kinds).count("sliding_attention")
    else:
        windowed = bool(getattr(text, "sliding_window", None)) and getattr(text, "use_sliding_window", True)
        expected = len(windows) if windowed else 0
    brought = sum(window is not None for window in windows)
    if brought < expected:
        raise UnsupportedModel(
            f"{config.model_type}: by its config {expected} of the layers have a sliding window, and {brought} tell "
            "the attention function; the others keep it in a mask that the attention function never sees"
        )


def longest_sequence(config: PretrainedConfig) -> int:
    """Tokens that the model's positions allow whoever shares the batch.

    transformers picks the "dynamic" and "longrope" scalings of rotary positions by the longest position in the
    *batch*, so a long sequence would change what a short one beside it computes. The first always does; the second
    only past the original length, up to which it is allowed.

    Raises:
        UnsupportedModel: dynamic scaling, or a config that does not say how many positions there are.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise UnsupportedModel(f"{config.model_type}: its config has no max_position_embeddings")
    for rope in _rope_parameters(text):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "dynamic":
            raise UnsupportedModel(
                f"{config.model_type}: rope_type 'dynamic' scales positions by the longest sequence of the batch, so "
                "packing sequences together would change the model"
            )
        if kind == "longrope":
            stated = rope.get("original_max_position_embeddings")
            original = stated or getattr(text, "original_max_position_embeddings", longest)
            longest = min(longest, int(str(original)))
    return longest


def _rope_parameters(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The rotary settings: one dictionary, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope and all(isinstance(value, dict) for value in rope.values()):
        yield from rope.values()
    else:
        yield rope
