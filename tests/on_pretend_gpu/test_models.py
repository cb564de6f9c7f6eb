"""Whole models on a pretend GPU: the public API in every mode, on every generation of cards."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.bench.pretend_gpu.cuda import CARDS, Pretence
from fastres.errors import DeviceError, FastresError
from fastres.executors import graphs
from fastres.executors.gpu import GpuExecutor
from fastres.executors.graphs import GraphExecutor
from fastres.kernels import dispatch, launch
from fastres.kernels.dispatch import UntunedGpuWarning
from fastres.kernels.routing.cards import H100, Gpu, gpu_of
from fastres.kernels.routing.tables import Index, Network, Table
from fastres.model import compiled
from fastres.network.architectures import Architecture
from tests.measures import Yardstick
from tests.subjects import EVERY_STEP

from .conftest import pretended

pytestmark = pytest.mark.interpreter

TINY = Architecture("tiny", "basic", (1,), (16,), stem="cifar", stem_widths=(16,), num_classes=10)
SIZE = (
    8  # pixels: the smallest size that a network takes, because the interpreter's time grows with the number of tiles
)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return calibrated(TINY)


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 3 images run as 4."""
    monkeypatch.setattr(graphs, "EXACT", 2)


@pytest.fixture
def model(network: nn.Module, pretence: Pretence) -> fastres.Model:
    return fastres.from_module(network).cuda()


def batch(n: int, seed: int = 0) -> Tensor:
    return smooth_images(n, SIZE, SIZE, seed=seed).cuda()


def graphs_of(model: fastres.Model) -> GraphExecutor:
    executor = model._executor
    assert isinstance(executor, GraphExecutor)
    return executor


