"""A pytest plugin: the oracle in three lines of a kernel's own tests.

    @pytest.mark.paged_kernel(dtypes=("float16",), window=True, lse="e", device="cuda")
    def test_my_kernel(paged_oracle):
        paged_oracle(my_kernel)

The marker takes the fields of `Capabilities`, and of `verify`: profile, conventions, adapter, device, budget, seed,
max_shapes, time_limit. A kernel that is wrong fails the test with the oracle's report and nothing else.

pytest loads this file in every project, so it lies outside the oracle's room, and imports that when it is asked for.
"""

from collections.abc import Callable
from typing import Any

import pytest

MARKER = "paged_kernel"
OF_VERIFY = ("profile", "conventions", "adapter", "device", "budget", "seed", "max_shapes", "time_limit")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers", f"{MARKER}(**declarations): what the paged attention kernel of this test can do (see paged.oracle)"
    )


@pytest.fixture
def paged_oracle(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A function that verifies a kernel with the marker's declarations, or others, and fails the test if it is wrong.

    It takes the kernel and keywords that come before the marker's; it returns the `Report` of a kernel that is right.
    """
    marked = {
        name: value for mark in reversed(list(request.node.iter_markers(MARKER))) for name, value in mark.kwargs.items()
    }

    def verify_or_fail(kernel: Any, **declarations: Any) -> Any:
        from paged.oracle import Capabilities, verify

        given = marked | declarations
        settings = {name: given.pop(name) for name in OF_VERIFY if name in given}
        try:
            report = verify(kernel, capabilities=Capabilities(**given), **settings)
        except (TypeError, ValueError) as error:
            pytest.fail(f"what is declared cannot be: {error}", pytrace=False)
        if not report.ok:
            pytest.fail(str(report), pytrace=False)
        return report

    return verify_or_fail
