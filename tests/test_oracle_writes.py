"""The judge of writers: right ones pass, broken ones are caught and named, and nothing they do is our traceback."""

import json
import threading

import numpy as np
import pytest
import torch

from paged import kv_pool
from paged.oracle import WriteCapabilities, WriteCase, replay_write, verify_write
from paged.oracle.mutants.writers import RIGHT_WRITERS, WRITERS, PlainWriter
from paged.oracle.writers.cases import cases, directed
from paged.oracle.writers.codes import decoded, nearest, numbers_of
from paged.oracle.writers.inputs import bits, materialise
from paged.oracle.writers.verify import pool_write

OWN = {
    "plain": WriteCapabilities(
        dtypes=("bfloat16", "float16", "float32", "float64"),
        head_dims=(16, 7),
        block_sizes=(4, 1, 5),
        slot_dtypes=("int64", "int32"),
        strided_caches=True,
    ),
    "keys and values of different widths": WriteCapabilities(head_dims=(24, 7), value_dims=(16, 5), block_sizes=(4,)),
    "stored in fewer bits": WriteCapabilities(dtypes=("float32",), kv_dtypes=("bfloat16",), head_dims=(16,)),
    "fp8 by tensor": WriteCapabilities(kv_dtypes=("float8_e4m3fn",), head_dims=(16,), scales="tensor"),
    "fp8 by head": WriteCapabilities(
        dtypes=("float32", "bfloat16"), kv_dtypes=("float8_e4m3fn",), head_dims=(16, 7), scales="head"
    ),
    "int8 by token": WriteCapabilities(
        dtypes=("bfloat16", "float32"), kv_dtypes=("int8",), head_dims=(16, 7), scales="token", strided_caches=True
    ),
}
# What the judge must say of a mutant, by its name.
FAULTS = {
    "NegativeWraps": "tokens whose slot is -1 are written",
    "NegativeIsZero": "tokens whose slot is -1 are written",
    "StopsAtNegative": "tokens are not written",
    "OffsetByOne": "tokens are written where they do not belong",
    "WrongBlockSize": "tokens are written where they do not belong",
    "LogicalOrder": "tokens are written where they do not belong",
    "Narrow": "wrong for slots beyond 2^31 numbers",
    "SixteenBitBlocks": "wrong for large block numbers",
    "EightBitBlocks": "wrong for large block numbers",
    "LastSlotForgotten": "tokens are not written",
    "FirstWins": "of two tokens with one slot the wrong one stays",
    "PaddingRowsWritten": "rows of key and value that have no slot are written",
    "EmptyWritesSlotZero": "slots of nobody are cleared",
    "ClearsTheRest": "slots of nobody are cleared",
    "ClearsNextBlock": "slots of nobody are cleared",
    "SortsSlots": "another token's numbers are written",
    "KeysAsValues": "keys are written as values",
    "ValuesForgotten": "tokens are not written",
    "HeadsBackwards": "another head's numbers are written",
    "FirstHeadOnly": "some heads are not written",
    "DimTail": "some dims are not written",
    "ContiguousRows": "wrong for keys and values that are slices of something larger",
    "ContiguousBlocks": "wrong for caches whose blocks do not lie one behind another",
    "CopiesThePool": "wrong for caches whose blocks do not lie one behind another",
    "ScalesInPlace": "writes into its inputs",
    "ScaleMultiplied": "numbers are multiplied by the scale instead of divided",
    "ScaleIgnored": "scales are ignored",
    "KeyScaleForValues": "values are divided by the scale of keys",
    "FirstHeadsScale": "all heads have the scale of the first one",
    "ScaleFloored": "scales below 1 are taken as 1",
    "Fnuz": "codes stand for half of what they should (e4m3fnuz)",
    "NotClamped": "numbers beyond the range are not clamped to it",
    "CutOff": "numbers are cut off instead of rounded",
    "TiesAway": "numbers midway between two codes do not go to the even one",
    "WrapsAround": "numbers beyond the range are not clamped to it",
    "ScaleOfTheToken": "scales are wrong",
    "ScaleElsewhere": "scales are wrong",
    "AsymmetricScale": "scales are wrong",
}


@pytest.mark.parametrize("name", OWN)
def test_this_projects_writer_is_right(name):
    report = verify_write(pool_write, capabilities=OWN[name])
    assert report.ok, report


