"""What the author of a kernel declares: what it can do, how it computes, and what it takes for granted.

- `Capabilities`: what is exercised. Nothing that is not declared is asked for, and nothing declared is left untold.
- `Profile`: where it rounds. Every allowance for error is derived from it; there is no tolerance to set.
- `Conventions`: where right kernels differ. A declared convention is applied, an undeclared one is a failure.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Granularity = Literal["tensor", "head", "token"]
LseBase = Literal["e", "2"]

QUERY_DTYPES = ("float64", "float32", "float16", "bfloat16")
KV_DTYPES = (*QUERY_DTYPES, "float8_e4m3fn", "float8_e5m2", "int8")
TABLE_DTYPES = ("int32", "int64")

# Unit roundoff: half the distance from 1 to the next number, 2^-p for p bits of significand.
ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "tfloat32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8_e4m3fn": 2.0**-4,
    "float8_e5m2": 2.0**-3,
}
# Below the first number, rounding is off by up to the second, and no longer by a share of what is rounded. GPUs flush
# what is subnormal in float32 and bfloat16 to 0.
SUBNORMAL = {
    "float64": (2.0**-1022, 2.0**-1022),
    "float32": (2.0**-126, 2.0**-126),
    "tfloat32": (2.0**-126, 2.0**-126),
    "float16": (2.0**-14, 2.0**-25),
    "bfloat16": (2.0**-126, 2.0**-126),
    "float8_e4m3fn": (2.0**-6, 2.0**-10),
    "float8_e5m2": (2.0**-14, 2.0**-17),
}


@dataclass(frozen=True)
class Capabilities:
    """What a kernel can do. What is declared is exercised, or listed as not exercised.

    Args:
        dtypes: of queries and output.
        kv_dtypes: of the caches; "auto" is the query's.
        head_dims: D, widths of a key.
        value_dims: Dv, widths of a value; None: always D.
        query_groups: Hq / Hkv, query heads that share a KV head.
        block_sizes: P, tokens.
        table_dtypes: of block_tables.
        decode_only: one query token for every sequence.
        window, softcap, alibi, sinks: whether the kernel takes it; without, the argument is not passed.
        kv_scales: k_scale and v_scale for the whole "tensor", for each KV "head", or for each "token" and head; None:
            not taken.
        lse: base of the log-sum-exp that is returned beside the output, "e" or "2"; None: not returned.
        empty_rows: sequences without keys, without queries, and queries that see no key.
        negative_padding: padding entries of a table may be -1.
        repeated_blocks: a block may occur twice in one table.
        strided_caches: caches may be views whose blocks do not lie one behind another, each with strides of its own.
        strided_tables: tables may be slices of wider ones, whose rows do not lie one behind another.
        batch_invariant: a sequence's output has the same bits alone and in any batch.

    Raises:
        ValueError: an unknown name, or a width that nothing can have.

    Example:
        >>> Capabilities(dtypes=("float16",), head_dims=(64, 80), lse="e").query_groups
        (1, 2, 3, 4)
        >>> Capabilities(dtypes=("half",))
        Traceback (most recent call last):
        ...
        ValueError: dtypes may name float64, float32, float16, bfloat16; got 'half'
    """

    dtypes: tuple[str, ...] = ("bfloat16",)
    kv_dtypes: tuple[str, ...] = ("auto",)
    head_dims: tuple[int, ...] = (64, 128)
    value_dims: tuple[int, ...] | None = None
    query_groups: tuple[int, ...] = (1, 2, 3, 4)
    block_sizes: tuple[int, ...] = (16, 32)
    table_dtypes: tuple[str, ...] = ("int32",)
    decode_only: bool = False
    window: bool = False
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    kv_scales: Granularity | None = None
    lse: LseBase | None = None
    empty_rows: bool = False
    negative_padding: bool = False
    repeated_blocks: bool = False
    strided_caches: bool = False
    strided_tables: bool = False
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("dtypes", "kv_dtypes", "head_dims", "value_dims", "query_groups", "block_sizes", "table_dtypes"):
            given = getattr(self, name)
            if name == "value_dims" and given is None:
                continue
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise ValueError(f"{name} is a tuple of what can be chosen from, got {given!r}; write ({given!r},)")
            object.__setattr__(self, name, tuple(given))
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one choice, got none")
        _names("dtypes", self.dtypes, QUERY_DTYPES)
        _names("kv_dtypes", self.kv_dtypes, ("auto", *KV_DTYPES))
        _names("table_dtypes", self.table_dtypes, TABLE_DTYPES)
        for name in ("head_dims", "value_dims", "query_groups", "block_sizes"):
            for width in getattr(self, name) or ():
                if not isinstance(width, int) or width < 1:
                    raise ValueError(f"{name} are integers of at least 1, got {width!r}")
        _choice("kv_scales", self.kv_scales, (None, *get_args(Granularity)))
        _choice("lse", self.lse, (None, *get_args(LseBase)))
        if "int8" in self.kv_dtypes and self.kv_scales is None:
            raise ValueError("int8 codes mean nothing without scales: declare kv_scales as 'tensor', 'head' or 'token'")

    def value_dim_for(self, head_dim: int) -> int:
        """Dv for a D: the same where no value_dims are declared, else the choice at D's place in head_dims."""
        if self.value_dims is None:
            return head_dim
        return self.value_dims[self.head_dims.index(head_dim) % len(self.value_dims)]


