"""The engine over a quantised cache: against transformers over a cache that quantises by definition, and its bytes."""

import pytest
import torch
from architectures import build
from helpers import as_prompts, load, token_prompts, tokens_of
from quantised_by_definition import read_back_fp8, read_back_int8
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from paged import LLM, SamplingParams
from paged.kv_pool import LayerShape, bytes_per_block
from paged.quantisation import stored_dtype

FORMS = ("gathered", "fused")
# One name for each way to store; fp8_e4m3 and int8 are second names.
KINDS = ("fp8", "fp8_per_head", "int8_per_token_head")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


class QuantisingCache(DynamicCache):
    """transformers' contiguous cache, but K and V come back as if from codes."""

    def __init__(self, kind: str, scales: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.kind, self.scales = kind, scales

    def update(self, key_states, value_states, layer_idx, *arguments, **keywords):
        states = []
        for i, x in enumerate((key_states, value_states)):  # [1, Hkv, T, D]
            numbers = x.transpose(1, 2).double().numpy()
            if self.kind.startswith("int8"):
                read = read_back_int8(numbers)
            else:
                read = read_back_fp8(numbers, self.scales[layer_idx][i].numpy())
            states.append(torch.from_numpy(read).to(x.dtype).transpose(1, 2))
        return super().update(*states, layer_idx, *arguments, **keywords)


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int, cache: DynamicCache) -> tuple[list[int], float]:
    """Tokens, and the logarithm of their probability, all together."""
    tokens, new, logprob = [], prompt, 0.0
    for _ in range(num_tokens):
        logprobs = model(torch.tensor([new]), past_key_values=cache, use_cache=True).logits[0, -1].log_softmax(dim=0)
        new = [int(logprobs.argmax())]
        tokens += new
        logprob += float(logprobs.max())
    return tokens, logprob


@pytest.fixture(autouse=True)
def experts_in_float64(monkeypatch):
    """transformers' default way to compute experts has no float64."""
    monkeypatch.setattr(PreTrainedModel, "get_correct_experts_implementation", lambda self, requested: "eager")


@pytest.fixture(scope="module")
def float64_folders(tmp_path_factory):
    """Models whose values are much smaller than their keys, those of the first head most of all.

    Nothing else changes, since the output projection makes up for it; but a scale that belongs to something else shows.
    """
    folders = {}
    for name in ("llama", "gemma2", "gpt_oss"):
        model = build(name, torch.float64)
        for layer in model.model.layers:
            values, outputs = layer.self_attn.v_proj, layer.self_attn.o_proj
            for head, size in enumerate((2.0**-24, 2.0**-10)):
                rows, columns = slice(16 * head, 16 * (head + 1)), slice(48 * head, 48 * (head + 1))
                for parameter in values.parameters():
                    parameter.data[rows] *= size
                outputs.weight.data[:, columns] /= size
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def fp8_scales(llm: LLM) -> list[tuple[Tensor, Tensor]]:
    modules = [call.module for call in llm.engine.runner._calls]
    return [(module.key_scale, module.value_scale) for module in modules]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_transformers_over_a_quantising_cache(kind, name, form, float64_folders):
    """Of ragged prompts, from a pool that runs out; and their probabilities are not those without quantisation."""
    prompts = token_prompts([1, 5, 17, 40])
    settings = {"dtype": "float64", "block_size": 4, "num_gpu_blocks_override": 20, "max_num_seqs": 4}
    llm = load(float64_folders[name], kv_cache_dtype=kind, attention_form=form, **settings)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    outputs = [output.outputs[0] for output in llm.generate(as_prompts(prompts), params)]
    assert llm.engine.scheduler.num_preemptions > 0
    model = AutoModelForCausalLM.from_pretrained(
        float64_folders[name], dtype=torch.float64, attn_implementation="eager"
    )
    scales = [] if kind.startswith("int8") else fp8_scales(llm)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, logprob = greedy(model, prompt, 24, QuantisingCache(kind, scales))
        _, exact = greedy(model, prompt, 24, DynamicCache())
        assert list(output.token_ids) == tokens
        # transformers' softmax and norms are float32 even here: that is 1e-7 for each token and layer.
        assert output.cumulative_logprob == pytest.approx(logprob, abs=1e-5)
        assert abs(logprob - exact) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_must_not_matter(kind, float64_folders):
    """Block size, chunks, prefix caching, preemption, form: the codes are a function of the tokens alone."""
    prompts = token_prompts([1, 7, 33, 20])
    prompts += [[*prompts[2][:24], 5, 6], prompts[2]]

    def tokens(**settings) -> list[list[int]]:
        llm = load(float64_folders["llama"], dtype="float64", kv_cache_dtype=kind, **settings)
        first, again = (tokens_of(llm.generate(as_prompts(prompts), GREEDY)) for _ in range(2))
        assert first == again, "the second time from cached blocks, if there is a cache"
        assert (llm.engine.scheduler.num_preemptions > 0) == ("num_gpu_blocks_override" in settings)
        return first

    expected = tokens()
    assert tokens(block_size=1, enable_prefix_caching=False) == expected
    assert tokens(block_size=5, max_num_batched_tokens=8, max_num_seqs=6) == expected
    assert tokens(block_size=4, num_gpu_blocks_override=24) == expected
    swapping = {"preemption_mode": "swap", "spare_blocks_per_seq": 0, "enable_prefix_caching": False}
    assert tokens(block_size=4, num_gpu_blocks_override=24, **swapping) == expected
    assert tokens(attention_form="fused", max_model_len=64, max_num_seqs=2) == expected


