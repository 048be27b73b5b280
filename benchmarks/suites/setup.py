"""One call of a paged attention kernel as a published test makes it, described."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from suites.calls import Call


@dataclass(frozen=True)
class Setup:
    """One call, described.

    Attributes:
        sequences: (query_len, seq_len) of each.
        heads: Hq, Hkv.
        head_dim, block_size: D and P; value_dim: Dv, None for D.
        accepts: whether a call's out and log-sum-exp are called right; suite_rules.py has such rules.
        dtype, kv_dtype: of queries, and of the cache where it is another; names without "torch.".
        values: "normal" with a standard deviation of `spread`, or "uniform" between -spread and spread; plus `mean`.
        table: "random" (with what repeats by chance), "identity" or "permutation".
        num_blocks: of the pool of a random table.
        unused: slots of no sequence hold "values", "zeros" or "nan"; or "nan in V", in blocks that are in use.
        padding: of the table, "zero" or "garbage".
        same_kv: keys and values of all sequences begin alike.
        value_is_key: V is the first Dv numbers of K.
        strided: caches are slices of something larger.
        scale: of the scores; None: 1 / sqrt(D).
        window, softcap: as in the contract.
        slopes: of ALiBi, "normal" or "powers" of 2; sinks: whether there are.
        kv_scales: granularity of what stored numbers are multiplied with, as in `Capabilities`; scale_values: of K and
            V, None for other ones everywhere.
        reference: "same" computes in the dtype of queries, "float32" in that.
        unquantised: the reference is given K and V as they were before they were stored.
        checks_lse: the rule looks at the log-sum-exp.
        skips_empty: rows of sequences without keys are not compared.
    """

    sequences: tuple[tuple[int, int], ...]
    heads: tuple[int, int]
    head_dim: int
    block_size: int
    accepts: Callable[["Call", Tensor, Tensor], bool]
    value_dim: int | None = None
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    values: str = "normal"
    spread: float = 1.0
    mean: float = 0.0
    table: str = "random"
    num_blocks: int = 1024
    unused: str = "values"
    padding: str = "zero"
    same_kv: bool = False
    value_is_key: bool = False
    strided: bool = False
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    slopes: str | None = None
    sinks: bool = False
    kv_scales: str | None = None
    scale_values: tuple[float, float] | None = None
    reference: str = "same"
    unquantised: bool = False
    checks_lse: bool = False
    skips_empty: bool = False

    def but(self, **changes: object) -> "Setup":
        """The same but for `changes`."""
        return replace(self, **changes)  # type: ignore[arg-type]