@pytest.mark.parametrize("card", ["T4", "A100", "RTX_3090", "L40S", "H100", "RTX_5090"])
def test_every_generation_of_cards(network: nn.Module, card: str) -> None:
    expected = fastres.from_module(network)(smooth_images(2, SIZE, SIZE))
    with pretended(CARDS[card]):
        model = fastres.from_module(network).cuda()
        assert (model.dtype, model.device) == (torch.float16, torch.device("cuda", 0))
        for _ in range(2):
            torch.testing.assert_close(model(batch(2)).cpu(), expected, atol=2e-2, rtol=2e-2)
        assert dispatch.tuned(gpu_of(model.device)) is not None
        assert "conv" in str(model.explain(2, SIZE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("small_buckets")
def test_results_are_as_good_on_every_call(pretence: Pretence, dtype: torch.dtype) -> None:
    """Each kind of step, in a bucket that is padded. The first call runs without a graph, the others replay."""
    network = calibrated(replace(TINY, squeeze_excitation=True))
    model = fastres.from_module(network, dtype=dtype).cuda()
    inputs = [smooth_images(3, SIZE, SIZE, seed=seed) for seed in range(2)]
    results = [model(x.cuda()) for x in (*inputs, *inputs)]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    Yardstick(network, *inputs).check(lambda x: results[[torch.equal(x, known) for known in inputs].index(True)].cpu(),
                                      dtype, batches=2)  # fmt: skip


def test_every_kind_of_step_replays(pretence: Pretence) -> None:
    network = calibrated(EVERY_STEP)
    model = fastres.from_module(network).cuda()
    x = smooth_images(1, 33, 35)
    first, *others = [model.features(x.cuda()) for _ in range(2)]
    for found in others:
        assert all(torch.equal(found[name], first[name]) for name in first)
    expected = fastres.from_module(network).features(x)
    for name, value in first.items():
        torch.testing.assert_close(value.cpu().float(), expected[name], atol=5e-2, rtol=5e-2)


@pytest.mark.usefixtures("small_buckets")
def test_feature_maps_of_a_bucket_are_the_callers_rows(model: fastres.Model) -> None:
    x_nan = batch(4)
    x_nan[3:] = torch.nan
    x = x_nan[:3]
    first = model.features(x)
    model.features(x)
    model.features(x_nan)  # leaves NaN in the padding rows
    again = model.features(x)
    for name, value in again.items():
        assert value.shape[0] == 3
        assert value.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(value, first[name])
    assert torch.equal(model.embed(x), model.embed(x_nan)[:3])


@pytest.mark.usefixtures("small_buckets")
def test_pixels_normalised_in_the_kernel(model: fastres.Model, network: nn.Module) -> None:
    x = pixels(smooth_images(3, SIZE, SIZE))
    expected = fastres.from_module(network)(x)
    for _ in range(2):
        torch.testing.assert_close(model(x.cuda()).cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("averages")
def test_warmup_covers_what_calls_feed(model: fastres.Model, pretence: Pretence) -> None:
    model.warmup((1, 2), SIZE)
    known = {(key[0][0], key[1]) for key in graphs_of(model)._captured}
    assert known == {(n, dtype) for n in (1, 2) for dtype in (torch.float32, torch.float16, torch.uint8)}
    captures = pretence.timeline.log.count("capture_begin")
    for x in (batch(1), batch(2).half(), pixels(batch(1))):
        model(x)
    assert pretence.timeline.log.count("capture_begin") == captures
    model.warmup(3, SIZE, torch.uint8)
    model.warmup(4, SIZE, [torch.float32])
    known = {(key[0][0], key[1]) for key in graphs_of(model)._captured}
    assert {found for found in known if found[0] > 2} == {(3, torch.uint8), (4, torch.float32)}


@pytest.mark.usefixtures("averages")
def test_predict_is_warm_after_warmup(model: fastres.Model, pretence: Pretence) -> None:
    model.transforms = replace(model.transforms, resize=SIZE, crop=SIZE)
    model.warmup(2, SIZE)
    images = [np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8) for seed in range(4)]
    begun = pretence.timeline.log.count("capture_begin")
    replays = pretence.timeline.log.count("replay")
    assert len(model.predict(images, 2, batch_size=2)) == 4
    assert pretence.timeline.log.count("capture_begin") == begun
    assert pretence.timeline.log.count("replay") == replays + 2


def test_other_streams_may_read_the_weights_at_once(model: fastres.Model) -> None:
    """The first call of one thread packs them on its stream. The fixture checks for races."""
    x = batch(1)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        first = model(x)
    second = model(x)
    assert torch.equal(first.cpu(), second.cpu())


def test_threads_share_a_model(model: fastres.Model) -> None:
    inputs = [batch(n, seed=n) for n in (1, 2)]
    expected = [model(x) for x in inputs]
    torch.cuda.synchronize()
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode(bool(index)):
            for _ in range(2):
                found[index].append(model(inputs[index]).cpu())

    threads = [threading.Thread(target=work, args=(index,)) for index in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, results in found.items():
        assert len(results) == 2
        assert all(torch.equal(result, expected[index].cpu()) for result in results)


def test_in_a_callers_graph(model: fastres.Model) -> None:
    x = batch(2)
    expected = model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = model(x)
    assert bool(found.isnan().all())
    graph.replay()
    assert torch.equal(found, expected)


def test_a_first_call_in_a_callers_graph_says_what_to_do(model: fastres.Model) -> None:
    x = batch(2)
    with pytest.raises(DeviceError, match="warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(x)
    assert torch.cuda.current_stream() is torch.cuda.default_stream(), "the capture ended properly"
    assert model(x).shape == (2, 10)


def test_moving_a_model(model: fastres.Model) -> None:
    assert model.cpu().dtype == torch.float32
    assert model.to("cuda").dtype == torch.float16
    assert model.half().cuda().dtype == torch.float16
    assert copy.deepcopy(model).device == model.device
    with pytest.raises(DeviceError, match="ordinal"):
        model.to("cuda:1")
    with pytest.raises(FastresError, match="cuda:0"):
        model(torch.zeros(1, 3, SIZE, SIZE))
    assert model(torch.zeros(0, 3, SIZE, SIZE, device="cuda")).shape == (0, 10)
    with pytest.raises(FastresError, match="elements or more"):
        model._executor.runner._schedule((1, 1 << 16, 1 << 15, 3), ("logits",))  # type: ignore[attr-defined]


def test_weights_loaded_anew_make_new_graphs(model: fastres.Model) -> None:
    x = batch(1)
    before = [model(x) for _ in range(3)][-1]
    state = {name: value * 2 if name == "fc.weight" else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert not torch.equal(before, model(x))


def test_inductors_graphs_leave_the_op_out() -> None:
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no such tag")
    assert torch.Tag.cudagraph_unsafe in torch.ops.fastres.run.default.tags
    with pytest.raises(FastresError, match="compile again"):
        compiled._find(-1)


# -- float32 precision ---------------------------------------------------------------------------------------


@contextmanager
def torchs_defaults() -> Iterator[None]:
    backends = torch.backends
    before = backends.cuda.matmul.fp32_precision, backends.fp32_precision
    try:
        backends.cuda.matmul.fp32_precision = backends.fp32_precision = "none"
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        backends.cuda.matmul.fp32_precision, backends.fp32_precision = before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda: None, "ieee"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (lambda: torch.set_float32_matmul_precision("medium"), "tf32"),
        (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"), "ieee"),
        (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends, "fp32_precision", "ieee"), "ieee"),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
    ],
)
def test_each_of_torchs_settings_is_read(change, expected: str) -> None:  # type: ignore[no-untyped-def]
    with torchs_defaults():
        change()
        assert launch.float32_precision() == expected


def test_a_call_after_the_newer_setting(model: fastres.Model) -> None:
    x = batch(1)
    with torchs_defaults():
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert model(x).shape == (1, 10)


# -- tuned ways to run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [False, True])
def test_tuned_ways_to_run_a_network(
    network: nn.Module, pretence: Pretence, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """Tests micro-batches, and kernels that start early (only the host code)."""
    way = Network("custom", 3, SIZE, SIZE, "float16", False, "" if early else "layer1", 0 if early else 2, early)
    model = fastres.from_module(network).cuda()
    x = batch(3)
    plain = GpuExecutor(model.plan).run(x)[0]
    way = replace(way, model=model.architecture.name)
    monkeypatch.setattr(dispatch, "tuned", lambda gpu: Index(Table((), (), (way,))))
    starts, real = [], launch.early_launches
    monkeypatch.setattr(launch, "early_launches", lambda: starts.append("early") or real())
    launches = len(pretence.launches)
    (found,) = GpuExecutor(model.plan).run(x)
    assert torch.equal(found, plain)
    assert starts == ["early"] * early
    if not early:
        assert pretence.launches[launches:].count("stem_kernel") == 2


def test_unknown_gpus_are_said_to_be_untuned(network: nn.Module, tmp_path: Path) -> None:
    card = Gpu("A card of tomorrow", "sm_130", 200, 232_448)
    dispatch._hint.cache_clear()
    with pretended(card), pytest.warns(UntunedGpuWarning, match="A card of tomorrow"):
        fastres.from_module(network).cuda()(batch(1))
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert H100.arch == "sm_90"
