"""From a case to tensors: the pool and its tables as the contract has them, and the same problem without blocks.

The pool is filled by what each slot is, its *region*, so that a report can say what a kernel read:

    live      a token that some query sees
    hidden    a token of a sequence that no query sees any more (before every window)
    tail      an unused slot behind a sequence's last token
    free      a slot of a block that no table names
    null      block 0: zeros, which padding entries name

Where the case says "poison", the regions hold NaN ("must not be read": tail and free) or huge finite numbers ("must be
masked": hidden, tail and free, each a number of its own). Where it does not, they hold generated numbers like any
other slot, so that a token too many has values that can be recognised.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from paged.oracle import recipes
from paged.oracle.case import Case
from paged.oracle.declarations import Conventions
from paged.oracle.exact import Problem
from paged.oracle.values import K_SCALE, PLACE, V_SCALE, Integers, random_bits

LIVE, HIDDEN, TAIL, FREE, NULL = "live", "hidden", "tail", "free", "null"
REGIONS = (LIVE, HIDDEN, TAIL, FREE, NULL)
MUST_NOT_READ = (TAIL, FREE)
MUST_MASK = (HIDDEN, TAIL, FREE)

# Huge but finite, different for each region, as shares of about the largest number of the dtype that sums survive.
HUGE = {"float64": 2.0**36, "float32": 2.0**36, "bfloat16": 2.0**36, "float16": 2.0**15, "float8_e5m2": 2.0**14}
SHARE = {HIDDEN: 0.5, TAIL: 1.0, FREE: 0.75}
# Blocks this far apart: of blocks 1, 2 and 3 the second begins beyond 2^31 numbers and the third beyond 2^32, so that
# signed and unsigned 32 bits are both too few. Nothing between is touched.
FAR = (1 << 30) + (1 << 28) + (1 << 27)
# In a pool of very many blocks, so many of the first ones and of those below the first in use hold numbers.
FEW = 64


class NoRoom(MemoryError):
    """Blocks cannot be laid so far apart on this machine: no fault of the kernel's."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call.

    Attributes:
        case: they were made of.
        query, key_cache, value_cache, block_tables, seq_lens, query_start_loc: as in the contract.
        scale, window, softcap, alibi_slopes, sinks, k_scale, v_scale: as in the contract; the window as this kernel
            counts it.
        problem: the same without blocks.
        regions: [N, P] what each slot is, an index into REGIONS.
        tokens: [N, P] numbers of the tokens that lie there.
        filled: [F] blocks that hold numbers; the others, in a pool of very many, are zeros that were never touched.
    """

    case: Case
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    scale: float
    window: int | None
    softcap: float | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    k_scale: Tensor | float | None
    v_scale: Tensor | float | None
    problem: Problem
    regions: Integers
    tokens: Integers
    filled: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What a kernel must leave as it is, by name; of the caches, copies of the blocks that hold numbers."""
        found: dict[str, Tensor] = {}
        for name in (field.name for field in fields(self)):
            tensor = getattr(self, name)
            if isinstance(tensor, Tensor) and name != "filled":
                found[name] = tensor[self.filled] if name in ("key_cache", "value_cache") else tensor
        return found

    def replace(self, **changes: object) -> "Inputs":
        """The same inputs but for `changes`."""
        return replace(self, **changes)  # type: ignore[arg-type]


