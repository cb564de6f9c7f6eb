"""Every configuration of every tuned table compiles well for its GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastres.errors import KernelError
from fastres.kernels.inspection import tuned_tables
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.routing.tables import FOLDER, Block, Layer, Table, Tuned, TunedBlock, to_json

LAYER = ConvShape(256, 14, 14, 256, 256, 3, 3, 1, 1)
MERGED = ConvShape(256, 56, 56, 64, 256, 1, 1, 1, 0)
INNER = ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1)


def write(path: Path, layers: tuple[Tuned, ...], blocks: tuple[TunedBlock, ...] = ()) -> Path:
    path.write_text(to_json(Table(layers, blocks), {"gpu": "NVIDIA H200", "arch": "sm_90"}))
    return path


def tuned(config: ConvConfig, batch: int = 256) -> Tuned:
    shape = ConvShape(batch, *(getattr(LAYER, name) for name in ("H", "W", "C", "K", "R", "S", "stride", "padding")))
    return Tuned(Layer(shape, "float16", False), config, 1.0, 2.0)


def test_each_kind_of_kernel_is_compiled_once(tmp_path: Path) -> None:
    conv = ConvConfig("conv", 128, 128, 64, 8, 3)
    path = write(
        tmp_path / "conv.json",
        (tuned(conv), tuned(conv, 64), tuned(ConvConfig("conv_tma", 128, 128, 64, 8, 3))),
        (
            TunedBlock(Block(MERGED, "float16", False, 256, 64, 1), ConvConfig("gemm", 128, 128, 64, 8, 3), 1.0, 2.0),
            TunedBlock(Block(INNER, "bfloat16", True, 256, 0, 1, 64), ConvConfig("fused", 128, 64, 64, 8, 3), 1.0, 2.0),
        ),
    )
    found = tuned_tables.entries(path)
    assert [entry.config.kernel for entry in found] == ["conv", "conv_tma", "gemm", "fused"]
    verdicts = [tuned_tables.judge(entry) for entry in found]
    assert [verdict.problem for verdict in verdicts] == [""] * 4
    assert all(0 < verdict.registers <= 255 for verdict in verdicts)
    assert len(tuned_tables.rows(verdicts)) == 5


def test_a_kernel_whose_tiles_depend_on_the_batch_is_compiled_for_each(tmp_path: Path) -> None:
    config = ConvConfig("conv_specialized", 128, 128, 64, 8, 4)
    path = write(tmp_path / "conv.json", tuple(tuned(config, batch) for batch in (8, 128, 256)))
    found = tuned_tables.entries(path)
    assert [entry.layer.shape.N for entry in found] == [8, 256], "128 and 256 images have the same tiles"


def test_bad_configurations_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "conv.json", (tuned(ConvConfig("conv", 128, 256, 128, 8, 5)),))
    (verdict,) = [tuned_tables.judge(entry) for entry in tuned_tables.entries(path)]
    assert "does not fit" in verdict.problem


def test_files_that_are_no_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "conv.json").write_text("{}")
    with pytest.raises(KernelError, match="is not a table"):
        tuned_tables.main([str(tmp_path / "conv.json")])


def test_the_tables_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuned_tables.main([]) == 0
    said = capsys.readouterr().out
    assert ("no table" in said) == (not list(FOLDER.glob("*/conv.json")))