@pytest.mark.parametrize("kind", RIGHT_WRITERS, ids=lambda kind: kind.__name__)
def test_a_right_writer_is_not_flagged(kind):
    report = verify_write(kind(), capabilities=kind.capabilities)
    assert report.ok, report


@pytest.mark.parametrize("kind", WRITERS, ids=lambda kind: kind.__name__)
def test_a_mutant_is_caught_and_named(kind):
    report = verify_write(kind(), capabilities=kind.capabilities)
    assert not report.ok
    if kind.__name__ in FAULTS:
        assert FAULTS[kind.__name__] in [failure.fault for failure in report.failures], report
    assert kind.__doc__
    assert "A" <= kind.letter <= "R"


@pytest.mark.parametrize("name", ["plain", "fp8 by head", "int8 by token"])
def test_a_fault_planted_in_this_projects_writer_is_found(name, monkeypatch):
    def late(key_cache, value_cache, key, value, slot_mapping, **scales):
        """Never reaches the pool's last slot."""
        last = key_cache.shape[0] * key_cache.shape[1] - 1
        kv_pool.write(key_cache, value_cache, key, value, slot_mapping.clamp(max=last - 1), **scales)

    monkeypatch.setattr("paged.oracle.writers.verify.write", late)
    assert not verify_write(pool_write, capabilities=OWN[name]).ok


def test_there_are_enough_of_both():
    assert len(WRITERS) >= 20
    assert len(RIGHT_WRITERS) >= 6


def test_a_report_names_token_slot_and_where_it_went():
    class Next(PlainWriter):
        """The second head goes one slot further."""

        def store(self, call, block, offset, row):
            call.cache[block, offset, :1] = row[:1]
            call.cache[(block + 1) % len(call.cache), offset, 1:] = row[1:]

    case = WriteCase(sequences=((5, 1),), block_size=4, num_kv_heads=2, head_dim=3, value_dim=3)
    report = replay_write(Next(), case)
    details = dict(report.failures[0].details)
    assert details["where"] == "key cache, slot 9 = block 2, offset 1, head 1, dim 0: no token's, to be left as it is"
    assert details["cause"] == "there lies the key of token 0 (sequence 0, position 5), head 1"
    report = replay_write(lambda *tensors: None, case)
    assert report.failures[0].fault == "tokens are not written"
    assert dict(report.failures[0].details)["where"].endswith("head 0, dim 0: token 0 (sequence 0, position 5)")

    def exchanged(key, value, key_cache, value_cache, slots):
        PlainWriter()(value, key, key_cache, value_cache, slots)

    details = dict(replay_write(exchanged, case).failures[0].details)
    assert details["cause"] == "there lies the value of token 0 (sequence 0, position 5), head 0"
    assert details["went to"] == "block 1, offset 1, head 0 of the value cache"


def test_a_report_can_be_replayed_and_read_by_programs():
    kind = next(kind for kind in WRITERS if kind.__name__ == "HeadsBackwards")
    report = verify_write(kind(), capabilities=kind.capabilities)
    found = json.loads(report.to_json())
    text = found["failures"][0]["details"]["reproduce"].split("'", 1)[1].rsplit("'", 1)[0]
    again = replay_write(kind(), text, capabilities=kind.capabilities)
    assert again.failures[0].fault == report.failures[0].fault
    assert str(verify_write(kind(), capabilities=kind.capabilities)) == str(report), "the same call, another report"


def hangs(*tensors):
    threading.Event().wait(5)


def exits(*tensors):
    raise SystemExit("done")


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no words")


def shrinks(key, value, key_cache, value_cache, slot_mapping):
    key_cache.resize_(0)


def spoils_slots(key, value, key_cache, value_cache, slot_mapping):
    PlainWriter()(key, value, key_cache, value_cache, slot_mapping)
    slot_mapping.zero_()


@pytest.mark.parametrize(
    ("writer", "fault"),
    [
        (lambda: None, "raises an exception"),
        (exits, "raises an exception"),
        (hangs, "hangs"),
        (lambda *tensors: "done", "returns something else"),
        (lambda *tensors: Unspeakable(), "returns something else"),
        (shrinks, "returns the wrong shape"),
        (spoils_slots, "writes into its inputs"),
        ("no.such.module:write", "cannot be imported"),
        (17, "cannot be imported"),
    ],
    ids=["arguments", "exits", "hangs", "string", "unspeakable", "shrinks", "spoils", "no module", "no function"],
)
def test_a_writer_that_misbehaves_is_a_verdict(writer, fault):
    report = verify_write(writer, capabilities=WriteCapabilities(head_dims=(8,)), time_limit=0.02)
    assert fault in [failure.fault for failure in report.failures]
    assert str(report)
    assert report.to_junit()


