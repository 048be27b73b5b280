"""A pool of blocks whose slots hold what they stand for, instead of numbers.

The K and V of a token depend on all tokens up to it. So the one thing a slot can rightly hold is *the prefix it stands
for*, and a schedule is right exactly when every slot that an attention reads holds the prefix that the reader expects.
No model, no floats, no tolerance: a wrong read is wrong by name.

Prefixes are interned: what follows a prefix `p` with a token `t` is one integer for the pair (p, t), so that comparing
two prefixes costs the same however long they are.
"""

from collections.abc import Sequence

EMPTY_PREFIX = 0


class WrongRead(AssertionError):
    """A block table leads to a slot that holds something else than its sequence computed there."""


class WrongWrite(AssertionError):
    """A slot was written that must not be: in the null block, or outside the pool."""


class TaggedMemory:
    """A pool of `num_blocks` blocks of `block_size` slots, and one of `num_host_blocks` that blocks are swapped to.

    Example: "b" was given a block that "a" still reads.
        >>> memory = TaggedMemory(num_blocks=4, block_size=2)
        >>> memory.write("a", [1], tokens=[7, 8], start=0, end=2)
        >>> memory.read("a", [1], tokens=[7, 8])
        >>> memory.write("b", [1], tokens=[9], start=0, end=1)
        >>> try:
        ...     memory.read("a", [1], tokens=[7, 8])
        ... except WrongRead as error:
        ...     print(str(error).replace(", which", ",\\nwhich"))
        'a' reads position 0 in slot 2 (block 1, offset 0),
        which should hold token 7 of 'a' and holds token 9 at position 0, written by 'b'
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_host_blocks = num_host_blocks
        self._host: dict[int, tuple[list[int | None], list[str | None]]] = {}
        self._slots: list[int | None] = [None] * (num_blocks * block_size)
        self._writers: list[str | None] = [None] * (num_blocks * block_size)
        self._children: dict[tuple[int, int], int] = {}
        self._tokens: list[tuple[int, int]] = [(-1, 0)]  # of each prefix: its last token and that token's position

    def write(
        self,
        name: str,
        block_table: Sequence[int],
        tokens: Sequence[int],
        start: int,
        end: int,
        first_visible: int = 0,
    ) -> None:
        """Write positions `start` to `end - 1` of a sequence through its block table.

        Args:
            name: the sequence, for messages.
            block_table: logical block -> physical block.
            tokens: all tokens of the sequence, at least `end`.
            first_visible: positions before it are not read, since a sliding window has left them behind.

        Raises:
            WrongWrite: into the null block or outside the pool.
            WrongRead: the positions before `start`, which the new tokens attend to, do not hold this sequence.
        """
        prefix = self._check(name, block_table, tokens[:start], first_visible)
        for position in range(start, end):
            prefix = self._longer(prefix, tokens[position], position)
            slot = self._slot(name, block_table, position)
            if not 0 < slot // self.block_size < self.num_blocks:
                raise WrongWrite(
                    f"{name!r} writes position {position} into block {slot // self.block_size}; blocks 1 to "
                    f"{self.num_blocks - 1} may be written, block 0 is the null block"
                )
            self._slots[slot], self._writers[slot] = prefix, name

    def read(self, name: str, block_table: Sequence[int], tokens: Sequence[int], first_visible: int = 0) -> None:
        """Read the positions of `tokens` from `first_visible` on, as an attention would.

        Raises:
            WrongRead: a slot holds something else.
        """
        self._check(name, block_table, tokens, first_visible)

    def copy_block(self, source: int, target: int) -> None:
        """Copy a whole block, whatever it holds."""
        here, there, size = source * self.block_size, target * self.block_size, self.block_size
        self._slots[there : there + size] = self._slots[here : here + size]
        self._writers[there : there + size] = self._writers[here : here + size]

    def swap_out(self, block: int, host_block: int) -> None:
        """Copy a whole block to the host.

        Raises:
            WrongWrite: the host has no such block, or it holds one that was not brought back or forgotten.
        """
        if not 0 < host_block < self.num_host_blocks:
            raise WrongWrite(f"block {block} is swapped out to host block {host_block} of {self.num_host_blocks}")
        if host_block in self._host:
            raise WrongWrite(f"block {block} is swapped out to host block {host_block}, which holds another one")
        first, last = block * self.block_size, (block + 1) * self.block_size
        self._host[host_block] = (self._slots[first:last], self._writers[first:last])

    def swap_in(self, host_block: int, block: int) -> None:
        """Copy a whole block back from the host, which does not hold it any longer.

        Raises:
            WrongRead: the host does not hold it.
        """
        if host_block not in self._host:
            raise WrongRead(f"block {block} is swapped in from host block {host_block}, which holds nothing")
        first, last = block * self.block_size, (block + 1) * self.block_size
        self._slots[first:last], self._writers[first:last] = self._host.pop(host_block)

    def forget(self, block: int) -> None:
        """Poison a block that was freed: whoever still reads it reads what nobody wrote."""
        first = block * self.block_size
        self._slots[first : first + self.block_size] = [None] * self.block_size

    def forget_on_host(self, host_block: int) -> None:
        """The same for a host block, whether or not it holds anything."""
        self._host.pop(host_block, None)

    def _check(self, name: str, block_table: Sequence[int], tokens: Sequence[int], first_visible: int) -> int:
        """The prefix of `tokens`, after comparing every slot on the way."""
        prefix = EMPTY_PREFIX
        for position, token in enumerate(tokens):
            prefix = self._longer(prefix, token, position)
            if position < first_visible:
                continue
            slot = self._slot(name, block_table, position)
            if self._slots[slot] != prefix:
                raise WrongRead(self._describe(name, position, token, slot))
        return prefix

    def _longer(self, prefix: int, token: int, position: int) -> int:
        known = self._children.get((prefix, token))
        if known is None:
            known = self._children[prefix, token] = len(self._tokens)
            self._tokens.append((token, position))
        return known

    def _slot(self, name: str, block_table: Sequence[int], position: int) -> int:
        index, offset = position // self.block_size, position % self.block_size
        if index >= len(block_table):
            raise WrongRead(f"{name!r} has no block for position {position}: its table is {list(block_table)}")
        return block_table[index] * self.block_size + offset

    def _describe(self, name: str, position: int, token: int, slot: int) -> str:
        block, offset = slot // self.block_size, slot % self.block_size
        where = f"{name!r} reads position {position} in slot {slot} (block {block}, offset {offset})"
        held = self._slots[slot]
        if held is None:
            return f"{where}, which should hold token {token} of {name!r} and holds nothing"
        found, found_at = self._tokens[held]
        same = found == token and found_at == position
        detail = " after other tokens" if same else ""
        return (
            f"{where}, which should hold token {token} of {name!r} and holds token {found} at position "
            f"{found_at}{detail}, written by {self._writers[slot]!r}"
        )
