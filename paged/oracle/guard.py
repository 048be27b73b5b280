"""Calling strangers' code that may raise or hang, and drawing what it is called with.

What `calls.Caller` does for attention kernels, for any function: it runs in a thread of its own, with a time limit, and
what goes wrong is a `Mishap` and never an exception of ours. The two judges of writers and of managers share it.
"""

import queue
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

try:
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from hypothesis import seed as seeded
    from hypothesis.strategies import SearchStrategy
except ImportError as error:
    raise ImportError("the oracle draws its cases with Hypothesis: pip install 'paged[oracle]'") from error

from paged.oracle.calls import Mishap

Drawn = TypeVar("Drawn")
MOST_LETTERS = 200


class Guard:
    """Calls functions, one at a time, in one thread with a time limit.

    Args:
        time_limit: seconds for a call.
        first_call: the first one may take so many times as long, since it may compile.

    Attributes:
        hung: the verdict on the call that did not return, or None. Nothing is called after it.

    Example:
        >>> guard = Guard(time_limit=5.0)
        >>> guard(lambda: 2 + 3)
        5
        >>> guard(lambda: 1 / 0).kind
        'raises'
    """

    def __init__(self, time_limit: float, first_call: int = 1) -> None:
        self.hung: Mishap | None = None
        self._limit, self._next_limit = time_limit, time_limit * first_call
        self._asked: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = torch.get_num_threads()
        # A daemon: what hangs must not keep the program from ending.
        threading.Thread(target=self._work, daemon=True, name="code under test").start()

    def __call__(self, function: Callable[[], Any]) -> Any:
        """What the function returns, or a `Mishap` of kind "raises" or "hangs"."""
        if self.hung is not None:
            return self.hung
        limit, self._next_limit = self._next_limit, self._limit
        self._asked.put(function)
        try:
            return self._answered.get(timeout=limit)
        except queue.Empty:
            self.hung = Mishap("hangs", f"did not return within {limit:g} seconds; it was left running")
            return self.hung

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            function = self._asked.get()
            try:
                with torch.no_grad():
                    answer = function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            # SystemExit would end the thread without a word, and look like a function that hangs.
            except (Exception, SystemExit) as error:
                answer = Mishap("raises", raised(error))
            self._answered.put(answer)


def raised(error: BaseException) -> str:
    """An exception in a line, and the line of code that it came from.

    Example:
        >>> raised(ValueError("no such block"))
        'ValueError: no such block'
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # an exception's own __str__ is a stranger's code as well
        lines = []
    said = lines[0] if lines else ""
    said = said if len(said) <= MOST_LETTERS else said[: MOST_LETTERS - 3] + "..."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) != Path(__file__)]
    place = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return (f"{type(error).__name__}: {said}" if said else type(error).__name__) + place


def search(strategy: SearchStrategy[Drawn], count: int, seed: int, fails: Callable[[Drawn], bool]) -> Drawn | None:
    """Draw until something fails, and let Hypothesis make it smaller.

    Args:
        strategy: what to draw; integers and names, never the numbers of a tensor.
        count: how many are drawn at most.
        seed: the same seed draws the same.
        fails: tries one.

    Returns:
        The smallest one found that fails, or None.

    Example:
        >>> from hypothesis import strategies as st
        >>> search(st.integers(0, 1000), 100, 0, lambda number: number > 17)
        18
    """
    smallest: list[Drawn] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
    )
    @given(strategy)
    def attempt(drawn: Drawn) -> None:
        if fails(drawn):
            smallest[:] = [drawn]
            raise AssertionError

    try:
        attempt()
    except Exception:
        # What fails only now and then makes Hypothesis raise an error of its own; the last failure is what there is.
        if not smallest:
            raise
    return smallest[0] if smallest else None
