"""A small picture of one row: which keys it sees, and which the kernel counted otherwise.

position    15   16   17 ...   33
counted      .    +    *        *     * right   + too many   . not seen
block        0    1    1        2
physical     4    7    7        2
"""

from collections.abc import Iterable

from paged.oracle.row import Change, Row

LEGEND = {"*": "* right", "+": "+ too many", "-": "- missing", "2": "2 twice", ".": ". not seen"}
MOST_COLUMNS = 14


def picture(row: Row, changes: Iterable[Change]) -> tuple[str, ...]:
    """The row around its edges and around what was counted wrongly, as lines.

    Args:
        row: one query token and head.
        changes: of its own sequence or of others, which have no position and get a line of their own.
    """
    marks, strangers = {}, []
    for change in changes:
        if change.position is None:
            strangers.append(f"physical block {change.block}, slot {change.offset} ({change.region})")
        elif change.times < 0:
            marks[change.position] = "-"
        else:
            marks[change.position] = "2" if row.first <= change.position <= row.last else "+"
    size, end = row.inputs.case.block_size, len(row.slots)
    edges = [row.first, row.last, *sorted(marks)[:3], *sorted(marks)[-1:]]
    shown = sorted({p + step for p in edges for step in (-1, 0, 1) if 0 <= p + step < end})[:MOST_COLUMNS]
    columns, previous = [], None
    for position in shown:
        if previous is not None and position > previous + 1:
            columns.append(("...", "", "", ""))
        seen = "*" if row.first <= position <= row.last else "."
        block = str(position // size), str(row.slots[position] // size)
        columns.append((str(position), marks.get(position, seen), *block))
        previous = position
    lines = []
    for heading, cells in zip(("position", "counted", "block", "physical"), zip(*columns, strict=True), strict=True):
        lines.append(f"{heading:<9}" + "".join(f"{cell:>6}" for cell in cells))
    if lines:
        used = {mark for _, mark, _, _ in columns}
        lines[1] += "     " + "   ".join(words for mark, words in LEGEND.items() if mark in used)
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        lines.append(f"{'others':<9}" + "; ".join(strangers[:3]) + more)
    return tuple(line.rstrip() for line in lines)
