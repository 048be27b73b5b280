"""Calling strangers' code, which may raise, hang, end the program or not even be there.

Each of these is a verdict, a `Mishap`, and never an exception of ours. The code runs in a thread that is left behind
when it takes too long: nothing else can be done about code that hangs outside Python, and nothing is asked of it again.
"""

import importlib
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Integers as wide as a number, by bytes.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MOST_LETTERS = 200
# The first call may compile.
FIRST_CALL = 10


@dataclass(frozen=True)
class Mishap:
    """Why there is no result that could be judged.

    Attributes:
        kind: "raises", "hangs", "returns", "shape", "dtype", "device", "writes", or "import".
        message: what happened, in a sentence or two.
    """

    kind: str
    message: str


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


def written(name: str, was: Tensor, now: Tensor) -> Mishap | None:
    """Whether a tensor that is only to be read has other bits than before, NaN's included.

    Args:
        name: of the tensor.
        was: a copy of it from before.
        now: the tensor.

    Returns:
        A `Mishap` of kind "writes", or None.

    Example:
        >>> written("seq_lens", torch.tensor([1, 2]), torch.tensor([1, 3])).message
        'seq_lens was written to: 1 elements changed, the first [1]'
    """
    if was.shape != now.shape or was.dtype != now.dtype:
        return Mishap("writes", f"{name} has another shape or dtype after the call")
    changed = bits(was) != bits(now)
    if not changed.any():
        return None
    first = [int(i) for i in changed.nonzero()[0]]
    return Mishap("writes", f"{name} was written to: {int(changed.sum())} elements changed, the first {first}")


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers as wide as its numbers, so that one NaN can be told from another; a view.

    Example:
        >>> bits(torch.tensor([1.0, -0.0])).tolist()
        [1065353216, -2147483648]
    """
    return tensor.view(BITS[tensor.element_size()])


def raised(error: BaseException) -> str:
    """An exception in a line, and the line of code that it came from.

    Example:
        >>> raised(ValueError("no such block"))
        'ValueError: no such block'
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) != Path(__file__)]
    place = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return in_a_line(error) + place


def in_a_line(error: BaseException) -> str:
    """An exception's type and the first line of what it says."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # an exception's own __str__ is a stranger's code as well
        lines = []
    said = lines[0] if lines else ""
    said = said if len(said) <= MOST_LETTERS else said[: MOST_LETTERS - 3] + "..."
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def kernel_named(kernel: Callable[..., Any] | str) -> Callable[..., Any] | Mishap:
    """A kernel by name, "module:function", or the one that is given.

    Example:
        >>> kernel_named("no.such.module:attend").kind
        'import'
    """
    if not isinstance(kernel, str):
        if callable(kernel):
            return kernel
        return Mishap("import", f"a kernel is a callable or 'module:function', got a {type(kernel).__name__}")
    module_name, _, function_name = kernel.partition(":")
    if not module_name or not function_name:
        return Mishap("import", f"{kernel!r} does not name a kernel; write module:function")
    try:
        found = importlib.import_module(module_name)
        for part in function_name.split("."):
            found = getattr(found, part)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Mishap("import", f"{kernel!r} cannot be imported: {in_a_line(error)}")
    if not callable(found):
        return Mishap("import", f"{kernel!r} is a {type(found).__name__}, which cannot be called")
    return found
