"""Which blocks of tokens the cache of shared prompt prefixes holds: without JAX; `chunked_prefill.py` has the arrays.

A block is known by its tokens and all before them. The block that was used the longest time ago makes room for a new
one, and of a prompt's blocks the last goes first, since without its predecessors a block is not found.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

BLOCK = 64  # tokens


class Block(NamedTuple):
    identity: int  # never given again, so that what follows an evicted block is not taken for what follows another
    number: int  # where its keys and values are


class PrefixCache:
    """The blocks of prompts that were prefilled."""

    def __init__(self, number: int, size: int = BLOCK):
        self._size = size  # tokens of a block
        self._free = list(range(number))
        self._blocks: OrderedDict[tuple[int, tuple[int, ...]], Block] = OrderedDict()  # least recently used first
        self._identities = 0

    def match(self, prompt: Sequence[int]) -> list[int]:
        """Return the numbers of the blocks that a prompt begins with; its last token is never among their tokens."""
        keys = list(self._known(prompt))
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        return [self._blocks[key].number for key in keys]

    def add(self, prompt: Sequence[int]) -> list[int]:
        """Add a prompt's blocks. Return the number that each has to be written to, -1 for those that were there."""
        known = list(self._known(prompt))
        keys, numbers = list(known), [-1] * len(known)
        for key in known:
            self._blocks.move_to_end(key)
        parent = self._blocks[known[-1]].identity if known else -1
        for start in range(len(known) * self._size, len(prompt) - self._size, self._size):
            if not self._free:
                oldest = next(iter(self._blocks), None)
                if oldest is None or oldest in keys:  # the prompt itself fills the cache
                    break
                self._free.append(self._blocks.pop(oldest).number)
            key = (parent, tuple(prompt[start : start + self._size]))
            block = self._blocks[key] = Block(self._identities, self._free.pop())
            self._identities += 1
            parent = block.identity
            keys.append(key)
            numbers.append(block.number)
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        return numbers

    def _known(self, prompt: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        parent = -1
        for start in range(0, len(prompt) - self._size, self._size):
            key = (parent, tuple(prompt[start : start + self._size]))
            if key not in self._blocks:
                return
            yield key
            parent = self._blocks[key].identity
