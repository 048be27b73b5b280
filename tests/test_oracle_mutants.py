"""The oracle finds every mutant of attention, and lets every variant pass."""

import pytest

from paged.oracle import Report, verify
from paged.oracle.mutants import ATTENTION_MUTANTS, ATTENTION_VARIANTS, CLASSES, Mutant, Variant

# Of each class, so many in the quick part; all of them take ten minutes.
QUICK_OF_EACH = 1
# Pools of 65,535 blocks take their time.
LONG_ONES = ("block_in16_bits", "block_in_signed16_bits")
QUICK_VARIANTS = ("honest", "eight_parts", "prescaled_queries_in16_bits")


def quick(mutant: Mutant) -> bool:
    """Whether it is one of the first of its class."""
    same = [m for m in ATTENTION_MUTANTS if m.bug_class == mutant.bug_class and m.name not in LONG_ONES]
    return mutant in same[:QUICK_OF_EACH]


def marked(found: list, is_quick) -> list:
    """As pytest wants them: named, and marked slow but for some."""
    return [pytest.param(one, id=one.name, marks=[] if is_quick(one) else pytest.mark.slow) for one in found]


def tried(one: Mutant) -> Report:
    return verify(one.kernel, capabilities=one.capabilities, budget="fast")


@pytest.mark.parametrize("mutant", marked(ATTENTION_MUTANTS, quick))
def test_mutant_is_killed(mutant: Mutant) -> None:
    report = tried(mutant)
    assert not report.ok, f"{mutant.name} ({mutant.bug_class}, {mutant.thread or 'no thread'}) survives\n{report}"


@pytest.mark.parametrize("variant", marked(ATTENTION_VARIANTS, lambda one: one.name in QUICK_VARIANTS))
def test_variant_passes(variant: Variant) -> None:
    report = verify(
        variant.kernel,
        capabilities=variant.capabilities,
        profile=variant.profile,
        conventions=variant.conventions,
        budget="fast",
    )
    assert report.ok, f"{variant.name} is right, but\n{report}"


def test_names_are_unique_and_every_class_about_reading_has_mutants():
    names = [one.name for one in [*ATTENTION_MUTANTS, *ATTENTION_VARIANTS]]
    assert len(set(names)) == len(names)
    assert {mutant.bug_class for mutant in ATTENTION_MUTANTS} == set(CLASSES) - {"P", "Q"}
    assert len(ATTENTION_MUTANTS) >= 60
    assert len(ATTENTION_VARIANTS) >= 12