def test_duplicates_that_were_to_be_refused():
    can = WriteCapabilities(head_dims=(8,), duplicate_slots="refused")
    report = verify_write(PlainWriter(), capabilities=can)
    assert "nothing was raised" in dict(report.failures[0].details)["what happened"]

    class Late(PlainWriter):
        """Notices only once it has written."""

        def __call__(self, *tensors, **scales):
            super().__call__(*tensors, **scales)
            if len(set(tensors[4].tolist())) < len(tensors[4]):
                raise ValueError("two tokens have one slot")

    assert not verify_write(Late(), capabilities=can).ok


@pytest.mark.parametrize(
    "declared",
    [
        {"kv_dtypes": ("int8",)},
        {"dtypes": "bfloat16"},
        {"scales": "head"},
        {"scales": "token", "kv_dtypes": ("float8_e4m3fn",), "head_dims": (8,)},
        {"head_dims": (0,)},
        {"value_dims": (8, 8, 8)},
        {"ties": "odd"},
    ],
    ids=str,
)
def test_declarations_that_contradict_are_refused(declared):
    with pytest.raises(ValueError, match=r"."):
        WriteCapabilities(**declared)


def test_an_unknown_budget_is_refused():
    with pytest.raises(ValueError, match="unknown budget 'huge'"):
        verify_write(pool_write, budget="huge")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_codes_agree_with_torch(dtype):
    codes = np.arange(256).astype(np.uint8)
    ours, theirs = decoded(dtype, codes), torch.from_numpy(codes).view(getattr(torch, dtype)).double().numpy()
    finite = np.isfinite(theirs)
    assert np.array_equal(ours[finite], theirs[finite])
    assert np.isnan(ours[~finite]).all()
    numbers, known = numbers_of(dtype)
    values = np.concatenate([(numbers[1:] + numbers[:-1]) / 2, np.linspace(-9, 9, 4001)])
    cast = torch.from_numpy(values).float().to(getattr(torch, dtype)).double().numpy()
    values = torch.from_numpy(values).float().double().numpy()
    assert np.array_equal(decoded(dtype, known[nearest(dtype, values).low]), cast)


def test_what_is_written_can_be_recognised_and_gaps_hold_bits():
    for case in directed(OWN["plain"], seed=0, rounds=1):
        if case.strides == "far" or case.first_block > 1:
            continue
        inputs = materialise(case)
        if case.recipe == "numbered" and case.kv_dtype == case.dtype:
            both = np.concatenate([numbers.ravel() for numbers in inputs.numbers])
            assert len(np.unique(both)) == len(both), case.describe()
        assert not inputs.key_cache.changed().any()
        assert not any(room.changed().any() for room in inputs.read_only().values())
        inputs.key_cache.view.zero_()
        assert inputs.key_cache.changed_gaps() == 0
        spare = inputs.key_cache.room.numel() - inputs.key_cache.view.numel()
        assert bool(spare) == (case.strides in ("padded", "interleaved"))
        assert (bits(inputs.key_cache.view) == 0).all()


def test_every_drawn_case_can_be_made():
    @pytest.importorskip("hypothesis").given(cases(WriteCapabilities(negative_slots=True, strided_caches=True)))
    def made(case):
        inputs = materialise(case)
        assert WriteCase.from_json(case.to_json()) == case
        slots = [token.slot for token in inputs.tokens if token.slot is not None]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < inputs.key_cache.view.shape[0] * case.block_size for slot in slots)

    made()


def test_a_writer_that_fails_a_drawn_case_only_once_is_not_let_off():
    num_directed, tokens = len(list(directed(WriteCapabilities(), 0, 1))), []

    def now_and_then(key, value, key_cache, value_cache, slot_mapping):
        tokens.append(len(slot_mapping))
        if not tokens[-1] or sum(count > 0 for count in tokens[num_directed:]) != 20:
            pool_write(key, value, key_cache, value_cache, slot_mapping)

    report = verify_write(now_and_then)
    assert [failure.fault for failure in report.failures] == ["tokens are not written"]
