"""Reading SASS: registers written while a product in flight reads them are detected, in loops and on every path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastres.kernels import fused
from fastres.kernels.inspection.ahead_of_time import compile_for
from fastres.kernels.inspection.pointer_kernels import Report
from fastres.kernels.inspection.sass import Sass, _written, disassemble, overwrites, parse, read_sass
from fastres.kernels.inspection.tma_kernels import compile_fused
from fastres.kernels.routing.cards import H100
from fastres.kernels.routing.rules import ConvShape


def listing(*lines: str) -> str:
    """Return instructions as ``cuobjdump -sass`` prints them, 16 bytes each."""
    return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0 */" for i, line in enumerate(lines))


def found(*lines: str) -> list[int]:
    return overwrites(parse(listing(*lines)))


PRODUCT = "HGMMA.64x64x16.F32 R24, R86, gdesc[UR12], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("write", "is_bad"),
    [
        ("MOV R86, R1", True),
        ("IMAD.MOV.U32 R89, RZ, RZ, R1", True),
        ("MOV R90, R86", False),
        ("LDS.64 R88, [R115+UR4+0x400]", True),
        ("LDS.128 R82, [R115]", False),
        ("LDS.128 R86, [R115]", True),
        ("LDSM.16.MT88.4 R86, [R65+0x2000]", True),
        ("LDSM.16.MT88.2 R84, [R65+0x2000]", False),
        ("@P2 LDG.E.U8 R87, desc[UR10][R92.64]", True),
        ("IADD3 R87, P4, R116, R172, RZ", True),
        ("LOP3.LUT P6, R88, R5, 0xff, RZ, 0xc0, !PT", True),
        ("IMAD.WIDE R84, R1, 0x4, R2", False),
        ("IMAD.WIDE.U32 R85, R1, 0x4, R2", True),
        ("CS2R R24, SRZ", True),  # the accumulator
        ("CS2R R84, SRZ", False),
        ("CS2R R85, SRZ", True),
        ("STS.128 [R86], R86", False),
        ("STG.E.128 desc[UR4][R86.64], R86", False),
        ("R2UR UR4, R86", False),
        ("ISETP.GE.AND P0, PT, R86, 0x7, PT", False),
        ("BAR.SYNC R86, R87", False),
        ("HGMMA.64x64x16.F32 R24, R90, gdesc[UR12], R24, gsb0", False),  # it accumulates in the same registers
        ("HGMMA.64x64x16.F32 R86, gdesc[UR4], R86, gsb0", True),
    ],
)
def test_writes_in_flight(write: str, is_bad: bool) -> None:
    assert found(PRODUCT, write, WAIT, "EXIT") == [1] * is_bad
    assert found(PRODUCT, WAIT, write, "EXIT") == []
    assert found(write, PRODUCT, WAIT, "EXIT") == []


def test_a_wait_retires_all_but_the_last_groups() -> None:
    other = "HGMMA.64x64x16.F32 R24, R90, gdesc[UR12], R24, gsb0"
    most = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert found(PRODUCT, other, most, "MOV R86, R1", "EXIT") == []
    assert found(PRODUCT, other, most, "MOV R90, R1", "EXIT") == [3]
    assert found(PRODUCT, most, "MOV R86, R1", "EXIT") == [2]
    # It is not in a group yet, so no wait covers it.
    assert found(PRODUCT.replace(", gsb0", ""), WAIT, "MOV R86, R1", "EXIT") == [2]
    # A group ends with the product that is marked as its end.
    assert found(PRODUCT.replace(", gsb0", ""), other, WAIT, "MOV R86, R1", "EXIT") == []
    assert found(PRODUCT, "@P0 " + WAIT, "MOV R86, R1", "EXIT") == [2]


def test_paths() -> None:
    # In a loop, the product at the end is in flight at the start.
    assert found("MOV R86, R1", PRODUCT, "@P0 BRA 0x0", WAIT, "EXIT") == [0]
    assert found("MOV R86, R1", PRODUCT, WAIT, "@P0 BRA 0x0", "EXIT") == []
    # A jump past a wait.
    assert found(PRODUCT, "@P0 BRA 0x30", WAIT, "MOV R86, R1", "EXIT") == [3]
    assert found(PRODUCT, "BRA 0x30", "MOV R86, R1", WAIT, "MOV R86, R1", "EXIT") == []
    # A jump to an unknown address may go anywhere.
    assert found("MOV R86, R1", PRODUCT, "BRX R2 -0x10", "EXIT") == [0]
    assert found("BSSY B0, 0x40", PRODUCT, "BSYNC B0", WAIT, "MOV R86, R1", "EXIT") == [4]


def test_the_hand_over_of_a_compiled_kernel() -> None:
    """The fused kernel passes on results in registers. Writing any of them too early is detected."""
    shape = ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1)
    item = compile_fused(shape, 256, torch.float16, fused.CANDIDATES[0], next_channels=64)
    text = disassemble(compile_for(item, fused.fused_kernel, "sm_90").asm["cubin"])
    code = parse(text)
    good = read_sass(text, 128)
    assert (good.overwritten, good.wgmma) == (0, 12)
    handed = [i for i, line in enumerate(code) if "GMMA" in line.opcode and ", R" in line.operands.split("gdesc")[0]]
    assert len(handed) == 8
    for index in handed:
        doctored = [*code]
        doctored[index + 1] = replace(
            code[index + 1], opcode="MOV", operands=f"{code[index].operands.split(', ')[1]}, RZ"
        )
        assert index + 1 in overwrites(doctored)


def test_overwritten_registers_are_a_problem() -> None:
    assert Report("fused", H100, 100, 0, 0, 1000, 1, 1, overwritten=1).problems == ("overwrites operands in flight",)


def test_spills_and_products_are_counted() -> None:
    sass = listing(
        "STL [R1], R2", "HMMA.16816.F32 R4, R8, R10, R4", "LDL R2, [R1]", "@P0 BRA 0x10", "FFMA R2, R2, R3, R4"
    )
    assert read_sass(sass, 64) == Sass(64, 2, 1, 0, 1, 0)
    (product, *_) = parse(listing("HMMA.16816.F32 R4, R8, R10, R4"))
    assert _written(product) == {4, 5, 6, 7}
