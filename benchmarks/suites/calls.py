"""Calls of a paged attention kernel as published tests make them: tensors, and a reference with a precision of its own.

A `Setup` becomes a `Call` here. Its tensors have the order and names of this project's contract; block 0 is left alone,
so that a table which is the identity begins at block 1.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from suites.setup import Setup

GARBAGE = 2_147_480_000  # FlashMLA's padding entries: to read one is an error
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}


@dataclass
class Call:
    """A setup's tensors.

    Attributes:
        setup: it was made of.
        tensors: query, key_cache, value_cache, block_tables, seq_lens, query_start_loc.
        wishes: scale, and what else is on.
        contexts: of each sequence, K [n, Hkv, D] and V [n, Hkv, Dv] as the reference is given them.
        features: what a kernel has to be able to do, in words of `Capabilities`.
    """

    setup: Setup
    tensors: tuple[Tensor, ...]
    wishes: dict[str, object]
    contexts: list[tuple[Tensor, Tensor]]
    features: frozenset[str]

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """Out and log-sum-exp that the suite compares with."""
        return dense(self, torch.float32 if self.setup.reference == "float32" else self.tensors[0].dtype)

    @cached_property
    def in_low_precision(self) -> Tensor:
        """What plain PyTorch makes of it in the queries' dtype, with scaled keys."""
        return dense(self, self.tensors[0].dtype, scaled_keys=True)[0]

    def compared(self, out: Tensor) -> Tensor:
        """The rows that are looked at, in float32."""
        if not self.setup.skips_empty:
            return out.float()
        return out[torch.cat([torch.full((q,), n > 0) for q, n in self.setup.sequences])].float()


