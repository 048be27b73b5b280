"""From a writer's case to tensors: keys and values that can be recognised, and a pool full of bits that must stay.

Before the call the whole pool holds random bits, which are NaN with all kinds of payloads in every other case, and so
do the gaps between its slots and around slices of keys and values. Of each tensor its *room* is kept, the memory that
it is a view of, and the room's bits from before: so whatever is written where nothing should be shows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paged.oracle.guard import BITS, bits
from paged.oracle.inputs import FAR
from paged.oracle.values import CODE_KEY, HEAD_LIMIT, PLACE, Integers, random_bits
from paged.oracle.writers.case import WriteCase
from paged.oracle.writers.codes import Floats
from paged.oracle.writers.numbers import numbers_for, scales_for

# Bits that are all 1 in an infinity or NaN, and one of the mantissa, by dtype.
NAN_BITS = {"float64": 0x7FF0000000000001, "float32": 0x7F800001, "float16": 0x7C01, "bfloat16": 0x7F81}
# Columns of a fused projection that are neither keys nor values, and so nobody's to touch.
QUERY_COLUMNS = 8
MOST_BITS = (1 << 17) - 1


@dataclass(frozen=True)
class Token:
    """One row of key and value: whose it is, and the slot it goes to, or None if it is skipped."""

    sequence: int
    position: int
    slot: int | None


@dataclass(frozen=True)
class Room:
    """A tensor that is passed, the memory around it, and what that memory held before.

    Attributes:
        view: what the writer is given.
        room: the memory it is a view of; for blocks that lie far apart the view itself.
        before: the room's bits before the call, integers.
    """

    view: Tensor
    room: Tensor
    before: Tensor

    def changed(self) -> Tensor:
        """Which elements of the room have other bits than before, NaN payloads included."""
        return bits(self.room) != self.before

    def before_view(self) -> Tensor:
        """The view's bits before the call, in the view's shape."""
        if self.room is self.view:
            return self.before
        offset = self.view.storage_offset() - self.room.storage_offset()
        return self.before.as_strided(self.view.shape, self.view.stride(), offset)

    def changed_gaps(self) -> int:
        """Elements beside the view that changed."""
        changed = self.changed()
        if self.room is self.view:
            return 0
        offset = self.view.storage_offset() - self.room.storage_offset()
        changed.as_strided(self.view.shape, self.view.stride(), offset).fill_(False)
        return int(changed.sum())


@dataclass(frozen=True)
class WriteInputs:
    """The tensors of one call.

    Attributes:
        case: they were made of.
        key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale: rooms; the scales may be None.
        tokens: one for each entry of slot_mapping.
        numbers: keys [T + extra, Hkv, D] and values [T + extra, Hkv, Dv] in float64, exactly what the tensors hold.
        scales: of keys and values [Hkv] in float64, where they are read; None where they are written or not passed.
    """

    case: WriteCase
    key: Room
    value: Room
    key_cache: Room
    value_cache: Room
    slot_mapping: Room
    k_scale: Room | None
    v_scale: Room | None
    tokens: tuple[Token, ...]
    numbers: tuple[Floats, Floats]
    scales: tuple[Floats, Floats] | None

    def read_only(self) -> dict[str, Room]:
        """What the writer must leave as it is, by name."""
        found = {"key": self.key, "value": self.value, "slot_mapping": self.slot_mapping}
        if self.k_scale is not None and self.v_scale is not None and self.case.scales != "token":
            found |= {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return found


def materialise(case: WriteCase, device: str = "cpu") -> WriteInputs:
    """Make the tensors of a case.

    Example: the second token begins a new block, so its slot is in another one.
        >>> inputs = materialise(WriteCase(sequences=((1, 2),), block_size=2, order="reversed"))
        >>> inputs.slot_mapping.view.tolist(), inputs.tokens[1]
        ([5, 2], Token(sequence=0, position=2, slot=2))
    """
    tokens, num_blocks = _lay_out(case)
    rows = len(tokens) + case.extra_rows
    key, value = _projections(case, rows, device)
    numbers = numbers_for(case, rows)
    for room, wanted in ((key, numbers[0]), (value, numbers[1])):
        room.view.copy_(torch.from_numpy(wanted).to(room.view.dtype))
    key_cache, value_cache = _pool(case, num_blocks, device)
    slots = torch.tensor([-1 if t.slot is None else t.slot for t in tokens], dtype=getattr(torch, case.slot_dtype))
    k_scale, v_scale, read = _scales(case, num_blocks, device)
    exact = [room.view.double().cpu().numpy() for room in (key, value)]
    return WriteInputs(
        case=case,
        key=_kept(key.view, key.room),
        value=_kept(value.view, value.room),
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=_kept(slots.to(device)),
        k_scale=k_scale,
        v_scale=v_scale,
        tokens=tokens,
        numbers=(exact[0], exact[1]),
        scales=read,
    )


def _kept(view: Tensor, room: Tensor | None = None) -> Room:
    room = view if room is None else room
    return Room(view, room, bits(room).clone())


def _lay_out(case: WriteCase) -> tuple[tuple[Token, ...], int]:
    """Whose tokens go to which slots, and the number of blocks; block 0 and one above stay free."""
    size = case.block_size
    places = [(s, p) for s, (start, count) in enumerate(case.sequences) for p in range(start, start + count)]
    contents = list(dict.fromkeys((sequence, position // size) for sequence, position in places))
    spots = [case.first_block + i for i in range(len(contents) + (2 if case.order == "shuffled" else 0))]
    if case.order == "reversed":
        spots = spots[::-1]
    elif case.order == "shuffled":
        spots = [spots[i] for i in _permutation(case, len(spots))[: len(contents)]]
    num_blocks = max(spots, default=case.first_block) + 2
    if case.last_block and contents:
        spots[-1] = num_blocks - 1
    if case.strides == "far":  # only three blocks lie between both ends of what 32 bits can count
        spots, num_blocks = [2, 1][: len(contents)], 3
    block_of = dict(zip(contents, spots, strict=True))
    slots: list[int | None] = [block_of[s, p // size] * size + p % size for s, p in places]
    if case.shuffled_tokens:
        order = _permutation(case, len(places))
        places, slots = [places[i] for i in order], [slots[i] for i in order]
    if case.duplicates:
        slots = [slots[i - i % 2] for i in range(len(slots))]
    count = len(slots)
    for i in range(count):
        end, between = i >= count - max(1, count // 3), i % 3 == 1 or count == 1
        if case.skips == "all" or (case.skips == "end" and end) or (case.skips == "between" and between):
            slots[i] = None
    return tuple(Token(s, p, slot) for (s, p), slot in zip(places, slots, strict=True)), num_blocks


def _permutation(case: WriteCase, count: int) -> list[int]:
    order = np.argsort(random_bits(case.seed, PLACE, np.arange(count), 1, 1)[:, 0, 0], kind="stable")
    return [int(i) for i in order]


def _scales(
    case: WriteCase, num_blocks: int, device: str
) -> tuple[Room | None, Room | None, tuple[Floats, Floats] | None]:
    """Tensors of the scales, and the numbers of those that are read."""
    if case.scales is None:
        return None, None, None
    if case.scales == "token":
        shape = (num_blocks, case.block_size, case.num_kv_heads)
        rooms = [_kept(_filled(case, 4 + i, shape, "float32").to(device)) for i in range(2)]
        return rooms[0], rooms[1], None
    read = scales_for(case)
    tensors = [torch.from_numpy(numbers).float().to(device) for numbers in read]
    if case.scales == "tensor":
        tensors = [tensor[0].clone() for tensor in tensors]
    return _kept(tensors[0]), _kept(tensors[1]), read


def _filled(case: WriteCase, which: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Random bits; for odd seeds NaN with random signs and payloads, where the dtype has them."""
    torch_dtype = getattr(torch, dtype)
    count = int(np.prod(shape))
    # In a pool of very many blocks the bits come again and again: drawing so many would take seconds.
    drawn = random_bits(case.seed, CODE_KEY + which * HEAD_LIMIT, np.arange(min(count, MOST_BITS)), 1, 1)
    drawn = np.resize(drawn, shape)
    if case.seed % 2 and dtype in NAN_BITS:
        drawn = drawn | np.uint64(NAN_BITS[dtype])
    whole: Integers = drawn.view(np.int64)
    # Only the low bits count: a narrowing cast of integers keeps them.
    return torch.from_numpy(whole).to(BITS[torch_dtype.itemsize]).view(torch_dtype)


