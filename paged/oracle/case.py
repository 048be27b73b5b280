"""A case: integers and the name of a recipe, from which all inputs of one call of a kernel follow.

A case holds no tensor. It says how long the sequences are, how blocks lie, which features are on and which recipe
makes the numbers; `paged.oracle.inputs` makes tensors of it. So a case is one line of JSON, it can be made smaller
without its values changing, and whoever reads a report can run it again anywhere.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from paged.oracle.declarations import KV_DTYPES, QUERY_DTYPES, TABLE_DTYPES

# What the numbers are; see paged/oracle/recipes.py.
RECIPES = ("random", "uniform", "needle", "pair", "staircase", "codes", "large", "negative")
# Recipes whose right answer is known exactly.
EXACT = ("uniform", "needle", "pair", "staircase", "codes")
# Dtypes with few enough numbers to try all of them.
CODES = ("int8", "float8_e4m3fn", "float8_e5m2")
ORDERS = ("identity", "reversed", "shuffled", "interleaved")
STRIDES = ("dense", "padded", "interleaved", "far")
# What lies where no query may look: more generated numbers, NaN, or huge finite numbers.
POISONS = ("none", "nan", "huge")
PADDINGS = ("null", "negative")


@dataclass(frozen=True)
class Case:
    """One call of a kernel.

    Attributes:
        sequences: (query_len, seq_len) of each; query tokens are the sequence's last ones, and seq_len counts them.
        num_kv_heads, query_group, head_dim, value_dim, block_size: Hkv, Hq / Hkv, D, Dv, P.
        dtype, kv_dtype, table_dtype: names without "torch.".
        recipe: what the numbers are.
        seed: of all numbers and of the order of blocks.
        scale: of the scores; None: what the recipe wants, which for random numbers is not 1 / sqrt(D).
        window, softcap: as in the contract.
        alibi, sinks: whether there are slopes and sinks, whose numbers the recipe makes.
        kv_scales: None, "tensor", "head" or "token".
        order: of the physical blocks.
        first_block: the lowest physical block in use; large ones try the width of a block number.
        shared_blocks: leading blocks that every sequence has in common with the first, where both are that long.
        repeat: a table's blocks repeat after so many (a ring); None: no block occurs twice.
        extra_columns: columns of the table beyond what the longest sequence needs.
        padding: what padding entries hold, "null" (block 0) or "negative" (-1).
        strides: of the caches: "dense"; "padded" (a gap behind every block and head); "interleaved" (K and V in one
            tensor, block by block); "far" (blocks so far apart that 32 bits do not count the numbers between them).
        sliced_table: whether the table is a slice of a wider one.
        poison: of slots that no query may see.

    Raises:
        ValueError: what cannot be, and why.

    Example:
        >>> case = Case(sequences=((1, 34),), block_size=16, window=17)
        >>> Case.from_json(case.to_json()) == case
        True
        >>> case.replace(window=0)
        Traceback (most recent call last):
        ...
        ValueError: window must be at least 1 or None, got 0
    """

    sequences: tuple[tuple[int, int], ...]
    num_kv_heads: int = 1
    query_group: int = 1
    head_dim: int = 64
    value_dim: int = 64
    block_size: int = 16
    dtype: str = "float32"
    kv_dtype: str = "float32"
    table_dtype: str = "int32"
    recipe: str = "random"
    seed: int = 0
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    kv_scales: str | None = None
    order: str = "shuffled"
    first_block: int = 1
    shared_blocks: int = 0
    repeat: int | None = None
    extra_columns: int = 0
    padding: str = "null"
    strides: str = "dense"
    sliced_table: bool = False
    poison: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", tuple((int(q), int(n)) for q, n in self.sequences))
        if not self.sequences or any(q < 0 or n < 0 for q, n in self.sequences):
            raise ValueError(f"sequences are one or more (query_len, seq_len), none negative; got {self.sequences}")
        for name in ("num_kv_heads", "query_group", "head_dim", "value_dim", "block_size", "first_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("window", "repeat"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {getattr(self, name)}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive or None, got {self.softcap}")
        choices = {
            "dtype": QUERY_DTYPES,
            "kv_dtype": KV_DTYPES,
            "table_dtype": TABLE_DTYPES,
            "recipe": RECIPES,
            "kv_scales": (None, "tensor", "head", "token"),
            "order": ORDERS,
            "padding": PADDINGS,
            "strides": STRIDES,
            "poison": POISONS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {getattr(self, name)!r}")
        if self.recipe == "codes" and self.kv_dtype not in CODES:
            raise ValueError(f"recipe codes needs a kv_dtype of {', '.join(CODES)}; got {self.kv_dtype}")
        if self.strides == "interleaved" and self.head_dim != self.value_dim:
            raise ValueError(f"interleaved caches need equal widths, got {self.head_dim} and {self.value_dim}")

    @property
    def num_heads(self) -> int:
        """Hq."""
        return self.num_kv_heads * self.query_group

    @property
    def num_queries(self) -> int:
        """T."""
        return sum(query_len for query_len, _ in self.sequences)

    @property
    def name(self) -> str:
        """A short name that is the same wherever the case is: letters of a hash of its JSON.

        Example:
            >>> Case(sequences=((1, 1),)).name == Case(sequences=((1, 1),)).name
            True
        """
        return "case_" + hashlib.sha256(self.to_json().encode()).hexdigest()[:8]

    def blocks_of(self, sequence: int) -> int:
        """How many blocks a sequence has."""
        return -(-self.sequences[sequence][1] // self.block_size)

    def replace(self, **changes: Any) -> "Case":
        """The same case but for `changes`."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """One line, only what differs from the defaults, so that it can be pasted into a test."""
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or getattr(self, field.name) != field.default
        }
        return json.dumps(given)

    @classmethod
    def from_json(cls, text: str) -> "Case":
        """Read what `to_json` wrote.

        Raises:
            ValueError: no JSON, an unknown field, or a case that cannot be.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not the JSON of a case: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"a case is a JSON object, got {text[:60]!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown or "sequences" not in fields:
            problem = f"unknown fields {', '.join(unknown)}" if unknown else "no sequences"
            raise ValueError(f"not a case: {problem}; a case has {', '.join(sorted(known))}")
        try:
            return cls(**fields)
        except (TypeError, IndexError) as error:
            raise ValueError(f"not a case: {error}") from None

    def describe(self) -> str:
        """The case in words, as short as it can be said.

        Example:
            >>> Case(sequences=((1, 34),), window=17).describe()
            'random float32: 1 sequence, query_len 1, seq_len 34; block 16, heads 1/1, dims 64/64, window 17'
        """
        if len(self.sequences) == 1:
            lengths = f"1 sequence, query_len {self.sequences[0][0]}, seq_len {self.sequences[0][1]}"
        else:
            lengths = f"{len(self.sequences)} sequences (query_len, seq_len) {list(self.sequences)}"
        dtype = self.dtype if self.kv_dtype == self.dtype else f"{self.dtype} over {self.kv_dtype}"
        words = [
            f"block {self.block_size}",
            f"heads {self.num_heads}/{self.num_kv_heads}",
            f"dims {self.head_dim}/{self.value_dim}",
        ]
        shapes = {"block_size", "num_kv_heads", "query_group", "head_dim", "value_dim"}
        told = {"sequences", "dtype", "kv_dtype", "recipe", "order", "seed"} | shapes
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in told and value != field.default:
                words.append(field.name if value is True else f"{field.name} {value}")
        return f"{self.recipe} {dtype}: {lengths}; {', '.join(words)}"
