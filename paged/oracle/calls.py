"""Calling a kernel that may do anything: raise, hang, return something else, or write where it should read.

Each of these is a verdict of its own. The kernel runs in a thread that is left behind when it takes too long: nothing
else can be done about a kernel that hangs in native code, and nothing else is asked of it afterwards.
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

from paged.oracle.adapters import Adapter, Kernel
from paged.oracle.declarations import Capabilities
from paged.oracle.inputs import Inputs

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
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


@dataclass(frozen=True)
class Result:
    """What a kernel returned, on the CPU: out [T, Hq, Dv] and lse [T, Hq] or None."""

    out: Tensor
    lse: Tensor | None


class Caller:
    """Calls one kernel, in a thread of its own, with a time limit.

    Args:
        kernel: any callable that the adapter can call.
        adapter: how.
        capabilities: what is declared.
        time_limit: seconds for a call; ten times as many for the first one, which may compile.

    Example:
        >>> from paged.oracle.adapters import Contract
        >>> from paged.oracle.case import Case
        >>> from paged.oracle.inputs import materialise
        >>> caller = Caller(lambda *tensors, **wishes: "done", Contract(), Capabilities())
        >>> caller(materialise(Case(sequences=((1, 1),))))
        Mishap(kind='returns', message="returned a str, not a tensor or (out, lse): 'done'")
    """

    def __init__(self, kernel: Kernel, adapter: Adapter, capabilities: Capabilities, time_limit: float = 60.0) -> None:
        self.capabilities = capabilities
        self.num_calls = 0
        self.hung: Mishap | None = None
        self._kernel, self._adapter, self._time_limit = kernel, adapter, time_limit
        self._asked: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[tuple[Any, Mishap | None]] = queue.SimpleQueue()
        self._threads = torch.get_num_threads()
        # A daemon: a kernel that hangs must not keep the program from ending.
        threading.Thread(target=self._work, daemon=True, name="kernel under test").start()

    def __call__(self, inputs: Inputs) -> Result | Mishap:
        """Call the kernel once; what it returned, checked for everything but its numbers."""
        if self.hung is not None:
            return self.hung
        before = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
        limit = self._time_limit * (1 if self.num_calls else FIRST_CALL)
        self.num_calls += 1
        self._asked.put(lambda: self._adapter.call(self._kernel, inputs, self.capabilities))
        try:
            returned, mishap = self._answered.get(timeout=limit)
        except queue.Empty:
            self.hung = Mishap("hangs", f"did not return within {limit:g} seconds; it was left running")
            return self.hung
        if mishap is not None:
            return mishap
        try:
            out, lse = self._adapter.results(returned)
        except Exception as error:
            return Mishap("returns", f"the adapter could not read what was returned: {_in_a_line(error)}")
        return _written(before, inputs) or self._checked(out, lse, returned, inputs)

    def _work(self) -> None:
        """What the kernel's thread does: answer calls, one by one."""
        torch.set_num_threads(self._threads)
        while True:
            call = self._asked.get()
            answer: tuple[Any, Mishap | None]
            try:
                with torch.no_grad():
                    answer = call(), None
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            except Exception as error:
                answer = None, Mishap("raises", _raised(error))
            self._answered.put(answer)

    def _checked(self, out: Any, lse: Any, returned: Any, inputs: Inputs) -> Result | Mishap:
        """Shapes, dtypes and devices."""
        case, query = inputs.case, inputs.query
        if not isinstance(out, Tensor) or not (lse is None or isinstance(lse, Tensor)):
            said = repr(returned)
            said = said if len(said) <= 60 else said[:57] + "..."
            return Mishap("returns", f"returned a {type(returned).__name__}, not a tensor or (out, lse): {said}")
        wanted = (case.num_queries, case.num_heads, case.value_dim)
        if tuple(out.shape) != wanted:
            return Mishap("shape", f"out is {list(out.shape)}; [T, Hq, Dv] is {list(wanted)}")
        if out.dtype != query.dtype:
            return Mishap("dtype", f"out is {_name(out.dtype)}; queries are {_name(query.dtype)}")
        if out.device != query.device:
            return Mishap("device", f"out is on {out.device}; queries are on {query.device}")
        if self.capabilities.lse is None:
            return Result(out.detach().cpu(), None)
        if lse is None:
            return Mishap("returns", f"no log-sum-exp came back, and Capabilities.lse is {self.capabilities.lse!r}")
        if tuple(lse.shape) != wanted[:2]:
            return Mishap("shape", f"lse is {list(lse.shape)}; [T, Hq] is {list(wanted[:2])}")
        if lse.dtype not in (torch.float32, torch.float64):
            return Mishap("dtype", f"lse is {_name(lse.dtype)}; it is float32 (float64 for float64 queries)")
        if lse.device != query.device:
            return Mishap("device", f"lse is on {lse.device}; queries are on {query.device}")
        return Result(out.detach().cpu(), lse.detach().cpu())


def kernel_named(kernel: Kernel | str) -> Kernel | Mishap:
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
        return Mishap("import", f"{kernel!r} cannot be imported: {_in_a_line(error)}")
    if not callable(found):
        return Mishap("import", f"{kernel!r} is a {type(found).__name__}, which cannot be called")
    return found


def _written(before: dict[str, Tensor], inputs: Inputs) -> Mishap | None:
    """Whether the kernel changed what it was given, NaN payloads included."""
    for name, tensor in inputs.tensors().items():
        was = before[name]
        if was.shape != tensor.shape or was.dtype != tensor.dtype:
            return Mishap("writes", f"{name} has another shape or dtype after the call")
        bits = BITS[was.element_size()]
        changed = was.contiguous().view(bits) != tensor.contiguous().view(bits) if was.dim() else was != tensor
        if changed.any():
            first = [int(i) for i in changed.nonzero()[0]]
            return Mishap("writes", f"{name} was written to: {int(changed.sum())} elements changed, the first {first}")
    return None


def _raised(error: Exception) -> str:
    """An exception and the kernel's own line that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) != Path(__file__)]
    place = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return _in_a_line(error) + place


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    said = lines[0] if lines else ""
    said = said if len(said) <= 200 else said[:197] + "..."
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
