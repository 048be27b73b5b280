"""The naive model beside a manager: what every table must lead to, and how many blocks must be free.

The judge plays the model that a manager works for. After an operation it copies the blocks that it was told to copy and
writes the new tokens through the sequence's table into a tagged memory, where a slot holds the beginning that it stands
for (reference/tagged_memory.py). Then every sequence reads all its tokens back, and blocks are counted. So reference
counts, copy-on-write and eviction are judged by what they do, and never by how a manager keeps them.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paged.blocks import blocks_for
from paged.oracle.guard import raised
from paged.oracle.manager_protocol import ManagerCapabilities
from paged.oracle.operations import ManagerCase, Operation
from reference.tagged_memory import TaggedMemory, WrongRead, WrongWrite

# A token that no sequence has: a prompt that ends with it is never found whole.
NOBODYS_TOKEN = -1
MOST_HISTORY = 8


class ManagerFault(Exception):
    """What a manager did wrong: the fault's name, its class in the catalogue, and what happened."""

    def __init__(self, fault: str, letter: str, words: str) -> None:
        super().__init__(words)
        self.fault, self.letter, self.words = fault, letter, words


class Refused(Exception):
    """The manager said that too few blocks are free."""


@dataclass
class Known:
    """A sequence as the judge knows it: its tokens, the first one still read, and its table."""

    tokens: list[int]
    first_visible: int = 0
    table: list[int] = field(default_factory=list)


