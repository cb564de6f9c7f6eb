"""The benchmark, the tuner and their helpers on a pretend GPU: all of the Python code above the hardware."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastres
from fastres.bench import run, tune
from fastres.bench.engines import peers
from fastres.bench.measure import ceilings, checking, host, kernel_timing, layers, timing
from fastres.bench.measure.calibration import calibrated
from fastres.bench.pretend_gpu.cuda import CARDS, Pretence
from fastres.bench.tuning import blocks, configurations, networks
from fastres.bench.tuning.progress import Progress, runs_right
from fastres.bench.visit import trials
from fastres.kernels import dispatch
from fastres.kernels.routing import tables
from fastres.kernels.routing.cards import H100, gpu_of
from fastres.kernels.routing.rules import ConvConfig, ConvShape
from fastres.kernels.routing.tables import VARIABLE, Layer, Table, from_json
from fastres.network import architectures
from fastres.network.architectures import Architecture
from fastres.roofline.ceilings import Ceilings

from .conftest import pretended

pytestmark = pytest.mark.interpreter

CUDA = torch.device("cuda", 0)
LIMITS = Ceilings(900, 3000)
TINY = Architecture("tiny", "bottleneck", (1,), (16,), stem="cifar", stem_widths=(16,), num_classes=10)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A tiny network, few repetitions, small ceiling measurements, and tables in the test's own folder."""
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", TINY)
    monkeypatch.setattr(ceilings, "_MATMUL_SIZE", {"cuda": 32, "cpu": 32})
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cuda": 4096, "cpu": 4096})
    monkeypatch.setattr(checking, "IMAGES_OF_SMALL_NETWORKS", 8)
    monkeypatch.setattr(timing, "QUICK", timing.Budget(0.0, 2, 2, 1))
    monkeypatch.setattr(timing, "REPLAYS", 1)
    monkeypatch.setattr(layers, "SECONDS", 0.0)
    monkeypatch.setattr(networks, "ROUNDS", 1)
    monkeypatch.setattr(networks, "REPLAYS", 1)
    monkeypatch.setattr(networks, "CHECKS", 1)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    yield
    tables.table.cache_clear()
    dispatch.route.cache_clear()


class Here:
    """A process pool in which everything compiles well."""

    def __init__(self, **_: object) -> None:
        self.asked: list[Any] = []

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], entry: object) -> Future[bool]:
        self.asked.append(entry)
        done: Future[bool] = Future()
        done.set_result(True)
        return done

    def map(self, function: Callable[..., Any], entries: list[object]) -> list[bool]:
        self.asked += entries
        return [True for _ in entries]

    def shutdown(self, **_: object) -> None:
        pass


