"""Read PTX: a kernel's copies and products, and the order of both.

Three rules are checked along every path through the code, by the order of instructions alone. The buffer that an
instruction touches is not known here.

- A buffer is refilled only after a barrier. A wait for wgmma covers the warp group that waits, and reads such as
  ``ldmatrix`` cover the warp that reads; other warps may still be reading. So a barrier must stand between either of
  them and the next copy into shared memory, or the signal to a producer that it may copy (``mbarrier.arrive``).
- wgmma reads shared memory through a different proxy from the one through which ``cp.async`` writes. So a
  ``fence.proxy.async`` must stand between the wait for such copies and the next wgmma.
- Products take their operands from shared memory, unless a kernel chains products on purpose.

Two things are not detected: a copy with no wait before it, and ordinary stores into a buffer. A store after a read is
often right (to another place, or by the warp that has read).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .flow import Instruction, facts_before

# Triton 3.6.0 and 3.7.0 leave out the fence in the pointer kernel: https://github.com/triton-lang/triton/issues/9610
RECOMMENDED = "3.7.1"


def leaves_out_fence(triton_version: str) -> bool:
    """Return True if this version of Triton is known to leave out the fence between ``cp.async`` and wgmma."""
    version, fenced = (re.findall(r"\d+", text)[:3] for text in (triton_version, RECOMMENDED))
    return [*map(int, version)] < [*map(int, fenced)]


@dataclass(frozen=True)
class Ptx:
    """Counts of instructions in a kernel's PTX code."""

    products: int  # wgmma instructions
    register_products: int  # of these, with an operand from registers
    loads: int  # TMA copies into shared memory
    stores: int  # TMA copies out of shared memory
    unguarded: int  # buffers refilled, or released for refilling, with no barrier since they were read
    unfenced: int  # wgmma instructions with no fence since copies that they may read


_READ = re.compile(r"wgmma\.wait_group|ldmatrix|ld\.shared")
_REFILL = re.compile(r"cp\.async\.(c[ag]|bulk\.tensor\.\dd)\.shared|mbarrier\.arrive\.(?!expect_tx)")


def read_ptx(ptx: str) -> Ptx:
    """Count the instructions of :class:`Ptx` in ``ptx``."""
    code = parse(ptx)

    def after(index: int, facts: frozenset[str]) -> frozenset[str]:
        opcode = code[index].opcode
        if _READ.match(opcode):
            return facts | {"read"}
        if re.match(r"(bar|barrier)\.(cta\.)?(sync|red)", opcode):
            return facts - {"read"}
        if re.match(r"cp\.async\.(wait_group|wait_all)", opcode):
            return facts | {"copied"}
        if opcode.startswith("fence.proxy.async"):
            return facts - {"copied"}
        return facts

    products = [line for line in code if line.opcode.startswith("wgmma.mma_async")]
    in_shared = [line for line in products if re.search(r"\},\s*%rd\d+,\s*%rd\d+", line.operands)]
    unguarded = unfenced = 0
    for index, facts in facts_before(code, after):
        opcode = code[index].opcode
        if _REFILL.match(opcode):
            unguarded += "read" in facts
        elif opcode.startswith("wgmma.mma_async"):
            unfenced += "copied" in facts
    return Ptx(
        len(products),
        len(products) - len(in_shared),
        sum(bool(re.match(r"cp\.async\.bulk\.tensor\.\dd\.shared", line.opcode)) for line in code),
        sum(bool(re.match(r"cp\.async\.bulk\.tensor\.\dd\.global", line.opcode)) for line in code),
        unguarded,
        unfenced,
    )


def parse(ptx: str) -> list[Instruction]:
    """Return the instructions of ``ptx``, without directives and debugging information."""
    found: list[tuple[str, str, str]] = []
    labels: dict[str, list[int]] = {}
    for line in ptx.splitlines():
        for statement in line.split("//")[0].split(";"):
            text = statement.strip("{} \t")
            if label := re.match(r"([$\w]+):(?=\s|$)", text):
                labels.setdefault(label.group(1), []).append(len(found))
                text = text[label.end() :].strip("{} \t")
            if matched := re.match(r"(@!?%?[$\w]+\s+)?([a-z][\w.:]*)(?:\s+(.*))?$", text):
                found.append((matched.group(1) or "", matched.group(2), matched.group(3) or ""))
    tables = dict(re.findall(r"([$\w]+):\s*\.branchtargets([^;]*);", ptx))
    code = []
    for index, (guard, opcode, operands) in enumerate(found):
        following = [index + 1] if index + 1 < len(found) else []
        kind = opcode.split(".")[0]
        if kind in ("bra", "brx"):
            names = re.findall(r"[$\w]+", tables[operands.split()[-1]] if kind == "brx" else operands)
            following = [_nearest(labels[name], index) for name in names] + following * bool(guard)
        elif kind in ("ret", "exit", "trap"):
            following *= bool(guard)
        code.append(Instruction(opcode, operands, bool(guard), tuple(i for i in following if i < len(found))))
    return code


def _nearest(places: list[int], index: int) -> int:
    """Return the place of a label. Inline assembly repeats labels; each one is for the code just after it."""
    return max((place for place in places if place <= index), default=places[0])
