"""The judge of block managers: right ones pass, broken ones are caught and named, and nothing raises but a verdict."""

import json
import threading

import numpy as np
import pytest

from paged.blocks import BlockPool, BlockTable, CachedBlock, PrefixCache, prefix_cache
from paged.oracle import ManagerCapabilities, ManagerCase, OwnBlocks, replay_manager, verify_manager
from paged.oracle.managers.operations import Operation
from paged.oracle.mutants.managers import MANAGERS, RIGHT_MANAGERS, PlainManager

READS, FINDS = "a sequence does not read what it wrote", "finds what is not there"
LOST, IN_USE = "blocks are lost", "blocks in use are free"
# What the judge must say of a mutant, by its name, as one of its failures.
FAULTS = {
    "NoCopyOnWrite": READS,
    "CopiesFullBlocksOnly": READS,
    "CopyNotTold": READS,
    "CopiedBackwards": READS,
    "CopyKeepsTheOld": LOST,
    "CopyFreesTheOld": IN_USE,
    "ForkNotCounted": IN_USE,
    "ForkSharesTheTable": "another sequence's table changes",
    "ForkLosesTheLast": "a table is too short",
    "FreesShared": IN_USE,
    "FreesTwice": "freeing twice frees blocks twice",
    "FreesSilently": "freeing twice is not refused",
    "LeaksTheLast": LOST,
    "LeaksForks": LOST,
    "WindowFreesTwice": IN_USE,
    "WindowFreesShared": IN_USE,
    "WindowDropsOneMore": "a reserved block is handed out",
    "NullBlockHandedOut": IN_USE,
    "OneBlockTooMany": IN_USE,
    "LastBlockNeverUsed": LOST,
    "HandsOutTwice": IN_USE,
    "RefusedKeepsSome": "a refusal changes something",
    "RefusedKeepsFound": LOST,
    "RefusedEndsTheSequence": "a refusal changes something",
    "RefusesTheLast": "refuses although enough blocks are free",
    "SurplusBlock": "a table is too long",
    "MissingBlock": "a table is too short",
    "IgnoresTheLastToken": FINDS,
    "IgnoresTheParent": FINDS,
    "IgnoresOrder": FINDS,
    "ParentByBlock": FINDS,
    "StaysFindable": FINDS,
    "ForgetsTheWrongOne": FINDS,
    "PartialFindable": FINDS,
    "HitStaysInQueue": IN_USE,
    "HitNotCounted": IN_USE,
    "FindsOneMore": FINDS,
    "TakesTheNewest": "a block used more recently is given up",
    "EvictsInUse": "a block in use is handed out",
    "LookupTakes": LOST,
    "CountsFindableTwice": IN_USE,
}


def faults(report):
    return [failure.fault for failure in report.failures]


def operations(report):
    return dict(report.failures[0].details)["operations"]


@pytest.mark.parametrize("seed", [0, 1])
def test_this_projects_blocks_are_right(seed):
    report = verify_manager(OwnBlocks, capabilities=OwnBlocks.CAPABILITIES, seed=seed)
    assert report.ok, report
    assert report.not_exercised == ()


@pytest.mark.parametrize("kind", RIGHT_MANAGERS, ids=lambda kind: kind.__name__)
def test_a_right_manager_is_not_flagged(kind):
    report = verify_manager(kind, capabilities=kind.capabilities)
    assert report.ok, report


@pytest.mark.parametrize("kind", MANAGERS, ids=lambda kind: kind.__name__)
def test_a_mutant_is_caught_and_named(kind):
    report = verify_manager(kind, capabilities=kind.capabilities)
    assert FAULTS[kind.__name__] in faults(report), report
    assert kind.__doc__
    assert "A" <= kind.letter <= "R"


def forgets_counts(pool, block):
    """A block is free as soon as one table lets go of it."""
    pool._ref_counts[block] = 0
    pool._free.append(block)


