"""The sampler against probabilities worked out by hand, and its noise against published vectors and statistics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.sampling import SamplingInputs, gumbel_noise, logprobs_of, sample, token_logprobs
from paged.sampling.adjust import adjust
from paged.sampling.noise import GAMMA, splitmix64
from paged.sampling.sampler import keep_top
from paged.sampling_params import SamplingParams
from paged.step import Admission, Sample
from paged.wishes import Wishes

MASK = (1 << 64) - 1


def splitmix64_in_python(x: int) -> int:
    """The mixing function of SplitMix64 as published, on Python's unbounded integers."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def inputs(size: int, *, temperature=1.0, top_k=10**6, top_p=1.0, min_p=0.0, vocab=1000, positions=None):
    """`size` rows with the same wishes and different seeds."""
    top_k = min(top_k, vocab)
    return SamplingInputs(
        temperature=torch.full((size,), temperature),
        top_k=torch.full((size,), top_k),
        top_p=torch.full((size,), top_p),
        min_p=torch.full((size,), min_p),
        seeds=torch.arange(size),
        positions=torch.zeros(size, dtype=torch.int64) if positions is None else positions,
        all_greedy=temperature == 0,
        any_truncated=top_k < vocab or top_p < 1,
        any_min_p=min_p > 0,
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
    tokens, _ = sample(logits.expand(size, -1), inputs(size, temperature=temperature, vocab=8))
    counts = torch.bincount(tokens, minlength=8).double()
    assert chi_square(counts, (logits.double() / temperature).softmax(0)) < 40.5


def test_truncated_draws_follow_what_is_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    size = 20_000
    tokens, _ = sample(logits.expand(size, -1), inputs(size, top_k=3, top_p=0.7, vocab=4))
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
    tokens, _ = sample(logits, wishes)
    assert (tokens[::2] == 1).all()
    assert len(tokens[1::2].unique()) == 3


def test_half_precision_logits_are_sampled_in_float32():
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    wishes = inputs(64, vocab=100)
    assert torch.equal(sample(logits.bfloat16(), wishes)[0], sample(logits.bfloat16().float(), wishes)[0])


def test_min_p_keeps_its_share_of_the_most_likely():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    tokens, _ = sample(logits.expand(5000, -1), inputs(5000, min_p=0.4, vocab=4))
    assert sorted(set(tokens.tolist())) == [0, 1], "0.2 is the least that is kept"
    tokens, _ = sample(logits.expand(5000, -1), inputs(5000, min_p=0.29, vocab=4))
    assert sorted(set(tokens.tolist())) == [0, 1, 2]


def test_rows_that_cannot_be_sampled_are_told():
    logits = torch.zeros(3, 4)
    logits[0, 2] = torch.nan
    logits[1] = -torch.inf
    for temperature in (0.0, 1.0):
        _, broken = sample(logits, inputs(3, temperature=temperature, vocab=4))
        assert broken.tolist() == [True, True, False]


def adjusted_by_hand(logits, allowed, bans, bias, prompt, output, repetition, frequency, presence):
    """vLLM's order, one token at a time."""
    result = []
    for token, logit in enumerate(logits):
        x = logit
        if (allowed is not None and token not in allowed) or token in bans:
            x = -math.inf
        x += bias.get(token, 0.0)
        if token in prompt or token in output:
            x = x / repetition if x > 0 else x * repetition
        x -= frequency * output.count(token)
        x -= presence * (token in output)
        result.append(x)
    return result


TOKENS = st.lists(st.integers(0, 7), max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5), min_size=8, max_size=8),
    allowed=st.none() | st.sets(st.integers(0, 7), min_size=1),
    bans=st.sets(st.integers(0, 7)),
    bias=st.dictionaries(st.integers(0, 7), st.floats(-100, 100)),
    prompt=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    before=TOKENS,
    after=TOKENS,
    penalties=st.tuples(st.floats(0.1, 3), st.floats(-2, 2), st.floats(-2, 2)),
)
def test_wishes_about_tokens_are_their_definitions(logits, allowed, bans, bias, prompt, before, after, penalties):
    """Through the rows of a batch, beside a row without wishes, with tokens sampled before and after a preemption."""
    repetition, frequency, presence = penalties
    params = SamplingParams(
        logit_bias=bias,
        allowed_token_ids=None if allowed is None else sorted(allowed),
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    wishes = Wishes(3, 8, torch.device("cpu"))
    wishes.admit(Admission(2, params, 0, tuple(prompt), tuple(before)))
    wishes.admit(Admission(0, SamplingParams(), 0, tuple(prompt), ()))
    for token in after:
        wishes.count(torch.tensor([0, 2]), torch.tensor([7 - token, token]))
    samples = [Sample(0), Sample(2, tuple(sorted(bans)))]
    found = wishes.inputs(samples, np.array([9, 9]))
    both = torch.tensor([logits, logits], dtype=torch.float64)
    plain, adjusted = adjust(both, found.allowed, found.edits, found.penalties)
    assert torch.equal(plain, both[0])
    output = [*before, *after]
    # The definition in float32 numbers, which is what wishes are kept in.
    rounded = [float(np.float32(x)) for x in (repetition, frequency, presence)]
    small = {token: float(np.float32(x)) for token, x in bias.items()}
    expected = adjusted_by_hand(logits, allowed, bans, small, prompt, output, *rounded)
    # The frequency penalty times a count of at most 12, and the presence penalty beside it, are rounded once each.
    bound = 2 * 2**-24 * (2 * 12 + 2)
    torch.testing.assert_close(adjusted, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=bound)


def test_a_row_forgets_the_wishes_of_its_last_owner():
    wishes = Wishes(1, 4, torch.device("cpu"))
    loud = SamplingParams(
        logit_bias={1: 5.0}, allowed_token_ids=[1], repetition_penalty=2.0, logprobs=3, prompt_logprobs=2, min_p=0.5
    )
    wishes.admit(Admission(0, loud, 0, (1, 2), ()))
    assert (wishes.num_logprobs([0]), wishes.num_prompt_logprobs([0])) == (3, 2)
    wishes.admit(Admission(0, SamplingParams(), 0, (3,), ()))
    found = wishes.inputs([Sample(0)], np.array([1]))
    assert (found.allowed, found.edits, found.penalties, found.any_min_p) == (None, None, None, False)
    assert wishes.num_logprobs([0]) is None


def test_logprobs_are_those_of_the_softmax():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 7, 7, 29, 3])
    rows = token_logprobs(logprobs_of(logits, tokens, 4), tokens)
    for row, token, numbers in zip(rows, tokens.tolist(), logits.tolist(), strict=True):
        total = math.log(sum(math.exp(x) for x in numbers))
        order = sorted(range(30), key=lambda i: -numbers[i])
        assert row.token_id == token
        assert row.logprob == pytest.approx(numbers[token] - total, abs=1e-5)
        assert row.rank == 1 + order.index(token)
        assert [i for i, _ in row.top] == order[:4]
        assert [x for _, x in row.top] == pytest.approx([numbers[i] - total for i in order[:4]], abs=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 16385),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -2),
        ("prompt_logprobs", 1.0),
        ("bad_words", [""]),
        ("bad_words", "word"),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", [1]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", ["a"]),
        ("truncate_prompt_tokens", 0),
        ("output_kind", "DELTA"),
        ("stop", 5),
        ("stop_token_ids", 5),
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


def test_wishes_that_do_not_go_together():
    with pytest.raises(ValueError, match="n must be 1 with temperature 0"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ValueError, match="detokenize must be True where there are stop strings"):
        SamplingParams(detokenize=False, stop="x")


def test_wishes_that_are_brought_into_range(caplog):
    greedy = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert (greedy.top_p, greedy.top_k, greedy.min_p) == (1.0, 0, 0.0)
    assert SamplingParams(temperature=0.001).temperature == 0.01
    assert "temperature=0.001 is raised to 0.01" in caplog.text
    assert SamplingParams(logit_bias={1: 500, 2: -500}).logit_bias == {1: 100.0, 2: -100.0}
    assert SamplingParams(seed=-1).seed is None
