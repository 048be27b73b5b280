"""Tiny random models of several architectures, different from each other where paging could go wrong.

Weights are drawn wide, so that greedy output is varied and its best two logits are far apart: a model that repeats one
token would hide every fault.
"""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

COMMON = {
    "vocab_size": 128,
    "hidden_size": 60,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

CONFIGS = {
    "llama": (LlamaConfig, {"num_hidden_layers": 2}),
    # Norms on queries and keys.
    "qwen3": (Qwen3Config, {"num_hidden_layers": 2}),
    # A sliding window shorter than the prompts, across block borders.
    "mistral": (MistralConfig, {"num_hidden_layers": 2, "sliding_window": 7}),
    # Softcapped scores, every other layer windowed, and a scale that is not 1 / sqrt(head_dim).
    "gemma2": (
        Gemma2Config,
        {
            "num_hidden_layers": 3,
            "sliding_window": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 9,
        },
    ),
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_config(name: str) -> PretrainedConfig:
    """The config of a tiny model."""
    config_class, settings = CONFIGS[name]
    return config_class(**COMMON, **settings)


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model with the same random weights every time."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # norms keep their ones
                width = 1.0 if parameter.shape[0] == COMMON["vocab_size"] else 2.0 * parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
    return model