def _projections(case: WriteCase, rows: int, device: str) -> tuple[Room, Room]:
    """Room for keys and values, not filled with them yet."""
    heads, widths = case.num_kv_heads, (case.head_dim, case.value_dim)
    if case.inputs == "fused":
        ends = np.cumsum([QUERY_COLUMNS, heads * widths[0], heads * widths[1]])
        room = _filled(case, 0, (rows, int(ends[-1]) + 3), case.dtype).to(device)
        # A view: rows are far apart, heads lie one behind another.
        key, value = (room[:, int(ends[i]) : int(ends[i + 1])].view(rows, heads, widths[i]) for i in range(2))
        return Room(key, room, room), Room(value, room, room)
    views = []
    for which, width in enumerate(widths):
        if case.inputs == "heads_first":
            views.append(_filled(case, which, (heads, rows, width), case.dtype).to(device).transpose(0, 1))
        else:
            views.append(_filled(case, which, (rows, heads, width), case.dtype).to(device))
    return Room(views[0], views[0], views[0]), Room(views[1], views[1], views[1])


def _pool(case: WriteCase, num_blocks: int, device: str) -> tuple[Room, Room]:
    """Key and value cache [N, P, Hkv, D] with the strides the case wants, full of bits."""
    size, heads = case.block_size, case.num_kv_heads
    if case.strides == "interleaved":
        room = _filled(case, 2, (num_blocks, 2, size, heads, case.head_dim), case.kv_dtype).to(device)
        return _kept(room[:, 0], room), _kept(room[:, 1], room)
    rooms = []
    for which, width in enumerate((case.head_dim, case.value_dim)):
        dense = (num_blocks, size, heads, width)
        if case.strides == "padded":
            room = _filled(case, 2 + which, (num_blocks, size + 1, heads + 1, width + 8), case.kv_dtype).to(device)
            rooms.append(_kept(room[:, :size, :heads, :width], room))
        elif case.strides == "heads_first":
            room = _filled(case, 2 + which, (num_blocks, heads, size, width), case.kv_dtype).to(device)
            rooms.append(_kept(room.transpose(1, 2), room))
        elif case.strides == "far":
            filled = _filled(case, 2 + which, dense, case.kv_dtype).to(device)
            room = torch.empty(FAR * (num_blocks - 1) + filled[0].numel(), dtype=filled.dtype, device=device)
            view = room.as_strided(dense, (FAR, *filled[0].stride()))
            view.copy_(filled)
            rooms.append(_kept(view))
        else:
            rooms.append(_kept(_filled(case, 2 + which, dense, case.kv_dtype).to(device)))
    return rooms[0], rooms[1]