def made(setup: Setup, seed: int) -> Call:
    """Draw a setup's tensors.

    Example: all values are 3, so every mean of them is.
        >>> setup = Setup(((1, 2),), (1, 1), 4, 2, lambda call, out, lse: True, spread=0.0, mean=3.0)
        >>> made(setup, seed=0).expected[0].flatten().tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    draws = torch.Generator().manual_seed(seed)
    tables = _tables(setup, draws)
    num_blocks = (
        max([setup.num_blocks if setup.table == "random" else 0, *(int(t.max()) for t in tables if len(t))]) + 2
    )
    num_heads, num_kv_heads = setup.heads
    widths = (setup.head_dim, setup.value_dim or setup.head_dim)
    query = _drawn(setup, (sum(q for q, _ in setup.sequences), num_heads, setup.head_dim), draws)
    meant = [_drawn(setup, (num_blocks, setup.block_size, num_kv_heads, width), draws) for width in widths]
    if setup.value_is_key:
        meant[1] = meant[0][..., : widths[1]].clone()
    if setup.same_kv:
        longest = max(tables, key=len)
        for numbers in meant:
            for table in tables:
                numbers[table] = numbers[longest[: len(table)]]
    kv_dtype = getattr(torch, setup.kv_dtype or setup.dtype)
    scales = [_scales(setup, which, numbers, draws) for which, numbers in enumerate(meant)]
    stored = [_stored(numbers, scale, kv_dtype) for numbers, scale in zip(meant, scales, strict=True)]
    if not setup.unquantised:
        meant = [_times(codes.float(), scale) for codes, scale in zip(stored, scales, strict=True)]
    contexts = [
        (meant[0][table].flatten(0, 1)[:n], meant[1][table].flatten(0, 1)[:n])
        for table, (_, n) in zip(tables, setup.sequences, strict=True)
    ]
    _clear(setup, tables, stored)
    wishes: dict[str, object] = {"scale": setup.scale or setup.head_dim**-0.5}
    wishes |= _features(setup, num_heads, draws)
    if setup.kv_scales:
        wishes |= {"k_scale": scales[0], "v_scale": scales[1]}
    starts = torch.tensor([0, *(q for q, _ in setup.sequences)]).cumsum(0).int()
    lengths = torch.tensor([n for _, n in setup.sequences], dtype=torch.int32)
    caches = [_strided(codes) if setup.strided else codes for codes in stored]
    tensors = (query.to(getattr(torch, setup.dtype)), *caches, _padded(setup, tables), lengths, starts)
    return Call(setup, tensors, wishes, contexts, _needed(setup, tables))


def dense(call: Call, dtype: torch.dtype, *, scaled_keys: bool = False) -> tuple[Tensor, Tensor]:
    """Attention over contiguous keys and values, whose products are rounded to a dtype.

    Args:
        call: whose contexts are read.
        dtype: of products and weights; float32 rounds nothing more.
        scaled_keys: the scale is applied to keys, in this dtype, and not to scores.

    Returns:
        out [T, Hq, Dv] and lse [T, Hq], float32: 0 and -inf where nothing is seen.
    """
    setup, wishes = call.setup, call.wishes
    scale, outs, lses = float(wishes["scale"]), [], []  # type: ignore[arg-type]
    queries = call.tensors[0].to(dtype).split([q for q, _ in setup.sequences])
    for query, (key, value), (query_len, seq_len) in zip(queries, call.contexts, setup.sequences, strict=True):
        if not seq_len or not query_len:
            outs.append(torch.zeros(query_len, query.shape[1], value.shape[2]))
            lses.append(torch.full(query.shape[:2], -torch.inf))
            continue
        group = query.shape[1] // key.shape[1]
        keys = (key * scale if scaled_keys else key).to(dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,nhd->hqn", query, keys).float() * (1.0 if scaled_keys else scale)
        if setup.softcap:
            scores = setup.softcap * torch.tanh(scores / setup.softcap)
        distance = torch.arange(seq_len - query_len, seq_len)[:, None] - torch.arange(seq_len)
        if setup.slopes:
            scores = scores - wishes["alibi_slopes"][:, None, None] * distance  # type: ignore[index]
        seen = (distance >= 0) & (distance < (setup.window or seq_len))
        scores = scores.masked_fill(~seen, -torch.inf)
        lses.append(scores.logsumexp(dim=2).T)
        if setup.sinks:
            scores = torch.cat([scores, wishes["sinks"][:, None, None].expand(-1, query_len, 1)], dim=2)  # type: ignore[index]
        weights = scores.softmax(dim=2).nan_to_num(0.0)[..., :seq_len].to(dtype)
        outs.append(torch.einsum("hqn,nhd->qhd", weights, value.to(dtype).repeat_interleave(group, dim=1)).float())
    return torch.cat(outs), torch.cat(lses)


def _tables(setup: Setup, draws: torch.Generator) -> list[Tensor]:
    """Physical blocks of each sequence."""
    counts = [-(-n // setup.block_size) for _, n in setup.sequences]
    if setup.table == "random":
        return [torch.randint(1, setup.num_blocks, (count,), generator=draws) for count in counts]
    order = torch.arange(sum(counts)) if setup.table == "identity" else torch.randperm(sum(counts), generator=draws)
    return list((order + 1).split(counts))


def _drawn(setup: Setup, shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    if setup.values == "normal":
        return torch.randn(shape, generator=draws) * setup.spread + setup.mean
    return (torch.rand(shape, generator=draws) * 2 - 1) * setup.spread + setup.mean


def _scales(setup: Setup, which: int, numbers: Tensor, draws: torch.Generator) -> Tensor | None:
    """[], [Hkv] or [N, P, Hkv] float32."""
    if setup.kv_scales is None:
        return None
    if setup.kv_scales == "token":
        largest = LARGEST[setup.kv_dtype or ""]
        return numbers.abs().amax(dim=3).clamp(min=1e-6) / largest
    shape = (setup.heads[1],) if setup.kv_scales == "head" else ()
    if setup.scale_values is not None:
        return torch.full(shape, setup.scale_values[which])
    return torch.rand(shape, generator=draws) * 2 + 0.01


def _times(numbers: Tensor, scale: Tensor | None) -> Tensor:
    return numbers if scale is None else numbers * scale[..., None]


def _stored(numbers: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    codes = numbers if scale is None else numbers / scale[..., None]
    if dtype == torch.int8:
        return codes.round().clamp(-127, 127).to(dtype)
    return codes.clamp(-448, 448).to(dtype) if dtype == torch.float8_e4m3fn else codes.to(dtype)


def _clear(setup: Setup, tables: list[Tensor], stored: list[Tensor]) -> None:
    """Overwrite slots that belong to nobody, as the suite leaves them."""
    if setup.unused == "values":
        return
    owned = torch.zeros(stored[0].shape[:2], dtype=torch.bool)
    used = torch.zeros(len(owned), dtype=torch.bool)
    for table, (_, n) in zip(tables, setup.sequences, strict=True):
        places = torch.arange(n)
        owned[table[places // setup.block_size], places % setup.block_size] = True
        used[table] = True
    if setup.unused == "nan in V":
        stored[1].copy_(torch.where((~owned & used[:, None])[..., None, None], torch.nan, stored[1].float()))
        return
    filler = torch.nan if setup.unused == "nan" else 0.0
    for codes in stored:
        codes.copy_(torch.where(owned[..., None, None], codes.float(), filler))


def _features(setup: Setup, num_heads: int, draws: torch.Generator) -> dict[str, object]:
    """Window, softcap, slopes and sinks, where they are on."""
    heads = torch.arange(1, num_heads + 1)
    found: dict[str, object] = {}
    if setup.window:
        found["window"] = setup.window
    if setup.softcap:
        found["softcap"] = setup.softcap
    if setup.slopes:
        powers = 2.0 ** (-8 * heads / num_heads)
        found["alibi_slopes"] = torch.randn(num_heads, generator=draws) if setup.slopes == "normal" else powers
    if setup.sinks:
        found["sinks"] = torch.rand(num_heads, generator=draws) * 5
    return found


def _strided(codes: Tensor) -> Tensor:
    """The same numbers with room between them, as a slice of [N, 2, P, 2, Hkv, 2, D]."""
    blocks, size, heads, dim = codes.shape
    room = torch.zeros(blocks, 2, size, 2, heads, 2, dim, dtype=codes.dtype)[:, 1, :, 1, :, 1]
    return room.copy_(codes)


def _padded(setup: Setup, tables: list[Tensor]) -> Tensor:
    padded = torch.full((len(tables), max(1, *map(len, tables))), GARBAGE if setup.padding == "garbage" else 0)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded.int()


def _needed(setup: Setup, tables: list[Tensor]) -> frozenset[str]:
    """What this call asks of a kernel; a row that is not compared asks for nothing."""
    empty = any(n < q or not q for q, n in setup.sequences) and not setup.skips_empty
    asked = {
        "window": setup.window,
        "softcap": setup.softcap,
        "alibi": setup.slopes,
        "sinks": setup.sinks,
        "lse": setup.checks_lse,
        "empty_rows": empty,
        "repeated_blocks": any(len(table.unique()) < len(table) for table in tables),
        "strided_caches": setup.strided,
    }
    return frozenset(name for name, is_on in asked.items() if is_on)
