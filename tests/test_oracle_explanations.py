"""What the oracle says of a fault: planted ones, each in a kernel made of this project's own, and what it must not say.

Each kernel calls `gathered.paged_attention` with something changed before or after, so that no fault is computed by the
code that recognises it.
"""

import json
import math
from xml.etree import ElementTree

import pytest
import torch

import paged.oracle
from paged.attention import gathered
from paged.oracle import Capabilities, Case, Report, check, verify

MIXED = ((1, 35), (5, 49), (3, 3), (1, 1))


def right(*tensors, **wishes):
    return gathered.paged_attention(*tensors, **wishes)


def changed(**by_name):
    """A right kernel whose arguments are replaced: each by a function of itself and of all others."""
    names = ("query", "key_cache", "value_cache", "block_tables", "seq_lens", "query_start_loc")

    def kernel(*tensors, **wishes):
        given = dict(zip(names, tensors, strict=True)) | wishes
        new = given | {name: change(given[name], given) for name, change in by_name.items()}
        return right(*[new.pop(name) for name in names], **new)

    return kernel


def only_in(which, kernel):
    """A kernel that is wrong only in the rows of some sequences: `which` is told their query lengths."""

    def confined(*tensors, **wishes):
        counts = tensors[5].diff().long()
        rows = which(counts).repeat_interleave(counts)
        wrong, good = kernel(*tensors, **wishes), right(*tensors, **wishes)
        return torch.where(rows[:, None, None], wrong[0], good[0]), torch.where(rows[:, None], wrong[1], good[1])

    return confined


def in_parts(merge, number=3):
    """Attends to each of so many parts of a context on its own, in decodes."""

    def kernel(query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, *, scale):
        size = key_cache.shape[1]
        outs, lses = torch.zeros_like(query), torch.zeros(query.shape[:2])
        for i, n in enumerate(seq_lens.tolist()):
            slots = (block_tables[i].long()[:, None] * size + torch.arange(size)).flatten()[:n]
            parts = [(key_cache.flatten(0, 1)[part], value_cache.flatten(0, 1)[part]) for part in slots.chunk(number)]
            found = []
            for keys, values in parts:
                place = torch.arange(len(keys))[None], torch.tensor([len(keys)]), torch.tensor([0, 1])
                found.append(right(query[i : i + 1], keys[:, None], values[:, None], *place, scale=scale))
            out, lse = (torch.stack(columns).float() for columns in zip(*found, strict=True))
            outs[i], lses[i] = merge(out, lse)[0][0].to(query.dtype), lse.logsumexp(dim=0)[0]
        return outs, lses

    return kernel


def by_mean(out, lse):
    return out.mean(dim=0), lse


def by_weight(out, lse):
    return (out * lse.softmax(dim=0)[..., None]).sum(dim=0), lse


