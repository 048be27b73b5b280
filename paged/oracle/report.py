"""What the oracle says: one screen for a person, and the same as JSON and as JUnit XML."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape, quoteattr

WIDTH = 16


@dataclass(frozen=True)
class Failure:
    """One fault, as far as it could be traced.

    Attributes:
        fault: what it is called.
        letter: its class in the catalogue of real bugs, A to R, or "-" where there is none.
        evidence: "exact", "proof, given the profile", or "statistical, one in 10^9".
        case: the smallest case that fails, as JSON.
        description: the same in words.
        original: the case that failed first, in words, and how many cases were tried on the way.
        details: what else is known, (heading, words), in the order of a report.
        picture: a small drawing of the row, lines.
        declare: the declaration that would make the kernel right, if it only differs in a convention.
        declared: what was declared, as arguments of `replay`; "": nothing but the defaults.
    """

    fault: str
    letter: str
    evidence: str
    case: str | None = None
    description: str = ""
    original: str = ""
    details: tuple[tuple[str, str], ...] = ()
    picture: tuple[str, ...] = ()
    declare: str | None = None
    declared: str = ""

    def lines(self) -> list[str]:
        """As printed."""
        known = (
            f"class {self.letter}, evidence: {self.evidence}" if self.letter != "-" else f"evidence: {self.evidence}"
        )
        lines = [f"FAIL  {self.fault}  ({known})"]
        about = [("minimal case", self.description), ("", self.original), *self.details]
        if self.declare is not None:
            about.append(("to allow it", f"declare {self.declare}"))
        lines += [f"  {heading:<{WIDTH}}{words}".rstrip() for heading, words in about if words]
        for index, line in enumerate(self.picture):
            lines.append(f"  {'picture' if index == 0 else '':<{WIDTH}}{line}")
        if self.case is not None:
            lines.append(f"  {'reproduce':<{WIDTH}}from paged.oracle import *; {self.replay}")
        return lines

    @property
    def replay(self) -> str:
        """The call that runs the case again, where `kernel` is the kernel.

        Example:
            >>> print(Failure("wrong numbers", "-", "exact", case='{"sequences": [[1, 1]]}').replay)
            replay(kernel, '{"sequences": [[1, 1]]}')
        """
        return f"replay(kernel, {', '.join(filter(None, (repr(self.case), self.declared)))})"


@dataclass(frozen=True)
class Report:
    """What came of a verification.

    Attributes:
        kernel: its name.
        num_cases: cases tried, those on the way to smaller ones included.
        failures: faults found; none if the kernel is right.
        not_exercised: what was declared, or is checked as a rule, and could not be; each with the reason.
        slack: for each check, the largest error as a share of what is allowed: at 1 it fails.
        settings: what was declared, as text by name, with seed and budget.

    Example:
        >>> report = Report("my_kernel", 3, (), ("window: no case could tell",), {"hard bound": 0.5}, {"seed": "0"})
        >>> report.ok
        True
        >>> print(report)
        ok    my_kernel: 3 cases
          largest errors  hard bound 0.500, where 1 is allowed
          not exercised   window: no case could tell
          settings        seed=0
    """

    kernel: str
    num_cases: int
    failures: tuple[Failure, ...] = ()
    not_exercised: tuple[str, ...] = ()
    slack: dict[str, float] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.failures

    def __str__(self) -> str:
        lines: list[str] = []
        for failure in self.failures:
            lines += [*failure.lines(), ""]
        lines.append(f"{'ok    ' if self.ok else 'failed'}{' ' * (not self.ok)}{self.kernel}: {self.num_cases} cases")
        if self.slack:
            shares = ", ".join(f"{check} {share:.3f}" for check, share in sorted(self.slack.items()))
            lines.append(f"  {'largest errors':<{WIDTH}}{shares}, where 1 is allowed")
        for index, words in enumerate(self.not_exercised):
            lines.append(f"  {'not exercised' if index == 0 else '':<{WIDTH}}{words}")
        if self.settings:
            lines.append(f"  {'settings':<{WIDTH}}{', '.join(f'{k}={v}' for k, v in self.settings.items())}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same for a program; the minimal cases are objects that `Case.from_json` reads when written as JSON."""
        found: dict[str, Any] = {"ok": self.ok, **dataclasses.asdict(self)}
        for failure in found["failures"]:
            failure["case"] = None if failure["case"] is None else json.loads(failure["case"])
            failure["details"] = _joined(failure["details"])
        return json.dumps(found, indent=1)

    def to_junit(self) -> str:
        """The same for a build server: one test case for every fault, or one that passed; what was skipped is named."""
        name = quoteattr(self.kernel)
        cases = []
        for failure in self.failures:
            text = escape(_printable("\n".join(failure.lines())))
            fault = quoteattr(_printable(failure.fault))
            body = f"<failure message={fault}>{text}</failure>"
            cases.append(f"  <testcase classname={name} name={fault}>{body}</testcase>")
        if self.ok:
            cases.append(f'  <testcase classname={name} name="verify"/>')
        for words in self.not_exercised:
            skipped = quoteattr(_printable(words))
            cases.append(f"  <testcase classname={name} name={skipped}><skipped message={skipped}/></testcase>")
        counts = f'tests="{len(cases)}" failures="{len(self.failures)}" skipped="{len(self.not_exercised)}"'
        return "\n".join(
            ['<?xml version="1.0" encoding="UTF-8"?>', f"<testsuite name={name} {counts}>", *cases, "</testsuite>"]
        )


def _joined(details: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Details by heading; what has none belongs to the one before.

    Example:
        >>> _joined([("cause", "one thing"), ("", "and another"), ("also", "a third")])
        {'cause': 'one thing; and another', 'also': 'a third'}
    """
    joined: dict[str, str] = {}
    last = ""
    for heading, words in details:
        last = heading or last
        joined[last] = f"{joined[last]}; {words}" if last in joined else words
    return joined


def as_arguments(**declarations: Any) -> str:
    """Declarations as the arguments that repeat them, without what is the default anyway.

    Example:
        >>> from paged.oracle.declarations import Capabilities, Profile
        >>> as_arguments(capabilities=Capabilities(window=True), profile=Profile())
        'capabilities=Capabilities(window=True)'
    """
    given = []
    for name, declared in declarations.items():
        told = ((field, getattr(declared, field.name)) for field in dataclasses.fields(declared))
        changed = ", ".join(f"{field.name}={value!r}" for field, value in told if value != field.default)
        if changed:
            given.append(f"{name}={type(declared).__name__}({changed})")
    return ", ".join(given)


def _printable(text: str) -> str:
    """Without the control characters that XML forbids, which a kernel's message may hold."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text)
