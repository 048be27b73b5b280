"""Bad input: the error names what was asked, what was there and what to change, and the engine stays usable."""

import shutil

import numpy as np
import pytest
import torch
from helpers import as_prompts, load, token_prompts, tokens_of
from tiny_models import tiny_model
from transformers import AutoConfig, LlamaConfig

from paged import LLM, SamplingParams
from paged.config import EngineConfig
from paged.model import ModelNotFound, UnsupportedModel
from paged.model.loading import TINY, check_kv_cache_dtype

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(folders):
    return load(folders["llama"], max_model_len=64, num_gpu_blocks_override=8, block_size=8)


BAD_REQUESTS = {
    "empty prompt": ([[]], GREEDY, "empty prompt"),
    "token beyond the vocabulary": ([[5, 100000]], GREEDY, "token id 100000.*ids 0 to"),
    "negative token": ([[-1]], GREEDY, "token id -1"),
    "no token": ([["a"]], GREEDY, "a text or token ids are wanted"),
    "no list of tokens": ([5], GREEDY, "a text or token ids are wanted"),
    "truth instead of tokens": ([[True, False]], GREEDY, "a bool is no token id"),
    "a dictionary instead of SamplingParams": ([[1]], {"temperature": 0}, "must be a SamplingParams"),
    "a text instead of SamplingParams": ([[1]], "greedy", "must be a SamplingParams"),
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


@pytest.mark.parametrize(
    "prompt",
    [5, None, {"text": "a"}, [1, 2, 3], {"prompt_token_ids": None}, {"prompt_token_ids": "abc"}, {"prompt": None}],
    ids=str,
)
def test_a_prompt_of_another_kind_is_refused(prompt, llm):
    with pytest.raises(ValueError, match="a prompt is a text"):
        llm.generate([prompt], GREEDY)


def test_a_text_needs_a_tokenizer(llm):
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate("hello", GREEDY)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple], ids=["numpy", "torch", "tuple"])
def test_token_ids_may_come_in_any_container(kind, llm):
    expected = llm.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY)
    (output,) = llm.generate({"prompt_token_ids": kind([5, 6, 7])}, GREEDY)
    assert output.outputs[0].token_ids == expected[0].outputs[0].token_ids
    assert all(type(token) is int for token in output.prompt_token_ids)


def test_generate_refuses_to_run_requests_of_others(llm):
    llm.engine.add_request("mine", [1, 2], GREEDY)
    with pytest.raises(ValueError, match="unfinished requests that this call did not add"):
        llm.generate(as_prompts([[3]]), GREEDY)
    assert llm.engine.abort_request("mine") is not None
    assert len(llm.generate(as_prompts([[3]]), GREEDY)) == 1


