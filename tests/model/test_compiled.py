"""A model under PyTorch's compilers, tracers and transforms: the right result of its own weights, or a named error."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastres
from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.errors import FastresError, GradientError, InputError
from fastres.network.architectures import get_architecture
from tests.measures import relative_error
from tests.subjects import EVERY_STEP, shallow

X = smooth_images(2, 40, 48, seed=3)
# Together they have every kind of stem, block, shortcut and gate.
SUBJECTS = {
    "resnet20": get_architecture("resnet20"),
    "plain20": get_architecture("plain20"),
    "resnext": replace(shallow("resnext50_32x4d"), widths=(16, 32), stem_widths=(16,), groups=4, width_per_group=32),
    "seresnet-d": EVERY_STEP,
}


def loaded(name: str = "resnet20", seed: int = 1) -> fastres.Model:
    arch = SUBJECTS[name]
    state = calibrated(arch, seed=seed).state_dict()
    return fastres.Model(state, arch, transforms=fastres.Transforms(64, 64))


def run_saved(program: torch.export.ExportedProgram) -> Any:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def traced(model: nn.Module, x: Tensor) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,)), file)
    file.seek(0)
    return torch.jit.load(file)


TRACERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.export": lambda model, x: run_saved(torch.export.export(model, (x,))),
    "torch.jit.trace": traced,
    "torch.fx": lambda model, x: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, x: make_fx(model)(x),
}


CASES = [("torch.export", name) for name in SUBJECTS]
CASES += [(tracer, name) for tracer in TRACERS if tracer != "torch.export" for name in ("resnet20", "seresnet-d")]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize(("tracer", "name"), CASES)
def test_programs_hold_the_network_and_its_weights(tracer: str, name: str) -> None:
    model = loaded(name)
    expected = model(X)
    program = TRACERS[tracer](model, X)
    if tracer in ("torch.export", "torch.jit.trace"):  # saved; the others refer to the model's own tensors
        model.load_state_dict(loaded(name, seed=2).state_dict())
    del model
    gc.collect()
    assert relative_error(program(X), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:torch.tensor results are registered as")
@pytest.mark.parametrize("tracer", ["torch.export", "torch.jit.trace", "make_fx"])
def test_programs_of_raw_pixels_and_of_larger_modules(tracer: str) -> None:
    model = loaded()
    picture = pixels(X)
    assert relative_error(TRACERS[tracer](model, picture)(picture), model(picture)) < 1e-5
    outer = nn.Sequential(model, nn.ReLU(), nn.Linear(10, 3)).eval().requires_grad_(False)
    assert relative_error(TRACERS[tracer](outer, X)(X), outer(X)) < 1e-5


def test_a_program_of_any_size() -> None:
    model = loaded()
    least = {"n": 1, "h": 16, "w": 16}
    batch, height, width = (torch.export.Dim(name, min=size, max=256) for name, size in least.items())
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch, 2: height, 3: width},))
    for shape in ((3, 33, 41), (5, 64, 32)):
        x = smooth_images(*shape, seed=7)
        assert relative_error(program.module()(x), model(x)) < 1e-5
    assert {name for name, _ in program.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_a_program_in_another_process_runs_its_own_weights(tmp_path: Path) -> None:
    model = loaded()
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "program.pt2")
    torch.save({"x": X, "expected": model(X)}, tmp_path / "data.pt")
    code = (
        "import torch, fastres; others = [fastres.load('resnet20', None) for _ in range(3)]; "
        "data = torch.load('data.pt'); found = torch.export.load('program.pt2').module()(data['x']); "
        "print(float((found - data['expected']).norm() / data['expected'].norm()) < 1e-5)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_the_key_of_another_process_finds_no_model() -> None:
    models = [loaded(seed=seed) for seed in range(3)]
    keys = {model._key for model in models}
    assert len(keys) == 3
    assert all(len(key) == 32 for key in keys), "random, so that no other process has the same"
    key = models[0]._key
    del models
    gc.collect()
    for unknown in (key, "0" * 32):
        with pytest.raises(
            FastresError, match="no longer exists, was moved or replaced, or belongs to another process"
        ):
            torch.ops.fastres.run(X, unknown, "logits")


@pytest.mark.slow
def test_compiled_code_follows_the_weights() -> None:
    model = loaded()
    compiled = torch.compile(lambda x: model(x) * 1, backend="aot_eager", fullgraph=True)
    other = loaded(seed=2)
    key = model._key
    assert torch.equal(compiled(X), model(X))
    model.load_state_dict(other.state_dict())
    assert torch.equal(compiled(X), other(X))
    with torch.no_grad():
        model.fc.bias.data.add_(1)  # type: ignore[union-attr,operator]
    assert relative_error(compiled(X), other(X) + 1) < 1e-6
    assert model._key == key, "no other code is needed"
    model.fc = nn.Linear(64, 3)
    assert compiled(X).shape == (2, 3)
    assert torch.equal(compiled(X), model(X))


@pytest.mark.slow
def test_compiled_code_refuses_gradients() -> None:
    model = loaded()
    compiled = torch.compile(lambda x: model(x) * 1, backend="aot_eager", fullgraph=True)
    needs_grad = X.clone().requires_grad_()
    with pytest.raises(GradientError, match="The input requires grad"):
        compiled(needs_grad)
    assert torch.equal(compiled(X), model(X))
    with torch.no_grad():
        assert torch.equal(compiled(needs_grad), model(X))


def test_vmap_runs_one_larger_batch() -> None:
    model = loaded()
    batches = torch.stack([X, 2 * X, -X])
    expected = torch.stack([model(x) for x in batches])
    for found in (torch.vmap(model)(batches), torch.vmap(model, in_dims=1)(batches.transpose(0, 1))):
        assert relative_error(found, expected) < 1e-6
    layers = torch.vmap(model.features)(batches)
    assert layers["layer2"].shape == (3, 2, 32, 20, 24)
    assert relative_error(layers["layer2"][1], model.features(2 * X)["layer2"]) < 1e-6


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def dual(model: nn.Module) -> Tensor:
    with fwd.dual_level():
        return model(fwd.make_dual(X, X))  # type: ignore[no-any-return]


def with_tensors(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda given: torch.func.functional_call(model, given, (X,)).sum()


DERIVATIVES: dict[str, Callable[[nn.Module], object]] = {
    "jvp": lambda m: torch.func.jvp(m, (X,), (X,)),
    "vjp": lambda m: torch.func.vjp(m, X),
    "grad": lambda m: torch.func.grad(lambda x: m(x).sum())(X),
    "jacfwd": lambda m: torch.func.jacfwd(m)(X),
    "jacrev": lambda m: torch.func.jacrev(m)(X),
    "dual tensors": dual,
    "vmap of grad": lambda m: torch.vmap(torch.func.grad(lambda x: m(x[None]).sum()))(X),
    "grad of parameters": lambda m: torch.func.grad(with_tensors(m))(tensors(m)),
    "jvp of parameters": lambda m: torch.func.jvp(with_tensors(m), (tensors(m),), (tensors(m),)),
    "vmap of parameters": lambda m: torch.vmap(with_tensors(m))(
        {k: torch.stack([v, v]) for k, v in tensors(m).items()}
    ),
    "autograd": lambda m: m(X.clone().requires_grad_()),
    "autograd.functional": lambda m: torch.autograd.functional.jvp(m, X, X),
}


@pytest.mark.parametrize("what", DERIVATIVES)
def test_derivatives_are_refused(what: str) -> None:
    model = loaded()
    expected = model(X)
    with pytest.raises(GradientError, match=r"fastres computes no (derivatives|gradients)"):
        DERIVATIVES[what](model)
    assert torch.equal(model(X), expected), "and later calls are not affected"
    with fwd.dual_level():
        assert torch.equal(model(X), expected), "a tensor without a tangent is an ordinary one"


@pytest.mark.parametrize(
    ("x", "advice"),
    [
        (X.to_sparse(), r"given torch.sparse_coo; call x.to_dense\(\)"),
        (X.to_mkldnn(), r"given torch._mkldnn; call x.to_dense\(\)"),
        (torch.nested.nested_tensor(list(X), layout=torch.jagged), r"torch.stack\(x.unbind\(\)\)"),
    ],
    ids=["sparse", "mkldnn", "nested"],
)
def test_other_layouts_are_named(x: Tensor, advice: str) -> None:
    with pytest.raises(InputError, match=advice):
        loaded()(x)


def test_lazily_negated_and_parameter_inputs() -> None:
    model = loaded()
    negated = torch.complex(torch.zeros_like(X), -X).conj().imag
    assert negated.is_neg()
    assert torch.equal(model(negated), model(X))
    assert torch.equal(model(nn.Parameter(X, requires_grad=False)), model(X))


def test_tensors_without_data_have_results_without_data() -> None:
    model = loaded()
    with FakeTensorMode() as mode:
        fake = model(mode.from_tensor(X))
    assert (fake.shape, fake.dtype, fake.device) == ((2, 10), torch.float32, torch.device("cpu"))


def test_checkpointing_runs_the_model() -> None:
    model = loaded()
    assert torch.equal(torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False), model(X))
