"""Tiny random models of many architectures: a config for each, with what makes its attention special switched on."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 128
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
# Shorter than the prompts, and not a multiple of a block.
WINDOW = {"sliding_window": 7}
# Every other layer windowed, whatever the architecture's own pattern would make of two layers.
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SOFTCAP = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0}


def _rope(kind: str, **settings: object) -> dict[str, object]:
    return {"model_type": "llama", "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


# What each one adds to COMMON; the key is the model type unless the settings name another.
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {},
    "llama-llama3-rope": _rope(
        "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "llama-yarn-rope": _rope("yarn", factor=4.0, original_max_position_embeddings=64),
    "llama-linear-rope": _rope("linear", factor=2.0),
    "mistral": WINDOW,
    "mixtral": {**LOCAL_EXPERTS, **WINDOW},
    "ministral": MIXED,
    "qwen2": {**MIXED, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "gemma": {},
    "gemma2": {**SOFTCAP, **MIXED, "query_pre_attn_scalar": 9},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 9},
    "vaultgemma": {**SOFTCAP, **MIXED, "query_pre_attn_scalar": 9},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": WINDOW,
    "phimoe": LOCAL_EXPERTS,
    "olmo2": {},
    "olmo3": MIXED,
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "granitemoe": {**LOCAL_EXPERTS, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {**MIXED, "logit_scale": 1.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": WINDOW,
    "gpt2": {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_positions": 512, "n_inner": 96},
    "gpt_bigcode": {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_positions": 512, "n_inner": 96},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "gpt_oss": {**LOCAL_EXPERTS, **MIXED},  # attention sinks
    "exaone4": MIXED,
    "glm": {},
    "glm4": {},
    "glm4_moe": ROUTED_EXPERTS,
    "deepseek_v3": {  # values narrower than keys
        **ROUTED_EXPERTS,
        "num_key_value_heads": 6,
        "head_dim": 8,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
    "seed_oss": {},
    "arcee": {},
    "apertus": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model, the same every time, with weights so wide that its greedy output is varied."""
    settings = {**COMMON, "model_type": name, **ARCHITECTURES[name]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                width = 1.0 if parameter.shape[0] >= VOCAB else 2.0 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
            elif parameter.shape == (COMMON["num_attention_heads"],):  # sinks, which begin as whatever was in memory
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model
