"""The model beside a manager: carries out operations as an engine would, and keeps books of what must come of them.

After an operation the judge copies the blocks that it was told to copy and writes the new tokens through the sequence's
table, as the model would that a manager works for. Then everything is checked (paged/oracle/managers/books.py).
"""

from collections.abc import Sequence
from typing import Any

from paged.blocks import blocks_for
from paged.oracle.managers.asking import Asking, ManagerFault, Refused
from paged.oracle.managers.books import FINDS, READS, Books, Known
from paged.oracle.managers.operations import ManagerCase, Operation
from paged.oracle.managers.protocol import ManagerCapabilities
from reference.tagged_memory import WrongRead, WrongWrite


class Bookkeeping:
    """Runs a list of operations on a manager, and checks everything after each.

    Args:
        manager: with the verbs of `paged.oracle.managers.protocol`.
        case: its pool and the operations.
        capabilities: what is declared.
        words: grows by each operation, in words, when it begins.

    Attributes:
        done: kinds of operations that were carried out, and "refused".

    Example:
        >>> from paged.oracle.managers.protocol import OwnBlocks
        >>> words = []
        >>> operations = (Operation("allocate", num_tokens=6), Operation("fork"), Operation("append", 1))
        >>> Bookkeeping(OwnBlocks(8, 4), ManagerCase(8, 4, operations), OwnBlocks.CAPABILITIES, words).run()
        >>> words[:3]
        ['A = allocate(6 new tokens)', 'B = fork(A)', 'append(B, 1 token)']
    """

    def __init__(self, manager: Any, case: ManagerCase, capabilities: ManagerCapabilities, words: list[str]) -> None:
        self.done: set[str] = set()
        self._case, self._can, self._words = case, capabilities, words
        self._asking = Asking(manager, case.num_blocks, capabilities)
        self._books = Books(self._asking, case.num_blocks, case.block_size, capabilities)
        self._ended: list[str] = []
        self._next_token, self._next_name = 1, 0

    def run(self) -> None:
        """Carry out all operations, then free everything and use every block once more.

        Raises:
            ManagerFault: the first thing that is wrong.
        """
        try:
            self._books.check("")
            for operation in self._case.operations:
                self._apply(operation)
            self._free_all()
            count = len(self._books.usable) - self._can.lookahead
            self._allocate(self._new_tokens(count * self._case.block_size), "as many new tokens as fit")
            self._allocate(self._new_tokens(1), "1 new token")
            self._free_all()
        except Refused as error:  # of a call that takes no block
            raise ManagerFault("raises an exception", "-", str(error)) from None

    def _apply(self, operation: Operation) -> None:
        kind, which, count, _ = operation
        live = list(self._books.live)
        if kind == "allocate":
            self._allocate(*self._tokens(operation))
        elif kind == "free again" and self._ended:
            self._free_again(self._ended[which % len(self._ended)])
        elif kind != "free again" and live:
            name = live[which % len(live)]
            if kind == "append":
                self._append(name, count)
            elif kind == "fork":
                self._fork(name)
            elif kind == "free":
                self._free(name)
            else:
                self._drop(name, count)
        else:
            return  # there is no sequence to do it with
        self.done.add(kind)

    def _tokens(self, operation: Operation) -> tuple[list[int], str]:
        """An allocation's tokens, and what they are."""
        _, which, count, tokens = operation
        history = self._books.history
        if tokens == "same":
            return [0] * count, f"{count} equal tokens"
        if tokens == "new" or not history:
            return self._new_tokens(count), f"{count} new token{'s' * (count != 1)}"
        name, known = history[which % len(history)]
        if tokens == "changed":
            changed = [*self._new_tokens(1), *known[1:count]]
            return changed, f"{len(changed)} tokens: those of {name} with the first one changed"
        kept = known[:count] if tokens == "again" else known[: (count + 1) // 2]
        new = self._new_tokens(max(count - len(kept), 0))
        return kept + new, f"{len(kept) + len(new)} tokens: the first {len(kept)} of {name}, {len(new)} new"

    def _new_tokens(self, count: int) -> list[int]:
        self._next_token += count
        return list(range(self._next_token - count, self._next_token))

    def _new_name(self, words: str) -> str:
        number, letter = divmod(self._next_name, 26)
        self._next_name += 1
        name = chr(ord("A") + letter) + (str(number) if number else "")
        self._words.append(name + words)
        return name

    def _allocate(self, tokens: list[int], words: str) -> None:
        name = self._new_name(f" = allocate({words})")
        free = self._asking.num_free()
        try:
            found = self._asking.allocate(name, tokens)
        except Refused as error:
            self._books.may_have_used(tokens)
            self._was_refused(error, free, blocks_for(len(tokens), self._case.block_size) + self._can.lookahead)
            return
        table, num_found = self._asking.table(name), blocks_for(found, self._case.block_size)
        self._books.live[name] = Known(list(tokens), table=table)
        self._fresh(name, table[num_found:])
        self._books.reads(f"{name} (found by prefix)", table, tokens[:found], fault=FINDS)
        self._write(name, found, hits=table[:num_found])

    def _append(self, name: str, count: int) -> None:
        self._words.append(f"append({name}, {count} token{'s' * (count != 1)})")
        known, free, size = self._books.live[name], self._asking.num_free(), self._case.block_size
        start, tokens = len(known.tokens), self._new_tokens(count)
        needed = max(0, blocks_for(start + count, size) + self._can.lookahead - len(known.table))
        # The block that is written next may be another's as well, and then takes a copy.
        others = {block for other, seen in self._books.live.items() if other != name for block in seen.table}
        needed += not others.isdisjoint(known.table[start // size :])
        try:
            copies = self._asking.append(name, tokens)
        except Refused as error:
            self._was_refused(error, free, needed)
            return
        self._moved(name, copies)
        known.tokens += tokens
        self._write(name, start)

    def _fork(self, name: str) -> None:
        twin = self._new_name(f" = fork({name})")
        known, free = self._books.live[name], self._asking.num_free()
        try:
            copies = self._asking.fork(name, twin)
        except Refused as error:
            self._was_refused(error, free, len(known.table))
            return
        self._books.live[twin] = Known(known.tokens.copy(), known.first_visible, known.table.copy())
        self._moved(twin, copies)
        self._books.check(twin)

    def _free(self, name: str) -> None:
        self._words.append(f"free({name})")
        known, free = self._books.live.pop(name), self._asking.num_free()
        self._ended.append(name)
        self._asking.free(name)
        shared = {
            block: other
            for other, seen in self._books.live.items()
            for block in seen.table
            if block in self._books.usable and block in known.table
        }
        gained = self._asking.num_free() - free
        alone = len(set(known.table) & self._books.usable) - len(shared)
        if gained > alone:
            still = [f"block {block} is free and still in {other}'s table" for block, other in shared.items()]
            words = f"{gained} blocks came back, and {alone} were {name}'s alone"
            # Which of the shared ones came back is known only if all of them did.
            raise ManagerFault("blocks in use are free", "Q", "; ".join([words, *still[: gained - alone]]))
        self._books.check("")

    def _free_all(self) -> None:
        for name in list(self._books.live):
            self._free(name)

    def _free_again(self, name: str) -> None:
        self._words.append(f"free({name}) again")
        before = self._asking.num_free()
        refused = self._asking.refuses_to_free(name)
        gained = self._asking.num_free() - before
        if gained:
            words = f"{name} had been freed, and the number of free blocks changed by {gained:+d}"
            raise ManagerFault("freeing twice frees blocks twice", "Q", words)
        if not refused and self._can.double_free == "refused":
            words = f"{name} had been freed, and no exception was raised"
            raise ManagerFault("freeing twice is not refused", "Q", words)
        self._books.check("")

    def _drop(self, name: str, count: int) -> None:
        known = self._books.live[name]
        position = min(known.first_visible + count, len(known.tokens))
        self._words.append(f"drop_before({name}, position {position})")
        self._asking.drop_before(name, position)
        known.first_visible = position
        self._books.check(name)

    def _write(self, name: str, start: int, hits: Sequence[int] = ()) -> None:
        """Write a sequence's tokens from `start` on, as the model would, and say so."""
        known = self._books.live[name]
        self._books.check_table(name)
        try:
            memory = self._books.memory
            memory.write(name, known.table, known.tokens, start, len(known.tokens), known.first_visible)
        except (WrongRead, WrongWrite) as error:
            raise ManagerFault(READS, "Q", str(error)) from None
        if self._can.prefix_caching:
            self._asking.computed(name)
        self._books.remember(name)
        self._books.check(name, hits)

    def _moved(self, name: str, copies: list[tuple[int, int]]) -> None:
        """Take over a sequence's table, and copy the blocks that the manager wants copied."""
        known = self._books.live[name]
        before, known.table = known.table, self._asking.table(name)
        for source, target in copies:
            if not {source, target} <= self._books.usable:
                raise ManagerFault("a reserved block is handed out", "Q", f"block {source} is copied to block {target}")
        self._fresh(name, [block for block in known.table if block not in before])
        for source, target in copies:
            self._books.memory.copy_block(source, target)

    def _fresh(self, name: str, blocks: Sequence[int]) -> None:
        """Blocks that a sequence was just given: nobody else may have them, and what they hold is undefined."""
        for block in blocks:
            for other, known in self._books.live.items():
                if other != name and block in known.table and block in self._books.usable:
                    words = f"block {block} was given to {name} and is in {other}'s table"
                    raise ManagerFault("a block in use is handed out", "Q", words)
            if block in self._books.usable:
                self._books.memory.forget(block)

    def _was_refused(self, error: Refused, free: int, needed: int) -> None:
        """A refusal is right if too few blocks are free, and if nothing changed."""
        self._words[-1] += ": refused"
        self.done.add("refused")
        if needed <= free:
            words = f"at most {needed} blocks are needed and {free} are free: {error}"
            raise ManagerFault("refuses although enough blocks are free", "Q", words)
        if self._asking.num_free() != free:
            words = f"{free} blocks were free before the call that was refused, {self._asking.num_free()} are after it"
            raise ManagerFault("a refusal changes something", "Q", words)
        self._books.check("")
