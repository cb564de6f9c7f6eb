"""Test that each engine of the benchmark computes the network's logits or says why it is absent."""

from __future__ import annotations

import copy
import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.bench.engines import peers
from fastres.bench.engines.eager import EagerResNet
from fastres.bench.engines.peers import EAGER, FASTRES, PEERS, Peer
from fastres.bench.measure.calibration import calibrated
from fastres.bench.measure.checking import Checks, Error, error_limit, make_checks, relative_error
from fastres.bench.measure.comparison import in_8_bit
from fastres.errors import DtypeError, FastresError
from fastres.network.architectures import get_architecture
from tests.subjects import EVERY_STEP, shallow

COMPILE = ("compile", "compile_max_autotune")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BY_NAME = {peer.name: peer for peer in PEERS}
ON_CPU = [peer for peer in PEERS if peer.reason_absent(CPU, torch.float32) is None and peer.name not in COMPILE]

NAMES = ("resnet20", "plain20", "grouped")


@functools.cache
def network(name: str = "resnet20") -> EagerResNet:
    return calibrated(shallow("resnext50_32x4d") if name == "grouped" else get_architecture(name))


@functools.cache
def known(module: EagerResNet, size: int, dtype: torch.dtype) -> tuple[Checks, Error]:
    """Return the checks for an engine of ``module``, and eager's own error."""
    checks = make_checks(module, 2, size, CPU, dtype)
    with torch.inference_mode():
        reference = EAGER.build(module, checks.batches[0])
    return checks, relative_error(reference, EAGER, checks)


def assert_right(peer: Peer, module: EagerResNet, size: int = 32, dtype: torch.dtype = torch.float32) -> None:
    checks, eager = known(module, size, dtype)
    with torch.inference_mode():
        engine = peer.build(module, peer.example(checks.batches[0]))
    error = relative_error(engine, peer, checks)
    limit = error_limit(peer, dtype, eager, checks)
    assert error.within(limit), f"{error}, at most {limit}"


@pytest.mark.parametrize(
    ("name", "peer"),
    # fastres loads by name, and the small grouped network has no name.
    [(name, peer) for name in NAMES for peer in ON_CPU if (name, peer) != ("grouped", FASTRES)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_engines_are_right_and_leave_the_network_alone(name: str, peer: Peer) -> None:
    module = network(name)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    layers = [type(layer) for layer in module.modules()]
    assert_right(peer, module)
    assert [type(layer) for layer in module.modules()] == layers
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.build_int8], ids=lambda peer: peer.name)
def test_engines_run_the_model_in_8_bit(peer: Peer, tmp_path: Path) -> None:
    if reason := peer.absent(CPU, torch.int8):
        pytest.skip(reason)
    assert peer.build_int8 is not None
    file = in_8_bit(network(), 32, tmp_path)
    checks = make_checks(network(), 2, 32, CPU, torch.int8, fastres.load(file).plan)
    with torch.inference_mode():
        engine = peer.build_int8(file, checks.batches[0])
    error = relative_error(engine, peer, checks)
    assert error.within(error_limit(peer, torch.int8, Error(0, 0), checks))


def test_other_engines_are_absent_in_8_bit() -> None:
    assert BY_NAME["compile"].absent(CPU, torch.int8) == "it cannot run the plan in 8 bit"
    assert EAGER.absent(CPU, torch.int8) is None
    assert FASTRES.absent(CPU, torch.int8) is None
    assert FASTRES.absent(CUDA, torch.int8) == "fastres computes in int8 on the CPU only"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_jax_is_right_in_half_precision(dtype: torch.dtype) -> None:
    pytest.importorskip("jax")
    assert_right(BY_NAME["jax"], network(), dtype=dtype)


def test_jax_runs_every_kind_of_step() -> None:
    pytest.importorskip("jax")
    assert_right(BY_NAME["jax"], calibrated(EVERY_STEP), size=75)


def test_jax_pools_like_torch_and_takes_its_own_arrays() -> None:
    jax = pytest.importorskip("jax")
    peer = BY_NAME["jax"]
    assert_right(peer, network("resnet18"), size=96)
    x = torch.randn(2, 3, 8, 9)
    array = peer.example(x)
    assert isinstance(array, jax.Array)
    assert array.shape == (2, 8, 9, 3)
    assert torch.equal(peer.as_tensor(array), x.permute(0, 2, 3, 1))