def materialise(
    case: Case, conventions: Conventions | None = None, device: str = "cpu", poisoned: tuple[str, ...] | None = None
) -> Inputs:
    """Make the tensors of a case.

    Args:
        case: what to make.
        conventions: of the kernel that gets them; they decide who sees what, and so what is right.
        device: torch's name of it.
        poisoned: regions to poison, where the case says so; None: all that its poison is for.

    Example: three tokens in blocks of two, in physical blocks 2 and 1.
        >>> inputs = materialise(Case(sequences=((1, 3),), block_size=2, head_dim=2, value_dim=2, order="reversed"))
        >>> inputs.block_tables.tolist(), [REGIONS[region] for region in inputs.regions[1]]
        ([[2, 1]], ['live', 'tail'])
    """
    conventions = conventions or Conventions()
    regions, tokens, tables = _lay_out(case, conventions)
    blocks = np.arange(len(regions))
    filled = blocks[(blocks < FEW) | (blocks >= case.first_block - FEW)]
    scales = [recipes.kv_scale(case, which, tokens[filled]) for which in (K_SCALE, V_SCALE)]
    stored = [recipes.stored_keys(case, tokens[filled]), recipes.stored_values(case, tokens[filled])]
    where = np.searchsorted(filled, np.concatenate(tables)) if tables else filled
    inside = np.split(where, np.cumsum([len(table) for table in tables])[:-1])
    problem = _problem(case, conventions, stored, scales, inside)
    _poison(case, stored, scales, regions[filled], poisoned)
    caches = _caches(case, stored, len(regions), filled, device)
    for which, scale in enumerate(scales):
        if scale is not None and scale.ndim == 3:
            whole = np.ones((*regions.shape, case.num_kv_heads))
            whole[filled] = scale
            scales[which] = whole

    def tensor(numbers: object, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(numbers)).to(device=device, dtype=dtype)

    query = torch.cat(problem.queries)
    starts = np.cumsum([0, *[query_len for query_len, _ in case.sequences]])
    return Inputs(
        case=case,
        query=query.to(device=device, dtype=getattr(torch, case.dtype)),
        key_cache=caches[0],
        value_cache=caches[1],
        block_tables=_sliced(case, tensor(_padded(case, tables), getattr(torch, case.table_dtype))),
        seq_lens=tensor([n for _, n in case.sequences], torch.int32),
        query_start_loc=tensor(starts, torch.int32),
        scale=problem.scale,
        window=case.window,
        softcap=case.softcap,
        alibi_slopes=tensor(recipes.slopes(case), torch.float32) if case.alibi else None,
        sinks=tensor(recipes.sinks(case), torch.float32) if case.sinks else None,
        k_scale=None if scales[0] is None else tensor(scales[0], torch.float32),
        v_scale=None if scales[1] is None else tensor(scales[1], torch.float32),
        problem=problem,
        regions=regions,
        tokens=tokens,
        filled=torch.from_numpy(filled).to(device),
    )


def first_position(case: Case, conventions: Conventions, sequence: int) -> int:
    """Where a sequence's first query token sits among its keys."""
    query_len, seq_len = case.sequences[sequence]
    return 0 if conventions.causal == "top_left" else seq_len - query_len


def window_with_self(case: Case, conventions: Conventions) -> int | None:
    """How many keys a query sees, itself included, or None for all."""
    return None if case.window is None else case.window + (not conventions.window_counts_self)


def _lay_out(case: Case, conventions: Conventions) -> tuple[Integers, Integers, list[Integers]]:
    """Regions [N, P] and token numbers [N, P] of the pool, and each sequence's physical blocks."""
    size, window = case.block_size, window_with_self(case, conventions)
    logical = []  # each block's content, by the number of its first token
    for sequence in range(len(case.sequences)):
        first_tokens = np.arange(case.blocks_of(sequence)) * size
        logical.append(recipes.owners(case, sequence, first_tokens))
    contents = list(dict.fromkeys(int(content) for row in logical for content in row))
    place = _places(case, logical, contents)
    # One free block above, as others' trash block would be; but far apart it would cost gigabytes of address space.
    num_blocks = max([case.first_block, *place.values()]) + (1 if case.strides == "far" else 2)
    regions = np.full((num_blocks, size), REGIONS.index(FREE))
    regions[0] = REGIONS.index(NULL)
    tokens = recipes.token_of(recipes.NOBODY, np.arange(num_blocks * size).reshape(num_blocks, size))
    tables = [np.array([place[int(content)] for content in row], dtype=np.int64) for row in logical]
    for sequence, ((query_len, seq_len), table) in enumerate(zip(case.sequences, tables, strict=True)):
        first = first_position(case, conventions, sequence)
        last_seen = min(seq_len, first + query_len) - 1 if query_len else -1
        first_seen = 0 if window is None else max(0, first - window + 1)
        for index, block in enumerate(table):
            positions = index * size + np.arange(size)
            tokens[block] = int(logical[sequence][index]) + np.arange(size)
            seen = (positions >= first_seen) & (positions <= last_seen)
            region = np.where(seen, REGIONS.index(LIVE), REGIONS.index(HIDDEN))
            region = np.where(positions < seq_len, region, REGIONS.index(TAIL))
            regions[block] = np.minimum(regions[block], region)  # who sees a shared slot decides
    return regions, tokens, tables


