"""What must hold after every operation on a manager, whatever it was.

    every sequence reads what it wrote            no block that is handed out is somebody else's, copied or given up
    free blocks and blocks in tables are all      none is lost, none is counted twice
    tables of other sequences are as they were
    what is found by prefix is that beginning     the same tokens behind the same tokens

Reads go through a tagged memory, where a slot holds the beginning that it stands for (reference/tagged_memory.py). So
reference counts and copy-on-write are judged by what they do, and never by how a manager keeps them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from paged.blocks import blocks_for
from paged.oracle.managers.asking import Asking, ManagerFault
from paged.oracle.managers.protocol import ManagerCapabilities
from reference.tagged_memory import TaggedMemory, WrongRead

# A token that no sequence has: a prompt that ends with it is never found whole.
NOBODYS_TOKEN = -1
MOST_HISTORY = 8
READS = "a sequence does not read what it wrote"
FINDS = "finds what is not there"


@dataclass
class Known:
    """A sequence as the judge knows it: its tokens, the first one still read, and its table."""

    tokens: list[int]
    first_visible: int = 0
    table: list[int] = field(default_factory=list)


class Books:
    """What the judge knows of a pool.

    Args:
        asking: the manager.
        num_blocks, block_size: of the pool.
        capabilities: what is declared.

    Attributes:
        memory: what every slot stands for.
        usable: blocks that may be handed out.
        live: the sequences that are there, by name.
        history: names and tokens of the latest sequences that were written, ended ones too.
    """

    def __init__(self, asking: Asking, num_blocks: int, block_size: int, capabilities: ManagerCapabilities) -> None:
        self.memory = TaggedMemory(num_blocks, block_size)
        self.usable = capabilities.usable(num_blocks)
        self.live: dict[str, Known] = {}
        self.history: list[tuple[str, list[int]]] = []
        self._asking, self._size, self._can = asking, block_size, capabilities
        # Findable blocks that no table names, and when each was let go: after how many checks.
        self._let_go: dict[int, int] = {}
        self._now = 0
        self._age_unknown: set[int] = set()

    def may_have_used(self, tokens: list[int]) -> None:
        """A sequence with these tokens was refused: whether what was found of it counts as used is left open."""
        if self._can.prefix_caching:
            self._age_unknown |= set(self._asking.lookup([*tokens, NOBODYS_TOKEN]))

    def remember(self, name: str) -> None:
        """A sequence's tokens have been written, so they may be looked for from now on."""
        tokens = self.live[name].tokens
        if (name, tokens) not in self.history:
            self.history = [*self.history, (name, tokens.copy())][-MOST_HISTORY:]

    def check(self, name: str, hits: Collection[int] = ()) -> None:
        """Everything that must hold.

        Args:
            name: the sequence that was operated on, whose table may be another now.
            hits: blocks that it was given because they were found by prefix.

        Raises:
            ManagerFault: what does not hold.
        """
        used: set[int] = set()
        self._now += 1
        for other, known in self.live.items():
            table = self._asking.table(other)
            if other != name and table != known.table:
                words = f"{other}'s table was {known.table} and is {table}"
                raise ManagerFault("another sequence's table changes", "Q", words)
            known.table = table
            self.check_table(other)
            own = [block for block in table if block in self.usable]
            if len(set(own)) < len(own):
                raise ManagerFault("a block is twice in one table", "Q", f"{other}'s table is {table}")
            used |= set(own)
        for other, known in self.live.items():
            self.reads(other, known.table, known.tokens, known.first_visible)
        self._counts(len(used))
        if self._can.prefix_caching:
            self._findable(used, hits)

    def check_table(self, name: str) -> None:
        """A table has as many blocks as its tokens need, and none that is reserved where tokens are still read."""
        known = self.live[name]
        needed = blocks_for(len(known.tokens), self._size)
        table = f"{name} has {len(known.tokens)} tokens and its table is {known.table}"
        if len(known.table) < needed:
            raise ManagerFault("a table is too short", "C", f"{table}; it takes {needed} blocks")
        if len(known.table) > needed + self._can.lookahead:
            raise ManagerFault("a table is too long", "C", f"{table}; {needed} blocks are enough")
        if not set(known.table[known.first_visible // self._size :]) <= self.usable:
            raise ManagerFault("a reserved block is handed out", "Q", f"{name}'s table is {known.table}")

    def reads(
        self, who: str, table: Sequence[int], tokens: Sequence[int], first_visible: int = 0, fault: str = READS
    ) -> None:
        """Whether a table leads to tokens and to what came before them."""
        try:
            self.memory.read(who, table, tokens, first_visible)
        except WrongRead as error:
            raise ManagerFault(fault, "Q", str(error)) from None

    def _counts(self, num_used: int) -> None:
        """Conservation: free and used are all."""
        free, expected = self._asking.num_free(), len(self.usable) - num_used
        counts = f"of {len(self.usable)} blocks the manager counts {free} free, and {num_used} are in tables"
        if free < expected:
            raise ManagerFault("blocks are lost", "Q", counts)
        if free > expected:
            raise ManagerFault("blocks in use are free", "Q", counts)

    def _findable(self, used: set[int], hits: Collection[int]) -> None:
        """What can be found is right, looking changes nothing, and what was let go first is given up first."""
        free, found = self._asking.num_free(), set[int]()
        for who, tokens in self._prompts():
            blocks = self._asking.lookup([*tokens, NOBODYS_TOKEN])
            if len(blocks) * self._size > len(tokens):
                words = f"looking up {who} ({len(tokens)} tokens, and one more) gave {len(blocks)} blocks"
                raise ManagerFault(FINDS, "Q", words)
            self.reads(f"lookup of {who}", blocks, tokens[: len(blocks) * self._size], fault=FINDS)
            found |= set(blocks)
        if self._asking.num_free() != free:
            words = f"{free} blocks were free before, {self._asking.num_free()} are after it"
            raise ManagerFault("looking something up changes something", "Q", words)
        if self._can.eviction == "lru":
            sure = {block: moment for block, moment in self._let_go.items() if block not in self._age_unknown}
            kept = {block: moment for block, moment in sure.items() if block in found - used}
            for block, moment in sure.items():
                older = [other for other in kept if kept[other] < moment]
                if block in used and block not in hits and older:
                    words = f"block {block} was given up, although block {older[0]} was let go before it"
                    raise ManagerFault("a block used more recently is given up", "Q", words)
        self._age_unknown &= found - used
        self._let_go = {block: self._let_go.get(block, self._now) for block in sorted(found - used)}

    def _prompts(self) -> Iterator[tuple[str, list[int]]]:
        """What is looked up: all that was written, and the latest crossed with the others."""
        for name, tokens in self.history:
            yield f"{name}'s tokens", tokens
        for name, tokens in self.history[:-1]:
            latest, newest = self.history[-1]
            size = self._size
            yield f"{latest}'s first block and {name}'s others", [*newest[:size], *tokens[size:]]
            yield f"{name}'s first block and {latest}'s others", [*tokens[:size], *newest[size:]]