def test_folded_networks_have_no_batch_norm() -> None:
    with torch.inference_mode():
        folded = peers._folded(network(), torch.zeros(1, 3, 32, 32))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    convolutions = [layer for layer in folded.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 19
    assert all(layer.bias is not None for layer in convolutions)


def test_examples_are_in_the_engines_layout() -> None:
    x = torch.randn(2, 3, 8, 9)
    for name, strides in (("eager", x.stride()), ("eager_channels_last", (216, 1, 27, 3)), ("fastres", x.stride())):
        given = BY_NAME[name].example(x)
        assert given.stride() == strides
        assert torch.equal(given, x)


def test_graphs_are_absent_without_cuda_and_present_with_it() -> None:
    for name in ("eager_cudagraph", "folded_cudagraph"):
        assert "CUDA GPU" in (BY_NAME[name].reason_absent(CPU, torch.float32) or "")
        assert BY_NAME[name].reason_absent(CUDA, torch.float16) is None


@pytest.mark.parametrize("package", ["jax", "torch_tensorrt"])
def test_packages_that_are_not_installed_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    reason = BY_NAME[package].reason_absent(CUDA, torch.float16) or ""
    assert reason.startswith(f"{package} is not installed: pip install")


def test_tensorrt_is_absent_without_an_nvidia_gpu() -> None:
    for name in ("torch_tensorrt", "onnxruntime_tensorrt"):
        assert BY_NAME[name].reason_absent(CPU, torch.float32) == "TensorRT needs an NVIDIA GPU"


def test_torch_tensorrt_is_there_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", None)
    assert BY_NAME["torch_tensorrt"].reason_absent(CUDA, torch.float16) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert BY_NAME["torch_tensorrt"].reason_absent(CUDA, torch.float16) == "TensorRT needs an NVIDIA GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="JAX may have a GPU here")
def test_a_jax_without_a_gpu_is_absent_on_one() -> None:
    jax = pytest.importorskip("jax")
    reason = BY_NAME["jax"].reason_absent(CUDA, torch.float16)
    assert reason == f"this jax {jax.__version__} has no GPU backend: pip install 'jax[cuda12]'"


def test_fastres_says_which_dtypes_this_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(dtype: torch.dtype) -> None:
        if dtype == torch.bfloat16:
            raise DtypeError("This CPU does not compute in bfloat16")

    monkeypatch.setattr(peers, "check_dtype", lacks)
    assert FASTRES.reason_absent(CPU, torch.bfloat16) == "This CPU does not compute in bfloat16"
    assert FASTRES.reason_absent(CPU, torch.float32) is None
    assert FASTRES.reason_absent(CUDA, torch.bfloat16) is None


def test_fastres_runs_the_networks_own_weights() -> None:
    other = copy.deepcopy(network())
    with torch.no_grad():
        other.fc.bias.add_(1.0)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        found: list[Tensor] = [FASTRES.build(module, x)(x) for module in (network(), other)]
    assert torch.allclose(found[1] - found[0], torch.ones(2, 10), atol=1e-4)


def test_selection_keeps_eager_and_fastres_and_the_order() -> None:
    assert peers.select(None) == PEERS
    assert [peer.name for peer in peers.select("")] == ["eager", "fastres"]
    assert [peer.name for peer in peers.select("compile, eager_channels_last")] == [
        "eager",
        "eager_channels_last",
        "compile",
        "fastres",
    ]
    rest = [peer.name for peer in peers.select(None, "jax, eager,compile_max_autotune")]
    assert rest == [name for name in BY_NAME if name not in ("jax", "compile_max_autotune")]


def test_unknown_engines_are_named() -> None:
    with pytest.raises(FastresError, match=r"'compil'\. Did you mean 'compile' or .*eager_channels_last"):
        peers.select("eager,compil")
    with pytest.raises(FastresError, match=r"'compil'"):
        peers.select(None, "compil")


def test_names_are_unique_and_eager_comes_first() -> None:
    assert len(BY_NAME) == len(PEERS)
    assert PEERS[0] is EAGER
    assert FASTRES in PEERS
