"""The flex form: FlexAttention over block tables, against `reference.attention`; what it refuses; and its merges.

On a GPU everything that the other forms are tested with, in float32 and bfloat16 (Triton has no product of float64). On
a CPU what its FlexAttention can do, in six compiled shapes: no log-sum-exp, so no sinks and no splits.

Tolerances are those of tests/test_attention.py. In bfloat16 FlexAttention rounds the weights before it multiplies them
with V, and parts before they are merged: three more roundings, each relative to a mean of values.
"""

from dataclasses import replace

import pytest
import torch
from test_attention import FEATURES, Case, around

from paged.attention import flex
from paged.attention.merge import apply_sinks, merge_parts, merge_two

ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
WIDE = {"head_dim": 16, "value_dim": 16, "dtype": torch.float32, "poison": 1e4}


def check(case: Case, **overrides) -> None:
    """The case by the flex form, against the reference."""
    arguments = {"scale": 0.37, **case.features, **overrides}
    tensors = (case.query, case.key_cache, case.value_cache, case.tables, case.seq_lens, case.starts)
    arguments = {k: v.to(case.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    out, lse = flex.paged_attention(*(tensor.to(case.device) for tensor in tensors), **arguments)
    expected_out, expected_lse = case.expected()
    largest = max([float(value.abs().max()) for value in case.values if value.numel()] + [1.0])
    allowed = 2 * case.tolerance() * largest + ROUNDING[case.dtype] * (expected_out.abs() + 2 * largest)
    assert out.dtype == case.dtype
    assert ((out.cpu().double() - expected_out).abs() <= allowed).all(), "the output differs"
    if case.device == "cpu":
        assert lse is None
        return
    empty = expected_lse == -torch.inf
    assert torch.equal(lse.cpu() == -torch.inf, empty), "rows that see no key"
    assert ((lse.cpu().double() - expected_lse).abs()[~empty] <= 64 * case.tolerance()).all(), "the log-sum-exp differs"


CPU_CASES = {
    "decodes": Case([(1, 1), (0, 0), (1, 16), (1, 17), (1, 100), (0, 3)], **WIDE),
    "decodes in a window": Case([(1, 1), (1, 16), (1, 17), (1, 36), (1, 100)], **WIDE, features={"window": 20}),
    "decodes, softcap and ALiBi": Case(
        [(1, 33), (1, 16)], **WIDE, features={**FEATURES["softcap"], **FEATURES["alibi"]}
    ),
    "chunks": Case(around(16), **WIDE, padded_rows=2),
    "chunks with everything": Case(
        [*around(16), (140, 150)],
        **WIDE,
        features={"window": 20, **FEATURES["softcap"], **FEATURES["alibi"]},
    ),
    "larger blocks, bfloat16": Case([(1, 100), (1, 64), (1, 1)], **{**WIDE, "dtype": torch.bfloat16}, block_size=64),
}


@pytest.mark.parametrize("name", CPU_CASES)
def test_on_a_cpu(name):
    check(CPU_CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_ragged_lengths_blocks_and_groups(block_size, group, dtype):
    case = Case(around(block_size), block_size=block_size, group=group, padded_rows=2, device="cuda", **WIDE)
    check(
        Case(case.lengths, block_size=block_size, group=group, padded_rows=2, device="cuda", **{**WIDE, "dtype": dtype})
    )
    decodes = [(min(q, 1), n) for q, n in case.lengths]
    check(Case(decodes, block_size=block_size, group=group, padded_rows=2, device="cuda", **{**WIDE, "dtype": dtype}))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 2, 8])
@pytest.mark.parametrize("name", FEATURES)
def test_features_and_splits(name, num_splits):
    features = FEATURES[name] | ({"window": 37} if "window" in FEATURES[name] else {})
    decodes = [(1, 1), (0, 0), (1, 16), (1, 17), (1, 36), (1, 37), (1, 38), (1, 200), (1, 64)]
    check(Case(decodes, device="cuda", **WIDE, features=features), num_splits=num_splits)
    if num_splits == 1:
        check(Case([*around(16), (140, 300)], device="cuda", **WIDE, features=features))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 15, 16, 17, 32, 33])
def test_windows_around_block_borders(window):
    lengths = [(1, 64), (1, 65), (1, 79), (1, 16), (1, 33)]
    check(Case(lengths, device="cuda", **WIDE, features={"window": window}), num_splits=2)
    check(Case([(7, 65), (33, 64), (16, 16), (1, 40)], device="cuda", **WIDE, features={"window": window}))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dims(head_dim, dtype):
    wide = {"head_dim": head_dim, "value_dim": 64 if head_dim == 192 else head_dim, "dtype": dtype, "poison": 1e4}
    for block_size in (16, 128):
        check(Case([(1, 100), (1, 129), (1, 7)], block_size=block_size, device="cuda", **wide), num_splits=2)
        check(Case([(100, 100), (3, 129)], block_size=block_size, device="cuda", **wide))