@dataclass(frozen=True)
class Profile:
    """Where a kernel rounds; the defaults are FlashAttention's.

    Args:
        p_dtype: the weights are rounded to it before they meet V; "query": the query's dtype.
        acc_dtype: sums are kept in it; "auto": float32, or float64 for float64 queries.
        split_dtype: partial outputs are stored in it between passes; None: in acc_dtype.
        q_prescale_dtype: queries times scale are rounded to it before the product; None: not rounded.
        operand_dtype: keys, queries and values are rounded to it before they are multiplied ("tfloat32"); None: exact.
        kv_dequant_dtype: stored value times scale is rounded to it; None: not rounded.
        exp_rel: relative error of the exponential; None: 2^-22 (PTX ex2.approx), or 2^-50 in float64.
        tanh_rel: relative error of the hyperbolic tangent; None: 2^-11 (PTX tanh.approx), or 2^-50 in float64.

    Raises:
        ValueError: an unknown dtype or a negative error.
    """

    p_dtype: str = "query"
    acc_dtype: str = "auto"
    split_dtype: str | None = None
    q_prescale_dtype: str | None = None
    operand_dtype: str | None = None
    kv_dequant_dtype: str | None = None
    exp_rel: float | None = None
    tanh_rel: float | None = None

    def __post_init__(self) -> None:
        known = tuple(ROUNDOFF)
        _choice("p_dtype", self.p_dtype, ("query", *known))
        _choice("acc_dtype", self.acc_dtype, ("auto", *known))
        for name in ("split_dtype", "q_prescale_dtype", "operand_dtype", "kv_dequant_dtype"):
            _choice(name, getattr(self, name), (None, *known))
        for name in ("exp_rel", "tanh_rel"):
            error = getattr(self, name)
            if error is not None and not 0 <= error < 1:
                raise ValueError(f"{name} is an error from 0 to 1, got {error!r}")

    def roundoffs(self, query_dtype: str) -> "Roundoffs":
        """The profile in numbers, for queries of one dtype."""
        exact = query_dtype == "float64"
        acc = ("float64" if exact else "float32") if self.acc_dtype == "auto" else self.acc_dtype
        p_dtype = query_dtype if self.p_dtype == "query" else self.p_dtype

        def of(dtype: str | None) -> float:
            return 0.0 if dtype is None else ROUNDOFF[dtype]

        return Roundoffs(
            out=of(query_dtype),
            weights=of(p_dtype),
            acc=of(acc),
            split=of(self.split_dtype),
            queries=of(self.q_prescale_dtype) + of(self.operand_dtype),
            keys=of(self.kv_dequant_dtype) + of(self.operand_dtype),
            exp=(2.0**-50 if exact else 2.0**-22) if self.exp_rel is None else self.exp_rel,
            tanh=(2.0**-50 if exact else 2.0**-11) if self.tanh_rel is None else self.tanh_rel,
            least_out=2 * SUBNORMAL[query_dtype][1],
            small_weights=max(SUBNORMAL[p_dtype], SUBNORMAL[acc]),
        )


