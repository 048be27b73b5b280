"""A quantised cache: its codes against their definition, its error against the bound, the engine against transformers.

The bounds, none of them tuned. An element is read back within (paged/quantisation.py)

    fp8    max(2^-4 |x|, 2^-10 scale)    up to 448 * scale        int8    (1/2 + 2^-13) scale

Attention then moves as follows. A score of query q and key j moves by at most eta_j = scale * sum_i |q_i| |dk_ji|, also
behind a softcap, whose slope is at most 1, and with ALiBi added. If no score moves by more than eta, no weight p_j
changes by more than a factor of exp(2 eta). The moved output is sum_j p'_j (v_j + dv_j), and weights sum to 1, so

    |o' - o| <= exp(2 eta) sum_j p_j |dv_j| + (exp(2 eta) - 1) sum_j p_j |v_j - o|

A sink is one more key with nothing to move: k as it is, v = 0. The log-sum-exp moves by at most eta.
"""

import math

import numpy as np
import pytest
import torch
from architectures import build
from helpers import as_prompts, load, token_prompts, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from quantised_by_definition import MAGNITUDES, read_back_fp8, read_back_int8
from test_attention import DEVICES, FEATURES, FORMS, Case, around
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from paged import LLM, SamplingParams
from paged.kv_pool import LayerShape, allocate_layer, bytes_per_block, write
from paged.quantisation import fp8_scale, stored_dtype, to_fp8, to_int8

# One name for each way to store; fp8_e4m3 and int8 are second names.
KINDS = ("fp8", "fp8_per_head", "int8_per_token_head")
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


# --- numbers ----------------------------------------------------------------------------------------------------------


def fp8_and_back(numbers: Tensor, scale: Tensor) -> Tensor:
    return to_fp8(numbers, scale).double() * scale.double()[..., None]


def test_every_fp8_number_comes_back_as_it_is_and_the_middle_of_two_goes_to_the_even_code():
    scale = torch.tensor(2.0**-5)
    numbers = torch.tensor([*MAGNITUDES, *-MAGNITUDES])[:, None] / 32
    assert torch.equal(fp8_and_back(numbers, scale), numbers)
    middles = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    even = np.where(np.arange(126) % 2, MAGNITUDES[1:], MAGNITUDES[:-1])
    assert fp8_and_back(torch.tensor(middles / 32)[:, None], scale)[:, 0].tolist() == (even / 32).tolist()


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.integers(-20, 20))
def test_fp8_is_the_nearest_code_within_the_bound(numbers, exponent):
    scale = torch.tensor(2.0**exponent)
    x = torch.tensor([numbers], dtype=torch.float32)
    read = fp8_and_back(x, scale)
    np.testing.assert_array_equal(read.numpy(), read_back_fp8(x.numpy(), scale.numpy()))
    x = x.double()
    assert torch.equal(read.isnan(), ~x.isfinite()), "what is no number stays none, and nothing else becomes it"
    clamped = x.clamp(-448 * scale, 448 * scale)
    bound = torch.maximum(2.0**-4 * x.abs(), 2.0**-10 * scale)
    assert ((read - clamped).abs() <= bound)[x.isfinite()].all()


@given(st.floats(0, 2.0**100, width=32))
def test_an_fp8_scale_is_a_power_of_two_with_a_headroom_of_two_to_four(largest):
    scale = fp8_scale(torch.tensor(largest)).double().item()
    assert math.frexp(scale)[0] == 0.5
    if largest > 1e-30:
        assert 2 * (1 - 2**-20) <= 448 * scale / largest <= 4 * (1 + 2**-20)
    else:
        assert np.isfinite(1 / scale)