PLANTED = {
    "counts": (BlockPool, "release", forgets_counts),
    "copies": (BlockTable, "shared_between", lambda table, start, end: []),
    "tokens": (CachedBlock, "stands_for", lambda entry, parent, tokens: True),
    "eviction": (PrefixCache, "_evicted", lambda cache, block: None),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_planted_in_this_projects_blocks_is_found(name, monkeypatch):
    # Few hashes, so that they collide all the time: right as long as tokens are compared.
    monkeypatch.setattr(prefix_cache, "hash", lambda value: hash(value) % 3, raising=False)
    if name == "tokens":
        assert verify_manager(OwnBlocks, capabilities=OwnBlocks.CAPABILITIES).ok
    monkeypatch.setattr(*PLANTED[name])
    assert not verify_manager(OwnBlocks, capabilities=OwnBlocks.CAPABILITIES).ok


def test_there_are_enough_of_both():
    assert len(MANAGERS) >= 25
    assert len(RIGHT_MANAGERS) >= 6


def test_a_failure_is_the_smallest_list_in_words():
    kind = next(kind for kind in MANAGERS if kind.__name__ == "FreesShared")
    report = verify_manager(kind, capabilities=kind.capabilities)
    assert operations(report) == "A = allocate(1 new token); B = fork(A); free(A)"
    words = dict(report.failures[0].details)["what happened"]
    assert words == "1 blocks came back, and 0 were A's alone; block 1 is free and still in B's table"


@pytest.mark.parametrize(
    ("name", "smallest"),
    [
        ("CopyNotTold", "A = allocate(1 new token); B = fork(A); append(A, 1 token)"),
        ("FreesTwice", "A = allocate(1 new token); free(A); free(A) again"),
        ("MissingBlock", "A = allocate(5 new tokens)"),
        (
            "TakesTheNewest",
            "A = allocate(4 new tokens); B = allocate(4 new tokens); free(A); free(B); C = allocate(1 new token)",
        ),
    ],
)
def test_nothing_that_could_be_left_out_is_left_in(name, smallest):
    kind = next(kind for kind in MANAGERS if kind.__name__ == name)
    assert operations(verify_manager(kind, capabilities=kind.capabilities)) == smallest


def test_a_report_can_be_replayed_and_read_by_programs():
    kind = next(kind for kind in MANAGERS if kind.__name__ == "ForkSharesTheTable")
    report = verify_manager(kind, capabilities=kind.capabilities)
    text = json.loads(report.to_json())["failures"][0]["details"]["reproduce"].split("'", 1)[1].rsplit("'", 1)[0]
    again = replay_manager(kind, text, capabilities=kind.capabilities)
    assert faults(again) == faults(report)
    assert operations(again) == operations(report)
    assert replay_manager(PlainManager, text, capabilities=kind.capabilities).ok
    assert str(verify_manager(kind, capabilities=kind.capabilities)) == str(report), "the same call, another report"


def broken(**verbs):
    """A plain manager with some verbs replaced."""
    return type("Broken", (PlainManager,), verbs)


def hang(self, *arguments):
    threading.Event().wait(5)


def leave(self, *arguments):
    raise SystemExit("done")


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: None, "raises an exception"),
        (lambda blocks, size: None, "raises an exception"),
        (broken(table=lambda self, name: None), "returns something else"),
        (broken(table=lambda self, name: [1.5]), "returns something else"),
        (broken(table=lambda self, name: [-1]), "a block that does not exist is handed out"),
        (broken(num_free=lambda self: "many"), "returns something else"),
        (broken(allocate=lambda self, name, tokens: None), "returns something else"),
        (broken(fork=lambda self, name, twin: [1]), "returns something else"),
        (broken(append=lambda self, name, tokens: 3), "returns something else"),
        (broken(free=lambda self, name: 1 / 0), "raises an exception"),
        (broken(append=leave), "raises an exception"),
        (broken(append=hang), "hangs"),
        (broken(__init__=hang), "hangs"),
        ("no.such.module:Manager", "cannot be imported"),
        (17, "cannot be imported"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_manager_that_misbehaves_is_a_verdict(make, fault):
    report = verify_manager(make, capabilities=ManagerCapabilities(), time_limit=0.2)
    assert fault in faults(report)
    assert str(report)
    assert report.to_junit()


def test_a_hang_names_the_operation():
    report = verify_manager(broken(append=hang), capabilities=ManagerCapabilities(block_sizes=(4,)), time_limit=0.2)
    assert dict(report.failures[0].details)["what happened"].startswith("append(A, 1 token): did not return within")


def test_an_exception_of_ones_own_says_that_blocks_are_short():
    class Full(Exception):
        pass

    class Own(PlainManager):
        def take(self, count):
            if count > len(self.queue):
                raise Full
            return super().take(count)

        def allocate(self, name, tokens):
            if self.needed(len(tokens)) > len(self.queue):
                raise Full
            return super().allocate(name, tokens)

    assert verify_manager(Own, capabilities=ManagerCapabilities(out_of_blocks=Full)).ok
    report = verify_manager(Own, capabilities=ManagerCapabilities())
    assert "raises an exception" in faults(report)


def test_numpy_integers_are_integers():
    class Numpy(PlainManager):
        def table(self, name):
            return np.array(super().table(name))

        def num_free(self):
            return np.int64(super().num_free())

    assert verify_manager(Numpy, capabilities=PlainManager.capabilities).ok


def test_what_is_not_declared_is_not_asked_for():
    bare = broken(fork=None, lookup=None, computed=None, drop_before=None)
    report = verify_manager(bare, capabilities=ManagerCapabilities(fork=False))
    assert report.ok, report
    assert "fork: not declared" in report.not_exercised


def test_a_declaration_that_would_allow_it_is_named():
    kind = next(kind for kind in MANAGERS if kind.__name__ == "FreesSilently")
    report = verify_manager(kind, capabilities=kind.capabilities)
    assert report.failures[0].declare == "ManagerCapabilities(double_free='ignored')"


@pytest.mark.parametrize(
    "declared",
    [{"eviction": "fifo"}, {"eviction": "lru"}, {"double_free": "maybe"}, {"block_sizes": ()}, {"block_sizes": (0,)}],
    ids=str,
)
def test_declarations_that_contradict_are_refused(declared):
    with pytest.raises(ValueError, match=r"."):
        ManagerCapabilities(**declared)


def test_an_unknown_budget_is_refused():
    with pytest.raises(ValueError, match="unknown budget 'huge'"):
        verify_manager(OwnBlocks, budget="huge")


def test_a_case_is_a_line():
    case = ManagerCase(6, 4, (Operation("allocate", num_tokens=5), Operation("fork"), Operation("free", 1)))
    assert ManagerCase.from_json(case.to_json()) == case
    assert "\n" not in case.to_json()
