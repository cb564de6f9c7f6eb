"""The facade: a drop-in for torchvision's model, with clear errors for unsupported operations."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import fastres
from fastres.bench.measure.calibration import calibrated, pixels, smooth_images
from fastres.errors import (
    ArchitectureError,
    DeviceError,
    DtypeError,
    GradientError,
    InputError,
    UnknownModelError,
)
from fastres.executors.cpu import CpuExecutor
from fastres.network.architectures import get_architecture
from fastres.text import dtype_name
from tests.executors.test_cpu import torchvision_module
from tests.measures import relative_error


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return torchvision_module("resnet18")


@pytest.fixture
def model(module: nn.Module) -> fastres.Model:
    return fastres.from_module(module)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return smooth_images(3, 65, 81, seed=3)


@torch.no_grad()
def logits_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


class TestDropIn:
    def test_logits(self, module: nn.Module, model: fastres.Model, x: torch.Tensor) -> None:
        assert relative_error(model(x), logits_of(module, x)) < 1e-5
        assert not model(x).requires_grad

    def test_state_dict_goes_back_unchanged(self, module: nn.Module, model: fastres.Model) -> None:
        state = model.state_dict()
        fresh = torchvision.models.resnet18()
        fresh.load_state_dict(state, strict=True)
        for key, value in module.state_dict().items():
            assert torch.equal(fresh.state_dict()[key], value), key
        assert list(state) == list(module.state_dict())

    def test_parameters_are_torchvisions(self, module: nn.Module, model: fastres.Model) -> None:
        ours, theirs = dict(model.named_parameters()), dict(module.named_parameters())
        assert list(ours) == list(theirs)
        assert sum(p.numel() for p in model.parameters()) == 11_689_512
        assert not any(p.requires_grad for p in model.parameters())
        assert torch.equal(model.layer1[0].conv1.weight, module.layer1[0].conv1.weight)  # type: ignore[union-attr,index]

    def test_load_state_dict_changes_the_result(self, model: fastres.Model, x: torch.Tensor) -> None:
        before = model(x)
        other = calibrated(get_architecture("resnet18"), seed=9)
        model.load_state_dict(other.state_dict())
        assert relative_error(model(x), logits_of(other, x)) < 1e-5
        assert relative_error(model(x), before) > 0.1

    def test_copies_are_independent(self, model: fastres.Model, x: torch.Tensor) -> None:
        expected = model(x)
        twin = copy.deepcopy(model)
        twin.load_state_dict(calibrated(get_architecture("resnet18"), seed=9).state_dict())
        assert torch.equal(model(x), expected)
        assert not torch.equal(twin(x), expected)

    def test_pickle_and_torch_save(self, model: fastres.Model, x: torch.Tensor, tmp_path: Path) -> None:
        expected = model(x)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)

    def test_eval_returns_the_model(self, model: fastres.Model) -> None:
        assert model.eval() is model
        assert not model.training

    def test_moving_returns_the_model_and_keeps_the_result(self, model: fastres.Model, x: torch.Tensor) -> None:
        expected = model(x)
        assert model.to("cpu") is model
        assert torch.equal(model.cpu().float().to(memory_format=torch.channels_last)(x), expected)

    def test_dtype_is_noted_until_it_can_run(self, model: fastres.Model) -> None:
        assert model.dtype == torch.float32
        assert model.half().dtype == torch.float16
        assert model.bfloat16().dtype == torch.bfloat16
        assert next(model.parameters()).dtype == torch.float32, "the checkpoint does not change"
        assert model.to(torch.float32).dtype == torch.float32

    def test_many_threads(self, model: fastres.Model) -> None:
        inputs = [smooth_images(1, 64 + 2 * i, 64, seed=i) for i in range(8)]
        expected = [copy.deepcopy(model)(x) for x in inputs]
        results: list[torch.Tensor | None] = [None] * len(inputs)

        def work(index: int) -> None:
            results[index] = model(inputs[index])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result, truth in zip(results, expected, strict=True):
            assert result is not None
            assert torch.equal(result, truth)

    def test_any_memory_format(self, model: fastres.Model, x: torch.Tensor) -> None:
        expected = model(x)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)
        wide = torch.zeros(3, 3, 65, 162)
        wide[..., ::2] = x
        torch.testing.assert_close(model(wide[..., ::2]), expected)

    def test_replacing_the_classifier(self, module: nn.Module, model: fastres.Model, x: torch.Tensor) -> None:
        head = nn.Linear(512, 7)
        model.fc = head
        changed = copy.deepcopy(module)
        changed.fc = head
        assert model.num_classes == 7
        assert relative_error(model(x), logits_of(changed, x)) < 1e-5

    def test_describes_itself(self, model: fastres.Model) -> None:
        assert "resnet18" in repr(model)
        assert "1000 classes, float32 on cpu" in repr(model)


class TestOtherOutputs:
    def test_features_and_embed(self, module: nn.Module, model: fastres.Model, x: torch.Tensor) -> None:
        found = model.features(x)
        assert list(found) == ["stem", "layer1", "layer2", "layer3", "layer4"]
        with torch.no_grad():
            expected = module.maxpool(module.relu(module.bn1(module.conv1(x))))  # type: ignore[operator]
            for name in list(found)[1:]:
                expected = module.get_submodule(name)(expected)
                assert relative_error(found[name], expected) < 1e-5
        assert relative_error(model.embed(x), expected.mean((2, 3))) < 1e-5

    def test_cifar_features(self) -> None:
        found = fastres.load("resnet20", weights=None).features(torch.randn(2, 3, 32, 32))
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            "stem": (2, 16, 32, 32),
            "layer1": (2, 16, 32, 32),
            "layer2": (2, 32, 16, 16),
            "layer3": (2, 64, 8, 8),
        }

    def test_plan(self, model: fastres.Model) -> None:
        assert len(model.plan) == 21
        assert model.plan.stem.mean == model.transforms.mean

    def test_explain(self, model: fastres.Model) -> None:
        rows = model.explain(batch=2, image_size=(64, 96)).rows
        assert [row.step for row in rows[:2]] == ["stem", "layer1.0.conv1"]
        assert rows[0].output_shape == (2, 16, 24, 64)
        assert rows[1].flops == 2 * 2 * 16 * 24 * 64 * 64 * 9
        assert "conv+bias+add+relu" in rows[2].kernel
        assert "resnet18, float32 on cpu" in str(model.explain())

    def test_warmup_prepares_the_shapes(self, model: fastres.Model) -> None:
        model.warmup((1, 2), image_size=64)
        executor = model._executor
        assert isinstance(executor, CpuExecutor)
        kept = executor._packed.kept if executor.direct is None else executor.direct.kept
        assert {key[0] for key in kept} == {(1, 64, 64, 3), (2, 64, 64, 3)}

    def test_empty_batch(self, model: fastres.Model) -> None:
        empty = torch.zeros(0, 3, 64, 64)
        assert model(empty).shape == (0, 1000)
        assert model.embed(empty).shape == (0, 512)
        assert model.features(empty)["layer4"].shape == (0, 512, 2, 2)

    def test_nan_passes_through(self, model: fastres.Model, x: torch.Tensor) -> None:
        broken = x.clone()
        broken[1, 0, 30, 30] = float("nan")
        logits = model(broken)
        assert bool(logits[1].isnan().all())
        assert bool(logits[[0, 2]].isfinite().all())

    def test_broken_weights_are_not_hidden(self, module: nn.Module, x: torch.Tensor) -> None:
        state = {key: value.clone() for key, value in module.state_dict().items()}
        state["layer2.0.bn1.running_var"][3] = -1
        assert bool(logits_of(module, x).isfinite().all())
        assert bool(fastres.load("resnet18", state)(x).isnan().all())

    @pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
    def test_what_is_not_finite_reaches_every_output(self, model: fastres.Model, x: torch.Tensor, value: float) -> None:
        broken = x.clone()
        broken[0, 2, 10, 60] = value
        for output in (model(broken), model.embed(broken), *model.features(broken).values()):
            assert not bool(output[0].isfinite().all())
            assert bool(output[1:].isfinite().all())

    @pytest.mark.slow
    def test_under_torch_compile(self, model: fastres.Model, x: torch.Tensor) -> None:
        def around(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return model(x).softmax(1), model.embed(x) * 2, model.features(x)["layer2"] + 1

        compiled = torch.compile(around, fullgraph=True)
        for result, expected in zip(compiled(x), around(x), strict=True):
            torch.testing.assert_close(result, expected)
        pictures = pixels(x)
        torch.testing.assert_close(compiled(pictures)[0], around(pictures)[0])


class TestFromModule:
    def test_class_count_and_training_mode_are_kept(self) -> None:
        module = torchvision.models.resnet50(num_classes=12).train()
        model = fastres.from_module(module)
        assert model.num_classes == 12
        assert model.architecture.name == "resnet50"
        assert module.training

    def test_custom_depths(self) -> None:
        module = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=5).eval()
        model = fastres.from_module(module)
        x = smooth_images(2, 64, 64)
        assert relative_error(model(x), logits_of(module, x)) < 1e-4

    def test_own_modules(self) -> None:
        for name in ("resnet20", "plain20", "plain18"):
            module = calibrated(get_architecture(name))
            assert fastres.from_module(module).architecture == get_architecture(name)

    def test_a_model_is_returned_as_it_is(self, model: fastres.Model) -> None:
        assert fastres.from_module(model) is model

    def test_later_training_does_not_reach_the_copy(self, x: torch.Tensor) -> None:
        module = torchvision_module("resnet18")
        model = fastres.from_module(module)
        expected = model(x)
        with torch.no_grad():
            module.conv1.weight.mul_(2)  # type: ignore[union-attr,operator]
        assert torch.equal(fastres.from_module(torchvision_module("resnet18"))(x), expected)
        model.float()  # folds again
        assert torch.equal(model(x), expected)

    def test_dilated_strides_are_refused(self) -> None:
        module = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
        with pytest.raises(ArchitectureError, match=r"layer4\.0\.conv2\.stride is \(1, 1\), but fastres runs \(2, 2\)"):
            fastres.from_module(module)

    def test_other_networks_are_refused(self) -> None:
        for other in (torchvision.models.alexnet(), nn.Linear(3, 4)):
            with pytest.raises(ArchitectureError, match="not laid out like torchvision's ResNet"):
                fastres.from_module(other)

    def test_other_forwards_are_refused(self) -> None:
        class Scaled(torchvision.models.ResNet):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * 1.5

        module = Scaled(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
        with pytest.raises(ArchitectureError, match="does not compute a ResNet"):
            fastres.from_module(module)

    def test_changed_epsilon_is_refused(self) -> None:
        module = torchvision.models.resnet18()
        module.layer2[0].bn1.eps = 1e-3
        with pytest.raises(ArchitectureError, match=r"layer2\.0\.bn1"):
            fastres.from_module(module)


class TestErrors:
    @pytest.mark.parametrize(
        ("shape", "hint"),
        [
            ((3, 64, 64), r"Add a batch dimension: x\[None\]"),
            ((1, 1, 64, 64), "Repeat the grey channel"),
            ((1, 4, 64, 64), "Drop the alpha channel"),
            ((1, 64, 64, 3), "looks like NHWC"),
            ((64, 64), "model.predict"),
        ],
    )
    def test_shapes(self, model: fastres.Model, shape: tuple[int, ...], hint: str) -> None:
        with pytest.raises(InputError, match=hint):
            model(torch.zeros(shape))

    def test_small_images(self, model: fastres.Model) -> None:
        with pytest.raises(InputError, match="at least 32×32 pixels but was given 20×64"):
            model(torch.zeros(1, 3, 20, 64))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.complex64, torch.int8], ids=str)
    def test_dtypes(self, model: fastres.Model, dtype: torch.dtype) -> None:
        with pytest.raises(DtypeError, match=f"was given {dtype_name(dtype)}"):
            model(torch.zeros(1, 3, 64, 64, dtype=dtype))

    def test_not_a_tensor(self, model: fastres.Model) -> None:
        with pytest.raises(InputError, match=r"was given ndarray; model\.predict"):
            model(np.zeros((1, 3, 64, 64)))

    def test_another_device(self, model: fastres.Model) -> None:
        with pytest.raises(DeviceError, match="The input is on meta, but the model is on cpu"):
            model(torch.zeros(1, 3, 64, 64, device="meta"))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_cuda_without_a_gpu(self, model: fastres.Model, x: torch.Tensor) -> None:
        for move in (model.cuda, lambda: model.to("cuda"), lambda: fastres.load("resnet18", None, device="cuda")):
            with pytest.raises(DeviceError, match="No CUDA GPU is available here"):
                move()
        assert model(x).shape == (3, 1000), "the model still works on its old device"

    def test_other_devices(self, model: fastres.Model) -> None:
        with pytest.raises(
            DeviceError, match="The device is 'meta', but fastres runs only on 'cpu' and 'cuda' devices"
        ):
            model.to("meta")
        with pytest.raises(DeviceError, match="give 'cpu', 'cuda'"):
            fastres.load("resnet18", None, device="gpu")

    def test_dtypes_that_fastres_does_not_compute_in(self, model: fastres.Model) -> None:
        with pytest.raises(DtypeError, match=r"dtype is torch\.float64, but fastres computes in float32"):
            model.double()
        with pytest.raises(DtypeError, match="int8"):
            fastres.load("resnet18", None, dtype="int8")

    def test_training(self, model: fastres.Model, x: torch.Tensor) -> None:
        with pytest.raises(GradientError, match="fastres is for inference"):
            model.train()
        with pytest.raises(GradientError, match="computes no gradients"):
            model.requires_grad_()
        with pytest.raises(GradientError, match=r"Pass x\.detach\(\)"):
            model(x.clone().requires_grad_())
        with torch.no_grad():
            assert model(x.clone().requires_grad_()).shape == (3, 1000)

    def test_layers_cannot_be_called_or_hooked(self, model: fastres.Model, x: torch.Tensor) -> None:
        with pytest.raises(ArchitectureError, match=r"cannot be called.*model\.features"):
            model.layer1(x)  # type: ignore[operator]
        with pytest.raises(ArchitectureError, match="cannot be hooked"):
            model.layer4[1].conv2.register_forward_hook(print)  # type: ignore[union-attr,index]

    @pytest.mark.parametrize("value", [nn.ReLU(), nn.Linear(5, 5), nn.Sequential(nn.Linear(512, 3))], ids=str)
    def test_classifiers_that_do_not_fit(self, model: fastres.Model, value: nn.Module) -> None:
        with pytest.raises(ArchitectureError, match=r"takes an nn\.Linear\(512, classes\), or nn\.Identity"):
            model.fc = value

    def test_new_modules_would_be_ignored(self, model: fastres.Model) -> None:
        with pytest.raises(ArchitectureError, match="would ignore the module"):
            model.dropout = nn.Dropout()

    def test_model_names(self) -> None:
        with pytest.raises(UnknownModelError, match=r"Did you mean .*'resnet50'"):
            fastres.load("resnet51x")


def test_import_is_light() -> None:
    """torchvision, the kernels and the optional packages are only imported when needed."""
    code = (
        "import sys, fastres; heavy = {'torchvision', 'triton', 'matplotlib', 'sklearn', 'onnx', 'rich', "
        "'torch._dynamo', 'torch._inductor'}; print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
