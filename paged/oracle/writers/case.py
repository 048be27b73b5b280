"""What a writer can do, and one call of it: integers and names, from which all tensors of the call follow.

A writer puts the keys and values of T new tokens into the slots of a pool ("reshape and cache"):

    write(key, value, key_cache, value_cache, slot_mapping, *, k_scale, v_scale)        in place, returns nothing

A case says which positions of which sequences are written, how their blocks lie in the pool and how all these tensors
lie in memory; `paged.oracle.writers.inputs` makes them.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from paged.oracle.declarations import QUERY_DTYPES
from paged.oracle.writers.codes import QUANTISED

STORED_DTYPES = (*QUERY_DTYPES, *QUANTISED)
ORDERS = ("identity", "reversed", "shuffled")
SKIPS = ("none", "end", "between", "all")
INPUTS = ("dense", "fused", "heads_first")
STRIDES = ("dense", "padded", "interleaved", "heads_first", "far")
RECIPES = ("numbered", "special", "codes", "ties", "beside", "between", "beyond")
SCALES = (None, "tensor", "head", "token")
DUPLICATES = (None, "last", "any", "refused")


@dataclass(frozen=True)
class WriteCapabilities:
    """What a writer can do. What is declared is tried; what is not is never asked for.

    Args:
        dtypes: of key and value.
        kv_dtypes: of the pool; "auto" is the dtype of key and value.
        head_dims, value_dims: D, and Dv or None where it is always D.
        block_sizes: P.
        slot_dtypes: of slot_mapping, "int64" or "int32".
        scales: k_scale and v_scale, float32: one number for the "tensor" or one for each KV "head" [Hkv], which are
            read; or one for each "token" and head [N, P, Hkv], which the writer writes: the largest number of the
            vector over 127. None: not passed.
        negative_slots: a token whose slot is -1 is skipped.
        duplicate_slots: what happens if two tokens have one slot: the "last" one stays, "any" of them does, or the call
            is "refused" by an exception and nothing is written. None: it never happens.
        longer_keys: key and value may have more rows than slot_mapping has entries; those are padding.
        strided_inputs: key and value may be slices of a fused projection, or have their heads first in memory.
        strided_caches: the pool may be views whose blocks do not lie one behind another.
        ties: a number in the middle between two codes goes to the "even" one, or to "any" of the two.
        quotient_error: the largest relative error of number / scale before it is rounded, for scales that are no
            powers of two; None: 2^-20.

    Raises:
        ValueError: an unknown name, or declarations that contradict one another.

    Example:
        >>> WriteCapabilities(kv_dtypes=("int8",))
        Traceback (most recent call last):
        ...
        ValueError: int8 codes mean nothing without scales: declare scales as 'tensor', 'head' or 'token'
    """

    dtypes: tuple[str, ...] = ("bfloat16",)
    kv_dtypes: tuple[str, ...] = ("auto",)
    head_dims: tuple[int, ...] = (64, 80)
    value_dims: tuple[int, ...] | None = None
    block_sizes: tuple[int, ...] = (16,)
    slot_dtypes: tuple[str, ...] = ("int64",)
    scales: str | None = None
    negative_slots: bool = False
    duplicate_slots: str | None = None
    longer_keys: bool = False
    strided_inputs: bool = True
    strided_caches: bool = False
    ties: str = "even"
    quotient_error: float | None = None

    def __post_init__(self) -> None:
        known = {"dtypes": QUERY_DTYPES, "kv_dtypes": ("auto", *STORED_DTYPES), "slot_dtypes": ("int64", "int32")}
        for name in ("dtypes", "kv_dtypes", "head_dims", "block_sizes", "slot_dtypes"):
            given = getattr(self, name)
            if isinstance(given, str) or not given:
                raise ValueError(f"{name} is a tuple of one or more choices, got {given!r}")
            object.__setattr__(self, name, tuple(given))
            for choice in given:
                if name in known and choice not in known[name]:
                    raise ValueError(f"{name} may name {', '.join(known[name])}; got {choice!r}")
                if name not in known and (not isinstance(choice, int) or choice < 1):
                    raise ValueError(f"{name} are integers of at least 1, got {choice!r}")
        if self.value_dims is not None and len(self.value_dims) != len(self.head_dims):
            raise ValueError(f"value_dims are one for each of head_dims, got {self.value_dims} for {self.head_dims}")
        for name, choices in (("scales", SCALES), ("duplicate_slots", DUPLICATES), ("ties", ("even", "any"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}; got {getattr(self, name)!r}")
        if "int8" in self.kv_dtypes and self.scales is None:
            raise ValueError("int8 codes mean nothing without scales: declare scales as 'tensor', 'head' or 'token'")
        if self.scales == "token" and set(self.kv_dtypes) != {"int8"}:
            raise ValueError(f"a scale that is written for each token is of int8, got kv_dtypes {self.kv_dtypes}")
        if self.scales is not None and not set(self.kv_dtypes) <= set(QUANTISED):
            raise ValueError(f"scales are of quantised pools ({', '.join(QUANTISED)}), got kv_dtypes {self.kv_dtypes}")

    def value_dim_for(self, head_dim: int) -> int:
        """Dv for a D."""
        return head_dim if self.value_dims is None else self.value_dims[self.head_dims.index(head_dim)]


@dataclass(frozen=True)
class WriteCase:
    """One call of a writer.

    Attributes:
        sequences: (first position, number of tokens) of what each sequence writes.
        num_kv_heads, head_dim, value_dim, block_size: Hkv, D, Dv, P.
        dtype, kv_dtype, slot_dtype: names without "torch."; kv_dtype is a real one, never "auto".
        recipe: what the numbers are: "numbered" (no two alike, as far as the dtype allows), "special" (zeros, NaN,
            infinities, subnormals), and for quantised pools "codes" (a code exactly), "ties" (midway between two),
            "beside" (hardly off midway), "between" (anything) and "beyond" (outside the range).
        seed: of the numbers, the order of blocks, and the bits that lie in the pool before.
        scales: None, "tensor", "head" or "token".
        uneven_scales: whether they are no powers of two.
        order: of the physical blocks.
        first_block: the lowest one that is written; large ones try the width of a block's number.
        shuffled_tokens: the tokens are not sorted by sequence and position.
        last_block: the pool ends with the block of the last token.
        skips: which tokens have slot -1: "none", those at the "end" (padding), some "between", or "all".
        duplicates: two tokens at a time have one slot.
        extra_rows: rows of key and value without an entry of slot_mapping.
        inputs: how key and value lie: "dense", "fused" (slices of one projection), or "heads_first".
        strides: of the pool: "dense"; "padded"; "interleaved" (K and V in one tensor, block by block); "heads_first"
            ("HND" in memory); "far" (blocks so far apart that 32 bits do not count the numbers between them).

    Example:
        >>> case = WriteCase(sequences=((14, 3), (0, 1)))
        >>> WriteCase.from_json(case.to_json()) == case, case.num_tokens
        (True, 4)
    """

    sequences: tuple[tuple[int, int], ...]
    num_kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    block_size: int = 16
    dtype: str = "float32"
    kv_dtype: str = "float32"
    slot_dtype: str = "int64"
    recipe: str = "numbered"
    seed: int = 0
    scales: str | None = None
    uneven_scales: bool = False
    order: str = "identity"
    first_block: int = 1
    shuffled_tokens: bool = False
    last_block: bool = False
    skips: str = "none"
    duplicates: bool = False
    extra_rows: int = 0
    inputs: str = "dense"
    strides: str = "dense"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", tuple((int(start), int(count)) for start, count in self.sequences))
        choices: dict[str, tuple[Any, ...]] = {"dtype": QUERY_DTYPES, "kv_dtype": STORED_DTYPES, "recipe": RECIPES}
        choices |= {"scales": SCALES, "order": ORDERS, "skips": SKIPS, "inputs": INPUTS, "strides": STRIDES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}; got {getattr(self, name)!r}")
        if any(start < 0 or count < 0 for start, count in self.sequences):
            raise ValueError(f"sequences are (first position, number of tokens), got {self.sequences}")

    @property
    def num_tokens(self) -> int:
        """T, without extra rows."""
        return sum(count for _, count in self.sequences)

    @property
    def quantised(self) -> bool:
        """Whether the pool holds codes."""
        return self.kv_dtype in QUANTISED

    def replace(self, **changes: Any) -> "WriteCase":
        """The same case but for `changes`."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """One line; what is as by default is left out."""
        fields = dataclasses.fields(self)
        return json.dumps({f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default})

    @classmethod
    def from_json(cls, text: str) -> "WriteCase":
        """The case that `to_json` wrote."""
        return cls(**json.loads(text))

    def describe(self) -> str:
        """In words, for a report."""
        writes = ", ".join(f"{count} from {start}" for start, count in self.sequences) or "none"
        words = f"tokens {writes}; block {self.block_size}, heads {self.num_kv_heads}, d {self.head_dim}"
        words += f"/{self.value_dim}" if self.value_dim != self.head_dim else ""
        told = ("sequences", "num_kv_heads", "head_dim", "value_dim", "block_size", "dtype", "kv_dtype")
        others = [field for field in dataclasses.fields(self) if field.name not in told]
        odd = [f"{f.name} {getattr(self, f.name)}" for f in others if getattr(self, f.name) != f.default]
        return "; ".join([f"{words}; {self.dtype} into {self.kv_dtype}", *odd])
