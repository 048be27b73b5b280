"""The oracle: hand it any paged attention kernel; it says that it is right, or names the token it got wrong.

    from paged.oracle import Capabilities, verify

    report = verify(my_kernel, capabilities=Capabilities(dtypes=("bfloat16",), window=True, lse="e"))
    print(report)

A kernel is called on cases whose right answer is known in float64, with a bound for every element that follows from
where the kernel says it rounds. To be read in this order: declarations, case, values, recipes, exact, inputs, expected,
row_statistics, judge, guard, calls, trial, directed, drawn, relations, reduce; then what is said of a failure:
syndrome, row, hypotheses, explain, evidence, placement, rounding, naming, diagnose, report; and verify.

Kernels with other arguments have adapters, and kernels that are not Python golden files; writers and managers of blocks
are judged in rooms of their own.
"""

from importlib.util import find_spec

if find_spec("hypothesis") is None:
    raise ImportError("the oracle draws its cases with Hypothesis: pip install 'paged[oracle]'")

from paged.oracle.adapters import Adapter
from paged.oracle.case import Case
from paged.oracle.declarations import Capabilities, Conventions, Profile
from paged.oracle.golden.export import export
from paged.oracle.golden.judge import judge_files
from paged.oracle.managers.operations import ManagerCase
from paged.oracle.managers.protocol import Manager, ManagerCapabilities, OwnBlocks
from paged.oracle.managers.verify import replay_manager, verify_manager
from paged.oracle.report import Failure, Report
from paged.oracle.verify import check, replay, verify
from paged.oracle.writers.case import WriteCapabilities, WriteCase
from paged.oracle.writers.verify import replay_write, verify_write

__all__ = [
    "Adapter",
    "Capabilities",
    "Case",
    "Conventions",
    "Failure",
    "Manager",
    "ManagerCapabilities",
    "ManagerCase",
    "OwnBlocks",
    "Profile",
    "Report",
    "WriteCapabilities",
    "WriteCase",
    "check",
    "export",
    "judge_files",
    "replay",
    "replay_manager",
    "replay_write",
    "verify",
    "verify_manager",
    "verify_write",
]