@pytest.mark.parametrize("alias", [("fp8", "fp8_e4m3"), ("int8_per_token_head", "int8")], ids=str)
def test_second_names(alias, float64_folders):
    prompts = as_prompts(token_prompts([5, 20]))
    first, second = (
        tokens_of(load(float64_folders["llama"], kv_cache_dtype=kind).generate(prompts, GREEDY)) for kind in alias
    )
    assert first == second


@pytest.mark.parametrize("kind", ["fp8", "fp8_per_head"])
def test_fp8_scales_fit_what_the_model_computes(kind, float64_folders):
    """Found by a pass over the same tokens under plain transformers, whose cache holds K and V of every layer."""
    llm = load(float64_folders["gemma2"], dtype="float64", kv_cache_dtype=kind)
    model = AutoModelForCausalLM.from_pretrained(
        float64_folders["gemma2"], dtype=torch.float64, attn_implementation="eager"
    )
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.linspace(0, llm.engine.vocab_size - 1, 256).long()[None], past_key_values=cache, use_cache=True)
    for layer, scales in zip(cache.layers, fp8_scales(llm), strict=True):
        for numbers, scale in zip((layer.keys, layer.values), scales, strict=True):
            largest = numbers.abs().amax(dim=(0, 2, 3)) if kind == "fp8_per_head" else numbers.abs().amax()
            assert scale.shape == largest.shape
            assert (448 * scale / largest >= 2).all()
            assert (448 * scale / largest <= 4).all()
    short = load(float64_folders["gemma2"], dtype="float64", kv_cache_dtype=kind, max_model_len=4)
    for scales, same in zip(fp8_scales(llm), fp8_scales(short), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(scales, same, strict=True)), "no setting changes the scales"


def test_a_broken_token_does_not_spoil_the_scales(float64_folders, tmp_path):
    """Whoever does not use it is served as without it; whoever does, gets an error."""
    model = AutoModelForCausalLM.from_pretrained(float64_folders["llama"], dtype=torch.float64)
    model.get_input_embeddings().weight.data[-1] = torch.nan  # of 128: the prompts stay below 100
    model.save_pretrained(tmp_path)
    whole, broken = (load(folder, kv_cache_dtype="fp8") for folder in (float64_folders["llama"], tmp_path))
    params = SamplingParams(temperature=0, max_tokens=4)
    prompts = as_prompts(token_prompts([5, 20]))
    assert tokens_of(broken.generate(prompts, params)) == tokens_of(whole.generate(prompts, params))
    (output,) = broken.generate(as_prompts([[5, 127]]), params)
    assert output.outputs[0].finish_reason == "error"


def test_without_quantisation_there_are_no_scales(float64_folders):
    llm = load(float64_folders["llama"])
    for call, cache in zip(llm.engine.runner._calls, llm.engine.runner.caches, strict=True):
        assert len(cache) == 2
        assert not hasattr(call.module, "key_scale")