def _places(case: Case, logical: list[Integers], contents: list[int]) -> dict[int, int]:
    """Physical blocks of the contents, in the case's order, with a few free blocks between them."""
    count = len(contents)
    if case.order == "interleaved":  # the sequences' first blocks, then their second ones
        longest = max(map(len, logical))
        contents = list(dict.fromkeys(int(row[i]) for i in range(longest) for row in logical if i < len(row)))
    spots = list(range(case.first_block, case.first_block + count))
    if case.order == "reversed":
        spots = spots[::-1]
    elif case.order == "shuffled":
        spots = list(range(case.first_block, case.first_block + count + 2 + count // 4))
        keys = random_bits(case.seed, PLACE, np.array(spots), 1, 1)[:, 0, 0]
        spots = [spots[i] for i in np.argsort(keys, kind="stable")[:count]]
    return dict(zip(contents, spots, strict=True))


def _padded(case: Case, tables: list[Integers]) -> Integers:
    """[B, M] with padding entries."""
    width = max(1, max(map(len, tables))) + case.extra_columns
    padded = np.full((len(tables), width), -1 if case.padding == "negative" else 0, dtype=np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


def _sliced(case: Case, table: Tensor) -> Tensor:
    """The same table, as a slice of a wider one whose other columns name the last block where the case wants that."""
    if not case.sliced_table:
        return table
    rows, width = table.shape
    wider = torch.full((rows, width + 3), int(table.max()), dtype=table.dtype, device=table.device)
    wider[:, 1 : 1 + width] = table
    return wider[:, 1 : 1 + width]


def _problem(
    case: Case,
    conventions: Conventions,
    stored: list[recipes.Floats],
    scales: list[recipes.Floats | None],
    tables: list[Integers],
) -> Problem:
    """The same without blocks: logical order, float64, stored numbers times their scales."""
    window = window_with_self(case, conventions)
    firsts = [first_position(case, conventions, sequence) for sequence in range(len(case.sequences))]
    contexts: list[list[Tensor]] = [[], []]
    for (_, seq_len), table in zip(case.sequences, tables, strict=True):
        for which in range(2):
            numbers = stored[which][table]  # [m, P, Hkv, D]
            scale = scales[which]
            if scale is not None:
                numbers = numbers * (scale[table] if scale.ndim == 3 else scale)[..., None]
            contexts[which].append(torch.from_numpy(numbers.reshape(-1, *numbers.shape[2:])[:seq_len].copy()))
    queries = [recipes.queries(case, sequence, first, window) for sequence, first in enumerate(firsts)]

    def in_float32(numbers: recipes.Floats) -> Tensor:
        return torch.from_numpy(numbers).float().double()  # as the kernel is given them

    return Problem(
        queries=tuple(map(torch.from_numpy, queries)),
        keys=tuple(contexts[0]),
        values=tuple(contexts[1]),
        first_positions=tuple(firsts),
        kv_heads=torch.arange(case.num_heads) // case.query_group,
        scale=recipes.score_scale(case),
        window=window,
        softcap=case.softcap,
        slopes=in_float32(recipes.slopes(case)) if case.alibi else None,
        sinks=in_float32(recipes.sinks(case)) if case.sinks else None,
        lse_base=conventions.lse_base or "e",
        lse_includes_sink=conventions.lse_includes_sink,
        alibi_origin=conventions.alibi_origin,
        empty_lse=conventions.empty_lse,
        empty_out=conventions.empty_out,
    )


def _poison(
    case: Case,
    stored: list[recipes.Floats],
    scales: list[recipes.Floats | None],
    regions: Integers,
    poisoned: tuple[str, ...] | None,
) -> None:
    """Overwrite what no query may see, in place; block 0 becomes zeros."""
    for numbers in stored:
        numbers[regions == REGIONS.index(NULL)] = 0.0
    if case.poison == "none":
        return
    for region in MUST_NOT_READ if case.poison == "nan" else MUST_MASK:
        if poisoned is not None and region not in poisoned:
            continue
        here = regions == REGIONS.index(region)
        for sign, numbers, scale in zip((1.0, -1.0), stored, scales, strict=True):
            if case.poison == "huge":
                largest = {"float8_e4m3fn": 448.0, "int8": 127.0}.get(case.kv_dtype) or HUGE[case.kv_dtype]
                numbers[here] = sign * np.trunc(largest * SHARE[region])
            elif case.kv_dtype != "int8":
                numbers[here] = np.nan
            elif scale is not None and scale.ndim == 3:  # a code is always a number; its scale need not be
                scale[here] = np.nan


def _caches(case: Case, stored: list[recipes.Floats], num_blocks: int, filled: Integers, device: str) -> list[Tensor]:
    """Key and value cache with the strides the case wants."""
    dtype = getattr(torch, case.kv_dtype)
    wide = torch.float64 if case.kv_dtype == "float64" else torch.float32
    # NaN and infinities survive every cast but that to int8, which has none.
    tensors = [torch.from_numpy(numbers).to(device=device, dtype=wide).to(dtype) for numbers in stored]
    if len(filled) < num_blocks:
        pools = [torch.zeros(num_blocks, *tensor.shape[1:], dtype=dtype, device=device) for tensor in tensors]
        for pool, tensor in zip(pools, tensors, strict=True):
            pool[torch.from_numpy(filled).to(device)] = tensor
        tensors = pools
    if case.strides == "interleaved":
        together = torch.stack(tensors, dim=1)  # [N, 2, P, Hkv, D]
        return [together[:, 0], together[:, 1]]
    if case.strides == "padded":
        # Gaps of different sizes, so that one cache's strides are not the other's.
        return [_with_gaps(tensor, gap) for tensor, gap in zip(tensors, (8, 16), strict=True)]
    if case.strides == "far":
        return [far_apart(tensor) for tensor in tensors]
    return tensors


def _with_gaps(tensor: Tensor, gap: int) -> Tensor:
    """The same numbers with gaps behind every head and block, which hold NaN where the dtype has it."""
    blocks, size, heads, dim = tensor.shape
    room = torch.zeros(blocks, size + gap // 8, heads + 1, dim + gap, dtype=tensor.dtype, device=tensor.device)
    if tensor.dtype.is_floating_point:
        room.copy_(torch.full((), torch.nan))
    view = room[:, :size, :heads, :dim]
    view.copy_(tensor)
    return view


def far_apart(tensor: Tensor) -> Tensor:
    """The same numbers [N, ...] in blocks so far apart that the last ones begin beyond 2^31 numbers.

    Only pages that are written are ever given by the operating system, so this takes address space and hardly memory.

    Raises:
        NoRoom: the machine does not have that much.
    """
    size = FAR * (len(tensor) - 1) + tensor[0].numel()
    try:
        room = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
    except RuntimeError as error:
        raise NoRoom(f"{size * tensor.element_size() / 2**30:.0f} GiB of address space cannot be had") from error
    return room.as_strided(tensor.shape, (FAR, *tensor[0].contiguous().stride())).copy_(tensor)
