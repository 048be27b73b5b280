"""Which form of attention a model is served with: what was asked for, or the best that can serve it."""

import torch

from paged.attention import flex
from paged.config import EngineConfig
from paged.model.loading import LoadedModel
from paged.model.paged_attention import AttentionCall


def choose_form(config: EngineConfig, loaded: LoadedModel, calls: list[AttentionCall], *, eager: bool) -> str:
    """The form of attention that a model is served with.

    Raises:
        ValueError: "flex" was asked for and cannot serve the model, with the reason.
    """
    form = config.attention_form
    if form not in ("auto", "flex"):
        return form
    reason = None
    if eager or loaded.device.type != "cuda":
        reason = "it runs compiled on a GPU, and this engine is eager or on a CPU"
    elif loaded.kv_dtype != loaded.dtype or loaded.dtype == torch.float64:
        reason = f"it reads no cache of {loaded.kv_dtype} for a model of {loaded.dtype}"
    else:
        widths = [width for call in calls for width in (call.shape.head_dim, call.shape.value_dim)]
        reason = flex.unfit(config.block_size, widths)
    if form == "flex" and reason is not None:
        raise ValueError(f"attention_form='flex' cannot be used here: {reason}; use 'auto'")
    if reason is None:
        return "flex"
    return "gathered" if eager else "fused"
