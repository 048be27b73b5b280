"""Gathered and fused attention against `reference.attention`: float64, one sequence at a time, over contiguous K and V.

Tolerances. With float64 inputs both sides round at 2^-53, a few operations a term and at most `K + D` terms a sum, so
an error of `8 * (K + D) * 2^-53` relative to the largest value bounds it with room; single wrong keys move the output
by 1 / K. Half-precision inputs are the same numbers on both sides (rounded before), float32 inside, so the bound is the
same with 2^-24, and one rounding of the output.
"""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paged.attention import fused, gathered
from reference.attention import attention

FORMS = {"gathered": gathered.paged_attention, "fused": fused.paged_attention}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass
class Case:
    """Ragged sequences in blocks, and the same sequences contiguously.

    Attributes:
        lengths: (query_len, seq_len) of each sequence.
        poison: what unused slots of used blocks, and all unused blocks but the null block, hold.
    """

    lengths: list[tuple[int, int]]
    block_size: int = 16
    group: int = 3
    num_kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float64
    poison: float = 1e30
    seed: int = 0
    padded_rows: int = 0
    features: dict = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        heads = self.num_kv_heads * self.group
        total = sum(q for q, _ in self.lengths)
        self.query = torch.randn(total + self.padded_rows, heads, self.head_dim, generator=g, dtype=torch.float64)
        needed = [-(-n // self.block_size) for _, n in self.lengths]
        num_blocks = sum(needed) + 4
        shape = (num_blocks, self.block_size, self.num_kv_heads)
        self.key_cache = torch.full((*shape, self.head_dim), self.poison, dtype=torch.float64)
        self.value_cache = torch.full((*shape, self.value_dim), -self.poison, dtype=torch.float64)
        self.key_cache[0] = self.value_cache[0] = 0
        order = (torch.randperm(num_blocks - 1, generator=g) + 1).tolist()  # physical blocks in no order
        self.tables = torch.zeros(len(self.lengths), max([*needed, 1]), dtype=torch.int32)
        self.keys, self.values = [], []
        for row, ((_, n), count) in enumerate(zip(self.lengths, needed, strict=True)):
            key = torch.randn(n, self.num_kv_heads, self.head_dim, generator=g, dtype=torch.float64).to(self.dtype)
            value = torch.randn(n, self.num_kv_heads, self.value_dim, generator=g, dtype=torch.float64).to(self.dtype)
            blocks = [order.pop() for _ in range(count)]
            self.tables[row, :count] = torch.tensor(blocks, dtype=torch.int32)
            for position in range(n):
                block, offset = blocks[position // self.block_size], position % self.block_size
                self.key_cache[block, offset] = key[position]
                self.value_cache[block, offset] = value[position]
            self.keys.append(key)
            self.values.append(value)
        if "window" in self.features:  # a block that no query sees any more may have gone to somebody else
            for row, (q, n) in enumerate(self.lengths):
                left = max(0, n - q - self.features["window"] + 1) // self.block_size
                self.tables[row, :left] = 0
        self.query = self.query.to(self.dtype)
        self.key_cache = self.key_cache.to(self.dtype)
        self.value_cache = self.value_cache.to(self.dtype)
        self.seq_lens = torch.tensor([n for _, n in self.lengths], dtype=torch.int32)
        self.starts = torch.tensor([0, *[q for q, _ in self.lengths]], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def run(self, form: str, **overrides) -> tuple[Tensor, Tensor]:
        arguments = {"scale": 0.37, **self.features, **overrides}
        arguments = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        tensors = (self.query, self.key_cache, self.value_cache, self.tables, self.seq_lens, self.starts)
        out, lse = FORMS[form](*(tensor.to(self.device) for tensor in tensors), **arguments)
        assert out.dtype == self.dtype
        assert lse.dtype == (torch.float64 if self.dtype == torch.float64 else torch.float32)
        return out.cpu(), lse.cpu()

    def expected(self, **overrides) -> tuple[Tensor, Tensor]:
        """By the reference; padded rows are 0 and -inf."""
        features = {k: v for k, v in {**self.features, **overrides}.items() if not k.endswith("_scale")}
        outs, lses = [], []
        for i, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            query = self.query[self.starts[i] : self.starts[i + 1]]
            out, lse = attention(query, key, value, scale=0.37, **features)
            outs.append(out)
            lses.append(lse)
        heads = self.query.shape[1]
        outs.append(torch.zeros(self.padded_rows, heads, self.value_dim, dtype=torch.float64))
        lses.append(torch.full((self.padded_rows, heads), -torch.inf, dtype=torch.float64))
        return torch.cat(outs), torch.cat(lses)

    def tolerance(self) -> float:
        longest = max([n for _, n in self.lengths] + [1])
        unit = 2.0**-53 if self.dtype == torch.float64 else 2.0**-24
        return 8 * (longest + self.head_dim) * unit

    def check(self, form: str, **overrides) -> None:
        out, lse = self.run(form, **overrides)
        expected_out, expected_lse = self.expected()
        tolerance = self.tolerance()
        largest = max([float(value.abs().max()) for value in self.values if value.numel()] + [1.0])
        rounding = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
        allowed = tolerance * largest + rounding[self.dtype] * expected_out.abs()
        assert ((out.double() - expected_out).abs() <= allowed).all(), "the output differs"
        empty = expected_lse == -torch.inf
        assert torch.equal(lse == -torch.inf, empty), "rows that see no key"
        # Errors of scores pass into the log-sum-exp as they are; scores here stay below 32.
        assert ((lse.double() - expected_lse).abs()[~empty] <= 32 * tolerance).all(), "the log-sum-exp differs"


def around(p: int) -> list[tuple[int, int]]:
    """Decodes and prompts and chunks, of lengths around block borders."""
    return [(1, 1), (0, 0), (1, p), (1, p + 1), (p, p), (p + 1, p + 1), (2, 2 * p + 1), (max(1, p - 1),) * 2, (0, 3)]


FEATURES = {
    "plain": {},
    "window 1": {"window": 1},
    "window": {"window": 6},
    "softcap": {"softcap": 0.5},
    "alibi": {"alibi_slopes": torch.tensor([2.0**-i for i in range(1, 7)], dtype=torch.float64)},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0, 2.0, -torch.inf], dtype=torch.float64)},
}
FEATURES["all"] = {**FEATURES["window"], **FEATURES["softcap"], **FEATURES["alibi"], **FEATURES["sinks"]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [1, 3, 7, 8])
@pytest.mark.parametrize("block_size", [1, 5, 16, 128])
def test_ragged_lengths_blocks_and_groups(block_size, group, form, device):
    Case(around(block_size), block_size=block_size, group=group, padded_rows=2, device=device).check(form)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, form, device):
    Case(around(5), block_size=5, features=FEATURES[name], device=device).check(form)


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in ("plain", "all")])
def test_features_matter_in_their_cases(name):
    """Without the feature the reference gives something far outside the tolerance: the case can see it."""
    case = Case(around(5), block_size=5, features=FEATURES[name])
    without = Case(around(5), block_size=5)
    difference = (case.expected()[0] - without.expected()[0]).abs().max()
    assert difference > 1e6 * case.tolerance()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [1, 4, 5, 6, 10, 11])
