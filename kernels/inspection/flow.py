"""What may hold at each instruction of a kernel's code, along every path that leads there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Fact = TypeVar("Fact", bound=Hashable)


@dataclass(frozen=True)
class Instruction:
    """An instruction of PTX or SASS, and where it leads."""

    opcode: str  # with its modifiers
    operands: str
    guarded: bool  # a predicate says whether it does anything
    next: tuple[int, ...]  # indices of the instructions that may follow


def facts_before(
    code: Sequence[Instruction], after: Callable[[int, frozenset[Fact]], frozenset[Fact]]
) -> Iterator[tuple[int, frozenset[Fact]]]:
    """Each instruction's index with the facts that may hold before it.

    ``after`` says what holds after an instruction where some facts held before it; none hold at the start. Facts of all
    paths are united, so what may happen on one path is not missed because it does not on another. An instruction
    under a predicate may do nothing. Code that no path reaches is taken for another start.
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
