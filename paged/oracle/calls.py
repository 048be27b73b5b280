"""Calling an attention kernel, which may return something else than it should, or write where it should read.

Each of these is a verdict of its own, like those of `paged.oracle.guard`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paged.oracle.adapters import Adapter, Kernel
from paged.oracle.declarations import Capabilities
from paged.oracle.guard import FIRST_CALL, Guard, Mishap, in_a_line, written
from paged.oracle.inputs import Inputs, NoRoom


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
        self._kernel, self._adapter = kernel, adapter
        self._guard = Guard(time_limit, FIRST_CALL)

    @property
    def hung(self) -> Mishap | None:
        """The verdict on the call that did not return, if one did not. Nothing is called after it."""
        return self._guard.hung

    def __call__(self, inputs: Inputs) -> Result | Mishap:
        """Call the kernel once; what it returned, checked for everything but its numbers.

        Raises:
            NoRoom: the adapter could not make the caches of a case.
        """
        before = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
        self.num_calls += 1
        returned = self._guard(lambda: self._asked(inputs))
        if isinstance(returned, NoRoom):
            raise returned
        if isinstance(returned, Mishap):
            return returned
        try:
            out, lse = self._adapter.results(returned)
        except Exception as error:
            return Mishap("returns", f"the adapter could not read what was returned: {in_a_line(error)}")
        return _written(before, inputs) or self._checked(out, lse, returned, inputs)

    def _asked(self, inputs: Inputs) -> Any:
        """What the adapter brings back, which may be a `Mishap`; a `NoRoom` is returned, too, since it is none."""
        try:
            return self._adapter.call(self._kernel, inputs, self.capabilities)
        except NoRoom as error:
            return error

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


def _written(before: dict[str, Tensor], inputs: Inputs) -> Mishap | None:
    """Whether the kernel changed what it was given, NaN payloads included."""
    for name, tensor in inputs.tensors().items():
        mishap = written(name, before[name], tensor)
        if mishap is not None:
            return mishap
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
