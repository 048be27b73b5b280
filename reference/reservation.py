"""Who holds which slots of a contiguous pool, in address order.

A contiguous cache has to know how many slots a request gets before it knows how many it needs. The max reservation
takes the longest that could be: max_model_len. Other policies (a power of two, the length known by an oracle) are this
class with other sizes.
"""

import bisect
from dataclasses import dataclass
from operator import attrgetter


class PoolFull(RuntimeError):
    """No gap in the pool is long enough."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A run of slots held by one request."""

    request_id: str
    first_slot: int
    num_slots: int

    @property
    def end(self) -> int:
        """One past the last slot."""
        return self.first_slot + self.num_slots


class ContiguousPool:
    """First fit in address order.

    Args:
        num_slots: size of the pool.

    Attributes:
        num_free: slots that nobody holds, in all gaps together.

    Example: between two reservations a gap of 4 stays, too small for 5 and right for 3.
        >>> pool = ContiguousPool(num_slots=12)
        >>> a, b, c = pool.reserve("a", 4), pool.reserve("b", 4), pool.reserve("c", 4)
        >>> pool.release("b")
        >>> pool.fits(5), pool.reserve("d", 3).first_slot
        (False, 4)
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_free = num_slots
        self._held: dict[str, Reservation] = {}
        self._ordered: list[Reservation] = []

    @property
    def reservations(self) -> list[Reservation]:
        """What is held, in address order."""
        return list(self._ordered)

    @property
    def gaps(self) -> list[int]:
        """Lengths of the free runs, in address order."""
        lengths, start = [], 0
        for reservation in self._ordered:
            lengths.append(reservation.first_slot - start)
            start = reservation.end
        return [length for length in (*lengths, self.num_slots - start) if length]

    def fits(self, num_slots: int) -> bool:
        """Whether some gap is long enough."""
        return self._first_gap(num_slots) is not None

    def reserve(self, request_id: str, num_slots: int) -> Reservation:
        """Take the first gap that is long enough.

        Raises:
            PoolFull: there is none.
            ValueError: the request holds slots already, or asks for none.
        """
        if request_id in self._held or num_slots < 1:
            raise ValueError(
                f"request {request_id!r} asks for {num_slots} slots and holds {self._held.get(request_id)}"
            )
        first_slot = self._first_gap(num_slots)
        if first_slot is None:
            raise PoolFull(
                f"request {request_id!r} asks for {num_slots} slots in one piece; {self.num_free} are free in all"
            )
        reservation = self._held[request_id] = Reservation(request_id, first_slot, num_slots)
        bisect.insort(self._ordered, reservation, key=_address)
        self.num_free -= num_slots
        return reservation

    def release(self, request_id: str) -> None:
        """Give back what a request holds.

        Raises:
            KeyError: it holds nothing.
        """
        reservation = self._held.pop(request_id)
        del self._ordered[bisect.bisect_left(self._ordered, reservation.first_slot, key=_address)]
        self.num_free += reservation.num_slots

    def _first_gap(self, num_slots: int) -> int | None:
        start = 0
        for reservation in self._ordered:
            if reservation.first_slot - start >= num_slots:
                return start
            start = reservation.end
        return start if self.num_slots - start >= num_slots else None


_address = attrgetter("first_slot")
