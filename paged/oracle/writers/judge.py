"""Comparing the whole pool with what it must hold, and finding out what lies where it should not.

A slot that a token names must hold the token's key and value: bit for bit, or for codes the nearest one. Every other
slot must keep its bits. What went wrong is read from the pool: the numbers of a case are different for every token, so
a vector in a wrong place says whose it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from paged.oracle.guard import bits
from paged.oracle.values import Integers
from paged.oracle.writers.case import WriteCapabilities
from paged.oracle.writers.codes import LARGEST, QUOTIENT_ERROR, Codes, Floats, decoded, is_nearest, nearest, numbers_of
from paged.oracle.writers.inputs import Room, WriteInputs

Mask = npt.NDArray[np.bool_]
NAMES = ("key", "value")
TIES = "numbers midway between two codes do not go to the even one"


@dataclass(frozen=True)
class Place:
    """An element of the pool: of keys (0) or values (1), and where."""

    which: int
    block: int
    offset: int
    head: int
    dim: int


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a pool.

    Attributes:
        touched: [N, P, Hkv, D] for keys and values, elements of nobody's slots that changed.
        wrong: [N, P, Hkv, D] for both, elements of some token's slot that are not that token's.
        wrong_scales: [N, P, Hkv] for both, scales that were written and are not right, or should not have been.
        owners: [N, P] the token whose slot it is, -1 for nobody's.
        gaps: elements beside the slots that changed.
    """

    touched: tuple[Mask, Mask]
    wrong: tuple[Mask, Mask]
    wrong_scales: tuple[Mask, Mask]
    owners: Integers
    gaps: int

    @property
    def ok(self) -> bool:
        """Whether the pool is right in every bit."""
        masks = (*self.touched, *self.wrong, *self.wrong_scales)
        return not self.gaps and not any(mask.any() for mask in masks)

    @property
    def symptom(self) -> str:
        """What a smaller case must have in common with this one."""
        if any(mask.any() for mask in self.touched) or self.gaps:
            return "touched"
        return "wrong" if any(mask.any() for mask in self.wrong) else "scales" if not self.ok else "ok"

    def first(self) -> Place | None:
        """The first wrong element: of slots that are nobody's if there are any."""
        for masks in (self.touched, self.wrong):
            for which, mask in enumerate(masks):
                if mask.any():
                    return Place(which, *(int(i) for i in np.argwhere(mask)[0]))
        return None


def judge(inputs: WriteInputs, capabilities: WriteCapabilities) -> Verdict:
    """Compare the pool after the call with what it must hold."""
    owners = _owners(inputs, capabilities)
    rooms = (inputs.key_cache, inputs.value_cache)
    touched, wrong = [], []
    for which, room in enumerate(rooms):
        after, before = bits(room.view).cpu().numpy(), room.before_view().cpu().numpy()
        touched.append((after != before) & (owners < 0)[..., None, None])
        mask = np.zeros(after.shape, dtype=bool)
        here = owners >= 0
        mask[here] = ~_right(inputs, capabilities, which, owners[here], after[here])
        wrong.append(mask)
    scales = [np.zeros(owners.shape, dtype=bool)[..., None]] * 2
    if inputs.case.scales == "token" and inputs.k_scale is not None and inputs.v_scale is not None:
        scales = [_wrong_scales(inputs, w, room, owners) for w, room in enumerate((inputs.k_scale, inputs.v_scale))]
    gaps = 0 if inputs.case.strides == "interleaved" else sum(room.changed_gaps() for room in rooms)
    return Verdict((touched[0], touched[1]), (wrong[0], wrong[1]), (scales[0], scales[1]), owners, gaps)


def quotients(inputs: WriteInputs, which: int, tokens: Integers) -> Floats:
    """Number / scale [S, Hkv, D] of some tokens, as a kernel with no rounding errors would round them to codes."""
    numbers = inputs.numbers[which][tokens]
    if inputs.scales is not None:
        return np.asarray(numbers / inputs.scales[which][:, None])
    if inputs.case.scales == "token":
        scale = vector_scales(numbers)[..., None]
        return np.divide(numbers, scale, out=np.zeros_like(numbers), where=scale > 0)
    return np.asarray(numbers)