class Bookkeeping:
    """Runs a list of operations on a manager, and checks everything after each.

    Args:
        manager: with the verbs of `paged.oracle.manager_protocol`.
        case: its pool and the operations.
        capabilities: what is declared.

    Attributes:
        words: the operations so far, in words; the last one may still be running.
        done: kinds of operations that were carried out, and "refused".

    Example:
        >>> from paged.oracle.manager_protocol import OwnBlocks
        >>> case = ManagerCase(8, 4, (Operation("allocate", num_tokens=6), Operation("fork"), Operation("append", 1)))
        >>> run = Bookkeeping(OwnBlocks(8, 4), case, OwnBlocks.CAPABILITIES)
        >>> run.run()
        >>> run.words[:3]
        ['A = allocate(6 new tokens)', 'B = fork(A)', 'append(B, 1 token)']
    """

    def __init__(self, manager: Any, case: ManagerCase, capabilities: ManagerCapabilities) -> None:
        self.words: list[str] = []
        self.done: set[str] = set()
        self._manager, self._case, self._can = manager, case, capabilities
        self._usable = capabilities.usable(case.num_blocks)
        self._memory = TaggedMemory(case.num_blocks, case.block_size)
        self._live: dict[str, Known] = {}
        self._ended: list[str] = []
        self._history: list[tuple[str, list[int]]] = []
        self._next_token, self._next_name = 1, 0
        # When each findable block that no table names was let go, by operation.
        self._let_go: dict[int, int] = {}

    def run(self) -> None:
        """Carry out all operations, then free everything and use every block once more.

        Raises:
            ManagerFault: the first thing that is wrong.
        """
        try:
            self._check("")
            for operation in self._case.operations:
                self._apply(operation)
            for name in list(self._live):
                self._free(name)
            self._allocate(self._new_tokens(len(self._usable) * self._case.block_size), "as many new tokens as fit")
            self._allocate(self._new_tokens(1), "1 new token")
            for name in list(self._live):
                self._free(name)
        except Refused as error:  # of a call that takes no block
            raise ManagerFault("raises an exception", "-", str(error)) from None

    def _apply(self, operation: Operation) -> None:
        kind, which, count, _ = operation
        if kind == "allocate":
            self.done.add(kind)
            self._allocate(*self._tokens(operation))
        elif kind == "free again":
            if self._ended:
                self._free_again(self._ended[which % len(self._ended)])
        elif self._live:
            name = list(self._live)[which % len(self._live)]
            self.done.add(kind)
            if kind == "append":
                self._append(name, count)
            elif kind == "fork":
                self._fork(name)
            elif kind == "free":
                self._free(name)
            else:
                self._drop(name, count)

    def _tokens(self, operation: Operation) -> tuple[list[int], str]:
        """An allocation's tokens, and what they are."""
        _, which, count, tokens = operation
        if tokens == "same":
            return [0] * count, f"{count} equal tokens"
        if tokens == "new" or not self._history:
            return self._new_tokens(count), f"{count} new token{'s' * (count != 1)}"
        name, known = self._history[which % len(self._history)]
        if tokens == "changed":
            changed = [*self._new_tokens(1), *known[1:count]]
            return changed, f"{len(changed)} tokens: those of {name} with the first one changed"
        kept = known[:count] if tokens == "again" else known[: (count + 1) // 2]
        new = self._new_tokens(max(count - len(kept), 0))
        return kept + new, f"{len(kept) + len(new)} tokens: the first {len(kept)} of {name}, {len(new)} new"

    def _new_tokens(self, count: int) -> list[int]:
        self._next_token += count
        return list(range(self._next_token - count, self._next_token))

    def _allocate(self, tokens: list[int], words: str) -> None:
        name = self._new_name(f" = allocate({words})")
        free = self._num_free()
        try:
            found = self._call(lambda: self._manager.allocate(name, list(tokens)))
        except Refused as error:
            self._was_refused(error, free, blocks_for(len(tokens), self._case.block_size))
            return
        found = self._number(found, "allocate")
        if not 0 <= found <= len(tokens):
            raise ManagerFault("finds what is not there", "Q", f"allocate found {found} of {len(tokens)} tokens")
        known = self._live[name] = Known(list(tokens))
        known.table = self._table(name)
        self._fresh(name, known.table[blocks_for(found, self._case.block_size) :])
        self._reads(f"{name} (found by prefix)", known.table, tokens[:found], 0, "finds what is not there")
        self._write(name, found, hits=set(known.table[: blocks_for(found, self._case.block_size)]))

    def _append(self, name: str, count: int) -> None:
        self.words.append(f"append({name}, {count} token{'s' * (count != 1)})")
        known, free, size = self._live[name], self._num_free(), self._case.block_size
        start, tokens = len(known.tokens), self._new_tokens(count)
        growth = max(0, blocks_for(start + count, size) - len(known.table))
        others = {block for other, seen in self._live.items() if other != name for block in seen.table}
        growth += bool(start % size) and known.table[start // size] in others
        try:
            copies = self._call(lambda: self._manager.append(name, list(tokens)))
        except Refused as error:
            self._was_refused(error, free, growth + self._can.lookahead)
            return
        self._moved(name, copies)
        known.tokens += tokens
        self._write(name, start)

    def _fork(self, name: str) -> None:
        twin = self._new_name(f" = fork({name})")
        known, free = self._live[name], self._num_free()
        try:
            copies = self._call(lambda: self._manager.fork(name, twin))
        except Refused as error:
            self._was_refused(error, free, len(known.table))
            return
        self._live[twin] = Known(known.tokens.copy(), known.first_visible, known.table.copy())
        self._moved(twin, copies)
        self._check(twin)

    def _free(self, name: str) -> None:
        self.words.append(f"free({name})")
        known = self._live.pop(name)
        self._ended.append(name)
        free = self._num_free()
        self._call(lambda: self._manager.free(name))
        others = {block for other in self._live.values() for block in other.table}
        own = {block for block in known.table if block in self._usable} - others
        gained = self._num_free() - free
        if gained > len(own):
            still = ", ".join(
                f"block {block} is free and still in {other}'s table"
                for other, seen in self._live.items()
                for block in seen.table
                if block in known.table and block in self._usable
            )
            words = f"{gained} blocks came back, and {len(own)} were {name}'s alone"
            raise ManagerFault("blocks in use are free", "Q", f"{words}: {still}" if still else words)
        self._check(name)

    def _free_again(self, name: str) -> None:
        self.words.append(f"free({name}) again")
        before, refused = self._num_free(), False
        try:
            self._manager.free(name)
        except (Exception, SystemExit):
            refused = True
        if self._num_free() != before:
            words = f"{name} had been freed, and {self._num_free() - before} more blocks are free now"
            raise ManagerFault("freeing twice frees blocks twice", "Q", words)
        if not refused and self._can.double_free == "refused":
            raise ManagerFault(
                "freeing twice is not refused", "Q", f"{name} had been freed, and no exception was raised"
            )
        self.done.add("free again")
        self._check("")

    def _drop(self, name: str, count: int) -> None:
        known = self._live[name]
        position = min(known.first_visible + count, len(known.tokens))
        self.words.append(f"drop_before({name}, position {position})")
        self._call(lambda: self._manager.drop_before(name, position))
        known.first_visible = position
        self._check(name)

    def _write(self, name: str, start: int, hits: Iterable[int] = ()) -> None:
        """Write a sequence's tokens from `start` on, as the model would, and say so."""
        known = self._live[name]
        self._long_enough(name, known)
        try:
            self._memory.write(name, known.table, known.tokens, start, len(known.tokens), known.first_visible)
        except (WrongRead, WrongWrite) as error:
            raise ManagerFault("a sequence does not read what it wrote", "Q", str(error)) from None
        if self._can.prefix_caching:
            self._call(lambda: self._manager.computed(name))
        if (name, known.tokens) not in self._history:
            self._history = [*self._history, (name, known.tokens.copy())][-MOST_HISTORY:]
        self._check(name, hits)

    def _moved(self, name: str, copies: Any) -> None:
        """Take over a sequence's table, and copy the blocks that the manager wants copied."""
        known = self._live[name]
        before, known.table = known.table, self._table(name)
        try:
            pairs = [(int(source), int(target)) for source, target in copies]
        except Exception:
            words = f"{self.words[-1]} returned a {type(copies).__name__}, no pairs (source, target) of blocks"
            raise ManagerFault("returns something else", "-", words) from None
        for source, target in pairs:
            if not {source, target} <= self._usable:
                raise ManagerFault("a reserved block is handed out", "Q", f"block {source} is copied to block {target}")
        self._fresh(name, [block for block in known.table if block not in before])
        for source, target in pairs:
            self._memory.copy_block(source, target)

    def _fresh(self, name: str, blocks: Sequence[int]) -> None:
        """Blocks that a sequence was just given: nobody else may have them, and what they hold is undefined."""
        for block in blocks:
            for other, known in self._live.items():
                if other != name and block in known.table and block in self._usable:
                    words = f"block {block} was given to {name} and is in {other}'s table"
                    raise ManagerFault("a block in use is handed out", "Q", words)
            if block in self._usable:
                self._memory.forget(block)

    def _was_refused(self, error: Refused, free: int, needed: int) -> None:
        """A refusal is right if too few blocks are free, and if nothing changed."""
        self.words[-1] += ": refused"
        self.done.add("refused")
        if needed <= free:
            words = f"at most {needed} blocks are needed and {free} are free: {error}"
            raise ManagerFault("refuses although enough blocks are free", "Q", words)
        if self._num_free() != free:
            words = f"{free} blocks were free before the call that was refused, {self._num_free()} are after it"
            raise ManagerFault("a refusal changes something", "Q", words)
        self._check("")

    def _check(self, name: str, hits: Iterable[int] = ()) -> None:
        """Everything that must hold after an operation on one sequence."""
        used: dict[int, str] = {}
        for other, known in self._live.items():
            table = self._table(other)
            if other != name and table != known.table:
                words = f"{other}'s table was {known.table} and is {table}"
                raise ManagerFault("another sequence's table changes", "Q", words)
            known.table = table
            self._long_enough(other, known)
            own = [block for block in table if block in self._usable]
            if len(set(own)) < len(own):
                raise ManagerFault("a block is twice in one table", "Q", f"{other}'s table is {table}")
            used |= dict.fromkeys(own, other)
        for other, known in self._live.items():
            self._reads(other, known.table, known.tokens, known.first_visible, "a sequence does not read what it wrote")
        self._counts(used)
        if self._can.prefix_caching:
            self._findable(used, set(hits))

    def _counts(self, used: dict[int, str]) -> None:
        """Conservation: free and used are all."""
        free, expected = self._num_free(), len(self._usable) - len(used)
        counts = f"{free} of {len(self._usable)} blocks are free by the manager's count and {len(used)} are in tables"
        if free < expected:
            raise ManagerFault("blocks are lost", "Q", counts)
        if free > expected:
            raise ManagerFault("blocks in use are free", "Q", counts)

    def _findable(self, used: dict[int, str], hits: set[int]) -> None:
        """What can be found is right, looking changes nothing, and the least recently used block is given up first."""
        found: set[int] = set()
        free = self._num_free()
        for name, tokens in self._history:
            blocks = self._lookup(tokens)
            covered = tokens[: len(blocks) * self._case.block_size]
            self._reads(f"lookup({name}'s tokens)", blocks, covered, 0, "finds what is not there")
            found |= set(blocks)
        if self._num_free() != free:
            raise ManagerFault(
                "looking something up changes something", "Q", f"{self._num_free() - free:+d} free blocks"
            )
        given_up = {block for block in self._let_go if block in used and block not in hits}
        for block in given_up if self._can.eviction == "lru" else ():
            for other, moment in self._let_go.items():
                if moment < self._let_go[block] and other in found and other not in used:
                    words = f"block {block} was given up, although block {other} was let go before it"
                    raise ManagerFault("a block used more recently is given up", "Q", words)
        now = len(self.words)
        self._let_go = {block: self._let_go.get(block, now) for block in sorted(found - set(used))}

    def _lookup(self, tokens: list[int]) -> list[int]:
        looked = self._call(lambda: self._manager.lookup([*tokens, NOBODYS_TOKEN]))
        blocks = self._blocks(looked, "lookup")
        if len(blocks) * self._case.block_size > len(tokens):
            words = f"lookup of {len(tokens)} tokens and one more found {len(blocks)} blocks of {self._case.block_size}"
            raise ManagerFault("finds what is not there", "Q", words)
        return blocks

    def _reads(self, who: str, table: Sequence[int], tokens: Sequence[int], first_visible: int, fault: str) -> None:
        try:
            self._memory.read(who, table, tokens, first_visible)
        except WrongRead as error:
            raise ManagerFault(fault, "Q", str(error)) from None

    def _long_enough(self, name: str, known: Known) -> None:
        """A table has as many blocks as its tokens need, and none that must not be written or read."""
        needed = blocks_for(len(known.tokens), self._case.block_size)
        table = f"{name} has {len(known.tokens)} tokens and its table is {known.table}"
        if len(known.table) < needed:
            raise ManagerFault("a table is too short", "C", f"{table}; it takes {needed} blocks")
        if len(known.table) > needed + self._can.lookahead:
            raise ManagerFault("a table is too long", "C", f"{table}; {needed} blocks are enough")
        for block in known.table[known.first_visible // self._case.block_size :]:
            if block not in self._usable:
                raise ManagerFault("a reserved block is handed out", "Q", f"{name}'s table is {known.table}")

    def _table(self, name: str) -> list[int]:
        return self._blocks(self._call(lambda: self._manager.table(name)), "table")

    def _blocks(self, given: Any, verb: str) -> list[int]:
        """Block numbers, as whatever sequence they came."""
        try:
            blocks = [int(block) for block in given]
        except Exception:
            raise ManagerFault(
                "returns something else", "-", f"{verb} returned a {type(given).__name__}, no sequence of blocks"
            ) from None
        for block in blocks:
            if not 0 <= block < self._case.num_blocks:
                words = f"{verb} names block {block} of {self._case.num_blocks}"
                raise ManagerFault("a block that does not exist is handed out", "Q", words)
        return blocks

    def _num_free(self) -> int:
        return self._number(self._call(lambda: self._manager.num_free()), "num_free")

    def _number(self, given: Any, verb: str) -> int:
        """An integer of any kind, NumPy's too."""
        try:
            return operator.index(given)
        except Exception:
            words = f"{verb} returned a {type(given).__name__}, no integer"
            raise ManagerFault("returns something else", "-", words) from None

    def _new_name(self, words: str) -> str:
        number, letter = divmod(self._next_name, 26)
        self._next_name += 1
        name = chr(ord("A") + letter) + (str(number) if number else "")
        self.words.append(name + words)
        return name

    def _call(self, function: Callable[[], Any]) -> Any:
        """A call of the manager, which may do anything."""
        try:
            return function()
        except self._can.out_of_blocks as error:
            raise Refused(raised(error)) from None
        except (Exception, SystemExit) as error:
            raise ManagerFault("raises an exception", "-", raised(error)) from None
