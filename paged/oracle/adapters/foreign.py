"""What the adapters for other projects' kernels have in common.

Each says with `arguments` what its kernel is called with, and with `cannot` what that kernel cannot be asked for. The
rest is done here: refuse what is declared and cannot be expressed, call the kernel, see that it wrote into nothing, and
read `out` or `(out, lse)`. The adapters are in `paged.oracle.adapters.caches`, `lists`, `slots` and `latent`.

Numbers that a layout counts in its own way are handed over for the default `Conventions`: a window of 5 tokens is
window_left 4 or sliding_window 5. A convention that is declared changes what is right, never what is handed over.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from paged.oracle.case import Case
from paged.oracle.declarations import Capabilities
from paged.oracle.guard import written
from paged.oracle.inputs import Inputs, far_apart

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# Capabilities that are declared by a bool and that not every kernel has an argument for.
FLAGS = ("window", "softcap", "alibi", "sinks", "negative_padding", "repeated_blocks", "strided_caches", "empty_rows")

# Reasons that several adapters have.
NO_ARGUMENT = "the kernel has no argument for it"
ONE_SHAPE = "keys and values of one tensor have one width"
NO_PADDING = "its lists have no padding entries"
NO_BLOCKS = "slots lie one behind another, so that no gap can be between blocks"
ONE_NUMBER = "its scales are single numbers"


class Foreign:
    """An adapter for a kernel with a layout of its own.

    Attributes:
        name: by which `verify` knows it.
        cannot: what the kernel cannot be asked for, and why. Keys are fields of `Capabilities` that are flags,
            "value_dims" (Dv other than D), "int64" (tables), or "kv_scales='head'" and the like.
    """

    name = "foreign"
    cannot: ClassVar[Mapping[str, str]] = {}

    def refuse(self, capabilities: Capabilities) -> None:
        """See that all that is declared can be expressed in this layout.

        Raises:
            ValueError: what cannot, and why.

        Example:
            >>> class Plain(Foreign):
            ...     name, cannot = "plain", {"softcap": NO_ARGUMENT}
            >>> Plain().refuse(Capabilities(softcap=True))
            Traceback (most recent call last):
            ...
            ValueError: adapter 'plain' cannot express softcap: the kernel has no argument for it. Do not declare it
        """
        for wish in asked(capabilities):
            if wish in self.cannot:
                raise ValueError(f"adapter {self.name!r} cannot express {wish}: {self.cannot[wish]}. Do not declare it")

    def arguments(self, inputs: Inputs, capabilities: Capabilities) -> Arguments:
        """What the kernel is called with: positional and named arguments."""
        raise NotImplementedError

    def call(self, kernel: Callable[..., Any], inputs: Inputs, capabilities: Capabilities) -> Any:
        """Call the kernel with the `arguments`; what it returns, or a `Mishap` if it wrote into one of them."""
        return call_unwritten(kernel, *self.arguments(inputs, capabilities))

    def results(self, returned: Any) -> tuple[Any, Any]:
        """`out`, or `(out, lse)`."""
        return out_and_lse(returned)


def out_and_lse(returned: Any) -> tuple[Any, Any]:
    """What most kernels return, `out` or `(out, lse)`, as a pair.

    Example:
        >>> out_and_lse(5), out_and_lse([5, 6])
        ((5, None), (5, 6))
    """
    if isinstance(returned, tuple | list) and len(returned) == 2:
        return returned[0], returned[1]
    return returned, None


def asked(capabilities: Capabilities) -> Iterable[str]:
    """What a kernel is asked for beyond plain attention, in the words of `Foreign.cannot`.

    Example:
        >>> list(asked(Capabilities(sinks=True, head_dims=(64,), value_dims=(32,), kv_scales="head")))
        ['sinks', "kv_scales='head'", 'value_dims']
    """
    yield from (flag for flag in FLAGS if getattr(capabilities, flag))
    if capabilities.kv_scales is not None:
        yield f"kv_scales={capabilities.kv_scales!r}"
    if any(capabilities.value_dim_for(width) != width for width in capabilities.head_dims):
        yield "value_dims"
    if "int64" in capabilities.table_dtypes:
        yield "int64"


def contract_wishes(inputs: Inputs, capabilities: Capabilities) -> dict[str, Any]:
    """The contract's keyword arguments: scale, and those that are declared."""
    wishes: dict[str, Any] = {"scale": inputs.scale}
    if capabilities.window:
        wishes["window"] = inputs.window
    if capabilities.softcap:
        wishes["softcap"] = inputs.softcap
    if capabilities.alibi:
        wishes["alibi_slopes"] = inputs.alibi_slopes
    if capabilities.sinks:
        wishes["sinks"] = inputs.sinks
    if capabilities.kv_scales is not None:
        wishes["k_scale"], wishes["v_scale"] = inputs.k_scale, inputs.v_scale
    return wishes


def window_left(inputs: Inputs) -> int:
    """How many keys a query sees before itself; -1: all. What FlashInfer, FlashAttention and SGLang are given."""
    return -1 if inputs.window is None else inputs.window - 1


def one_number(scale: Tensor | float | None) -> float:
    """A scale for the whole tensor as a number; 1 where there is none."""
    return 1.0 if scale is None else float(scale)


def spaced(cache: Tensor, case: Case) -> Tensor:
    """The same numbers [N, ...], with the gaps between blocks that the case's strides ask for.

    "far": as far apart as the contract's. "padded" and "interleaved": behind every block a gap as large as the block,
    full of NaN where the dtype has it.

    Example:
        >>> spaced(torch.zeros(3, 5), Case(sequences=((1, 1),), strides="padded")).stride()
        (10, 1)
    """
    if case.strides == "dense":
        return cache
    if case.strides == "far":
        return far_apart(cache)
    room = torch.zeros(len(cache), 2, *cache.shape[1:], dtype=cache.dtype, device=cache.device)
    if cache.dtype.is_floating_point:
        room.copy_(torch.full((), torch.nan))
    return room[:, 0].copy_(cache)


def call_unwritten(kernel: Callable[..., Any], positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call a kernel; what it returns, or a `Mishap` if a tensor it was given has other bits afterwards.

    The oracle watches the contract's tensors; a kernel in another layout is given copies of them.

    Example:
        >>> call_unwritten(lambda cache: cache.zero_(), (torch.ones(2),), {}).message
        'argument 0 was written to: 2 elements changed, the first [0]'
    """
    given = {f"argument {i}": value for i, value in enumerate(positional)} | named
    before = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    returned = kernel(*positional, **named)
    mishaps = (written(name, was, given[name]) for name, was in before.items())
    return next((mishap for mishap in mishaps if mishap is not None), returned)
