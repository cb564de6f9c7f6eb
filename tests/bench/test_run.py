"""Test ``bench.run``: wrong engines are not timed, absent engines have rows, and the results record what happened."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from fastres.bench import run
from fastres.bench.engines import peers
from fastres.bench.engines.eager import EagerResNet
from fastres.bench.engines.peers import EAGER, FASTRES, PEERS, Engine, Peer
from fastres.bench.measure import ceilings, layers
from fastres.bench.report import results
from fastres.bench.report.results import Results, Row
from fastres.bench.run import Options
from fastres.errors import DtypeError, FastresError

CPU = torch.device("cpu")


def options(
    *engines: Peer, dtypes: tuple[torch.dtype, ...] = (torch.float32,), batches: tuple[int, ...] = (2,)
) -> Options:
    return Options(("resnet20",), batches, 32, dtypes, CPU, engines, quick=True)


def counting(peer: Peer, calls: Counter[str], factor: float = 1.0, name: str | None = None) -> Peer:
    """Return ``peer`` with its calls counted and its logits multiplied by ``factor``."""

    def build(module: EagerResNet, x: Tensor) -> Engine:
        engine = peer.build(module, x)

        def call(x: Tensor) -> Tensor:
            calls[name or peer.name] += 1
            return engine(x) * factor

        return call

    return dataclasses.replace(peer, build=build, name=name or peer.name)


def by_engine(found: Results) -> dict[str, Row]:
    rows = {row.engine: row for row in found.rows}
    assert len(rows) == len(found.rows)
    return rows


FIRST_AND_CHECKS = 1 + 4  # the first call, then four batches of two images
TIMED = 1 + 2 * 2  # a warm-up, then two rounds of two calls each


@pytest.mark.usefixtures("small")
def test_8_bit_is_compared_with_eager_in_float32() -> None:
    found = run.run(options(EAGER, PEERS[1], FASTRES, dtypes=(torch.int8,)))
    rows = {row.engine: row for row in found.rows if row.dtype == "int8"}
    assert {name: row.status for name, row in rows.items()} == {
        "eager": "ok",
        PEERS[1].name: "absent",
        "fastres": "ok",
    }
    assert rows["fastres"].ratio_to_eager_float32 is not None
    assert {layer.op for layer in found.layers if layer.dtype == "int8"}
    assert found.environment["ceilings"]["int8"]["tflops"] > 0


@pytest.mark.usefixtures("small")
def test_a_wrong_engine_is_refused_and_not_timed() -> None:
    calls: Counter[str] = Counter()
    engines = (
        EAGER,
        counting(PEERS[1], calls, name="right"),
        counting(PEERS[1], calls, factor=1.001, name="perturbed"),
        counting(FASTRES, calls),
    )
    found = run.run(options(*engines))
    rows = by_engine(found)
    assert {name: row.status for name, row in rows.items()} == {
        "eager": "ok",
        "right": "ok",
        "perturbed": "wrong",
        "fastres": "ok",
    }
    wrong = rows["perturbed"]
    assert wrong.max_rel_error == pytest.approx(1e-3, rel=0.01)
    assert wrong.error_limit is not None
    assert wrong.error_limit < 1e-5
    assert "1.00e-03" in wrong.note
    assert wrong.p50_ms is wrong.images_per_s is wrong.ratio_to_eager is wrong.roofline_share is None
    assert wrong.samples == 0
    whole = FIRST_AND_CHECKS + TIMED
    assert calls == {"right": whole, "perturbed": FIRST_AND_CHECKS, "fastres": whole}
    assert results.exit_code(found.rows) == 0


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_fastres_fails_the_run(factor: float) -> None:
    calls: Counter[str] = Counter()
    found = run.run(options(EAGER, counting(FASTRES, calls, factor=factor)))
    assert by_engine(found)["fastres"].status == "wrong"
    assert by_engine(found)["eager"].status == "ok"
    assert calls == {"fastres": FIRST_AND_CHECKS}
    assert results.exit_code(found.rows) == 1
    assert results.from_dict(json.loads(found.as_json())) == found


@pytest.mark.usefixtures("small")
def test_rows_are_consistent() -> None:
    found = run.run(options(EAGER, FASTRES, batches=(1, 3)))
    assert [(row.batch, row.engine) for row in found.rows] == [
        (1, "eager"),
        (1, "fastres"),
        (3, "eager"),
        (3, "fastres"),
    ]
    eager = {row.batch: row.p50_ms for row in found.rows if row.engine == "eager"}
    for row in found.rows:
        assert row.p20_ms is not None
        assert row.p50_ms is not None
        assert row.p80_ms is not None
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.images_per_s == pytest.approx(1e3 * row.batch / row.p50_ms, rel=1e-3)
        assert row.ratio_to_eager == pytest.approx(eager[row.batch] / row.p50_ms, rel=1e-3)
        assert row.ratio_to_eager_float32 == pytest.approx(row.ratio_to_eager, rel=1e-3)
        assert row.roofline_share == pytest.approx(row.roofline_ms / row.p50_ms, rel=1e-3)
        assert row.max_rel_error is not None
        assert row.error_limit is not None
        assert 0 < row.max_rel_error <= row.error_limit
        assert row.first_call_s is not None
        assert row.first_call_s > 0
        assert row.samples == 2
    bounds = {row.roofline_ms for row in found.rows if row.batch == 1}
    assert len(bounds) == 1
    assert found.environment["ceilings"]["float32"]["tflops"] > 0
    assert found.environment["complete"] is True


def _broken(module: EagerResNet, x: Tensor) -> NoReturn:
    raise RuntimeError("no compiler found\nand a long trace")


@pytest.mark.usefixtures("small")
def test_an_engine_that_cannot_be_built_is_absent_with_its_reason() -> None:
    absent = Peer("elsewhere", "another device's engine", _broken, lambda device, dtype: "needs a TPU")
    found = run.run(options(EAGER, Peer("broken", "", _broken), absent, FASTRES))
    rows = by_engine(found)
    assert (rows["broken"].status, rows["broken"].note) == ("absent", "RuntimeError: no compiler found")
    assert (rows["elsewhere"].status, rows["elsewhere"].note) == ("absent", "needs a TPU")
    assert rows["fastres"].status == "ok"
    assert results.exit_code(found.rows) == 0


@pytest.mark.usefixtures("small")
def test_a_fastres_that_raises_fails_the_run() -> None:
    found = run.run(options(EAGER, dataclasses.replace(FASTRES, build=_broken)))
    assert by_engine(found)["fastres"].status == "failed"
    assert by_engine(found)["eager"].p50_ms is not None
    assert results.exit_code(found.rows) == 1


@pytest.mark.usefixtures("small")
def test_without_a_yardstick_there_is_no_run() -> None:
    with pytest.raises(
        FastresError, match="Eager PyTorch, the baseline of all comparisons, is absent here: RuntimeError: no comp"
    ):
        run.run(options(dataclasses.replace(EAGER, build=_broken), FASTRES))


@pytest.mark.usefixtures("small")
def test_a_dtype_that_the_device_lacks_is_said_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(dtype: torch.dtype) -> None:
        if dtype == torch.bfloat16:
            raise DtypeError("This CPU does not compute in bfloat16; it supports float32")

    monkeypatch.setattr(peers, "check_dtype", lacks)
    found = run.run(options(EAGER, FASTRES, dtypes=(torch.bfloat16, torch.float32)))
    assert [(row.dtype, row.engine, row.status) for row in found.rows] == [
        ("float32", "eager", "ok"),
        ("float32", "fastres", "ok"),
        ("bfloat16", "fastres", "unsupported"),
    ]
    assert set(found.environment["ceilings"]) == {"float32"}  # a matmul may take minutes if the CPU emulates the dtype
    assert found.rows[-1].note == "This CPU does not compute in bfloat16; it supports float32"
    assert results.exit_code(found.rows) == 0


@pytest.mark.usefixtures("small")
def test_nothing_runs_where_no_dtype_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(dtype: torch.dtype) -> NoReturn:
        raise DtypeError("not here")

    monkeypatch.setattr(peers, "check_dtype", lacks)
    monkeypatch.setattr(ceilings, "measure", lambda *_: pytest.fail("it was measured needlessly"))
    found = run.run(options(EAGER, FASTRES, dtypes=(torch.float16,)))
    assert [(row.dtype, row.engine, row.status, row.note) for row in found.rows] == [
        ("float16", "fastres", "unsupported", "not here")
    ]
    assert results.exit_code(found.rows) == 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("cold", [False, True])
def test_compilation_caches_are_empty_only_when_asked(
    cold: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen = []

    def build(module: EagerResNet, x: Tensor) -> Engine:
        seen.append(os.environ["TRITON_CACHE_DIR"])
        return EAGER.build(module, x)

    engines = (dataclasses.replace(EAGER, build=build), FASTRES)
    found = run.run(dataclasses.replace(options(*engines), cold=cold))
    assert (seen != [str(tmp_path)]) is cold
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
    assert ("empty" in found.environment["first_call"]) is cold


@pytest.mark.usefixtures("small")
def test_half_precision_has_the_float32_yardstick_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "check_dtype", lambda dtype: None)
    stand_in = dataclasses.replace(FASTRES, build=PEERS[1].build)  # not every CPU runs fastres in bfloat16
    found = run.run(options(EAGER, stand_in, dtypes=(torch.bfloat16,)))
    assert [(row.dtype, row.engine) for row in found.rows] == [
        ("float32", "eager"),
        ("bfloat16", "eager"),
        ("bfloat16", "fastres"),
    ]
    base, eager, fastres = (row.p50_ms or 0.0 for row in found.rows)
    assert found.rows[2].ratio_to_eager == pytest.approx(eager / fastres, rel=1e-3)
    assert found.rows[2].ratio_to_eager_float32 == pytest.approx(base / fastres, rel=1e-3)


@pytest.mark.usefixtures("small")
def test_results_are_kept_after_each_engine() -> None:
    kept: list[Results] = []
    found = run.run(options(EAGER, FASTRES, batches=(1, 2)), keep=kept.append)
    # For each setting: eager built, fastres built, both timed, setting complete.
    assert [len(each.rows) for each in kept] == [1, 2, 2, 2, 3, 4, 4, 4]
    assert [each.environment["complete"] for each in kept] == [False] * 7 + [True]
    assert kept[-1] == found


@pytest.mark.usefixtures("small")
def test_what_is_timed_outlives_an_engine_that_takes_the_process_with_it() -> None:
    kept: list[Results] = []

    def build(module: EagerResNet, x: Tensor) -> Engine:
        raise KeyboardInterrupt  # like a process that is stopped: nothing after this line runs

    compiler = Peer("compiler", "takes minutes", build, slow=True)
    later = Peer("later", "takes minutes too", EAGER.build, slow=True)
    with pytest.raises(KeyboardInterrupt):
        run.run(options(EAGER, compiler, later, FASTRES), keep=kept.append)
    assert {row.engine: row.p50_ms is not None for row in kept[-1].rows} == {"eager": True, "fastres": True}
    assert kept[-1].environment["complete"] is False
    found = run.run(options(EAGER, later, FASTRES), keep=kept.append)
    assert [row.engine for row in found.rows] == ["eager", "later", "fastres"], "in the order that the user gave"
    assert all(row.p50_ms for row in found.rows)
    assert len({row.samples for row in found.rows}) == 1, "at the end all are timed, interleaved"


@pytest.mark.usefixtures("small")
def test_float32_is_left_out_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "check_dtype", lambda dtype: None)
    stand_in = dataclasses.replace(FASTRES, build=PEERS[1].build)
    asked = dataclasses.replace(options(EAGER, stand_in, dtypes=(torch.bfloat16,)), float32=False)
    assert {row.dtype for row in run.run(asked).rows} == {"bfloat16"}


@pytest.mark.usefixtures("small")
def test_precision_settings_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    seen = []

    def build(module: EagerResNet, x: Tensor) -> Engine:
        seen.append((torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark))
        return EAGER.build(module, x)

    before = (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark)
    for tf32 in (False, True):
        engines = (dataclasses.replace(EAGER, build=build),)
        given = dataclasses.replace(options(*engines), tf32=tf32)
        run.run(given)
    assert seen == [("highest", False, True), ("high", True, True)]
    assert (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark) == before


def test_trained_weights_are_the_networks_own() -> None:
    network = run.load_network("resnet20_digits", "DEFAULT")
    import fastres

    expected = fastres.load("resnet20_digits").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    assert not network.training


@pytest.mark.usefixtures("small")
def test_fastres_is_timed_layer_by_layer_where_it_is_right() -> None:
    found = run.run(options(EAGER, FASTRES))
    assert [layer.step for layer in found.layers][:2] == ["stem", "layer1.0.conv1"]
    assert {(layer.model, layer.batch, layer.dtype) for layer in found.layers} == {("resnet20", 2, "float32")}
    assert run.run(options(EAGER, PEERS[1])).layers == ()


@pytest.mark.usefixtures("small")
def test_layers_that_cannot_be_measured_are_said_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> NoReturn:
        raise FastresError("no such step")

    monkeypatch.setattr(layers, "measure", fail)
    found = run.run(options(EAGER, FASTRES))
    assert by_engine(found)["fastres"].status == "ok"
    assert found.layers == ()
    assert "could not time each layer: no such step" in capsys.readouterr().err


def test_auto_is_the_devices_own_dtype() -> None:
    assert run._dtypes("auto", CPU) == (torch.float32,)
    assert run._dtypes("auto,float32", CPU) == (torch.float32,)
    assert run._dtypes("auto, bfloat16", torch.device("cuda", 0)) == (torch.float16, torch.bfloat16)