@dataclass(frozen=True)
class Roundoffs:
    """A `Profile` in unit roundoffs: out, weights, sums, partials, queries, keys and values, exponential, tanh.

    And what small numbers lose: outputs up to `least_out`, weights as in SUBNORMAL.
    """

    out: float
    weights: float
    acc: float
    split: float
    queries: float
    keys: float
    exp: float
    tanh: float
    least_out: float
    small_weights: tuple[float, float]

    def without_queries(self) -> "Roundoffs":
        """The same but for the query, which is not rounded."""
        return replace(self, queries=0.0)


@dataclass(frozen=True)
class Conventions:
    """Where right kernels differ; the defaults are those of this project's contract.

    Args:
        empty_out: output of a row that sees no key: "zero", "nan", or "any" if it is left unwritten.
        empty_lse: its log-sum-exp: "-inf", "+inf", "zero", or "any".
        lse_base: "e" or "2"; None: as `Capabilities.lse` says.
        lse_includes_sink: whether the sink is part of the log-sum-exp.
        window_counts_self: whether a window of w is the query and w - 1 keys before it; else it is w keys before it.
        causal: "bottom_right" (the last query sees the last key) or "top_left" (the first query sees the first key).
        alibi_origin: what ALiBi counts distances from: the "query", the "last_key" of the sequence, or the
            "first_key". The output is the same; the log-sum-exp is not.
        negative_index: a table entry of -1 is "forbidden" or to be "skip"ped.
        unused_slots: slots that no query may see are "unread" (they may hold NaN) or "masked" (they hold any finite
            number, and a weight of 0 silences it).

    Raises:
        ValueError: an unknown choice.
    """

    empty_out: str = "zero"
    empty_lse: str = "-inf"
    lse_base: LseBase | None = None
    lse_includes_sink: bool = False
    window_counts_self: bool = True
    causal: str = "bottom_right"
    alibi_origin: str = "query"
    negative_index: str = "forbidden"
    unused_slots: str = "unread"

    def __post_init__(self) -> None:
        _choice("empty_out", self.empty_out, ("zero", "nan", "any"))
        _choice("empty_lse", self.empty_lse, ("-inf", "+inf", "zero", "any"))
        _choice("lse_base", self.lse_base, (None, *get_args(LseBase)))
        _choice("causal", self.causal, ("bottom_right", "top_left"))
        _choice("alibi_origin", self.alibi_origin, ("query", "last_key", "first_key"))
        _choice("negative_index", self.negative_index, ("forbidden", "skip"))
        _choice("unused_slots", self.unused_slots, ("unread", "masked"))

    def agree_with(self, capabilities: Capabilities) -> "Conventions":
        """The same with lse_base filled in.

        Raises:
            ValueError: the base, or what -1 means, is declared twice and differently.
        """
        if self.lse_base is not None and capabilities.lse is not None and self.lse_base != capabilities.lse:
            raise ValueError(
                f"Conventions.lse_base is {self.lse_base!r} and Capabilities.lse is {capabilities.lse!r}: declare one, "
                "or the same in both"
            )
        if capabilities.negative_padding and self.negative_index == "forbidden":
            return dataclasses.replace(self, negative_index="skip", lse_base=self.lse_base or capabilities.lse)
        return dataclasses.replace(self, lse_base=self.lse_base or capabilities.lse)


def _names(field: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{field} may name {', '.join(known)}; got {name!r}")


def _choice(field: str, given: Any, known: tuple[Any, ...]) -> None:
    if given not in known:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, known))}; got {given!r}")