@pytest.mark.parametrize("kind", ["auto", *KINDS])
def test_a_token_that_is_no_number_is_an_error_and_nobody_elses(kind, float64_folders):
    llm = load(float64_folders["llama"], kv_cache_dtype=kind)
    prompts = as_prompts([[3, 4, 5], [6, 7, 8]])
    expected = tokens_of(llm.generate(prompts, GREEDY))
    projection = llm.engine.runner._calls[0].module.k_proj

    def poison(module, arguments, output):
        output[0, 1, 0] = torch.nan  # the first prompt's second token
        return output

    handle = projection.register_forward_hook(poison)
    llm.engine.reset_prefix_cache()
    for name, prompt in zip("ab", prompts, strict=True):
        llm.engine.add_request(name, prompt["prompt_token_ids"], GREEDY)
    first = [output for output in llm.engine.step() if output.finished]
    handle.remove()
    assert [(output.request_id, output.outputs[0].finish_reason) for output in first] == [("a", "error")]
    outputs = []
    while llm.engine.has_unfinished_requests:
        outputs += [output for output in llm.engine.step() if output.finished]
    assert tokens_of(outputs) == expected[1:]
    assert tokens_of(llm.generate(prompts, GREEDY)) == expected, "what was left in the blocks is of no account"


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_share_blocks_and_copy_one_are_those_of_single_requests(kind, float64_folders):
    """Copy-on-write takes the scales of a block with it."""
    llm = load(
        float64_folders["llama"], dtype="float64", kv_cache_dtype=kind, block_size=8, enable_prefix_caching=False
    )
    (prompt,) = as_prompts(token_prompts([13]))
    wishes = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
    together = llm.generate(prompt, SamplingParams(n=3, seed=7, **wishes))[0].outputs
    alone = [llm.generate(prompt, SamplingParams(seed=7 + i, **wishes))[0].outputs[0] for i in range(3)]
    assert [list(o.token_ids) for o in together] == [list(o.token_ids) for o in alone]
    assert len({o.token_ids for o in together}) == 3


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "num_blocks"),
    [
        ("auto", 100),
        ("fp8", 400),
        ("fp8_per_head", 400),
        # A head of a token takes 2 * 16 numbers: 128 bytes in float32; in int8 32, and two scales of 4.
        ("int8_per_token_head", 100 * 128 // 40),
    ],
)
def test_the_same_bytes_hold_more_blocks(kind, num_blocks, float64_folders):
    shapes = [LayerShape(num_kv_heads=2, head_dim=16, value_dim=16)] * 2
    size = bytes_per_block(shapes, 8, torch.float32)
    llm = load(
        float64_folders["llama"], dtype="float32", kv_cache_dtype=kind, block_size=8, kv_cache_memory_bytes=100 * size
    )
    runner = llm.engine.runner
    assert runner.num_blocks == num_blocks
    assert runner.kv_cache_bytes == num_blocks * bytes_per_block(shapes, 8, stored_dtype(kind, torch.float32))
    assert runner.kv_cache_bytes <= 100 * size
    assert llm.engine.scheduler.pool.num_usable == num_blocks - 2


@pytest.mark.parametrize("kind", ["auto", *KINDS])
def test_gathered_copies_are_as_large_whatever_the_cache_is(kind, float64_folders):
    """They are made in the dtype of the computation: 20 tokens are 3 blocks of 8 slots, 2 heads, 32 numbers."""
    llm = load(float64_folders["llama"], dtype="float32", kv_cache_dtype=kind, block_size=8)
    llm.generate(as_prompts(token_prompts([20])), SamplingParams(temperature=0, max_tokens=1))
    assert llm.engine.runner.most_gather_bytes == 3 * 8 * 2 * 32 * 4


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"enforce_eager": True}, {}], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("kind", "name"),
    # Softcap, windows and sinks with one kind each: a graph for every number of rows takes half a minute to compile.
    [*((kind, "llama") for kind in KINDS), ("fp8_per_head", "gemma2"), ("int8_per_token_head", "gpt_oss")],
)
def test_tokens_on_a_gpu_are_those_of_a_cpu(kind, name, settings, float64_folders, monkeypatch):
    prompts = as_prompts(token_prompts([1, 5, 17, 40]))
    dtype = "float64"
    if not settings and kind.startswith("fp8"):  # the compiler has no kernel with both
        dtype = "float32"
    if not settings and name == "gpt_oss":  # nor, as one graph, what computes experts in float64
        monkeypatch.undo()
        dtype = "float32"
    shared = {"dtype": dtype, "kv_cache_dtype": kind, "block_size": 4, "num_gpu_blocks_override": 20}
    cpu = load(float64_folders[name], **shared)
    gpu = load(float64_folders[name], device="cuda", **shared, **settings)
    assert tokens_of(gpu.generate(prompts, GREEDY)) == tokens_of(cpu.generate(prompts, GREEDY))
