"""From a pool that is wrong to a fault with a name: what was written, whose it is, and where it should have gone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paged.oracle.diagnose import MISHAPS
from paged.oracle.guard import Mishap, bits
from paged.oracle.report import Failure
from paged.oracle.writers.case import WriteCase
from paged.oracle.writers.cases import PLAIN
from paged.oracle.writers.inputs import WriteInputs
from paged.oracle.writers.judge import NAMES, TIES, Place, Verdict, as_if, expected_bits, places_of, vectors_like

# What is wrong, where a case that is as small as it can be still needs this feature; and the catalogue's letter.
NEEDED = {
    "strides": ("wrong for caches whose blocks do not lie one behind another", "E"),
    "inputs": ("wrong for keys and values that are slices of something larger", "E"),
    "duplicates": ("of two tokens with one slot the wrong one stays", "P"),
    "extra_rows": ("rows of key and value that have no slot are written", "P"),
    "slot_dtype": ("wrong for slots in int32", "B"),
    "uneven_scales": ("wrong with scales that are no powers of two", "O"),
}
KEPT, ZERO, FOREIGN, OTHER = "kept", "zero", "foreign", "other"


@dataclass(frozen=True)
class Outcome:
    """What came of one call.

    Attributes:
        case: it was made for.
        inputs: its tensors, as the writer left them.
        mishap: why there is nothing to compare, or None.
        verdict: on the pool; None after a mishap.
    """

    case: WriteCase
    inputs: WriteInputs
    mishap: Mishap | None
    verdict: Verdict | None

    @property
    def ok(self) -> bool:
        """Whether the writer did what it must."""
        return self.mishap is None and self.verdict is not None and self.verdict.ok

    @property
    def symptom(self) -> str:
        """What a smaller case must have in common with this one."""
        if self.mishap is not None:
            return self.mishap.kind
        return "" if self.verdict is None else self.verdict.symptom


def failure(outcome: Outcome, passes: Callable[[WriteCase], bool], original: str = "") -> Failure:
    """What is wrong in a case that is as small as it could be made.

    Args:
        outcome: of that case.
        passes: tries a neighbouring case.
        original: about the case it was made from.
    """
    case, verdict = outcome.case, outcome.verdict
    reproduce = ("reproduce", f"paged.oracle.replay_write(writer, '{case.to_json()}')")
    if outcome.mishap is not None or verdict is None:
        words = "" if outcome.mishap is None else outcome.mishap.message
        fault = MISHAPS["raises" if outcome.mishap is None else outcome.mishap.kind]
        return Failure(fault, "-", "exact", None, case.describe(), original, (("what happened", words), reproduce))
    fault, letter, declare = _name(outcome.inputs, verdict)
    details = (*_details(outcome.inputs, verdict), ("passes with", _neighbours(case, passes)), reproduce)
    return Failure(fault, letter, "exact, bit for bit", None, case.describe(), original, details, declare=declare)


def _name(inputs: WriteInputs, verdict: Verdict) -> tuple[str, str, str | None]:
    """The fault, its class, and a declaration that would allow it."""
    case, place = inputs.case, verdict.first()
    if case.strides == "far":
        return "wrong for slots beyond 2^31 numbers", "B", None
    if case.first_block > 1:
        return "wrong for large block numbers", "B", None
    if not any(mask.any() for mask in verdict.touched) and any(mask.any() for mask in verdict.wrong_scales):
        return "scales are wrong", "O", None
    explained = None if place is None or any(mask.any() for mask in verdict.touched) else as_if(inputs, verdict)
    if explained is not None:
        return explained, "O", "WriteCapabilities(ties='any')" if explained == TIES else None
    if case.skips != "none" and any(mask.any() for mask in verdict.touched):
        return "tokens whose slot is -1 are written", "P", None
    for field, (words, letter) in NEEDED.items():
        if getattr(case, field) != PLAIN[field]:
            return words, letter, None
    if place is None:
        return "memory between the slots is written", "E", None
    return (*_by_content(inputs, verdict, place), None)


def _by_content(inputs: WriteInputs, verdict: Verdict, place: Place) -> tuple[str, str]:
    """A name for what lies at the first wrong place."""
    content = _content(inputs, verdict, place)
    whose = next(vectors_like(inputs, place), None)
    if verdict.touched[place.which].any():
        if whose is not None:
            return "tokens are written where they do not belong", "P"
        return ("slots of nobody are cleared" if content == ZERO else "slots of nobody are changed"), "P"
    if content == KEPT:
        room = (inputs.key_cache, inputs.value_cache)[place.which]
        same = (bits(room.view) == room.before_view()).cpu().numpy()[place.block, place.offset]
        if not same[place.head].all():
            return "some dims are not written", "N"
        return ("tokens are not written", "P") if same.all() else ("some heads are not written", "M")
    if content == FOREIGN and whose is not None:
        which, token, _ = whose
        if which != place.which:
            return f"{NAMES[which]}s are written as {NAMES[place.which]}s", "P"
        if token != verdict.owners[place.block, place.offset]:
            return "another token's numbers are written", "P"
        return "another head's numbers are written", "M"
    return ("zeros are written" if content == ZERO else "wrong numbers are written"), "P"


def _content(inputs: WriteInputs, verdict: Verdict, place: Place) -> str:
    """What lies in the wrong elements of the vector at a place."""
    room = (inputs.key_cache, inputs.value_cache)[place.which]
    where = place.block, place.offset, place.head
    wrong = (verdict.touched[place.which] | verdict.wrong[place.which])[where]
    now, before = bits(room.view).cpu().numpy()[where], room.before_view().cpu().numpy()[where]
    if (now == before)[wrong].all():
        return KEPT
    if (now[wrong] == 0).all():
        return ZERO
    return FOREIGN if next(vectors_like(inputs, place), None) is not None else OTHER


def _details(inputs: WriteInputs, verdict: Verdict) -> tuple[tuple[str, str], ...]:
    place = verdict.first()
    if place is None:
        return (("where", _other_places(inputs, verdict)),)
    where, size = (place.block, place.offset, place.head), inputs.case.block_size
    owner = int(verdict.owners[place.block, place.offset])
    slot = f"slot {place.block * size + place.offset} = block {place.block}, offset {place.offset}"
    spot = f"{slot}, head {place.head}, dim {place.dim}"
    room = (inputs.key_cache, inputs.value_cache)[place.which]
    now = int(bits(room.view)[(*where, place.dim)])
    wanted = int(room.before_view()[(*where, place.dim)])
    if owner >= 0:
        wanted = int(expected_bits(inputs, place.which, np.array([owner]))[0, place.head, place.dim])
    width = 2 * room.view.element_size()
    named = "no token's, to be left as it is" if owner < 0 else _token(inputs, owner)
    found = [
        ("where", f"{NAMES[place.which]} cache, {spot}: {named}"),
        ("expected", f"bits {_hex(wanted, width)}   got {_hex(now, width)}{_numbers(inputs, place, owner)}"),
    ]
    whose = next(vectors_like(inputs, place), None)
    content = _content(inputs, verdict, place)
    if whose is not None:
        which, token, head = whose
        found.append(("cause", f"there lies the {NAMES[which]} of {_token(inputs, token)}, head {head}"))
    else:
        words = {KEPT: "what lay there before: it was not written", ZERO: "zeros", OTHER: "no vector of this call"}
        found.append(("cause", f"there lies {words.get(content, content)}"))
    if owner >= 0:
        places = [found for found in places_of(inputs, place.which, owner, place.head) if _is_elsewhere(found, place)]
        went = [f"block {p.block}, offset {p.offset}, head {p.head} of the {NAMES[p.which]} cache" for p in places[:2]]
        found += [("went to", "; ".join(went))] if went else []
    return (*found, ("also", _also(verdict)))


def _is_elsewhere(found: Place, place: Place) -> bool:
    def spot(p: Place) -> tuple[int, int, int, int]:
        return p.which, p.block, p.offset, p.head

    return spot(found) != spot(place)


def _other_places(inputs: WriteInputs, verdict: Verdict) -> str:
    if verdict.gaps:
        return f"{verdict.gaps} elements between the slots, which belong to somebody else"
    for which, mask in enumerate(verdict.wrong_scales):
        for block, offset, head in np.argwhere(mask)[:1]:
            owner = int(verdict.owners[block, offset])
            whose = "no token's, to be left as it is" if owner < 0 else _token(inputs, owner)
            return f"scale of the {NAMES[which]} in block {block}, offset {offset}, head {head}: {whose}"
    return ""


def _token(inputs: WriteInputs, index: int) -> str:
    if index >= len(inputs.tokens):
        return f"row {index} of key and value, which has no slot"
    token = inputs.tokens[index]
    skipped = ", slot -1" if token.slot is None else ""
    return f"token {index} (sequence {token.sequence}, position {token.position}{skipped})"


def _numbers(inputs: WriteInputs, place: Place, owner: int) -> str:
    """The number that was to be written, where the pool holds codes of it."""
    if owner < 0:
        return ""
    number = inputs.numbers[place.which][owner, place.head, place.dim]
    if not inputs.case.quantised:
        return f" (the number {number:.7g})"
    scale = 1.0 if inputs.scales is None else inputs.scales[place.which][place.head]
    return f" (the number {number:.7g}, scale {scale:.7g})" if inputs.case.scales != "token" else f" ({number:.7g})"


def _hex(number: int, width: int) -> str:
    return f"0x{number & ((1 << 4 * width) - 1):0{width}x}"


def _also(verdict: Verdict) -> str:
    touched, wrong = (sum(int(mask.sum()) for mask in masks) for masks in (verdict.touched, verdict.wrong))
    tokens = {int(t) for mask in verdict.wrong for t in verdict.owners[mask.any(axis=(2, 3))]}
    words = [f"{touched} elements of nobody's slots changed", f"{wrong} elements of {len(tokens)} tokens wrong"]
    return "; ".join([*words, *([f"{verdict.gaps} between slots"] if verdict.gaps else [])])


def _neighbours(case: WriteCase, passes: Callable[[WriteCase], bool]) -> str:
    """Which plainer cases are right."""
    plainer = [(f, v) for f, v in PLAIN.items() if getattr(case, f) != v]
    found = [f"{field} {value}" for field, value in plainer if passes(case.replace(**{field: value}))]
    return "; ".join(found) or "none of the neighbouring cases"
