"""`paged check MODULE:FUNCTION`: the oracle on the command line.

Declarations come from a file (see `paged.oracle.declared`), and the most common ones from options.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paged.oracle.declared import read_declarations
from paged.oracle.guard import Mishap, kernel_named
from paged.oracle.verify import verify


@dataclass(frozen=True)
class CheckSettings:
    """What the command line says.

    Attributes:
        kernel: "module:function", looked for in the current folder first.
        adapter: the name of one that ships, or "module:Class" of one's own.
        dtypes: of queries and output, instead of the file's.
        device, budget, seed, max_shapes, time_limit: as for `verify`.
        declarations: a file as in `paged.oracle.declared`.
        as_json: print the report as JSON.
        junit: write it as JUnit XML, too.
    """

    kernel: str
    adapter: str = "contract"
    dtypes: tuple[str, ...] = ()
    device: str = "cpu"
    budget: str = "fast"
    seed: int = 0
    max_shapes: int | None = None
    time_limit: float = 60.0
    declarations: Path | None = None
    as_json: bool = False
    junit: Path | None = None


def run_check(settings: CheckSettings) -> int:
    """Verify the kernel and print what came of it.

    Returns:
        0 if the kernel is right, 1 if it is not.

    Raises:
        ValueError: the kernel or the adapter cannot be imported, or a declaration cannot be.
        OSError: a file cannot be read or written.
    """
    declared = read_declarations(settings.declarations)
    if settings.dtypes:
        declared["capabilities"] = replace(declared["capabilities"], dtypes=settings.dtypes)
    sys.path.insert(0, os.getcwd())  # as `python -m` would have it
    report = verify(
        _kernel(settings.kernel),
        adapter=_adapter(settings.adapter),
        device=settings.device,
        budget=settings.budget,
        seed=settings.seed,
        max_shapes=settings.max_shapes,
        time_limit=settings.time_limit,
        **declared,
    )
    report = replace(report, kernel=settings.kernel)
    if settings.junit is not None:
        settings.junit.write_text(report.to_junit())
    print(report.to_json() if settings.as_json else report)
    return 0 if report.ok else 1


def _kernel(name: str) -> Any:
    """The kernel that "module:function" names."""
    found = kernel_named(name)
    if isinstance(found, Mishap):
        raise ValueError(found.message)
    return found


def _adapter(name: str) -> Any:
    """An adapter that ships, by its name; or one's own as "module:Class", which is called without arguments."""
    return _kernel(name)() if ":" in name else name
