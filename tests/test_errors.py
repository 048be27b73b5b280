"""Bad input: the error names what was asked, what was there and what to change, and the engine stays usable."""

import pytest
import torch
from test_engine import as_prompts, load, token_prompts, tokens_of
from tiny_models import tiny_model
from transformers import AutoConfig, LlamaConfig

from paged import LLM, SamplingParams
from paged.model import ModelNotFound, UnsupportedModel

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(folders):
    return load(folders["llama"], max_model_len=64, num_gpu_blocks_override=8, block_size=8)


BAD_REQUESTS = {
    "empty prompt": ([[]], GREEDY, "empty prompt"),
    "token beyond the vocabulary": ([[5, 100000]], GREEDY, "token id 100000.*ids 0 to"),
    "negative token": ([[-1]], GREEDY, "token id -1"),
    "no token": ([["a"]], GREEDY, "token id 'a'"),
    "too long": ([[1] * 64], GREEDY, "prompt of 64 tokens.*max_model_len=64.*at most 63"),
    "stop token beyond the vocabulary": ([[1]], SamplingParams(stop_token_ids=[10**6]), "token id 1000000"),
    "stop string without tokenizer": ([[1]], SamplingParams(stop="x"), "stop strings and the engine has no tokenizer"),
    "can never fit the pool": ([[1] * 40], SamplingParams(max_tokens=20), "never fit the pool.*8 blocks.*has 6"),
    "fewer params than prompts": ([[1], [2]], [GREEDY], "prompts and 1 sampling_params"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_and_the_engine_stays_usable(name, llm):
    prompts, params, message = BAD_REQUESTS[name]
    good = as_prompts(token_prompts([5, 9]))
    before = tokens_of(llm.generate(good, GREEDY))
    with pytest.raises(ValueError, match=message):
        llm.generate(as_prompts(prompts), params)
    with pytest.raises(ValueError, match=message):  # nor does a good one before it stay behind
        llm.generate(good[:1] + as_prompts(prompts), [GREEDY, params] if isinstance(params, SamplingParams) else params)
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable
    assert tokens_of(llm.generate(good, GREEDY)) == before


@pytest.mark.parametrize("prompt", [5, None, {"text": "a"}, [1, 2, 3]], ids=str)
def test_a_prompt_of_another_kind_is_refused(prompt, llm):
    with pytest.raises(ValueError, match="a prompt is a text"):
        llm.generate([prompt], GREEDY)


def test_a_text_needs_a_tokenizer(llm):
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate("hello", GREEDY)


def test_a_name_can_be_used_once_at_a_time(llm):
    llm.engine.add_request("twin", [1, 2], GREEDY)
    with pytest.raises(ValueError, match="'twin' is already waiting or running"):
        llm.engine.add_request("twin", [1, 2], GREEDY)
    llm.engine.abort_request("twin")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
        ({"block_size": 1.5}, "block_size must be an integer >= 1, got 1.5"),
        ({"max_num_seqs": 0}, "max_num_seqs must be"),
        ({"max_model_len": 0}, "max_model_len must be"),
        ({"max_model_len": 10**6}, "max_model_len=1000000 is longer than the"),
        ({"gpu_memory_utilization": 0}, r"gpu_memory_utilization must be in \(0, 1\]"),
        ({"gpu_memory_utilization": 1.1}, r"gpu_memory_utilization must be in \(0, 1\]"),
        ({"num_gpu_blocks_override": 2}, "num_gpu_blocks_override=2 leaves no block"),
        ({"kv_cache_memory_bytes": 5000}, r"takes .* bytes; there are 5,000. Set max_model_len to at most 0"),
        ({"kv_cache_memory_bytes": 100_000, "max_model_len": 256}, "Set max_model_len to at most 160"),
        ({"max_num_batched_tokens": 10}, "max_num_batched_tokens=10 is less than max_model_len"),
        ({"max_model_len": 8, "max_num_batched_tokens": 10}, "less than max_num_seqs=256"),
        ({"dtype": "int8"}, "dtype must be one of auto, float16"),
        ({"device": "warp"}, "device must be"),
        ({"load_format": "gguf"}, "load_format must be one of"),
        ({"attention_form": "flesh"}, "attention_form must be one of"),
        ({"seed": None}, "seed must be an integer"),
        ({"blok_size": 16}, "unknown engine argument blok_size; there are: model, tokenizer"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_a_value_error(settings, message, folders):
    with pytest.raises(ValueError, match=message):
        load(folders["llama"], **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(folders):
    with pytest.raises(ValueError, match="torch sees no GPU"):
        load(folders["llama"], device="cuda")


@pytest.mark.parametrize("name", ["tny", "./nowhere", "/no/such/folder", "a/b/c", "~/model"])
def test_an_unknown_model_is_refused_at_once(name):
    with pytest.raises(ModelNotFound, match=r"no model .*'tiny'"):
        LLM(model=name)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        LLM(model=tmp_path)


def test_a_folder_without_weights(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match=r"no \*\.safetensors.*load_format='dummy'"):
        load(tmp_path)


def test_a_folder_without_tokenizer(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="skip_tokenizer_init=True"):
        LLM(model=tmp_path)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}

REFUSED = {
    "bloom": ({"n_layer": 2, "hidden_size": 32, "n_head": 2}, "BloomForCausalLM does not take its attention"),
    "t5": ({}, "encoder-decoder"),
    "mamba": (SMALL, "does not take its attention|could not be loaded|no max_position_embeddings"),
    "qwen3_next": (SMALL, "does not take its attention"),
    "nemotron": (
        {**SMALL, "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 2},
        "NemotronAttention does not hand the model's keyword arguments",
    ),
    "lfm2": ({**SMALL, "layer_types": ["conv", "full_attention"]}, "layers of the kinds conv cannot be paged"),
    "llama4_text": ({**SMALL, "intermediate_size": 32, "intermediate_size_mlp": 32}, "chunked_attention"),
    "llama": (
        {**SMALL, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type 'dynamic'",
    ),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_be_paged_is_refused_with_the_reason(model_type, tmp_path):
    settings, message = REFUSED[model_type]
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=message):
        load(tmp_path, load_format="dummy")


def test_longrope_is_allowed_up_to_its_original_length(tmp_path):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    }
    config = LlamaConfig(
        **SMALL, max_position_embeddings=256, rope_parameters=rope, bos_token_id=None, eos_token_id=None
    )
    config.save_pretrained(tmp_path)
    assert load(tmp_path, load_format="dummy").engine.max_model_len == 64
    with pytest.raises(ValueError, match="max_model_len=65 is longer than the 64"):
        load(tmp_path, load_format="dummy", max_model_len=65)
