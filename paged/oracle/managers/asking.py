"""Asking a manager, which may raise anything and answer anything: what it says as plain integers, or a fault."""

import operator
from collections.abc import Callable
from typing import Any

from paged.oracle.guard import raised
from paged.oracle.managers.protocol import ManagerCapabilities

RETURNS = "returns something else"


class ManagerFault(Exception):
    """What a manager did wrong: the fault's name, its class in the catalogue, and what happened."""

    def __init__(self, fault: str, letter: str, words: str) -> None:
        super().__init__(words)
        self.fault, self.letter, self.words = fault, letter, words


class Refused(Exception):
    """The manager said that too few blocks are free."""


class Asking:
    """A manager whose answers can be relied on to be integers.

    Args:
        manager: with the verbs of `paged.oracle.managers.protocol`.
        num_blocks: of its pool.
        capabilities: which exception means that too few blocks are free.

    Example:
        >>> from paged.oracle.managers.protocol import OwnBlocks
        >>> asking = Asking(OwnBlocks(8, 4), 8, ManagerCapabilities())
        >>> asking.allocate("A", [1, 2, 3, 4, 5]), asking.table("A"), asking.num_free()
        (0, [1, 2], 4)
        >>> try:
        ...     asking.table("B")
        ... except ManagerFault as fault:
        ...     print(fault.fault)
        raises an exception
    """

    def __init__(self, manager: Any, num_blocks: int, capabilities: ManagerCapabilities) -> None:
        self._manager, self._num_blocks, self._can = manager, num_blocks, capabilities

    def allocate(self, name: str, tokens: list[int]) -> int:
        """How many of the tokens were found."""
        found = _integer(self._call(lambda: self._manager.allocate(name, list(tokens))), "allocate")
        if not 0 <= found <= len(tokens):
            raise ManagerFault("finds what is not there", "Q", f"allocate found {found} of {len(tokens)} tokens")
        return found

    def append(self, name: str, tokens: list[int]) -> list[tuple[int, int]]:
        """The copies to make."""
        return self._copies(self._call(lambda: self._manager.append(name, list(tokens))), "append")

    def fork(self, name: str, twin: str) -> list[tuple[int, int]]:
        """The copies to make."""
        return self._copies(self._call(lambda: self._manager.fork(name, twin)), "fork")

    def free(self, name: str) -> None:
        """A sequence has ended."""
        self._call(lambda: self._manager.free(name))

    def refuses_to_free(self, name: str) -> bool:
        """Whether freeing a sequence that is not there raises something."""
        try:
            self._manager.free(name)
        except (Exception, SystemExit):
            return True
        return False

    def drop_before(self, name: str, position: int) -> None:
        """A window has moved on."""
        self._call(lambda: self._manager.drop_before(name, position))

    def computed(self, name: str) -> None:
        """A sequence's tokens have been written."""
        self._call(lambda: self._manager.computed(name))

    def table(self, name: str) -> list[int]:
        """A sequence's blocks."""
        return self._blocks(self._call(lambda: self._manager.table(name)), "table")

    def lookup(self, tokens: list[int]) -> list[int]:
        """Blocks that are found."""
        return self._blocks(self._call(lambda: self._manager.lookup(list(tokens))), "lookup")

    def num_free(self) -> int:
        """Blocks that are free."""
        return _integer(self._call(lambda: self._manager.num_free()), "num_free")

    def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except self._can.out_of_blocks as error:
            raise Refused(raised(error)) from None
        except (Exception, SystemExit) as error:
            raise ManagerFault("raises an exception", "-", raised(error)) from None

    def _blocks(self, given: Any, verb: str) -> list[int]:
        """Block numbers, as whatever sequence they came."""
        try:
            blocks = [operator.index(block) for block in given]
        except Exception:
            raise ManagerFault(RETURNS, "-", f"{verb} returned a {type(given).__name__}, no list of blocks") from None
        for block in blocks:
            if not 0 <= block < self._num_blocks:
                words = f"{verb} names block {block}, and the pool has {self._num_blocks}"
                raise ManagerFault("a block that does not exist is handed out", "Q", words)
        return blocks

    def _copies(self, given: Any, verb: str) -> list[tuple[int, int]]:
        try:
            pairs = [(source, target) for source, target in given]
        except Exception:
            words = f"{verb} returned a {type(given).__name__}, no pairs (source, target) of blocks"
            raise ManagerFault(RETURNS, "-", words) from None
        return [tuple(self._blocks(pair, f"a copy of {verb}")) for pair in pairs]  # type: ignore[misc]


def _integer(given: Any, verb: str) -> int:
    """An integer of any kind, NumPy's too."""
    try:
        return operator.index(given)
    except Exception:
        raise ManagerFault(RETURNS, "-", f"{verb} returned a {type(given).__name__}, no integer") from None
