"""Changes of a ResNet's layers, wiring, hooks and functions, for the tests of ``from_module``.

``MUTATIONS`` has each change by name: a function that changes a small ResNet in place or returns another one, and
whether fastres must still convert the result.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet


def small(block: type[nn.Module] = BasicBlock, kind: type[ResNet] = ResNet, **options: Any) -> Any:
    """Return a small torchvision ResNet in eval mode, whose batch norms have random statistics and scales."""
    torch.manual_seed(3)
    return randomised(kind(block, [1, 1, 1, 1], num_classes=7, **options))  # type: ignore[arg-type]


def randomised(module: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    for layer in module.modules():
        if hasattr(layer, "running_var"):
            for part, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -0.3, 0.3)):
                getattr(layer, part).data.uniform_(low, high, generator=generator)
            layer.running_var.data.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


Change = Callable[[Any], Any]
MUTATIONS: dict[str, tuple[Change, bool]] = {}


def mutation(accepted: bool = False) -> Callable[[Change], Change]:
    """Register a change of a ResNet, in place or returned. ``accepted`` says that it must still be converted."""

    def register(change: Change) -> Change:
        MUTATIONS[change.__name__] = (change, accepted)
        return change

    return register


def replacing(name: str, attribute: str, layer: Callable[[], nn.Module], accepted: bool = False) -> None:
    def change(module: Any) -> None:
        parent = module.get_submodule(attribute.rpartition(".")[0])
        setattr(parent, attribute.rpartition(".")[2], layer())

    MUTATIONS[name] = (change, accepted)


# -- layers

for _where in ("relu", "layer1.0.relu", "layer4.0.relu"):
    replacing(f"{_where} is ReLU6", _where, nn.ReLU6)
    replacing(f"{_where} is Hardtanh", _where, lambda: nn.Hardtanh(0, 1e4))
    replacing(f"{_where} is LeakyReLU", _where, lambda: nn.LeakyReLU(1e-6))
replacing("relu is Softplus", "layer1.0.relu", lambda: nn.Softplus(beta=1e4))
replacing("relu is Identity", "layer1.0.relu", nn.Identity)
replacing("relu is Threshold", "layer2.0.relu", lambda: nn.Threshold(1e-6, 0.0))
replacing("relu is not in place", "layer1.0.relu", lambda: nn.ReLU(inplace=False), accepted=True)
replacing("pool is 2×2", "maxpool", lambda: nn.MaxPool2d(2, 2))
replacing("pool rounds up", "maxpool", lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True))
replacing("pool is dilated", "maxpool", lambda: nn.MaxPool2d(3, 2, 2, dilation=2))
replacing("pool averages", "maxpool", lambda: nn.AvgPool2d(3, 2, 1))
replacing("head takes the maximum", "avgpool", lambda: nn.AdaptiveMaxPool2d(1))
replacing("head pools to 1×1 by name", "avgpool", lambda: nn.AdaptiveAvgPool2d((1, 1)), accepted=True)
replacing("classifier drops", "fc", lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(512, 7)))
replacing("classifier without bias", "fc", lambda: nn.Linear(512, 7, bias=False))
replacing("classifier is Identity", "fc", nn.Identity, accepted=True)
replacing("block is Identity", "layer2.0", nn.Identity)
replacing("shortcut drops", "layer2.0.downsample.2", lambda: nn.Dropout(0.5), accepted=True)
replacing("norm is GroupNorm", "bn1", lambda: nn.GroupNorm(8, 64))
replacing("norm has other momentum", "layer1.0.bn1", lambda: nn.BatchNorm2d(64, momentum=0.5), accepted=True)
replacing("norm uses the batch", "layer1.0.bn1", lambda: nn.BatchNorm2d(64, track_running_stats=False))
replacing("norm has no scale", "layer1.0.bn1", lambda: nn.BatchNorm2d(64, affine=False))
replacing("norm is synchronised", "bn1", lambda: nn.SyncBatchNorm(64), accepted=True)
replacing(
    "norm is InstanceNorm", "layer1.0.bn1", lambda: nn.InstanceNorm2d(64, affine=True, track_running_stats=True)
)  # fmt: skip
replacing("stem pads by reflection", "conv1", lambda: nn.Conv2d(3, 64, 7, 2, 3, bias=False, padding_mode="reflect"))
replacing("stem has a bias", "conv1", lambda: nn.Conv2d(3, 64, 7, 2, 3))
replacing("conv is dilated", "layer1.0.conv2", lambda: nn.Conv2d(64, 64, 3, 1, 2, dilation=2, bias=False))


@mutation()
def norm_keeps_training_mode(module: Any) -> None:
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Any:
            return super().train(True)

    module.bn1 = Stubborn(64)


@mutation(accepted=True)
def one_layer_in_training_mode(module: Any) -> None:
    module.layer1.train()


@mutation()
def epsilon(module: Any) -> None:
    module.layer1[0].bn1.eps = 1e-3


@mutation(accepted=True)
def zero_classifier(module: Any) -> None:
    nn.init.zeros_(module.fc.weight)
    nn.init.zeros_(module.fc.bias)


@mutation(accepted=True)
def zero_residual_scale(module: Any) -> None:
    for stage in (module.layer1, module.layer2):
        nn.init.zeros_(stage[0].bn2.weight)


@mutation(accepted=True)
def tied_layers(module: Any) -> None:
    module.layer1[0].bn2 = module.layer1[0].bn1


@mutation()
def another_tensor_beside(module: Any) -> None:
    module.scale = nn.Parameter(torch.ones(1))


@mutation(accepted=True)
def frozen_norms(module: Any) -> Any:
    twin = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    twin.load_state_dict(module.state_dict(), strict=False)
    return twin.eval()


# -- hooks and functions on objects


@mutation()
def hook(module: Any) -> None:
    module.layer1[0].register_forward_hook(lambda layer, x, y: y * 1.00001)


@mutation()
def hook_that_only_looks(module: Any) -> None:
    module.layer1[0].register_forward_hook(lambda layer, x, y: None)


@mutation()
def pre_hook_of_the_module(module: Any) -> None:
    module.register_forward_pre_hook(lambda layer, x: (x[0].clamp(-3, 3),))


@mutation()
def hook_with_names(module: Any) -> None:
    module.conv1.register_forward_hook(lambda layer, x, kwargs, y: y + 1e-5, with_kwargs=True)


@mutation()
def pruning(module: Any) -> None:
    torch.nn.utils.prune.l1_unstructured(module.layer1[0].conv1, "weight", 0.1)


@mutation(accepted=True)
def pruning_made_permanent(module: Any) -> None:
    pruning(module)
    torch.nn.utils.prune.remove(module.layer1[0].conv1, "weight")


@mutation()
def weight_norm(module: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(module.layer1[0].conv1)


@mutation()
def old_weight_norm(module: Any) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(module.layer1[0].conv1)


@mutation()
def spectral_norm(module: Any) -> None:
    torch.nn.utils.parametrizations.spectral_norm(module.fc)


@mutation()
def forward_on_the_object(module: Any) -> None:
    original = module.forward
    module.forward = lambda x: original(x) * 1.001


@mutation()
def forward_of_a_layer(module: Any) -> None:
    module.layer1[0].relu.forward = types.MethodType(lambda self, x: F.relu6(x), module.layer1[0].relu)


@mutation()
def inner_forward_on_the_object(module: Any) -> None:
    module._forward_impl = functools.partial(type(module)._forward_impl, module)


@mutation()
def adapter(module: Any) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base
            self.down = nn.Conv2d(64, 64, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.down(x)

    module.layer1[0].conv1 = Adapter(module.layer1[0].conv1)


# -- other classes


def other_block(forward: Callable[[Any, Tensor], Tensor]) -> Change:
    def change(module: Any) -> Any:
        block = type("OtherBlock", (BasicBlock,), {"forward": forward})
        twin = small(block)
        twin.load_state_dict(module.state_dict())
        return twin

    return change


def _ordinary(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.bn1(self.conv1(x)), inplace=True)
    y = self.bn2(self.conv2(y))
    y += x if self.downsample is None else self.downsample(x)
    return self.relu(y)


def _no_last_relu(self: Any, x: Tensor) -> Tensor:
    y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    return y + (x if self.downsample is None else self.downsample(x))


def _pre_activation(self: Any, x: Tensor) -> Tensor:
    y = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
    return y + (x if self.downsample is None else self.downsample(x))


def _scaled_branch(self: Any, x: Tensor) -> Tensor:
    y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    return self.relu(y * 0.9999 + (x if self.downsample is None else self.downsample(x)))


def _weighted_sum(self: Any, x: Tensor) -> Tensor:
    y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    return self.relu(torch.add(x if self.downsample is None else self.downsample(x), y, alpha=1.0001))


def _overwritten_shortcut(self: Any, x: Tensor) -> Tensor:
    identity = x if self.downsample is None else self.downsample(x)
    view = identity.detach()
    view.clamp_(max=5)
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + identity)


def _overwritten_alias(self: Any, x: Tensor) -> Tensor:
    y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    alias = y[:]
    alias.relu_()
    return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def _dropped(self: Any, x: Tensor) -> Tensor:
    return F.dropout(_ordinary(self, x), 0.001, training=True)


def _swapped_norms(self: Any, x: Tensor) -> Tensor:
    y = self.bn1(self.conv2(self.relu(self.bn2(self.conv1(x)))))
    return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def _rounded(self: Any, x: Tensor) -> Tensor:
    return _ordinary(self, x.bfloat16().float())


MUTATIONS["block written differently"] = (other_block(_ordinary), True)
for _forward in (
    _no_last_relu, _pre_activation, _scaled_branch, _weighted_sum, _overwritten_shortcut, _overwritten_alias, _dropped,
    _swapped_norms, _rounded,
):  # fmt: skip
    MUTATIONS[f"block{_forward.__name__}"] = (other_block(_forward), False)


def other_forward(forward: Callable[[Any, Tensor], Any]) -> Change:
    def change(module: Any) -> Any:
        kind = type("OtherResNet", (ResNet,), {"forward": forward})
        twin = small(kind=kind)
        twin.load_state_dict(module.state_dict())
        return twin

    return change


def body(self: Any, x: Tensor) -> Tensor:
    x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
    return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[no-any-return]


def _drops_before_the_classifier(self: Any, x: Tensor) -> Tensor:
    x = torch.flatten(self.avgpool(body(self, x)), 1)
    return self.fc(F.dropout(x, 0.5, training=self.training))  # type: ignore[no-any-return]


def _means_by_itself(self: Any, x: Tensor) -> Tensor:
    return self.fc(body(self, x).mean([-2, -1]))  # type: ignore[no-any-return]


def _mean_of_one_side(self: Any, x: Tensor) -> Tensor:
    return self.fc(body(self, x).mean(2).amax(2))  # type: ignore[no-any-return]


def _fixed_pool(self: Any, x: Tensor) -> Tensor:
    return self.fc(F.avg_pool2d(body(self, x), 2).flatten(1))  # type: ignore[no-any-return]


def _normalises(self: Any, x: Tensor) -> Tensor:
    return ResNet.forward(self, (x - 0.001) / 1.001)


def _softmax(self: Any, x: Tensor) -> Tensor:
    return ResNet.forward(self, x).log_softmax(1)


def _clamps_large_values(self: Any, x: Tensor) -> Tensor:
    return ResNet.forward(self, x.clamp(-3, 3) if x.abs().max() > 50 else x)


def _asserts(self: Any, x: Tensor) -> Tensor:
    assert torch.isfinite(x).all()
    return ResNet.forward(self, x)


def _asserts_the_shape(self: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 3
    return ResNet.forward(self, x)


def _resizes_large_images(self: Any, x: Tensor) -> Tensor:
    return ResNet.forward(self, F.interpolate(x, 64) if x.shape[-1] > 200 else x)


def _flips(self: Any, x: Tensor) -> Tensor:
    return (ResNet.forward(self, x) + ResNet.forward(self, x.flip(3))) / 2


def _adds_noise(self: Any, x: Tensor) -> Tensor:
    return ResNet.forward(self, x + 1e-6 * torch.randn_like(x))


def _returns_a_tuple(self: Any, x: Tensor) -> Any:
    return (ResNet.forward(self, x),)


def _returns_features(self: Any, x: Tensor) -> Tensor:
    return torch.flatten(self.avgpool(body(self, x)), 1)


def _changes_weights(self: Any, x: Tensor) -> Tensor:
    self.conv1.weight.data.mul_(1.0001)
    return ResNet.forward(self, x)


def _through_numpy(self: Any, x: Tensor) -> Tensor:
    return ResNet.forward(self, torch.from_numpy(x.numpy().clip(-9, 9)))


def _raises(self: Any, x: Tensor) -> Tensor:
    raise ValueError("not today")


def _other_order(self: Any, x: Tensor) -> Tensor:
    x = self.relu(self.bn1(self.maxpool(self.conv1(x))))
    x = self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
    return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]


for _forward, _accepted in (
    (_drops_before_the_classifier, True), (_means_by_itself, True), (_asserts_the_shape, True),
    (_mean_of_one_side, False), (_fixed_pool, False), (_normalises, False), (_softmax, False),
    (_clamps_large_values, False), (_asserts, False), (_resizes_large_images, False), (_flips, False),
    (_adds_noise, False), (_returns_a_tuple, False), (_returns_features, False), (_changes_weights, False),
    (_through_numpy, False), (_raises, False), (_other_order, False),
):  # fmt: skip
    MUTATIONS[f"forward{_forward.__name__}"] = (other_forward(_forward), _accepted)