def test_windows_around_block_borders(window, form):
    Case([(1, 23), (1, 20), (7, 21), (12, 12)], block_size=5, features={"window": window}).check(form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("features", [{}, {"window": 6}, {"sinks": torch.ones(6, dtype=torch.float64)}], ids=str)
def test_nan_in_unused_slots_does_not_leak(features, form):
    """0 * NaN is NaN: a mask on the weights alone is not enough."""
    Case([(1, 18), (3, 7), (9, 9), (0, 0)], block_size=5, poison=torch.nan, features=features, padded_rows=1).check(
        form
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cache", ["key_cache", "value_cache"])
def test_nan_that_is_seen_comes_out(cache, form):
    """In one head of one sequence, where it was, and nowhere else: 0 in its place would be believed."""
    clean, _ = Case([(1, 8), (2, 9)], block_size=5).run(form)
    case = Case([(1, 8), (2, 9)], block_size=5)
    getattr(case, cache)[case.tables[1, 0], 3, 1] = torch.nan
    out, lse = case.run(form)
    assert out[1:, 3:].isnan().all()
    assert lse[1:, 3:].isnan().all() or cache == "value_cache"
    assert torch.equal(out[:1], clean[:1])
    assert torch.equal(out[1:, :3], clean[1:, :3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype, form):
    Case(around(16), dtype=dtype, poison=1e4).check(form)


@pytest.mark.parametrize("form", FORMS)
def test_values_of_another_width(form):
    Case(around(5), block_size=5, head_dim=12, value_dim=4).check(form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["number", "head", "token"])
def test_kv_scales(kind, form):
    """A stored value stands for itself times its scale: multiplying the pool beforehand gives the same."""
    case = Case(around(5), block_size=5, poison=100.0)
    blocks, size, heads, _ = case.key_cache.shape
    shapes = {"number": (), "head": (heads,), "token": (blocks, size, heads)}
    generator = torch.Generator().manual_seed(1)
    k_scale, v_scale = (torch.rand(shapes[kind], generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    stored = case.run(form, k_scale=k_scale, v_scale=v_scale)
    case.key_cache = case.key_cache * k_scale[..., None]
    case.value_cache = case.value_cache * v_scale[..., None]
    meant = case.run(form)
    for a, b in zip(stored, meant, strict=True):
        torch.testing.assert_close(a, b, rtol=case.tolerance(), atol=case.tolerance())
    assert (meant[0] - Case(around(5), block_size=5).run(form)[0]).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_shared_block_is_read_by_both(form):
    """Two sequences with the same first block and tails of their own."""
    case = Case([(1, 8), (1, 9)], block_size=5)
    case.tables[1, 0] = case.tables[0, 0]
    case.keys[1][:5], case.values[1][:5] = case.keys[0][:5], case.values[0][:5]
    case.check(form)


@pytest.mark.parametrize("form", FORMS)
def test_max_query_len_may_be_given(form):
    case = Case([(1, 8), (4, 9)], block_size=5)
    for a, b in zip(case.run(form), case.run(form, max_query_len=4), strict=True):
        assert torch.equal(a, b)


WRONG_SHAPES = {
    "query heads": ({"query": torch.zeros(1, 3, 4)}, "3 query heads of 4 cannot read 2 KV heads of 4"),
    "head dim": ({"query": torch.zeros(1, 4, 5)}, "4 query heads of 5 cannot read 2 KV heads of 4"),
    "dimensions": ({"query": torch.zeros(1, 1, 4, 4)}, r"must be \[T, Hq, D\]"),
    "value cache": ({"value_cache": torch.zeros(3, 4, 2, 4)}, "must have the same blocks"),
    "lengths": ({"seq_lens": torch.tensor([1, 1])}, r"1 block tables need 1 seq_lens .* got \[2\] and \[2\]"),
    "window": ({"window": 0}, "window must be at least 1"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_wrong_shapes_are_named(name, form):
    changed, message = WRONG_SHAPES[name]
    arguments = {
        "query": torch.zeros(1, 4, 4),
        "key_cache": torch.zeros(3, 2, 2, 4),
        "value_cache": torch.zeros(3, 2, 2, 4),
        "block_tables": torch.tensor([[1]]),
        "seq_lens": torch.tensor([1]),
        "query_start_loc": torch.tensor([0, 1]),
        "window": 1,
    }
    FORMS[form](**arguments, scale=1.0)
    with pytest.raises(ValueError, match=message):
        FORMS[form](**{**arguments, **changed}, scale=1.0)


@pytest.mark.parametrize("form", FORMS)
def test_tables_without_a_block(form):
    out, lse = FORMS[form](
        torch.ones(2, 4, 4),
        torch.zeros(3, 2, 2, 4),
        torch.zeros(3, 2, 2, 4),
        torch.zeros(2, 0, dtype=torch.int32),
        torch.tensor([0, 0]),
        torch.tensor([0, 1, 2]),
        scale=1.0,
    )
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_do(form):
    """No tokens, and sequences without any."""
    Case([(0, 0), (0, 5)], block_size=5).check(form)


def pieces(form: str, case: Case, split: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """One decode's context attended in two parts: the first `split` blocks and the others."""
    size = case.block_size
    first = (case.tables[:, :split], torch.clamp(case.seq_lens, max=split * size))
    rest = (case.tables[:, split:], case.seq_lens - split * size)
    return tuple(  # type: ignore[return-value]
        FORMS[form](case.query, case.key_cache, case.value_cache, table, lens.int(), case.starts, scale=0.37)
        for table, lens in (first, rest)
    )


@settings(max_examples=30, deadline=None)
@given(st.data())
@pytest.mark.parametrize("form", FORMS)
def test_parts_merge_by_their_log_sum_exp(form, data):
    """out = sum_i out_i * exp(lse_i - lse): what split contexts and shared prefixes are built on."""
    blocks = data.draw(st.integers(2, 5))
    tail = data.draw(st.integers(1, 4))
    case = Case([(1, 4 * (blocks - 1) + tail)], block_size=4, seed=data.draw(st.integers(0, 99)))
    (out_1, lse_1), (out_2, lse_2) = pieces(form, case, data.draw(st.integers(1, blocks - 1)))
    lse = torch.logaddexp(lse_1, lse_2)
    merged = out_1 * (lse_1 - lse).exp()[..., None] + out_2 * (lse_2 - lse).exp()[..., None]
    out, whole = case.run(form)
    torch.testing.assert_close(merged, out, rtol=0, atol=case.tolerance() * 4)
    torch.testing.assert_close(lse, whole, rtol=0, atol=case.tolerance() * 32)


@st.composite
def cases(draw) -> Case:
    """Any mix of ragged sequences and features."""
    kv_heads = draw(st.integers(1, 3))
    group = draw(st.integers(1, 4))
    heads = kv_heads * group
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    slopes, sinks = torch.rand(2, heads, generator=generator, dtype=torch.float64)
    features = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "window": st.integers(1, 30),
                "softcap": st.sampled_from([0.3, 1.0, 20.0]),
                "alibi_slopes": st.just(slopes),
                "sinks": st.just(sinks * 4 - 2),
            },
        )
    )
    seq_lens = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    return Case(
        [(draw(st.integers(0, n)), n) for n in seq_lens],
        block_size=draw(st.integers(1, 20)),
        group=group,
        num_kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 9)),
        value_dim=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 999)),
        padded_rows=draw(st.integers(0, 2)),
        poison=draw(st.sampled_from([1e30, torch.nan])),
        features=features,
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_any_case(case):
    for form in FORMS:
        case.check(form)