# A vector's own scale has to be a normal float32 number for the bound; smaller ones lose less than 2^-119 altogether.
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_int8_is_the_nearest_code_within_the_bound(numbers):
    x = torch.tensor([numbers], dtype=torch.float32)
    codes, scales = to_int8(x)
    read = codes.double() * scales.double()[..., None]
    if not x.isfinite().all():
        assert read.isnan().all()
        return
    assert codes.abs().max() <= 127
    bound = (0.5 + 2.0**-13) * scales.double()[..., None] + 2.0**-119 * (scales[..., None] < 2.0**-126)
    assert ((read - x.double()).abs() <= bound).all()
    if scales.item() >= 2.0**-126:
        np.testing.assert_array_equal(read.numpy(), read_back_int8(x.numpy()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_numbers_of_other_dtypes(dtype):
    """Rounded to float32 first, which only float64 notices."""
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    scale = torch.tensor([2.0**-6, 2.0**-8])
    assert torch.equal(to_fp8(x, scale).float(), to_fp8(x.float(), scale).float())
    for a, b in zip(to_int8(x), to_int8(x.float()), strict=True):
        assert torch.equal(a, b)


# --- attention over a quantised pool ----------------------------------------------------------------------------------


class StoredCase(Case):
    """A case whose K and V went into a quantised pool through `write`; every slot they are not in holds poison."""

    def __init__(self, kind: str, lengths: list[tuple[int, int]], **settings) -> None:
        super().__init__(lengths, **settings)
        # Float32 numbers, so that the bound holds as it stands; K, V and their heads of different sizes, and V's second
        # head so small that one scale for both leaves it few bits.
        key_size, value_size = (torch.tensor(sizes, dtype=self.dtype)[:, None] for sizes in ((0.5, 1), (4, 2.0**-10)))
        self.keys = [key.float().to(self.dtype) * key_size for key in self.keys]
        self.values = [value.float().to(self.dtype) * value_size for value in self.values]
        self.kind = kind
        shape = LayerShape(self.num_kv_heads, self.head_dim, self.value_dim)
        cache = allocate_layer(shape, len(self.key_cache), self.block_size, stored_dtype(kind, self.dtype), "cpu")
        if kind.startswith("fp8"):
            per_head = ([2.0**-7, 2.0**-6], [2.0**-4, 2.0**-16])
            scales = [torch.tensor(s if kind == "fp8_per_head" else max(s)) for s in per_head]
            for tensor in cache:
                tensor[1:] = torch.nan
        else:
            scales = list(cache[2:])
            for codes, scale in zip(cache[:2], scales, strict=True):
                codes[1:], scale[1:] = 127, torch.nan
        self.features = {**self.features, "k_scale": scales[0], "v_scale": scales[1]}
        self.key_cache, self.value_cache = cache[:2]
        self.store()

    def store(self) -> None:
        """Write every token; blocks that a window has left behind are in no table, and nobody's."""
        scales = {name: self.features[name] for name in ("k_scale", "v_scale")}
        for table, key, value in zip(self.tables, self.keys, self.values, strict=True):
            positions = torch.arange(len(key))
            blocks = table[positions // self.block_size].long()
            slots = blocks * self.block_size + positions % self.block_size
            mine = blocks > 0
            write(self.key_cache, self.value_cache, key[mine], value[mine], slots[mine], **scales)

    def read_back(self) -> tuple[list[Tensor], list[Tensor]]:
        """K and V as they should be read, by definition."""
        scales = self.features["k_scale"], self.features["v_scale"]
        return tuple(  # type: ignore[return-value]
            [
                torch.from_numpy(
                    read_back_int8(x.double().numpy())
                    if self.kind.startswith("int8")
                    else read_back_fp8(x.double().numpy(), scale.numpy())
                )
                for x in tensors
            ]
            for tensors, scale in zip((self.keys, self.values), scales, strict=True)
        )

    def element_bound(self, numbers: Tensor, scale: Tensor) -> Tensor:
        """How far an element can be from what is read for it."""
        size = numbers.double().abs()
        if self.kind.startswith("int8"):
            own_scale = size.amax(dim=-1, keepdim=True) / 127 * (1 + 2.0**-23)
            return ((0.5 + 2.0**-13) * own_scale).expand_as(size)
        assert (size <= 448 * scale[..., None]).all(), "nothing is clamped here"
        return torch.maximum(2.0**-4 * size, 2.0**-10 * scale.double()[..., None].expand_as(size))

    def moved(self, sequence: int, query: Tensor, position: int, head: int) -> tuple[Tensor, float]:
        """The bounds above for the output [Dv] and the log-sum-exp of one query at one head."""
        window = self.features.get("window", position + 1)
        seen = slice(max(0, position - window + 1), position + 1)
        kv_head = head // self.group
        key, value = self.keys[sequence][seen, kv_head].double(), self.values[sequence][seen, kv_head].double()
        dk = self.element_bound(self.keys[sequence], self.features["k_scale"])[seen, kv_head]
        dv = self.element_bound(self.values[sequence], self.features["v_scale"])[seen, kv_head]
        eta = 0.37 * (dk @ query.abs()).max()
        score = 0.37 * (key @ query)
        if cap := self.features.get("softcap"):
            score = cap * torch.tanh(score / cap)
        if (slopes := self.features.get("alibi_slopes")) is not None:
            score += slopes[head] * torch.arange(1 - len(score), 1)
        if (sinks := self.features.get("sinks")) is not None:
            score = torch.cat([score, sinks[head, None]])
            value, dv = (torch.cat([x, x.new_zeros(1, x.shape[1])]) for x in (value, dv))
        p = score.softmax(dim=0)
        factor = torch.exp(2 * eta)
        return factor * (p @ dv) + (factor - 1) * (p @ (value - p @ value).abs()), float(eta)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """[T, Hq, Dv] and [T, Hq]."""
        bounds = [
            self.moved(i, self.query[self.starts[i] + j, head].double(), n - q + j, head)
            for i, (q, n) in enumerate(self.lengths)
            for j in range(q)
            for head in range(self.query.shape[1])
            if n - q + j >= 0
        ]
        heads = self.query.shape[1]
        out, eta = torch.stack([out for out, _ in bounds]), torch.tensor([eta for _, eta in bounds]).double()
        return out.reshape(-1, heads, self.value_dim), eta.reshape(-1, heads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_reads_what_the_codes_stand_for(kind, name, form, device):
    """Tight: against float64 attention over K and V read back by definition."""
    case = StoredCase(kind, around(5), block_size=5, features=FEATURES[name], padded_rows=2, device=device)
    case.keys, case.values = case.read_back()
    case.check(form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_other_dtypes(kind, dtype, form):
    case = StoredCase(kind, around(16), dtype=dtype, head_dim=12, value_dim=4)
    case.keys, case.values = case.read_back()
    case.check(form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_moves_no_further_than_the_bound(kind, name, form):
    """Against float64 attention over the K and V that were never quantised."""
    case = StoredCase(kind, [(1, 1), (3, 9), (5, 5), (1, 23), (4, 40)], block_size=5, features=FEATURES[name])
    out, lse = case.run(form)
    expected_out, expected_lse = case.expected()
    bound, eta = case.bounds()
    tolerance = case.tolerance() * 16
    error = (out - expected_out).abs()
    assert (error <= bound + tolerance).all()
    assert ((lse - expected_lse).abs() <= eta + 32 * tolerance).all()
    # And the bound says something: errors reach a good part of it, and it is far below the values.
    assert (error / bound).max() > 0.2
    assert bound.mean() < 0.1 * max(value.abs().max() for value in case.values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("cache", ["key_cache", "value_cache"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_number_comes_out_as_none(form, cache, broken, kind):
    """One element of K or of V is enough, for the queries that read its head; and no other knows of it."""

    def run(element: float) -> Tensor:
        case = StoredCase(kind, [(1, 7), (1, 9)], block_size=5)
        getattr(case, "keys" if cache == "key_cache" else "values")[0][3, 1, 2] = element
        case.store()
        return case.run(form)[0]

    clean, out = run(1.0), run(broken)
    assert out[0, 3:].isnan().any(dim=-1).all()
    assert torch.equal(out[0, :3], clean[0, :3])
    assert torch.equal(out[1], clean[1])


# --- the engine -------------------------------------------------------------------------------------------------------


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
    folders = {}
    for name in ("llama", "gemma2", "gpt_oss"):
        folders[name] = tmp_path_factory.mktemp(name)
        build(name, torch.float64).save_pretrained(folders[name])
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


def test_without_quantisation_there_are_no_scales(float64_folders):
    llm = load(float64_folders["llama"])
    for call, cache in zip(llm.engine.runner._calls, llm.engine.runner.caches, strict=True):
        assert len(cache) == 2
        assert not hasattr(call.module, "key_scale")


@pytest.mark.parametrize("kind", KINDS)
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
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_on_a_gpu_are_those_of_a_cpu(kind, name, settings, float64_folders):
    prompts = as_prompts(token_prompts([1, 5, 17, 40]))
    shared = {"dtype": "float64", "kv_cache_dtype": kind, "block_size": 4, "num_gpu_blocks_override": 20}
    cpu = load(float64_folders[name], **shared)
    gpu = load(float64_folders[name], device="cuda", **shared, **settings)
    assert tokens_of(gpu.generate(prompts, GREEDY)) == tokens_of(cpu.generate(prompts, GREEDY))
