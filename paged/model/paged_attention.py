"""The attention that transformers' models call: write this step's K and V into the pool, read by block table.

transformers looks attention functions up by name, and hands ours whatever keyword arguments the model was called
with. So the model's code stays its own, and a call looks like this:

    model(input_ids=[1, T], position_ids=[1, T], attention_inputs=batch.attention, use_cache=False)

The pools hang on the attention modules as `key_cache` and `value_cache`, and the scales of a quantised one as
`key_scale` and `value_scale`. A lookup by layer number would make the compiler specialise its graph for every layer; an
attribute of the module makes one graph serve them all. Plain attributes and not buffers: the compiler takes a buffer's
size for fixed, and would compile everything again when the pool gets its final size.

No mask is registered under our names, so transformers makes none and passes None: causality, the sliding window and
padding are this function's business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from paged.attention import fused, gathered
from paged.batch import AttentionInputs
from paged.kv_pool import LayerShape, finite_values, write
from paged.model.flex_inputs import FlexInputs
from paged.model.flex_op import attend
from paged.model.support import UnsupportedModel, check_windows

PagedAttention = Callable[..., tuple[Tensor, Tensor]]


def _make_forward(paged_attention: PagedAttention) -> Callable[..., tuple[Tensor, None]]:
    """An attention function with transformers' signature around one of the forms."""

    def forward(
        module: nn.Module,
        query: Tensor,  # [1, Hq, T, D]
        key: Tensor,  # [1, Hkv, T, D]
        value: Tensor,  # [1, Hkv, T, Dv]
        attention_mask: Tensor | None,
        *,
        scaling: float,
        attention_inputs: AttentionInputs,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        key_cache, value_cache = cast(Tensor, module.key_cache), cast(Tensor, module.value_cache)
        scales = {"k_scale": getattr(module, "key_scale", None), "v_scale": getattr(module, "value_scale", None)}
        new_key, new_value = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, Hkv, D], [T, Hkv, Dv]
        write(key_cache, value_cache, new_key, new_value, attention_inputs.slot_mapping, **scales)
        tokens = query[0].transpose(0, 1)  # [T, Hq, D]
        outputs = [
            paged_attention(
                tokens[group.start : group.end],
                key_cache,
                value_cache,
                group.block_tables,
                group.seq_lens,
                group.query_start_loc,
                scale=scaling,
                window=sliding_window,
                softcap=softcap,
                sinks=s_aux,
                max_query_len=group.max_query_len,
                **scales,
            )[0]
            for group in attention_inputs.groups
        ]
        return torch.cat(outputs).unsqueeze(0), None  # [1, T, Hq, Dv]

    return forward


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function, as the probe saw it; num_heads counts query heads."""

    module: nn.Module
    shape: LayerShape
    window: int | None
    num_heads: int


def _probe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Attend to nothing, and write down who asked for what."""
    if "calls" not in arguments:
        raise UnsupportedModel(
            f"{type(module).__name__} does not hand the model's keyword arguments on to its attention function, so the "
            "block tables would never reach it"
        )
    if attention_mask is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} hands a mask of its own to the attention function, which would ignore it: "
            "block tables and lengths decide which keys are seen"
        )
    shape = LayerShape(num_kv_heads=key.shape[1], head_dim=key.shape[3], value_dim=value.shape[3])
    arguments["calls"].append(AttentionCall(module, shape, arguments.get("sliding_window"), query.shape[1]))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _flex_forward(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention_inputs: FlexInputs,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same for the flex form, whose inputs are others."""
    key_cache, value_cache = cast(Tensor, module.key_cache), cast(Tensor, module.value_cache)
    new_query, new_key, new_value = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, width]
    new_key, new_value = finite_values(new_key, new_value)
    write(key_cache, value_cache, new_key, new_value, attention_inputs.slot_mapping)
    out = attend(
        new_query,
        new_key,
        new_value,
        key_cache,
        value_cache,
        attention_inputs,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None  # [1, T, Hq, Dv]


PROBE = "paged_probe"
AttentionInterface.register(PROBE, _probe)
AttentionInterface.register("paged_gathered", _make_forward(gathered.paged_attention))
AttentionInterface.register("paged_fused", _make_forward(fused.paged_attention))
AttentionInterface.register("paged_flex", _flex_forward)


@torch.inference_mode()
def find_attention(model: PreTrainedModel) -> list[AttentionCall]:
    """Ask the model itself: run a token with an attention function that only takes notes.

    No list of class or attribute names has to be kept, and it holds for head dims, KV heads and value widths of every
    architecture, per layer.

    Args:
        model: any model with `_supports_attention_backend`.

    Returns:
        One call for each layer, in the order of the layers.

    Raises:
        UnsupportedModel: some layer does not call the attention function exactly once, or not with all that decides
            which keys it sees.
    """
    model.set_attn_implementation(PROBE)
    calls: list[AttentionCall] = []
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model(input_ids=zero, position_ids=zero, use_cache=False, calls=calls)

    check_windows(model.config, [call.window for call in calls])
    num_layers = model.config.get_text_config().num_hidden_layers
    modules = {id(call.module) for call in calls}
    if not len(calls) == len(modules) == num_layers:
        raise UnsupportedModel(
            f"{type(model).__name__} has {num_layers} layers and {len(modules)} of them called the attention function "
            f"{len(calls)} times in all; each layer has to call it once, or part of the model is not paged (recurrent "
            "layers, attention of its own, layers that share their K and V)"
        )
    return calls