def vector_scales(numbers: Floats) -> Floats:
    """The scale of each vector: its largest number over 127."""
    return np.asarray(np.abs(numbers).max(axis=-1) / 127.0)


def expected_bits(inputs: WriteInputs, which: int, tokens: Integers) -> Integers:
    """What each of the tokens [S] stores, as integers [S, Hkv, D]; for codes the nearest one."""
    if inputs.case.quantised:
        _, codes = numbers_of(inputs.case.kv_dtype)
        stored = codes[nearest(inputs.case.kv_dtype, quotients(inputs, which, tokens)).low]
        return np.asarray(stored.astype(np.int64))
    numbers = torch.from_numpy(inputs.numbers[which][tokens]).to(getattr(torch, inputs.case.dtype))
    return np.asarray(bits(numbers.to(getattr(torch, inputs.case.kv_dtype))).numpy().astype(np.int64))


def vectors_like(inputs: WriteInputs, place: Place) -> Iterator[tuple[int, int, int]]:
    """Whose vectors are like what lies at a place now: (key or value, token, head)."""
    room = (inputs.key_cache, inputs.value_cache)[place.which]
    found = bits(room.view).cpu().numpy()[place.block, place.offset, place.head].astype(np.int64)
    rows = np.arange(len(inputs.numbers[0]))
    for which in (place.which, 1 - place.which):
        all_bits = expected_bits(inputs, which, rows)
        if all_bits.shape[-1] == len(found):
            yield from ((which, int(t), int(h)) for t, h in np.argwhere((all_bits == found).all(axis=-1)))


def places_of(inputs: WriteInputs, which: int, token: int, head: int) -> Iterator[Place]:
    """Where in the pool a token's vector lies, although the place did not hold it before."""
    wanted = expected_bits(inputs, which, np.array([token]))[0, head]
    for other, room in enumerate((inputs.key_cache, inputs.value_cache)):
        after = bits(room.view).cpu().numpy().astype(np.int64)
        if after.shape[-1] != len(wanted):
            continue
        changed = bits(room.view).cpu().numpy() != room.before_view().cpu().numpy()
        alike = (after == wanted).all(axis=-1) & changed.any(axis=-1)
        yield from (Place(other, int(b), int(o), int(h), 0) for b, o, h in np.argwhere(alike))


def as_if(inputs: WriteInputs, verdict: Verdict) -> str | None:
    """Which mistake with scales or rounding explains every code, in words."""
    here = verdict.owners >= 0
    if not inputs.case.quantised or not here.any():
        return None
    tokens, dtype = verdict.owners[here], inputs.case.kv_dtype
    ratios = [quotients(inputs, which, tokens) for which in (0, 1)]
    rooms = (inputs.key_cache, inputs.value_cache)
    stored = [bits(room.view).cpu().numpy()[here].view(np.uint8) for room in rooms]
    for words, changed in _mistakes(inputs):
        alike = [np.array_equal(changed[which][tokens], ratios[which]) for which in (0, 1)]
        explains = (is_nearest(dtype, stored[w], changed[w][tokens], QUOTIENT_ERROR, "any").all() for w in (0, 1))
        if not all(alike) and all(explains):
            return words
    if all(_is_cut_off(dtype, stored[which], ratios[which]) for which in (0, 1)):
        return "numbers are cut off instead of rounded"
    if all(is_nearest(dtype, stored[which], ratios[which], 0.0, "any").all() for which in (0, 1)):
        return TIES
    if all((np.abs(ratios[w]) > LARGEST[dtype])[verdict.wrong[w][here]].all() for w in (0, 1)):
        return "numbers beyond the range are not clamped to it"
    return None


def _owners(inputs: WriteInputs, capabilities: WriteCapabilities) -> Integers:
    """[N, P] whose slot it is: the last token's, or with "any" the one's that fits best."""
    view = inputs.key_cache.view
    owners = np.full(int(view.shape[0] * view.shape[1]), -1)
    errors: dict[int, int] = {}
    for index, token in enumerate(inputs.tokens):
        if token.slot is None:
            continue
        if capabilities.duplicate_slots == "any" and inputs.case.duplicates:
            error = _errors(inputs, capabilities, index, token.slot)
            if error >= errors.setdefault(token.slot, 1 << 62):
                continue
            errors[token.slot] = error
        owners[token.slot] = index
    return owners.reshape(view.shape[0], view.shape[1])


