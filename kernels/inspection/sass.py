"""Read SASS, NVIDIA's machine code: registers, spills, products, and operands of products in flight.

A warp-group product (HGMMA) keeps running after it is issued. It reads its register operands and its accumulator until
a wait retires it (``WARPGROUP.DEPBAR.LE gsb0, n``: all but the last n groups; a group ends with the product that
carries ``gsb0``). Until then nothing may write these registers. ptxas of CUDA 12.8, which Triton bundles, has been seen
to break this rule: https://github.com/triton-lang/triton/issues/9433.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from fastres.errors import KernelError

from .flow import Instruction, facts_before

# Instructions that multiply: Hopper's warp-group products, datacentre Blackwell's, the older warp-wide ones and plain
# float32.
PRODUCTS = ("HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "QMMA", "IMMA", "FFMA", "FFMA2")


@dataclass(frozen=True)
class Sass:
    """Resources of a kernel's machine code. Counts are of instructions."""

    registers: int
    spills: int  # loads and stores of spilled registers
    loop_spills: int  # of these, inside loops with products
    wgmma: int
    mma: int  # products on tensor cores
    overwritten: int  # instructions that write a register that a product in flight still reads


def read_cubin(cubin: bytes) -> Sass:
    """Read the machine code of a compiled kernel."""
    usage = _cuobjdump("--dump-resource-usage", cubin)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return read_sass(disassemble(cubin), int(registers.group(1)))


def disassemble(cubin: bytes) -> str:
    """Return a kernel's machine code as text. Raise ``KernelError`` if Triton's disassembler does not know its GPU."""
    return _cuobjdump("-sass", cubin)


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True)
    if done.returncode:
        said = " ".join(f"{done.stdout} {done.stderr}".split())
        raise KernelError(f"Triton {triton.__version__} cannot disassemble the kernel it compiled: {said}")
    return done.stdout


def read_sass(sass: str, registers: int) -> Sass:
    """Count the instructions of :class:`Sass` in ``sass``."""
    code = parse(sass)
    names = [instruction.opcode.split(".")[0] for instruction in code]
    loops = [
        (target, index)
        for index, instruction in enumerate(code)
        if names[index] == "BRA"
        for target in instruction.next
        if target < index
    ]
    spills = [index for index, name in enumerate(names) if name in ("STL", "LDL")]
    products = [index for index, name in enumerate(names) if name in PRODUCTS]
    hot = [(low, high) for low, high in loops if any(low <= index <= high for index in products)]
    return Sass(
        registers,
        len(spills),
        sum(any(low <= index <= high for low, high in hot) for index in spills),
        sum("GMMA" in names[index] for index in products),
        sum(not names[index].startswith("FFMA") for index in products),
        len(overwrites(code)),
    )


def parse(sass: str) -> list[Instruction]:
    """Return the instructions of a kernel. A jump whose targets are not in the text may lead anywhere."""
    pattern = r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;"
    found = [match.groups() for match in re.finditer(pattern, sass)]
    places = {int(address, 16): index for index, (address, *_) in enumerate(found)}
    everywhere = tuple(range(len(found)))
    meetings = [_target(operands) for _, _, opcode, operands in found if opcode.startswith("BSSY")]
    code = []
    for index, (_, guard, opcode, operands) in enumerate(found):
        onward = tuple(range(index + 1, min(index + 2, len(found))))
        kind = opcode.split(".")[0]
        following = onward
        if kind in ("BRA", "JMP"):
            certain = not guard and opcode == "BRA" and "," not in operands
            following = (places[_target(operands)], *(() if certain else onward))
        elif kind == "BSYNC":
            following = (*onward, *(places[target] for target in meetings))
        elif kind in ("BRX", "JMX", "CALL", "RET", "BRXU", "JMXU"):
            following = everywhere
        elif kind in ("EXIT", "KILL"):
            following = onward if guard else ()
        code.append(Instruction(opcode, operands, bool(guard), following))
    return code


def _target(operands: str) -> int:
    return int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)


_MOST_GROUPS = 8  # older groups count as this old


def overwrites(code: Sequence[Instruction]) -> list[int]:
    """Return the indices of instructions that write a register that a product in flight reads, on some path.

    A product may write the accumulator of another, because products that add to one accumulator run in order; it must
    not write the other's operand. Not detected: *reads* of an accumulator that are too early, and operands in shared
    memory.
    """
    operands = {i: _read_in_flight(instruction) for i, instruction in enumerate(code) if _is_product(instruction)}
    if not operands:
        return []

    # A fact: the index of a product in flight, and how many groups have ended since, including its own.
    def after(index: int, facts: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]]:
        instruction = code[index]
        if index in operands:
            facts |= {(index, 0)}
            if re.search(r"\bgsb0\b", instruction.operands):
                facts = frozenset((product, min(groups + 1, _MOST_GROUPS)) for product, groups in facts)
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            most = _target(instruction.operands)
            facts = frozenset((product, groups) for product, groups in facts if groups <= most)
        return facts

    found = []
    for index, facts in facts_before(code, after):
        if facts and (written := _written(code[index])):
            operand, accumulator = (set().union(*(operands[product][i] for product, _ in facts)) for i in (0, 1))
            if written & (operand if index in operands else operand | accumulator):
                found.append(index)
    return found


def _is_product(instruction: Instruction) -> bool:
    return re.match(r"[HQI]GMMA\b", instruction.opcode) is not None


def _read_in_flight(product: Instruction) -> tuple[frozenset[int], frozenset[int]]:
    """Return the registers of a product's operand (none if it is in shared memory) and of its accumulator."""
    first = re.match(r"R(\d+), R(\d+), gdesc", product.operands)
    operand = _from(int(first.group(2)), 4) if first else frozenset()  # 64 rows of 32 bytes, over 128 threads
    return operand, _written(product)


@functools.lru_cache(maxsize=4096)
def _written(instruction: Instruction) -> frozenset[int]:
    """Return the general registers that an instruction writes, including those that it may write."""
    name, *modifiers = instruction.opcode.split(".")
    operands = [operand.strip() for operand in instruction.operands.split(",")]
    operands = [operand for operand in operands if not re.fullmatch(r"!?U?P(\d+|T|R)", operand)]
    first = re.match(r"R(\d+)\b", operands[0]) if operands else None
    if first is None or "SETP" in name or name in ("R2P", "FCHK", "BAR", "BRX", "RET", "NANOSLEEP", "WARPSYNC"):
        return frozenset()
    width = 1
    if _is_product(instruction):
        columns = int(modifiers[0].split("x")[1])
        width = columns // 2 if "F16" not in modifiers[1:2] else columns // 4
    elif name.endswith("MMA") or "128" in modifiers or (name == "LDSM" and "4" in modifiers[-1]):
        width = 4
    elif name == "CS2R" and "32" not in modifiers:
        width = 2
    elif {"64", "WIDE", "F64", "U64", "S64"} & set(modifiers) or name.startswith("D") or name == "LDSM":
        width = 1 if name == "SHF" else 2
    return _from(int(first.group(1)), width)


def _from(first: int, width: int) -> frozenset[int]:
    return frozenset(range(first, first + width))