# -- the tuner -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", ["T4", "RTX_5090"])
def test_the_tuner_writes_a_table_that_is_then_used(
    card: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(configurations, "TILES_TRIED", 1)
    monkeypatch.setattr(configurations, "VARIANTS_TRIED", 1)
    given = ["--model", "tiny", "--batch", "1", "--size", "8", "--out", str(tmp_path / "configs")]
    with pretended(CARDS[card]):
        assert tune.main(given) == 0
        path = tables.table_path(CARDS[card].name, tmp_path / "configs")
        table = from_json(path.read_text(), str(path))
        assert len(table.layers) == len(configurations.layers_of(["tiny"], [1], 8, torch.float16))
        assert [network.model for network in table.networks] == ["tiny"]
        assert all(entry.microseconds > 0 for entry in table.layers)
        assert json.loads(path.read_text())["arch"] == CARDS[card].arch
        # The tuned table is used, and nothing is tuned twice.
        expected = fastres.load("tiny", calibrated(TINY).state_dict(), num_classes=10)
        model = fastres.load("tiny", calibrated(TINY).state_dict(), num_classes=10, device="cuda")
        x = torch.randn(1, 3, 8, 8)
        torch.testing.assert_close(model(x.cuda()).cpu(), expected(x), atol=5e-2, rtol=5e-2)
        before = path.read_bytes()
        assert tune.main(given) == 0
        assert path.read_bytes() == before
    assert "FASTRES_CONFIGS" in capsys.readouterr().out


def progress(tmp_path: Path) -> Progress:
    return Progress(tmp_path / "table.json", {}, Table())


def test_joined_runs_are_checked_and_timed(pretence: Pretence, tmp_path: Path) -> None:
    """Runs on a Hopper card, with kernels that read and write through descriptors."""
    tools = blocks.block_tools(H100, Here(), progress(tmp_path))  # type: ignore[arg-type]
    cases = blocks.cases(["tiny"], [1], 8, torch.float16, H100)
    assert cases
    case = min(cases, key=lambda case: len(case.run.parts))
    configs = blocks.candidates(case.block, H100)[:1]
    found = blocks.tune_block(case, configs, tools)
    assert found is not None
    assert found.config == configs[0]
    assert found.microseconds > 0 < found.apart_microseconds
    assert any(name.startswith(("gemm", "conv_tma", "fused")) for name in pretence.launches)


def test_a_kernel_that_raises_or_is_wrong_is_left_out(pretence: Pretence, tmp_path: Path) -> None:
    known = progress(tmp_path)

    def raises() -> float:
        raise RuntimeError("no such kernel\nblockSize=[64, 128]\n")

    assert not runs_right(raises, "float16", "this", known)
    assert not runs_right(lambda: float("nan"), "float16", "that", known)
    assert runs_right(lambda: 1e-4, "float16", "another", known)
    assert [problem.split()[0] for problem in known.problems] == ["this", "that"]
    assert known.problems[0] == "this raises RuntimeError: no such kernel; blockSize=[64, 128]"


def test_a_configuration_that_raises_is_named_with_its_kernel(
    pretence: Pretence, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def raises(*given: Any) -> float:
        raise RuntimeError("invalid argument")

    monkeypatch.setattr(configurations, "error", raises)
    known = Progress(tmp_path / "conv.json", {}, Table())
    found = configurations.gpu_tools(H100, Here(), known)  # type: ignore[arg-type]
    layer = Layer(ConvShape(1, 4, 4, 64, 64, 1, 1, 1, 0), "float16", False)
    for kernel in ("gemm", "gemm_persistent"):
        assert not found.is_right(layer, ConvConfig(kernel, 64, 64, 64, 4, 3))
    assert [problem.split()[0] for problem in known.problems] == ["gemm", "gemm_persistent"]


def test_a_network_is_timed_in_every_way(pretence: Pretence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "LARGE_BATCH", 2)
    monkeypatch.setattr(networks, "MICRO_BATCHES", (1,))
    monkeypatch.setitem(architectures.ARCHITECTURES, "two", replace(TINY, depths=(1, 1), widths=(16, 16)))
    for batch in (1, 2):  # with early starts, in micro-batches
        found = networks.on_gpu("two", batch, 8, torch.float16, has_blocks=False)
        assert (found.model, found.batch) == ("two", batch)
        assert found.microseconds > 0 < found.plain_microseconds


# -- the benchmark -------------------------------------------------------------------------------------------


def test_the_benchmark_compares_engines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    peers = "eager_channels_last,folded_channels_last,eager_cudagraph,folded_cudagraph,onnxruntime_tensorrt,openvino"
    given = ["--device", "cuda", "--quick", "--model", "tiny", "--size", "8", "--batch", "1", "--peers", peers]
    with pretended():
        assert run.main([*given, "--json", "--out", str(tmp_path / "out"), "--only-data"]) == 0
    found = json.loads(capsys.readouterr().out)
    status = {(row["engine"], row["dtype"]): row["status"] for row in found["rows"]}
    assert status["fastres", "float16"] == status["folded_cudagraph", "float16"] == "ok"
    assert status["eager", "float32"] == "ok"
    assert status["openvino", "float16"] == "absent"
    assert found["environment"]["gpu"] == "H100"
    steps = {layer["step"] for layer in found["layers"]}
    assert {"stem", "layer1.0.conv2", "head"} <= steps
    ours = next(row for row in found["rows"] if row["engine"] == "fastres")
    assert ours["p50_ms"] > 0 < ours["peak_memory_mb"]


def test_cuda_graphs_of_others_return_what_they_wrap(pretence: Pretence) -> None:
    from fastres.bench.engines.peers import PEERS

    network = calibrated(TINY)
    x = torch.randn(2, 3, 8, 8, device="cuda")
    peers = {peer.name: peer for peer in PEERS}
    engine = peers["eager_cudagraph"].build(network, x)
    for value in (x, -x):
        expected = peers["eager_channels_last"].build(network, x)(value)
        torch.testing.assert_close(engine(value), expected)
    assert pretence.timeline.log.count("replay") == 2


def test_replays_keep_what_a_graph_has_only_the_addresses_of(
    pretence: Pretence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of weights that is freed may be overwritten before the next replay."""
    made: list[weakref.ref[object]] = []

    def noted(found: Any) -> Any:
        made.append(weakref.ref(found))
        return found

    eager, executor = peers._eager, trials._network
    monkeypatch.setattr(peers, "_eager", lambda *given: noted(eager(*given)))
    monkeypatch.setattr(trials, "_network", lambda small: tuple(map(noted, executor(small))))
    x = torch.randn(2, 3, 8, 8, device="cuda")
    names = ("eager_cudagraph", "folded_cudagraph")
    engines = [peer.build(calibrated(TINY), x) for peer in peers.PEERS if peer.name in names]
    graphs = list(trials.FAMILIES["graphs"].trials(H100, True))
    gc.collect()
    assert len(made) == len(engines) + 2 * len(graphs) == 4
    assert None not in [reference() for reference in made]


def test_steps_are_timed_by_events(pretence: Pretence) -> None:
    model = fastres.from_module(calibrated(TINY)).cuda()
    rows = layers.measure(model, torch.randn(1, 3, 8, 8, device="cuda").half(), LIMITS)
    assert [row.step for row in rows] == [step.name for step in model.outline]
    assert all(row.us > 0 for row in rows)


@pytest.mark.usefixtures("averages")
def test_host_time_is_that_of_a_replay(
    pretence: Pretence, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(host, "ROUNDS", 2)
    assert host.main(["--model", "tiny", "--out", str(tmp_path / "host.json")]) == 0
    found = json.loads((tmp_path / "host.json").read_text())
    assert (found["graph"], found["batch"]) == ("CUDA graph", 1)
    assert found["host_us"] > 0
    assert pretence.timeline.log.count("replay") > 3
    assert "µs per call" in capsys.readouterr().out


@pytest.mark.parametrize("measured", [True, False])
def test_kernel_benchmarks_time_graphs(pretence: Pretence, measured: bool) -> None:
    x = torch.ones(4, device=CUDA)

    class Benchmark:
        """Replaces the fixture of pytest-benchmark."""

        extra_info: dict[str, Any]
        stats = SimpleNamespace(stats=SimpleNamespace(median=0.02)) if measured else None

        def pedantic(self, call: Callable[[], None], rounds: int, warmup_rounds: int) -> None:
            call()

    benchmark = Benchmark()
    benchmark.extra_info = {}
    layer = kernel_timing.layers("conv", 1, torch.float16, "resnet18", 32)[0]
    kernel_timing._ceilings.cache_clear()
    kernel_timing.time_kernel(benchmark, lambda: x.add_(1), layer, torch.float16, "config")
    assert float(x[0]) == 2 + kernel_timing.LAUNCHES, "one plain call, and the launches of one replay"
    if measured:
        assert benchmark.extra_info["us"] == pytest.approx(0.02e6 / kernel_timing.LAUNCHES)
    else:
        assert benchmark.extra_info == {}


def test_memory_of_a_first_call_is_the_allocators(pretence: Pretence) -> None:
    kept = []
    work = lambda: kept.append(torch.zeros(1000, device=CUDA))  # noqa: E731
    _, seconds, growth = timing.measured(work, CUDA)
    assert growth == 4000
    assert seconds > 0
    assert "max_memory_allocated" in timing.memory_method(CUDA)
    assert gpu_of(CUDA) == H100
    assert replace(H100, name="x") != H100
