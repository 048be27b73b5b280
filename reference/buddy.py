"""Buddy allocation: runs of slots whose lengths are powers of two, split in halves and joined again.

    64 free              [                               ]
    reserve 10 -> 16     [ a a a a . . | 16  |     32     ]       two halves were split off and stay free
    release              [                               ]       each joins its buddy again

The PagedAttention paper assumes it of Orca (section 6.1). Joining and splitting are quick, and the price is rounding: a
run of 1025 slots takes 2048.
"""

from reference.reservation import PoolFull, Reservation


class BuddyPool:
    """Gives out the lowest free run of the smallest power of two that is long enough.

    Args:
        num_slots: size of the pool. If it is no power of two, it is cut into some, the largest first.

    Attributes:
        num_free: slots that nobody holds, in all gaps together.

    Example: of 12 slots the first 8 are one run and the last 4 another.
        >>> pool = BuddyPool(num_slots=12)
        >>> pool.reserve("a", 3), pool.reserve("b", 5).first_slot
        (Reservation(request_id='a', first_slot=8, num_slots=4), 0)
        >>> pool.fits(1), pool.gaps
        (False, [])
        >>> pool.release("b")
        >>> pool.reserve("c", 2).first_slot, pool.gaps
        (0, [2, 4])
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_free = num_slots
        self._held: dict[str, Reservation] = {}
        self._free: dict[int, set[int]] = {}  # length -> where free runs of it begin
        self._roots: dict[int, int] = {}  # where the runs begin that are nobody's half -> their lengths
        start = 0
        for bit in reversed(range(num_slots.bit_length())):
            if num_slots >> bit & 1:
                self._roots[start] = 1 << bit
                self._free.setdefault(1 << bit, set()).add(start)
                start += 1 << bit

    @property
    def reservations(self) -> list[Reservation]:
        """What is held, in address order; `num_slots` is the rounded number."""
        return sorted(self._held.values(), key=lambda reservation: reservation.first_slot)

    @property
    def gaps(self) -> list[int]:
        """Lengths of the free runs, in address order. Neighbours that are no buddies are two runs."""
        starts = sorted((start, length) for length, begins in self._free.items() for start in begins)
        return [length for _, length in starts]

    def fits(self, num_slots: int) -> bool:
        """Whether some free run is long enough."""
        return any(begins and length >= num_slots for length, begins in self._free.items())

    def reserve(self, request_id: str, num_slots: int) -> Reservation:
        """Take a run of the next power of two.

        Raises:
            PoolFull: none is long enough.
            ValueError: the request holds slots already, or asks for none.
        """
        if request_id in self._held or num_slots < 1:
            raise ValueError(
                f"request {request_id!r} asks for {num_slots} slots and holds {self._held.get(request_id)}"
            )
        lengths = [length for length, begins in self._free.items() if begins and length >= num_slots]
        if not lengths:
            raise PoolFull(
                f"request {request_id!r} asks for {num_slots} slots in one piece; {self.num_free} are free in all"
            )
        length = min(lengths)
        start = min(self._free[length])
        self._free[length].remove(start)
        while length // 2 >= num_slots:
            length //= 2
            self._free.setdefault(length, set()).add(start + length)
        self.num_free -= length
        self._held[request_id] = Reservation(request_id, start, length)
        return self._held[request_id]

    def release(self, request_id: str) -> None:
        """Give back what a request holds; it joins its buddy if that is free, and both theirs.

        Raises:
            KeyError: it holds nothing.
        """
        run = self._held.pop(request_id)
        start, length = run.first_slot, run.num_slots
        self.num_free += length
        root = max(begin for begin in self._roots if begin <= start)
        while length < self._roots[root]:
            buddy = start ^ length  # a run begins at a multiple of its length, as the roots do
            if buddy not in self._free.get(length, ()):
                break
            self._free[length].remove(buddy)
            start, length = min(start, buddy), 2 * length
        self._free.setdefault(length, set()).add(start)