REFUSED = {
    "block size": (Case([(1, 8)], block_size=8, **WIDE), {}, "power of two, 16 tokens or more, and hold 8"),
    "odd block size": (Case([(1, 8)], block_size=48, **WIDE), {}, "power of two, 16 tokens or more, and hold 48"),
    "head dim": (Case([(1, 8)], head_dim=8, value_dim=16, dtype=torch.float32), {}, "have to be 16 wide or more"),
    "float64": (Case([(1, 8)], head_dim=16, value_dim=16), {}, "not in torch.float64"),
    "scales": (Case([(1, 8)], **WIDE), {"k_scale": 2.0}, "reads no quantised cache"),
    "sinks on a CPU": (Case([(1, 8)], **WIDE, features=FEATURES["sinks"]), {}, "no log-sum-exp"),
    "splits on a CPU": (Case([(1, 8)], **WIDE), {"num_splits": 2}, "no log-sum-exp"),
    "window": (Case([(1, 8)], **WIDE), {"window": 0}, "window must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused(name):
    case, overrides, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        check(case, **overrides)


def test_a_pool_too_large_for_its_indices_is_refused():
    """2^31 elements, without the memory for them: the guard looks at the shape alone."""
    pool = torch.empty(1, dtype=torch.bfloat16).expand(2**31 // (16 * 8 * 128), 16, 8, 128)
    query = torch.zeros(1, 8, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="at most 131,071 blocks"):
        flex.check_limits(query, pool, pool)
    flex.check_limits(query, pool[:-1], pool[:-1])


def test_it_never_runs_eagerly(monkeypatch):
    """Eager FlexAttention ignores lists of blocks. With compilation switched off the call must fail, not mislead."""
    case = CPU_CASES["decodes"]
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="attends to the whole pool"):
        check(replace(case))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [None, 1, 16, 20, 33])
def test_a_plan_lists_every_visible_key_once(num_splits, window):
    """Read as a set of slots: whole blocks, and of partial ones what is within the sequence and the window."""
    size, lens = 16, [0, 1, 15, 16, 17, 48, 64, 80]
    tables = (torch.randperm(len(lens) * 5) + 1).reshape(len(lens), 5).int()
    plan = flex.plan_decode(
        tables, torch.tensor(lens, dtype=torch.int32), block_size=size, window=window, num_splits=num_splits
    )
    for i, length in enumerate(lens):
        seen = []
        for row in range(i * num_splits, (i + 1) * num_splits):
            for block in plan.full_blocks[row, 0, 0, : plan.full_counts[row, 0, 0]].tolist():
                seen += [block * size + offset for offset in range(size)]
            for block in plan.partial_blocks[row, 0, 0, : plan.partial_counts[row, 0, 0]].tolist():
                index = plan.last_index[row] if block == plan.last_block[row] else plan.first_index[row]
                first = int(index) * size
                inside = range(max(first, int(plan.first_position[row])), min(first + size, int(plan.seq_lens[row])))
                seen += [block * size + position - first for position in inside]
        first = 0 if window is None else max(0, length - window)
        expected = [int(tables[i, p // size]) * size + p % size for p in range(first, length)]
        assert sorted(seen) == sorted(expected)


def test_splits_fill_the_gpu_and_are_not_too_short():
    assert flex.num_splits_for(256, 8, 64, 132) == 1
    assert flex.num_splits_for(1, 8, 512, 132) == 64
    assert flex.num_splits_for(1, 8, 16, 132) == 4  # parts of 4 blocks
    assert flex.num_splits_for(1, 8, 1, 132) == 1


def parts(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [T, S, H, K] and values of S parts: their outs and lses, and those of the whole by definition."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, 3, 2, 4, generator=g, dtype=torch.float64) * 3
    scores[1, 0] = scores[2, 1:] = scores[3] = -torch.inf  # parts, and a row, without a key
    values = torch.randn(5, 3, 2, 4, 6, generator=g, dtype=torch.float64)
    lses = scores.logsumexp(-1)
    outs = (scores.softmax(-1)[..., None] * values).sum(-2)  # NaN where there is no key: nobody may look at it
    whole = scores.transpose(1, 2).flatten(2)  # [T, H, S * K]
    out = (whole.softmax(-1)[..., None] * values.transpose(1, 2).flatten(2, 3)).sum(-2).nan_to_num(0)
    return outs, lses, out, whole.logsumexp(-1)


@pytest.mark.parametrize("seed", range(5))
def test_merges_by_definition(seed):
    outs, lses, out, lse = parts(seed)
    merged, merged_lse = merge_parts(outs, lses)
    torch.testing.assert_close(merged, out, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-13, atol=1e-13)
    two, two_lse = merge_two(outs[:, 0], lses[:, 0], *merge_parts(outs[:, 1:], lses[:, 1:]))
    torch.testing.assert_close(two, out, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(two_lse, lse, rtol=1e-13, atol=1e-13)


def test_a_sink_takes_its_share():
    lse = torch.tensor([[0.0, 5.0, -torch.inf]], dtype=torch.float64)
    sinks = torch.tensor([0.0, -torch.inf, 1.0], dtype=torch.float64)
    out = apply_sinks(torch.ones(1, 3, 2, dtype=torch.float64), lse, sinks)
    assert out[..., 0].tolist() == [[0.5, 1.0, 0.0]]
