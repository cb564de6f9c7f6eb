"""The pretend GPU itself: it does what a GPU does and rejects what a GPU rejects."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.bench.pretend_gpu import cuda as pretend
from fastres.bench.pretend_gpu.cuda import CARDS, Pretence
from fastres.bench.pretend_gpu.streams import CaptureError
from fastres.errors import DeviceError
from fastres.kernels import launch
from fastres.kernels.routing import cards
from tests.on_pretend_gpu.conftest import pretended

pytestmark = pytest.mark.interpreter

CUDA = torch.device("cuda", 0)


@triton.jit
def double_kernel(y_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def copy_kernel(y_desc, x_desc):
    y_desc.store([0, 0], x_desc.load([0, 0]))


def double(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    double_kernel[(1,)](y, x, x.numel(), BLOCK=16)
    return y


# -- tensors -------------------------------------------------------------------------------------------------


def test_tensors_are_of_the_gpu(pretence: Pretence) -> None:
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1, 2], device="cuda"),
        torch.as_tensor([1.0], device="cuda"),
        torch.arange(3, device="cuda"),
        torch.randn(2, device=CUDA, generator=torch.Generator("cuda").manual_seed(3)),
        torch.ones(2).to("cuda"),
        torch.ones(2).cuda(),
        nn.Linear(2, 2).cuda().weight.data,
        nn.Linear(2, 2).to("cuda", torch.float16).weight.data,
        torch.full((2,), 3, dtype=torch.uint8, device="cuda") + 1,
        copy.deepcopy(nn.Linear(2, 2).cuda()).weight.data,
    ]
    assert all(tensor.is_cuda and tensor.device == CUDA for tensor in made)
    assert all(tensor.cpu().device.type == "cpu" for tensor in made)
    assert torch.equal(torch.arange(3, device="cuda").cpu(), torch.arange(3))
    again = torch.randn(2, device=CUDA, generator=torch.Generator("cuda").manual_seed(3))
    assert torch.equal(made[4], again)
    assert "cuda:0" in repr(made[0])
    with pytest.raises(TypeError, match="cuda:0"):
        made[0].numpy()
    with pytest.raises(RuntimeError, match="same device"):
        made[0] + torch.zeros(2)
    assert (made[0] + torch.tensor(1.0)).is_cuda, "a scalar may be on the CPU"
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        made[0].to("cuda:1")


def test_views_share_memory_and_layouts_are_kept(pretence: Pretence) -> None:
    x = torch.zeros(2, 3, 4, 4, device="cuda")
    x[1, :, ::2].fill_(1)
    assert float(x.sum()) == 3 * 2 * 4
    last = x.to(memory_format=torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert last.cpu().is_contiguous(memory_format=torch.channels_last)
    assert x.data_ptr() % 16 == 0
    assert x.flatten()[1:].data_ptr() % 16 == 4
    taken = torch.empty(0, device="cuda")
    torch.add(x, 1, out=taken)
    assert torch.equal(taken, x + 1)


def test_fresh_memory_is_not_zero(pretence: Pretence) -> None:
    assert bool(torch.empty(5, device="cuda").isnan().all())
    assert bool((torch.empty(5, dtype=torch.int32, device="cuda") != 0).all())


def test_inference_tensors_are_inference_tensors(pretence: Pretence) -> None:
    with torch.inference_mode():
        x = torch.zeros(2, device="cuda")
    with pytest.raises(RuntimeError, match="outside InferenceMode"):
        x.copy_(torch.ones(2, device="cuda"))
    x.clone().add_(1)


def test_memory_is_counted_and_limited(pretence: Pretence) -> None:
    before = torch.cuda.memory_allocated()
    x = torch.empty(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4000
    del x
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() >= before + 4000
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before
    pretence.memory.largest = 100
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.zeros(26, device="cuda")
    torch.zeros(25, device="cuda")


# -- kernels -------------------------------------------------------------------------------------------------


def test_kernels_run_on_the_gpus_tensors_alone(pretence: Pretence) -> None:
    x = torch.arange(5.0, device="cuda")
    assert torch.equal(double(x), 2 * x)
    assert pretence.launches == ["double_kernel"]
    with pytest.raises(ValueError, match="cpu tensor"):
        double_kernel[(1,)](torch.empty(5), x, 5, BLOCK=16)
    assert torch.equal(double(torch.arange(5.0)), 2 * torch.arange(5.0)), (
        "CPU tensors run in the interpreter as without a GPU"
    )
    boxes = torch.arange(64.0, device="cuda").view(4, 16), torch.empty(4, 16, device="cuda")
    source, target = (TensorDescriptor.from_tensor(box, [4, 16]) for box in boxes)
    copy_kernel[(1,)](target, source)
    assert torch.equal(*boxes)


# -- graphs --------------------------------------------------------------------------------------------------


def capture(work, graph: torch.cuda.CUDAGraph | None = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:  # type: ignore[no-untyped-def]
    graph = graph or torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = work()
    return graph, y


def test_a_capture_computes_nothing_and_a_replay_all(pretence: Pretence) -> None:
    x = torch.ones(4, device="cuda")
    double(x)
    graph, y = capture(lambda: double(x.add_(1)) + 1)
    assert bool(y.isnan().all())
    assert torch.equal(x.cpu(), torch.ones(4))
    for step in (2, 3):
        graph.replay()
        assert torch.equal(y.cpu(), torch.full((4,), 2.0 * step + 1))
    x.fill_(9)
    graph.replay()
    assert torch.equal(y.cpu(), torch.full((4,), 21.0))


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.zeros(4)),
        lambda x: torch.equal(x, x),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
        lambda x: double(x),
        lambda x: torch.cuda.CUDAGraph().capture_begin(),
        lambda x: torch.cuda.current_stream().wait_event(torch.cuda.default_stream().record_event()),
    ],
    ids=["item", "cpu", "copy", "equal", "synchronize", "stream", "first launch", "nested", "event"],
)
def test_what_breaks_a_capture(pretence: Pretence, forbidden) -> None:  # type: ignore[no-untyped-def]
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(CaptureError, match="previous error"), torch.cuda.graph(graph), pytest.raises(CaptureError):
        forbidden(x)
    with pytest.raises(RuntimeError, match="without a preceding"):
        graph.replay()
    # As with CUDA, torch's context manager leaves the thread on the capture's stream and the allocator in its pool.
    assert torch.cuda.current_stream() != torch.cuda.default_stream()
    assert pretence.timeline.pools_open


def test_a_kernel_is_loaded_for_what_it_is_specialised_on(pretence: Pretence) -> None:
    x = torch.ones(17, device="cuda")
    double(x[:4])
    graph = torch.cuda.CUDAGraph()
    not_loaded = pytest.raises(CaptureError, match="double_kernel is not loaded")
    with pytest.raises(CaptureError, match="previous error"), torch.cuda.graph(graph), not_loaded:
        double(x[1:5])  # not aligned
    torch.cuda.set_stream(torch.cuda.default_stream())
    double(x[1:5])
    capture(lambda: double(x[1:5]))
    capture(lambda: double(x[:3]))  # 3 and 4 are alike, 16 is not
    with pytest.raises(CaptureError):
        capture(lambda: double(x[:16]))


def test_a_capture_of_one_thread_lets_others_work(pretence: Pretence) -> None:
    errors: dict[str, BaseException | None] = {}

    def work(mode: str) -> None:
        errors[mode] = None
        try:
            torch.zeros(2, device="cuda").cpu()
        except CaptureError as error:
            errors[mode] = error

    for mode in ("thread_local", "global"):
        thread = threading.Thread(target=work, args=(mode,))
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode=mode)
            thread.start()
            thread.join()
            if mode == "thread_local":
                graph.capture_end()
    assert errors["thread_local"] is None
    assert errors["global"] is not None


def test_memory_of_captures_can_run_out(pretence: Pretence) -> None:
    pretence.memory.for_captures = 100
    capture(lambda: torch.empty(20, device="cuda"))
    with pytest.raises(torch.OutOfMemoryError):
        capture(lambda: torch.empty(20, device="cuda"))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.empty(2000, device="cuda")


# -- streams -------------------------------------------------------------------------------------------------


def test_accesses_that_nothing_orders_are_noted() -> None:
    with pretended() as pretence:
        x, races = torch.zeros(4, device="cuda"), pretence.timeline.races
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            y = x + 1
        assert len(races) == 1
        assert "reads [4]" in races[0]
        side.synchronize()
        y + 1
        assert len(races) == 1, "the CPU has waited for it"
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            x.add_(1)
        assert len(races) == 1
        torch.cuda.current_stream().wait_stream(side)
        x.add_(1)
        assert len(races) == 1
        side.wait_event(torch.cuda.current_stream().record_event())
        with torch.cuda.stream(side):
            x.sum()
        x.add_(1)
        assert len(races) == 2, "written while another stream still reads"


def test_memory_freed_while_in_use_is_noted() -> None:
    with pretended() as pretence:
        side, races = torch.cuda.Stream(), pretence.timeline.races
        for noted in (True, False):
            x = torch.zeros(4, device="cuda")
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.sum()
            if noted:
                x.record_stream(side)
            assert races == []
            del x
        assert len(races) == 1
        assert "freed" in races[0]


def test_events_have_times() -> None:
    times = iter(range(100))
    with pretended(clock=lambda: float(next(times))):
        begin, end, untimed = (torch.cuda.Event(enable_timing=timed) for timed in (True, True, False))
        with pytest.raises(ValueError, match="recorded"):
            begin.elapsed_time(end)
        begin.record()
        end.record()
        end.synchronize()
        assert begin.elapsed_time(end) == 1000
        assert end.query()
        with pytest.raises(ValueError, match="enable_timing"):
            begin.elapsed_time(untimed)
        assert triton.testing.do_bench(lambda: None, warmup=1, rep=1) == 1000


# -- cards ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_cards_are_seen_as_they_are_described(card: cards.Gpu) -> None:
    with pretended(card, memory=16 << 30):
        assert cards.gpu_of(CUDA) == card
        assert torch.cuda.get_device_name() == card.name
        assert torch.cuda.mem_get_info()[1] == 16 << 30


def test_all_is_undone() -> None:
    before = (torch.cuda.Stream, torch.Tensor.to, torch.tensor, torch.Generator, torch.cuda.graph)
    with pretended():
        assert torch.cuda.is_available()
        kept = torch.zeros(2, device="cuda")
    assert (torch.cuda.Stream, torch.Tensor.to, torch.tensor, torch.Generator, torch.cuda.graph) == before
    assert not torch.cuda.is_available()
    with pytest.raises(RuntimeError):
        torch.zeros(2, device="cuda")
    with pytest.raises(RuntimeError):
        kept + 1


def test_it_needs_the_interpreter_and_no_other_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(), pytest.raises(DeviceError, match="without CUDA"), pretend.pretend_gpu():
        pass
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(cards, "INTERPRETED", False)
    with pytest.raises(DeviceError, match="TRITON_INTERPRET=1"), pretend.pretend_gpu():
        pass


def test_a_module_runs_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    pretended().__class__  # skips if there can be no pretend GPU  # noqa: B018
    with pytest.raises(SystemExit) as ended:
        pretend.main(["--card", "T4", "-m", "fastres", "env"])
    assert ended.value.code == 0
    assert "Tesla T4" in capsys.readouterr().out


def test_processes_it_starts_compile(pretence: Pretence) -> None:
    asked = "import triton; print(triton.knobs.runtime.interpret)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert triton.knobs.runtime.interpret
