"""How mutants and variants are listed: a class with one deviating step, and a line about where the bug was seen.

    @mutant("G", "vllm#3385", window=True)
    class WindowPlusOne(Attention):
        ...

A thread is written "repository#number", short names as in `THREADS_OF`; an empty one means that the bug follows from
its class, and nobody has been asked about it in public.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from paged.oracle.declarations import Capabilities, Conventions, Profile

Kernel = TypeVar("Kernel", bound=type)
Base = TypeVar("Base")

# What the short names of repositories stand for.
THREADS_OF = {
    "vllm": "vllm-project/vllm",
    "FA": "Dao-AILab/flash-attention",
    "flashinfer": "flashinfer-ai/flashinfer",
    "sglang": "sgl-project/sglang",
    "aiter": "ROCm/aiter",
    "TRT-LLM": "NVIDIA/TensorRT-LLM",
    "imp": "kekzl/imp",
    "mistral.rs": "EricLBuehler/mistral.rs",
    "onnx": "onnx/onnx",
    "pegainfer": "pegainfer-project/pegainfer",
    "pytorch": "pytorch/pytorch",
    "rocm-libraries": "ROCm/rocm-libraries",
    "sparkinfer": "gittensor-ai-lab/sparkinfer",
    "TileOPs": "tile-ai/TileOPs",
    "triton": "triton-lang/triton",
}

# The classes of real bugs; P and Q are about writing into the pool and about keeping its books.
CLASSES = {
    "A": "numbers in slots that must not count",
    "B": "width of integers",
    "C": "lengths and partial blocks",
    "D": "the way through the block table",
    "E": "layout and strides",
    "F": "causal alignment",
    "G": "sliding window",
    "H": "softcap",
    "I": "sinks",
    "J": "ALiBi",
    "K": "splits, their merge, and the log-sum-exp",
    "L": "range and precision",
    "M": "heads that share a KV head",
    "N": "width of heads, scale of scores",
    "O": "scales of stored numbers",
    "P": "writing keys and values",
    "Q": "block managers and prefix caches",
    "R": "broken tests, and what slips through them",
}


@dataclass(frozen=True)
class Mutant:
    """A kernel that is wrong on purpose.

    Attributes:
        name: of its deviation, in snake_case.
        bug_class: a letter of CLASSES.
        thread: where such a bug was reported, or "".
        kernel: with the contract's arguments.
        capabilities: what it claims to be able to do.
    """

    name: str
    bug_class: str
    thread: str
    kernel: Callable[..., Any]
    capabilities: Capabilities


@dataclass(frozen=True)
class Variant:
    """A kernel that is right although it does things in another way.

    Attributes:
        name, kernel, capabilities: as for `Mutant`.
        profile, conventions: what it declares; None: the defaults.
    """

    name: str
    kernel: Callable[..., Any]
    capabilities: Capabilities
    profile: Profile | None = None
    conventions: Conventions | None = None


ATTENTION_MUTANTS: list[Mutant] = []
ATTENTION_VARIANTS: list[Variant] = []


def mutant(bug_class: str, thread: str = "", **declared: Any) -> Callable[[Kernel], Kernel]:
    """List a class as a mutant, under its own name in snake_case.

    Args:
        bug_class, thread: of the mutant.
        declared: its capabilities, beyond bfloat16 with nothing.

    Raises:
        ValueError: a class of bugs that is not in the catalogue.
    """
    if bug_class not in CLASSES:
        raise ValueError(f"classes of bugs are {', '.join(CLASSES)}; got {bug_class!r}")

    def listed(kernel: Kernel) -> Kernel:
        ATTENTION_MUTANTS.append(
            Mutant(snake_case(kernel.__name__), bug_class, thread, kernel(), Capabilities(**declared))
        )
        return kernel

    return listed


def variant(
    profile: Profile | None = None, conventions: Conventions | None = None, **declared: Any
) -> Callable[[Kernel], Kernel]:
    """List a class as a variant, under its own name in snake_case.

    Args:
        profile, conventions: of the variant.
        declared: its capabilities, beyond those that all variants have: two dtypes, log-sum-exp, empty rows.
    """

    def listed(kernel: Kernel) -> Kernel:
        everywhere: dict[str, Any] = {"dtypes": ("bfloat16", "float16"), "lse": "e", "empty_rows": True}
        capabilities = Capabilities(**everywhere | declared)
        ATTENTION_VARIANTS.append(Variant(snake_case(kernel.__name__), kernel(), capabilities, profile, conventions))
        return kernel

    return listed


def defined_in(base: type[Base], *modules: ModuleType) -> tuple[type[Base], ...]:
    """The classes of some modules that are a base or derive from it, in the order in which they are written.

    Args:
        base: a writer or manager.
        modules: what they import from one another is not theirs.

    Example:
        >>> from fractions import Fraction
        >>> import numbers
        >>> [kind.__name__ for kind in defined_in(numbers.Real, numbers)]
        ['Real', 'Rational', 'Integral']
    """
    return tuple(
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, base) and kind.__module__ == module.__name__
    )


def snake_case(name: str) -> str:
    """A class's name as one of a mutant.

    Example:
        >>> snake_case("WindowPlusOne")
        'window_plus_one'
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
