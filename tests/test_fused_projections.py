"""One product for projections of one input: the same tokens and bytes as before, and fewer products."""

import math
import re
import shutil

import pytest
import torch
from architectures import build
from helpers import load, token_prompts
from tiny_models import tiny_model
from torch import nn
from torch._inductor.utils import run_and_get_code

from paged.kv_pool import storage_bytes
from paged.model.fused_projections import Projection, SharedProduct, fuse_projections

# Saved products in two layers: Q, K, V save two, gate and up one.
SAVED = {
    "llama": 6,
    "qwen2": 6,  # biases on Q, K and V
    "qwen3": 6,  # norms on Q and K
    "gemma2": 6,
    "mixtral": 4,  # experts and router are no linear layers
    "qwen2_moe": 6,  # a shared expert
    "deepseek_v3": 4,  # the way down to queries' and to keys' latent; gate, up in one dense layer and a shared expert
    "olmo2": 6,  # attention reads what the layer got, without a norm
    "opt": 4,  # no gate
    "phi3": 0,  # comes fused
    "gpt_neox": 0,  # likewise
    "gpt2": 0,  # no linear layers at all
}
IDS = torch.tensor(token_prompts([17]))


@torch.inference_mode()
def logits_of(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", SAVED)
def test_logits_tokens_and_state_are_those_of_before(name):
    """Logits are bounded, not exact: a longer product may sum in another order. The weights are exact."""
    model = build(name, torch.float64)
    model.set_experts_implementation("eager")  # the others know no float64
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):  # zero until now
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    before = logits_of(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    num_bytes = storage_bytes([*model.parameters(), *model.buffers()])

    assert fuse_projections(model) == SAVED[name]
    logits = logits_of(model)
    assert (logits - before).abs().max() <= 1e-12 * before.abs().max()
    assert torch.equal(logits.argmax(-1), before.argmax(-1))
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert storage_bytes([*model.parameters(), *model.buffers()]) == num_bytes
    assert model.config._attn_implementation == "eager", "left as it was"
    assert fuse_projections(model) == 0, "nothing is left to fuse"


def test_each_projection_is_within_the_bound_of_two_orders_of_summation():
    generator = torch.Generator().manual_seed(0)
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 7, 60, generator=generator)
    plain = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    with torch.inference_mode():
        expected = [linear(x) for linear in plain]
        bounds = [2 * 60 * torch.finfo(x.dtype).eps * (x.abs() @ linear.weight.abs().T) for linear in plain]
    fuse_projections(model)
    with torch.inference_mode():
        for name, numbers, bound in zip(("q_proj", "k_proj", "v_proj"), expected, bounds, strict=True):
            assert ((getattr(attention, name)(x) - numbers).abs() <= bound).all()


def products(code: str) -> int:
    """Library products in generated code."""
    return len(re.findall(r"extern_kernels\.(?:add)?mm\(", code))


def buffer_sizes(code: str, num_tokens: int) -> list[int]:
    """Elements of every buffer that generated code allocates; the number of tokens may be a symbol there, as s27."""
    shapes = re.findall(r"empty_strided\w*\(\(([^()]*)\)", code)
    return [math.prod(int(n) for n in re.findall(r"\d+", re.sub(r"\bs\d+", f"{num_tokens}", s))) for s in shapes]