def test_the_longest_prompt_there_is_room_for(llm):
    (output,) = llm.generate(as_prompts([[1] * 47]), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 2
    wide = load(llm.engine.config.model, max_model_len=64)
    (output,) = wide.generate(as_prompts([[1] * 63]), GREEDY)
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"


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
        (
            {"kv_cache_memory_bytes": 5000},
            r"takes .* bytes; there are 5,000\. Set kv_cache_memory_bytes to at least 278528",
        ),
        ({"kv_cache_memory_bytes": 100_000, "max_model_len": 256}, "Set max_model_len to at most 160"),
        ({"max_num_batched_tokens": 300, "enable_chunked_prefill": False}, "tokens=300 is less than max_model_len"),
        ({"max_model_len": 8, "max_num_batched_tokens": 10}, "less than max_num_seqs=256"),
        ({"preemption_mode": "swop"}, "preemption_mode must be one of recompute, swap"),
        ({"swap_space": 0}, "swap_space must be a number of GiB > 0, got 0"),
        ({"swap_space": float("nan")}, "swap_space must be a number of GiB > 0, got nan"),
        ({"swap_space": True}, "swap_space must be a number of GiB > 0, got True"),
        ({"swap_space": 1e-6, "preemption_mode": "swap"}, r"swap_space=1e-06 GiB holds 0 blocks of .* bytes"),
        ({"dtype": "int8"}, "dtype must be one of auto, float16"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype must be one of auto, fp8, fp8_e4m3, .*; got 'fp4'"),
        ({"device": "warp"}, "device must be"),
        ({"load_format": "gguf"}, "load_format must be one of"),
        ({"attention_form": "flesh"}, "attention_form must be one of"),
        ({"cudagraph_capture_sizes": (0,)}, "cudagraph_capture_sizes must be integers >= 1"),
        ({"cudagraph_capture_seconds": -1}, "cudagraph_capture_seconds must be a number >= 0"),
        ({"enable_cascade_attention": 2}, "enable_cascade_attention must be one of"),
        ({"cudagraph_capture_sizes": (0, 4)}, r"cudagraph_capture_sizes must be integers >= 1, got \(0, 4\)"),
        ({"seed": None}, "seed must be an integer"),
        ({"blok_size": 16}, "unknown engine argument blok_size; there are: model, tokenizer"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_a_value_error(settings, message, folders):
    with pytest.raises(ValueError, match=message):
        load(folders["llama"], **settings)


def test_fp8_is_refused_on_a_gpu_that_the_compiler_has_no_fp8_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match=r"'fp8_per_head' cannot be compiled .* capability 8\.0 and fp8 needs 8\.9"):
        check_kv_cache_dtype(EngineConfig(model="tiny", kv_cache_dtype="fp8_per_head"), torch.bfloat16, gpu)
    for settings in ({"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "fp8", "enforce_eager": True}, {}):
        check_kv_cache_dtype(EngineConfig(model="tiny", **settings), torch.bfloat16, gpu)
    check_kv_cache_dtype(EngineConfig(model="tiny", kv_cache_dtype="fp8"), torch.float64, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_kv_cache_dtype(EngineConfig(model="tiny", kv_cache_dtype="fp8"), torch.bfloat16, gpu)
    with pytest.raises(ValueError, match="'fp8' cannot be compiled beside dtype='float64'"):
        check_kv_cache_dtype(EngineConfig(model="tiny", kv_cache_dtype="fp8"), torch.float64, gpu)


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


def test_missing_tensors_are_named_instead_of_drawn(tmp_path):
    model = tiny_model("llama")
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("model.layers.1.mlp")}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelNotFound, match=r"lack 3 tensors .*'model\.layers\.1\.mlp\.down_proj\.weight'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"", "weights of .* could not be loaded"),
        ("model.safetensors", None, "weights of .* could not be loaded"),
        ("config.json", b"{", "config of .* could not be loaded"),
        ("tokenizer.json", b"{}", "tokenizer of .* could not be loaded"),
    ],
    ids=["empty weights", "half the weights", "half a config", "no tokenizer in its file"],
)
def test_damaged_files_are_named(file, content, message, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    with pytest.raises(ModelNotFound, match=message) as caught:
        LLM(model=tmp_path / "model", device="cpu")
    assert str(caught.value).count("\n") == 0


def test_a_pool_beyond_all_memory_is_refused(folders):
    with pytest.raises(ValueError, match=r"a pool of [\d,]+ blocks takes [\d,]+ bytes, more than cpu has left"):
        load(folders["llama"], kv_cache_memory_bytes=10**16)


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
    "bert": ({**SMALL, "intermediate_size": 64}, "change with the tokens behind it"),
    "roberta": ({**SMALL, "intermediate_size": 64, "is_decoder": True}, "positions are not 0, 1, 2"),
    "doge": (
        {**SMALL, "intermediate_size": 64, "keep_window_size": 4},
        "hands a mask of its own|change with the tokens behind it",
    ),
    "phimoe": (
        {**SMALL, "intermediate_size": 64, "num_local_experts": 2, "num_key_value_heads": 2, "sliding_window": 7},
        "2 of the layers have a sliding window, and 0 tell",
    ),
    "qwen2_moe": (
        {
            **SMALL,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "1 of the layers have a sliding window, and 0 tell",
    ),
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
