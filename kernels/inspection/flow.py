"""Find the facts that may hold at each instruction of a kernel's code, along every path that leads there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Fact = TypeVar("Fact", bound=Hashable)


@dataclass(frozen=True)
class Instruction:
    """An instruction of PTX or SASS, and the instructions that may follow it."""

    opcode: str  # with its modifiers
    operands: str
    guarded: bool  # a predicate decides whether it does anything
    next: tuple[int, ...]  # indices of the instructions that may follow


def facts_before(
    code: Sequence[Instruction], after: Callable[[int, frozenset[Fact]], frozenset[Fact]]
) -> Iterator[tuple[int, frozenset[Fact]]]:
    """Yield each instruction's index with the facts that may hold before it.

    ``after`` returns the facts that hold after an instruction, given those before it; no fact holds at the start. The
    facts of all paths are united, so nothing that may happen on any path is missed. An instruction under a predicate
    may do nothing. Code that no path reaches counts as another start.
    """
    before: dict[int, frozenset[Fact]] = {}
    for start in range(len(code)):
        if start in before:
            continue
        before[start] = frozenset()
        todo = [start]
        while todo:
            index = todo.pop()
            known = before[index]
            then = after(index, known)
            if code[index].guarded:
                then |= known
            for following in code[index].next:
                if following not in before:
                    before[following] = then
                elif then <= before[following]:
                    continue
                else:
                    before[following] |= then
                todo.append(following)
    yield from sorted(before.items(), key=lambda item: item[0])
