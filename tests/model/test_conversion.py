"""``from_module``: whatever was done to a ResNet, the logits are the module's, or an error says why not."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fastres
from fastres.bench.engines.eager import EagerResNet
from fastres.errors import ArchitectureError, DtypeError, FastresError, WeightsError
from fastres.network.architectures import Architecture, get_architecture

from .mutations import MUTATIONS, body, randomised, small


def images() -> list[Tensor]:
    """Return images of different scales and sizes, and raw pixels that were never normalised."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 3, 64, 80, generator=generator)
    return [x, 10 * x, 100 * x[:1, :, :, :47], torch.rand(1, 3, 224, 224, generator=generator) * 255]


@torch.no_grad()
def check_logits(module: nn.Module, model: fastres.Model) -> None:
    reference = copy.deepcopy(module).eval()
    for x in images():
        expected = reference(x)
        assert float((model(x) - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("name", MUTATIONS)
def test_logits_are_the_modules_or_it_is_refused(name: str) -> None:
    change, accepted = MUTATIONS[name]
    module = small()
    changed = change(module)
    module = module if changed is None else changed
    if not accepted:
        with pytest.raises(ArchitectureError, match="cannot be run: "):
            fastres.from_module(module)
        return
    check_logits(module, fastres.from_module(module))


def test_the_reason_names_the_layer() -> None:
    module = small()
    module.layer2[0].relu = nn.ReLU6()
    with pytest.raises(ArchitectureError, match=r"layer2\.0\.relu \(ReLU6\(\)\) computes hardtanh\(.*max_val=6"):
        fastres.from_module(module)
    module = small()
    module.layer2[0].bn1.register_forward_hook(print)
    with pytest.raises(ArchitectureError, match=r"layer2\.0\.bn1 \(BatchNorm2d\) has a forward hook \(print\)"):
        fastres.from_module(module)


# -- what is given


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def averaged(module: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(module)


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, averaged], ids=lambda wrap: wrap.__name__)
def test_wrappers_come_off(wrap: Callable[[Any], Any]) -> None:
    module = small()
    check_logits(module, fastres.from_module(wrap(module)))
    check_logits(module, fastres.from_module(wrap(nn.DataParallel(module))))
    hooked = wrap(module)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ArchitectureError, match="hook"):
        fastres.from_module(hooked)


def test_compiled_in_place() -> None:
    module = small()
    module.compile(backend="eager")
    check_logits(module, fastres.from_module(module))


