"""The sampler against probabilities worked out by hand, and its noise against published vectors and statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.sampling import SamplingInputs, gumbel_noise, sample
from paged.sampling.noise import GAMMA, splitmix64
from paged.sampling.sampler import keep_top
from paged.sampling_params import SamplingParams

MASK = (1 << 64) - 1


def splitmix64_in_python(x: int) -> int:
    """The mixing function of SplitMix64 as published, on Python's unbounded integers."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def inputs(size: int, *, temperature=1.0, top_k=10**6, top_p=1.0, vocab=1000, positions=None) -> SamplingInputs:
    """`size` rows with the same wishes and different seeds."""
    top_k = min(top_k, vocab)
    return SamplingInputs(
        temperature=torch.full((size,), temperature),
        top_k=torch.full((size,), top_k),
        top_p=torch.full((size,), top_p),
        seeds=torch.arange(size),
        positions=torch.zeros(size, dtype=torch.int64) if positions is None else positions,
        all_greedy=temperature == 0,
        any_truncated=top_k < vocab or top_p < 1,
    )


def test_splitmix64_gives_the_published_stream():
    """The first outputs of seed 1234567, as in the generator's reference implementation."""
    stream = [splitmix64(torch.tensor(1234567) + i * torch.tensor(GAMMA)).item() & MASK for i in (1, 2, 3)]
    assert stream == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(-(2**63), 2**63 - 1))
def test_splitmix64_equals_unbounded_integers(x):
    assert splitmix64(torch.tensor(x)).item() & MASK == splitmix64_in_python(x)


def test_noise_depends_on_seed_position_and_token_only():
    seeds, positions = torch.tensor([5, 6, 5]), torch.tensor([1, 1, 2])
    together = gumbel_noise(seeds, positions, 50)
    for row in range(3):
        assert torch.equal(together[row], gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 50)[0])
    assert torch.equal(together[:, :20], gumbel_noise(seeds, positions, 20))
    assert (together[0] != together[1]).all()
    assert (together[0] != together[2]).all()


def test_noise_is_gumbel_and_independent():
    """Mean, variance and the correlation between neighbours, each within five standard errors."""
    rows, vocab = 2000, 500
    noise = gumbel_noise(torch.arange(rows), torch.arange(rows) % 7, vocab).double()
    count = noise.numel()
    variance = math.pi**2 / 6
    assert abs(noise.mean().item() - 0.5772156649) < 5 * math.sqrt(variance / count)
    # The Gumbel distribution's kurtosis is 5.4, so the variance of (x - mean)^2 is 4.4 variance^2.
    assert abs(noise.var().item() - variance) < 5 * math.sqrt(4.4 * variance**2 / count)
    for shifted in (noise.roll(1, 0), noise.roll(1, 1)):
        correlation = ((noise - noise.mean()) * (shifted - noise.mean())).mean().item() / variance
        assert abs(correlation) < 5 / math.sqrt(count)


def test_noise_is_finite_for_every_hash():
    bits = torch.tensor([0, (1 << 23) - 1])
    uniform = (bits.float() + 0.5) * 2.0**-23
    assert torch.isfinite(-torch.log(-torch.log(uniform))).all()


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    """20,000 draws of 8 tokens: chi-square with 7 degrees of freedom is above 40.5 once in a million."""
    logits = torch.linspace(-1, 2, 8)
    size = 20_000
    tokens = sample(logits.expand(size, -1), inputs(size, temperature=temperature, vocab=8))
    counts = torch.bincount(tokens, minlength=8).double()
    assert chi_square(counts, (logits.double() / temperature).softmax(0)) < 40.5


def test_truncated_draws_follow_what_is_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    size = 20_000
    tokens = sample(logits.expand(size, -1), inputs(size, top_k=3, top_p=0.7, vocab=4))
    counts = torch.bincount(tokens, minlength=4).double()
    # Of 4/9, 3/9 and 2/9 that the top 3 leave, the first two reach 0.7.
    assert counts[2:].sum() == 0
    assert chi_square(counts[:2], torch.tensor([4 / 7, 3 / 7]).double()) < 24  # one degree of freedom, one in a million


def keep_top_by_hand(probabilities: list[float], k: int, p: float) -> set[int]:
    """The definition: the top k with ties, then tokens in falling order until their share reaches p."""
    kth = sorted(probabilities, reverse=True)[k - 1]
    left = [i for i, x in enumerate(probabilities) if x >= kth]
    total = sum(probabilities[i] for i in left)
    kept, reached = set(), 0.0
    for i in sorted(left, key=lambda i: (-probabilities[i], i)):
        if reached >= p - 1e-9:
            break
        kept.add(i)
        reached += probabilities[i] / total
    return kept


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.data(),
)
@settings(max_examples=300)
def test_keep_top_is_its_definition(weights, data):
    k = data.draw(st.integers(1, len(weights)))
    # Eighths away from every possible border: integer weights over their sum are never p exactly, by 1e-3.
    p = data.draw(st.sampled_from([0.1003, 0.3003, 0.5003, 0.7003, 0.9003, 1.0]))
    probabilities = [w / sum(weights) for w in weights]
    logits = torch.tensor([probabilities], dtype=torch.float64).log()
    kept = keep_top(logits, torch.tensor([k]), torch.tensor([p], dtype=torch.float64))[0]
    assert set(kept.isfinite().nonzero().flatten().tolist()) == keep_top_by_hand(probabilities, k, p)
    assert torch.equal(kept[kept.isfinite()], logits[0][kept.isfinite()])


def test_greedy_rows_keep_their_argmax_beside_drawn_ones():
    logits = torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.1, 0.0]]).repeat(500, 1)
    wishes = inputs(1000, vocab=3)
    wishes.temperature[::2] = 0
    tokens = sample(logits, wishes)
    assert (tokens[::2] == 1).all()
    assert len(tokens[1::2].unique()) == 3


def test_half_precision_logits_are_sampled_in_float32():
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    wishes = inputs(64, vocab=100)
    assert torch.equal(sample(logits.bfloat16(), wishes), sample(logits.bfloat16().float(), wishes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("seed", 2**63),
        ("seed", 1.0),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop_token_ids", ["a"]),
    ],
)
def test_a_wish_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must") as error:
        SamplingParams(**{field: value})
    assert repr(value) in str(error.value)