def _errors(inputs: WriteInputs, capabilities: WriteCapabilities, token: int, slot: int) -> int:
    """How many elements of a slot are not this token's."""
    block, offset = divmod(slot, inputs.case.block_size)
    count = 0
    for which, room in enumerate((inputs.key_cache, inputs.value_cache)):
        stored = bits(room.view[block : block + 1, offset]).cpu().numpy()
        count += int((~_right(inputs, capabilities, which, np.array([token]), stored)).sum())
    return count


def _right(
    inputs: WriteInputs, capabilities: WriteCapabilities, which: int, tokens: Integers, stored: Integers
) -> Mask:
    """Which elements [S, Hkv, D] of what is stored are what the tokens [S] say."""
    case = inputs.case
    if not case.quantised:
        right = stored == expected_bits(inputs, which, tokens)
        # Which NaN a copy makes of a NaN is its own affair.
        numbers = torch.from_numpy(stored).view(getattr(torch, case.kv_dtype))
        return np.asarray(right | (np.isnan(inputs.numbers[which][tokens]) & numbers.isnan().numpy()))
    error = QUOTIENT_ERROR if capabilities.quotient_error is None else capabilities.quotient_error
    exact = not case.uneven_scales and not (case.scales == "token" and case.recipe == "between")
    ratio = quotients(inputs, which, tokens)
    return is_nearest(case.kv_dtype, stored.view(np.uint8), ratio, 0.0 if exact else error, capabilities.ties)


def _wrong_scales(inputs: WriteInputs, which: int, room: Room, owners: Integers) -> Mask:
    """[N, P, Hkv] scales that were written: a power of two exactly, others but for the rounding of a division."""
    here = owners >= 0
    wrong = np.asarray(room.changed().cpu().numpy()).copy()
    expected = vector_scales(inputs.numbers[which][owners[here]])
    stored = room.view.cpu().double().numpy()[here]
    allowed = 0.0 if inputs.case.recipe != "between" else 2.0**-22
    right = np.abs(stored - expected) <= allowed * expected
    right |= (expected == 0) & np.isfinite(stored)  # a vector of zeros is 0 with any scale
    wrong[here] = ~right
    return wrong


def _mistakes(inputs: WriteInputs) -> Iterator[tuple[str, tuple[Floats, Floats]]]:
    """Mistakes that have been made with scales: in words, and what would be rounded then, of keys and values."""
    numbers, scales = inputs.numbers, inputs.scales
    rows = np.arange(len(numbers[0]))
    right = quotients(inputs, 0, rows), quotients(inputs, 1, rows)
    if scales is not None:
        keys, values = (scale[:, None] for scale in scales)
        yield "values are divided by the scale of keys", (right[0], numbers[1] / keys)
        yield "keys are divided by the scale of values", (numbers[0] / values, right[1])
        yield "scales of keys and values are exchanged", (numbers[0] / values, numbers[1] / keys)
        yield "scales below 1 are taken as 1", (numbers[0] / np.maximum(keys, 1), numbers[1] / np.maximum(values, 1))
        yield "scales are ignored", numbers
        yield "numbers are multiplied by the scale instead of divided", (numbers[0] * keys, numbers[1] * values)
        yield "numbers are divided by the scale twice", (right[0] / keys, right[1] / values)
        yield "all heads have the scale of the first one", (numbers[0] / keys[:1], numbers[1] / values[:1])
        yield "heads have one another's scales", (numbers[0] / keys[::-1], numbers[1] / values[::-1])
    yield "codes stand for half of what they should (e4m3fnuz)", (right[0] * 2, right[1] * 2)
    yield "codes stand for twice what they should (e4m3fnuz)", (right[0] / 2, right[1] / 2)


def _is_cut_off(dtype: str, stored: Codes, ratio: Floats) -> bool:
    """Whether every code is the next one towards 0."""
    numbers, _ = numbers_of(dtype)
    last = len(numbers) - 1
    down = np.clip(np.searchsorted(numbers, ratio, side="right") - 1, 0, last)
    up = np.clip(np.searchsorted(numbers, ratio), 0, last)
    return bool((decoded(dtype, stored) == numbers[np.where(ratio < 0, up, down)]).all())
