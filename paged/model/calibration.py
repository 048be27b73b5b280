"""Scales for an fp8 cache, found at start: run some tokens through the model and see how large K and V become.

The pass computes real attention, so that the later layers see what they will see, but no pool exists yet: the K and V
of its one sequence, as they come, are a pool of a single block as long as the sequence.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from paged.attention.gathered import paged_attention
from paged.model.loading import LoadedModel
from paged.model.support import longest_sequence
from paged.quantisation import fp8_scale

# Enough for the first token, whose keys are often the largest, and for a few hundred others.
NUM_TOKENS = 256
CALIBRATION = "paged_calibration"


def _attend_and_measure(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Tensor | None,
    *,
    scaling: float,
    scale_per_head: bool,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over one contiguous sequence, and leave scales for its K and V on the module."""
    for name, numbers in (("key_scale", key), ("value_scale", value)):
        # One token that overflows, as rarely trained ones do in half precision, must not spoil the scale of all others.
        finite = torch.where(numbers.isfinite(), numbers.abs(), 0.0)
        largest = finite.amax(dim=(0, 2, 3)) if scale_per_head else finite.amax()
        module.register_buffer(name, fp8_scale(largest), persistent=False)
    length = query.shape[2]
    out = paged_attention(
        query[0].transpose(0, 1),
        key.transpose(1, 2),  # [1, T, Hkv, D]: one block of T slots
        value.transpose(1, 2),
        block_tables=torch.zeros(1, 1, dtype=torch.int32, device=query.device),
        seq_lens=torch.tensor([length], device=query.device),
        query_start_loc=torch.tensor([0, length], device=query.device),
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        max_query_len=length,
    )[0]
    return out.unsqueeze(0), None  # [1, T, Hq, Dv]


AttentionInterface.register(CALIBRATION, _attend_and_measure)


@torch.inference_mode()
def calibrate(loaded: LoadedModel) -> None:
    """Give every attention module its buffers `key_scale` and `value_scale`: a number, or [Hkv] for "fp8_per_head".

    The tokens are spread evenly over the vocabulary: no text is needed, and the same model gets the same scales
    whatever is served with it. What turns out larger than the headroom allows is clamped.

    Args:
        loaded: a model whose layers all call the attention function, not compiled yet; its attention implementation
            is another one afterwards.
    """
    config, model = loaded.config, loaded.model
    length = min(NUM_TOKENS, longest_sequence(model.config))  # not max_model_len: no setting changes the scales
    model.set_attn_implementation(CALIBRATION)
    model(
        input_ids=torch.linspace(0, loaded.vocab_size - 1, length, device=loaded.device).long()[None],
        position_ids=torch.arange(length, device=loaded.device)[None],
        use_cache=False,
        logits_to_keep=1,
        scale_per_head=config.kv_cache_dtype == "fp8_per_head",
    )