class Lightning(nn.Module):
    """A module that holds a network under a name of its own, as training frameworks do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def exported(module: Any) -> Any:
    return torch.export.export(module, (torch.zeros(1, 3, 64, 64),))


def scripted(module: Any) -> Any:
    return torch.jit.trace(module, torch.zeros(1, 3, 64, 64))


def scripted_inside(module: Any) -> Any:
    module.layer1 = torch.jit.trace(module.layer1, torch.zeros(1, 64, 16, 16))
    return module


def quantised(module: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


def on_meta(module: Any) -> Any:
    return module.to("meta")


def on_two_devices(module: Any) -> Any:
    module.layer3.to("meta")
    return module


def lazy(module: Any) -> Any:
    module.fc = nn.LazyLinear(7)
    return module


def whole_numbers(module: Any) -> Any:
    module.fc.weight = nn.Parameter(torch.zeros(7, 512, dtype=torch.int8), requires_grad=False)
    return module


def sparse(module: Any) -> Any:
    module.fc.weight = nn.Parameter(module.fc.weight.detach().to_sparse())
    return module


GIVEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a name": (lambda _: "resnet50", "was given 'resnet50', but takes a live ResNet; names, paths .* fastres.load"),
    "a path": (lambda _: Path("model.pth"), "model.pth.*fastres.load"),
    "nothing": (lambda _: None, "was given None, .* pass a module"),
    "a number": (lambda _: 3, "was given an int"),
    "a state dict": (lambda m: m.state_dict(), r"an OrderedDict, .* fastres\.load\(name, weights=state_dict\)"),
    "a class": (lambda _: ResNet, r"the class ResNet, .* ResNet\(…\)"),
    "a function": (lambda _: torchvision.models.resnet18, "was given a function"),
    "no parameters": (lambda _: nn.ReLU(), "it has no parameters"),
    "Lightning": (lambda _: Lightning(), "not laid out like.*then pass its 'net'"),
    "Sequential": (lambda m: nn.Sequential(nn.Identity(), m), "not laid out like.*then pass its '1'"),
    "exported": (exported, r"an ExportedProgram.*weights=program\.state_dict\)"),
    "scripted": (scripted, r"a TorchScript module.*weights=module\.state_dict\(\)\)"),
    "scripted inside": (scripted_inside, r"layer1 \(.*\) is a TorchScript module"),
    "quantised": (quantised, r"fc \(Linear\) is quantized; pass the model in floating point"),
    "on the meta device": (on_meta, "on the meta device, without data"),
    "on two devices": (on_two_devices, "on the meta device"),
    "lazy": (lazy, r"fc\.weight is not initialised yet; run the module once"),
    "whole numbers": (whole_numbers, r"fc\.weight is int8"),
    "sparse": (sparse, r"fc\.weight is torch\.sparse_coo; fastres reads dense tensors"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", GIVEN)
def test_other_things_are_refused_by_name(name: str) -> None:
    make, message = GIVEN[name]
    given = make(small())
    with pytest.raises(ArchitectureError, match=message) as caught:
        fastres.from_module(given)
    assert "\n" not in str(caught.value)


def test_lazy_modules_after_their_first_batch() -> None:
    module = lazy(small())
    module(images()[0])
    check_logits(module, fastres.from_module(module))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    module = small()
    with torch.no_grad():
        module.layer3[0].conv2.weight[0, 0, 1, 1] = value
    with pytest.raises(WeightsError, match=r"has 1 of 589824 values in layer3\.0\.conv2\.weight that are NaN or inf"):
        fastres.from_module(module)


def test_negative_variances_are_refused() -> None:
    module = small()
    module.layer2[0].bn1.running_var[3] = -0.5
    with pytest.raises(WeightsError, match=r"negative variances in layer2\.0\.bn1\.running_var"):
        fastres.from_module(module)


def test_overflowing_networks_are_accepted() -> None:
    module = small()
    with torch.no_grad():
        module.fc.weight.mul_(1e38)
    assert fastres.from_module(module).num_classes == 7


def test_other_dtypes() -> None:
    double = small().double()
    with pytest.raises(DtypeError, match=r"ResNet is in float64, .* pass dtype='float32'"):
        fastres.from_module(double)
    check_logits(double.float(), fastres.from_module(small().double(), dtype="float32"))
    assert fastres.from_module(small().half()).dtype == torch.float16
    mixed = small()
    mixed.fc.half()
    assert fastres.from_module(mixed).fc.weight.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_quantizable_networks_in_floating_point(block: type[nn.Module]) -> None:
    from torchvision.models.quantization import resnet as quantizable

    kind = quantizable.QuantizableBasicBlock if block is BasicBlock else quantizable.QuantizableBottleneck
    module = small(kind, quantizable.QuantizableResNet)
    check_logits(module, fastres.from_module(module))


def test_traced_graphs() -> None:
    module = small()
    check_logits(module, fastres.from_module(torch.fx.symbolic_trace(module)))


def _squeezed(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.avgpool(body(self, x)).squeeze(-1).squeeze(-1))  # type: ignore[no-any-return]


def _selected(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.avgpool(body(self, x))[:, :, 0, 0])  # type: ignore[no-any-return]


def _viewed(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.avgpool(body(self, x)).view(x.shape[0], -1))  # type: ignore[no-any-return]


def _channels_last(self: Any, x: Tensor) -> Tensor:
    return ResNet.forward(self, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("forward", [_squeezed, _selected, _viewed, _channels_last])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_ways_to_write_a_forward(forward: Callable[[Any, Tensor], Tensor], layout: torch.memory_format) -> None:
    module = small(kind=type("Other", (ResNet,), {"forward": forward})).to(memory_format=layout)
    check_logits(module, fastres.from_module(module))


GATED = Architecture(
    "custom", "bottleneck", (1, 1), (16, 32), stem="deep", stem_widths=(8, 8, 16), shortcut="average_pool",
    squeeze_excitation=True,
)  # fmt: skip


@pytest.mark.parametrize("arch", [GATED, get_architecture("resnet20")], ids=["gates", "padded shortcuts"])
def test_channels_last_networks_of_other_kinds(arch: Architecture) -> None:
    module = randomised(EagerResNet(arch)).to(memory_format=torch.channels_last)
    check_logits(module, fastres.from_module(module))


def test_settings_of_torch_that_change_its_operations() -> None:
    module = small()
    with torch.backends.mkldnn.flags(enabled=False):
        check_logits(module, fastres.from_module(module))
    torch.use_deterministic_algorithms(True)
    try:
        check_logits(module, fastres.from_module(module))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shift", [0, 1])
def test_option_a_pads_on_both_sides(shift: int) -> None:
    arch = Architecture("custom", "basic", (1, 1), (16, 32), stem="cifar", shortcut="pad", stem_widths=(16,))
    module = randomised(EagerResNet(arch))
    module.layer2[0].downsample.before += shift
    module.layer2[0].downsample.after -= shift
    if shift:
        with pytest.raises(ArchitectureError, match=r"layer2\.0\.downsample .* computes constant_pad_nd"):
            fastres.from_module(module)
    else:
        check_logits(module, fastres.from_module(module))


# -- what stays as it was


def test_the_module_and_torch_are_left_as_they_were() -> None:
    module = small().train()
    module.layer1.eval()
    nn.init.zeros_(module.layer1[0].bn2.weight)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    modes = [layer.training for layer in module.modules()]
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in module.modules()]
    state, drawn = torch.get_rng_state(), random.getstate()
    fastres.from_module(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == drawn
    assert [layer.training for layer in module.modules()] == modes
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in module.modules()] == hooks
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_within_other_settings_of_torch() -> None:
    module = small()
    expected = fastres.from_module(module)(images()[0])
    with torch.inference_mode():
        model = fastres.from_module(module)
        made_here = small()
    assert torch.equal(model(images()[0]), expected)
    check_logits(module, fastres.from_module(made_here))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = fastres.from_module(module)
    assert torch.equal(model(images()[0]), expected)
    torch.set_default_dtype(torch.float64)
    try:
        model = fastres.from_module(module)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(model(images()[0]), expected)
    with torch.device("meta"):
        model = fastres.from_module(module)
    assert torch.equal(model(images()[0]), expected)


# -- backbones


@pytest.mark.parametrize(
    "name",
    ["relu is ReLU6", "layer1.0.relu is LeakyReLU", "norm is InstanceNorm", "pool rounds up", "hook", "weight_norm",
     "block_no_last_relu", "block_overwritten_shortcut", "forward_of_a_layer"],
)  # fmt: skip
def test_backbones_are_checked_in_the_same_way(name: str) -> None:
    module = small()
    changed = MUTATIONS[name][0](module)
    body = IntermediateLayerGetter(module if changed is None else changed, {"layer1": "a", "layer4": "b"})
    with pytest.raises(ArchitectureError, match="cannot be run: "):
        fastres.Backbone.from_module(body)


def test_backbones_of_other_getters() -> None:
    class Scaled(IntermediateLayerGetter):
        def forward(self, x: Tensor) -> Any:
            return {name: value * 1.0001 for name, value in super().forward(x).items()}

    class Renamed(IntermediateLayerGetter):
        def forward(self, x: Tensor) -> Any:
            return {"other": next(iter(super().forward(x).values()))}

    for kind in (Scaled, Renamed):
        with pytest.raises(FastresError, match="cannot be run: "):
            fastres.Backbone.from_module(kind(small(), {"layer4": "b"}))