def compiled(model, *, dynamic):
    """Logits, and the code of the one graph that serves all layers; it gives back its output and nothing else."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=dynamic)
    logits, codes = run_and_get_code(logits_of, model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(codes) == 1
    returned = re.findall(r"^ +return \((buf.*)\)$", codes[0], re.MULTILINE)
    assert [buffers.count("buf") for buffers in returned] == [1]
    return logits, codes[0]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("name", "dynamic"), [("llama", True), ("qwen2", False)])
def test_a_compiled_layer_has_four_products_instead_of_seven(name, dynamic):
    """Read from the generated code, with no product kept and no weight copied."""
    model = build(name)
    expected, code = compiled(model, dynamic=dynamic)
    assert products(code) == 7
    fuse_projections(model)
    logits, code = compiled(model, dynamic=dynamic)
    assert products(code) == 4
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    sizes = buffer_sizes(code, IDS.numel())
    assert IDS.numel() * (96 + 2 * 32) in sizes, "the product of Q, K and V, or else the pattern does not fit the code"
    assert max(sizes) < min(module.weight.numel() for module in model.modules() if isinstance(module, SharedProduct))


class Pair(nn.Module):
    """Two projections of nearly the same input, in place of an MLP."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one = nn.Linear(48, 48, bias=kind == "one has a bias")
        self.two = nn.Linear(48, 48, bias=False, dtype=torch.float64 if kind == "two dtypes" else None)
        if kind == "one weight":
            self.two.weight = self.one.weight
        if kind == "weights of one storage":
            self.two.weight.data = self.one.weight.data[:]
        if kind == "a weight that another module has":
            self.other = nn.Embedding.from_pretrained(self.one.weight.data)
        if kind == "a weight that is a buffer elsewhere":
            self.register_buffer("other", self.one.weight.data)
        if kind == "parametrised":
            nn.utils.parametrizations.weight_norm(self.one)
        if kind == "hooked":
            self.one.register_forward_hook(lambda module, inputs, output: output * 2)
        if kind == "another class":
            self.one.__class__ = type("Quantised", (nn.Linear,), {})

    def forward(self, x):
        x = x * 1
        first = self.one(x)
        if self.kind == "another input":
            x = x + 1
        if self.kind == "an input changed in place":
            x.add_(1)
        if self.kind == "called twice":
            first = first + self.one(x)
        return first + self.two(x.to(self.two.weight.dtype)).to(x.dtype)


NOT_FUSED = (
    "another input",
    "an input changed in place",
    "called twice",
    "one has a bias",
    "two dtypes",
    "one weight",
    "weights of one storage",
    "a weight that another module has",
    "a weight that is a buffer elsewhere",
    "parametrised",
    "hooked",
    "another class",
)


@pytest.mark.parametrize("kind", [*NOT_FUSED, "nothing special"])
def test_what_is_no_product_of_its_own_stays(kind):
    torch.manual_seed(0)
    model = build("llama")
    model.model.layers[0].mlp = Pair(kind)
    before = logits_of(model)
    fuse_projections(model)
    pair = model.model.layers[0].mlp
    fused = [isinstance(child, Projection) for child in (pair.one, pair.two)]
    assert fused == [kind == "nothing special"] * 2
    torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-4)


def test_tied_embeddings_stay_tied():
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = attention.v_proj.weight
    assert fuse_projections(model) == 4, "only Q was left of the first layer's three"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert attention.k_proj.weight is attention.v_proj.weight


def test_no_order_of_calls_is_wrong():
    """In another order, only some of them, with another input between: slower, and right."""
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    one, other = torch.randn(2, 1, 5, 60, generator=torch.Generator().manual_seed(0)).unbind()
    names = ("q_proj", "k_proj", "v_proj")
    plain = {name: getattr(attention, name) for name in names}
    weights = {name: linear.weight.detach().clone() for name, linear in plain.items()}
    fuse_projections(model)
    with torch.inference_mode():
        for order in ("vkq", "qkv", "qqk", "kk", "vv", "qv", "qkv"):
            for letter, x in zip(order, (one, other, one, one), strict=False):
                out = getattr(attention, f"{letter}_proj")(x)
                torch.testing.assert_close(out, x @ weights[f"{letter}_proj"].T, rtol=1e-5, atol=1e-4)


def test_a_pass_that_broke_off_leaves_nothing_for_the_next():
    """The next one's input may be the same tensor, filled anew."""
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    fuse_projections(model)
    x = torch.ones(1, 5, 60)
    with torch.inference_mode():
        attention.q_proj(x)  # and here an error ends the pass
        old = attention.q_proj(x), attention.k_proj(x)
        x *= 2
        new = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
    for before, after in zip(old, new, strict=False):
        assert torch.equal(after, 2 * before), "powers of two are exact"
    assert attention.q_proj.product.output is attention.q_proj.product.input is None, "let go of"


def test_works_on_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = build("llama")
        before = logits_of(model)
        assert fuse_projections(model) == 6
        torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-4)


def test_a_compiled_engine_fuses_and_an_eager_one_does_not(folders):
    """That the tokens are the same is said in tests/test_compile.py."""

    def num_products(enforce_eager):
        runner = load(folders["qwen3"], enforce_eager=enforce_eager, max_num_seqs=3).engine.runner
        return sum(isinstance(module, SharedProduct) for module in runner._model.modules())

    assert (num_products(True), num_products(False)) == (0, 4)