def backwards(tables, given):
    size, turned = given["key_cache"].shape[1], tables.clone()
    for row, n in zip(turned, given["seq_lens"].tolist(), strict=True):
        count = -(-n // size)
        row[:count] = row[:count].flip(0)
    return turned


def zeros_behind_the_first(*tensors, **wishes):
    out, lse = right(*tensors, **wishes)
    out[int(tensors[5][1]) :] = 0
    return out, lse


def afterwards(change):
    """A right kernel whose results are replaced."""
    return lambda *tensors, **wishes: change(*right(*tensors, **wishes))


def now_and_then():
    """Loses a token in every third call."""
    calls = []

    def kernel(query, key_cache, value_cache, *rest, **wishes):
        calls.append(1)
        lost = value_cache * 0 if len(calls) % 3 == 1 else value_cache
        return right(query, key_cache, lost, *rest, **wishes)

    return kernel


def first_answer():
    """Returns what it returned to the first call of its shape."""
    kept = {}

    def kernel(*tensors, **wishes):
        return tuple(one.clone() for one in kept.setdefault(tensors[0].shape, right(*tensors, **wishes)))

    return kernel


LSE, BF16 = {"lse": "e"}, {"dtype": "bfloat16", "kv_dtype": "bfloat16"}
# Fault, kernel, what is declared, what is different about the case.
PLANTED = {
    "the window is rounded up to whole blocks": (
        changed(window=lambda window, given: -(-window // 16) * 16), {"window": True}, {"window": 19},
    ),
    "softcap is ignored, in decodes only": (
        only_in(lambda counts: counts == 1, changed(softcap=lambda cap, given: None)),
        {"softcap": True}, {"softcap": 0.5},
    ),
    "sinks are ignored, in chunks of queries only": (
        only_in(lambda counts: counts > 1, changed(sinks=lambda sinks, given: None)), {"sinks": True}, {"sinks": True},
    ),
    "softcap comes before the scale": (
        changed(softcap=lambda cap, given: cap * given["scale"]), {"softcap": True}, {"softcap": 2.0},
    ),
    "sinks are taken by KV head": (
        changed(sinks=lambda sinks, given: sinks[torch.arange(len(sinks)) // 3]), {"sinks": True},
        {"sinks": True, "num_kv_heads": 2, "query_group": 3},
    ),
    "the sink is counted 4 times": (
        changed(sinks=lambda sinks, given: sinks + math.log(4)), {"sinks": True}, {"sinks": True},
    ),
    "of values, query head h reads KV heads in reverse order": (
        changed(value_cache=lambda cache, given: cache.flip(2)), {}, {"num_kv_heads": 3},
    ),
    "a row of the table is read backwards": (changed(block_tables=backwards), {}, {}),
    "the slot behind the last token is a key like any other": (
        changed(seq_lens=lambda n, given: (n + 1).clamp(max=16 * given["block_tables"].shape[1])), {}, {},
    ),
    "[N, P, Hkv, D] is read as [N, Hkv, P, D]": (
        changed(**{
            name: lambda cache, given: cache.reshape(cache.shape[0], cache.shape[2], 16, -1).transpose(1, 2)
            for name in ("key_cache", "value_cache")
        }),
        {}, {"num_kv_heads": 2},
    ),
    "contexts are attended to in 3 parts, and all parts weigh the same": (in_parts(by_mean), {"decode_only": True}, {}),
    "only the first sequence's rows are written": (zeros_behind_the_first, {}, {}),
    "the output is 0 everywhere": (afterwards(lambda out, lse: (out * 0, lse)), {}, {}),
    "the log-sum-exp is rounded to bfloat16": (afterwards(lambda out, lse: (out, lse.bfloat16().float())), LSE, {}),
    "the log-sum-exp is another head's": (afterwards(lambda out, lse: (out, lse.flip(1))), LSE, {"query_group": 4}),
    "rounds more than is declared, as if weights were rounded to float8_e4m3fn": (
        changed(value_cache=lambda cache, given: cache.to(torch.float8_e4m3fn).to(cache.dtype)), {}, BF16,
    ),
    "the same call gives different results": (now_and_then(), {}, {}),
}  # fmt: skip


def judged(kernel, declared, different) -> Report:
    rows = tuple((1, n) for _, n in MIXED) if declared.get("decode_only") else MIXED
    case = Case(sequences=rows, **different)
    can = Capabilities(dtypes=(case.dtype,), head_dims=(64,), query_groups=(case.query_group,), **declared)
    return check(kernel, case, capabilities=can)


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named(fault):
    report = judged(*PLANTED[fault])
    assert [failure.fault for failure in report.failures] == [fault], str(report)


def test_these_kernels_are_right_without_the_fault():
    assert judged(in_parts(by_weight), {"decode_only": True}, {}).ok
    assert judged(only_in(lambda counts: counts == 1, right), {"softcap": True}, {"softcap": 0.5}).ok
    assert judged(changed(), {"sinks": True}, {"sinks": True}).ok


def test_an_answer_to_an_earlier_call_is_named():
    kernel = first_answer()
    check(kernel, Case(sequences=MIXED, seed=5))
    report = check(kernel, Case(sequences=MIXED))
    assert [failure.fault for failure in report.failures] == ["the result of an earlier call is returned"]


def test_nothing_is_claimed_that_another_case_refutes():
    """Wrong as if there were no softcap, but only in small batches: that is more than "softcap is ignored" says."""

    def kernel(*tensors, softcap=None, **wishes):
        return right(*tensors, softcap=softcap if len(tensors[0]) > 5 else None, **wishes)

    report = check(kernel, Case(sequences=((1, 20), (1, 20)), softcap=0.5))
    assert not report.ok
    assert "softcap is ignored" not in report.failures[0].fault, str(report)


def test_the_last_line_of_a_report_can_be_pasted():
    """Even if the fault shows only in what was declared: here in the log-sum-exp."""
    kernel = afterwards(lambda out, lse: (out, lse + 1))
    report = verify(kernel, capabilities=Capabilities(dtypes=("float32",), window=True, lse="e"))
    line = report.failures[0].replay
    assert f"from paged.oracle import *; {line}" in str(report)
    again = eval(line, vars(paged.oracle) | {"kernel": kernel})
    assert [failure.fault for failure in again.failures] == [report.failures[0].fault]
    assert eval(line, vars(paged.oracle) | {"kernel": right}).ok


def test_all_three_forms_of_a_report_say_the_same():
    report = verify(PLANTED["a row of the table is read backwards"][0], capabilities=Capabilities(dtypes=("float32",)))
    twin = json.loads(report.to_json())
    suite = ElementTree.fromstring(report.to_junit())
    texts = [failure.text or "" for failure in suite.findall("testcase/failure")]
    assert len(report.failures) == len(twin["failures"]) == len(texts) == int(suite.get("failures", 0))
    for failure, found, text in zip(report.failures, twin["failures"], texts, strict=True):
        assert "\n".join(failure.lines()) == text
        assert found["fault"] == failure.fault
        for _, words in failure.details:
            assert words in text
            assert any(words in told for told in found["details"].values()), words
    skipped = [case.get("name") for case in suite.findall("testcase") if case.find("skipped") is not None]
    assert skipped == list(report.not_exercised) == twin["not_exercised"]
    widths = [len(line) for failure in report.failures for line in failure.lines()]
    assert max(map(len, texts)) < 4000
    assert len(widths) <= 24 * len(report.failures), "one screen"
