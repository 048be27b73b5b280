"""Quantised K and V: their codes against the definition, and attention over them against the bound on its error.

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
from hypothesis import given
from hypothesis import strategies as st
from quantised_by_definition import MAGNITUDES, read_back_fp8, read_back_int8
from test_attention import DEVICES, FEATURES, FORMS, Case, around
from torch import Tensor

from paged.kv_pool import LayerShape, allocate_layer, write
from paged.quantisation import fp8_scale, stored_dtype, to_fp8, to_int8

# One name for each way to store; fp8_e4m3 and int8 are second names.
KINDS = ("fp8", "fp8_per_head", "int8_per_token_head")


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
