"""The processor's name and instruction sets, from what Linux reports for real processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastres.bench.report.words import cpu_words, device_name
from fastres.executors import processor

ZEN_3 = "model name\t: AMD EPYC 7763 64-Core Processor\nflags\t\t: fpu sse2 avx avx2 bmi2 sha_ni vaes"
SAPPHIRE_RAPIDS = (
    "model name\t: Intel(R) Xeon(R) Platinum 8488C\n"
    "flags\t\t: sse2 avx avx2 avx512f avx512dq avx_vnni avx512_bf16 avx512_vnni avx512_fp16 amx_bf16 amx_tile amx_int8"
)
GRAVITON_3 = "BogoMIPS\t: 2100.00\nFeatures\t: fp asimd asimdhp sve i8mm bf16\nCPU part\t: 0xd40"


@pytest.mark.parametrize(
    ("cpuinfo", "sets"),
    [
        (ZEN_3, "AVX2"),
        (SAPPHIRE_RAPIDS, "AVX2, AVX-VNNI, AVX-512, VNNI, BF16, FP16, AMX"),
        (GRAVITON_3, "NEON, FP16, SVE, BF16, I8MM"),
        ("processor\t: 0", None),
        (None, None),
    ],
    ids=["avx2", "amx", "arm", "says nothing", "no file"],
)
def test_instruction_sets(
    cpuinfo: str | None, sets: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPUINFO", path)
    for name in processor.LIMITS:
        monkeypatch.delenv(name, raising=False)
    if cpuinfo is not None:
        path.write_text(f"processor\t: 0\n{cpuinfo}\n\nprocessor\t: 1\nflags\t: other\n")
    found = processor.processor()
    assert found["cpu_instruction_sets"] == sets
    assert found["cpu_limits"] is None
    assert processor.has_amx() == ("AMX" in (sets or ""))
    assert found["cpu"]
    if cpuinfo and "model name" in cpuinfo:
        assert f"model name\t: {found['cpu']}" in cpuinfo


@pytest.mark.parametrize(("has", "name"), [(processor.has_amx, "AMX"), (processor.has_bf16, "BF16")])
def test_limits_of_onednn_leave_neither_amx_nor_bf16(
    has: Callable[[], bool], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in processor.LIMITS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(processor, "instruction_sets", lambda: ("AVX2", "AVX-512"))
    assert not has()
    monkeypatch.setattr(processor, "instruction_sets", lambda: ("AVX2", "AVX-512", name))
    assert has()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert has()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert not has()


def test_limits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processor.LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert processor.processor()["cpu_limits"] == "ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2"


def test_reports_name_them_and_read_older_records() -> None:
    older = {"cpu": "AMD EPYC", "gpu": None, "threads": 2}
    assert device_name(older) == "AMD EPYC, 2 threads"
    newer = older | {"cpu_instruction_sets": "AVX2", "cpu_limits": None, "threads": 1}
    assert device_name(newer) == "AMD EPYC (AVX2), 1 thread"
    limited = newer | {"cpu_instruction_sets": "AVX2, AVX-512", "cpu_limits": "ONEDNN_MAX_CPU_ISA=AVX2"}
    assert cpu_words(limited) == "AMD EPYC (AVX2, AVX-512; ONEDNN_MAX_CPU_ISA=AVX2)"
