"""Feature maps for other models: torchvision's detectors and segmenters with fastres inside."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops import FeaturePyramidNetwork

import fastres
from fastres.bench.measure.calibration import pixels, smooth_images
from fastres.errors import ArchitectureError, GradientError, InputError
from fastres.executors import cpu
from tests.executors.test_cpu import torchvision_module
from tests.measures import relative_error

STAGES = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
CHANNELS = [64, 128, 256, 512]


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return torchvision_module("resnet18")


@pytest.fixture(scope="module")
def model(module: nn.Module) -> fastres.Model:
    return fastres.from_module(module)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return smooth_images(2, 97, 131, seed=7)


class TestNames:
    @pytest.mark.parametrize(
        "layers",
        [STAGES, {"layer4": "out", "layer2": "aux"}, {"maxpool": "stem", "avgpool": "pooled"}, {"layer3": 3}],
        ids=str,
    )
    def test_maps_are_intermediate_layer_getters(
        self, module: nn.Module, model: fastres.Model, x: Tensor, layers: dict[str, str]
    ) -> None:
        with torch.no_grad():
            expected = IntermediateLayerGetter(module, layers)(x)
        for found in (model.features(x, layers), fastres.Backbone(model, layers)(x)):
            assert isinstance(found, OrderedDict)
            assert list(found) == list(expected)
            for name, value in expected.items():
                assert found[name].shape == value.shape
                assert relative_error(found[name], value) < 1e-5

    def test_a_list_keeps_the_names(self, model: fastres.Model, x: Tensor) -> None:
        assert list(model.features(x, ["layer4", "stem"])) == ["stem", "layer4"]
        assert list(model.features(x, "layer2")) == ["layer2"]

    def test_one_value_under_two_names(self, model: fastres.Model, x: Tensor) -> None:
        found = model.features(x, {"stem": "a", "maxpool": "b"})
        assert torch.equal(found["a"], found["b"])

    def test_nothing_deeper_is_computed(self, model: fastres.Model, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        class Convolutions(TorchDispatchMode):
            count = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                self.count += "convolution" in str(func)
                return func(*args, **(kwargs or {}))

        monkeypatch.setattr(cpu, "absent", lambda: "torch's operators can be counted")
        model = copy.deepcopy(model)
        model(x)  # packs weights
        counts = {}
        for layer in ("stem", "layer1", "layer2", "avgpool"):
            with Convolutions() as seen:
                model.features(x, [layer])
            counts[layer] = seen.count
        assert counts == {"stem": 1, "layer1": 5, "layer2": 10, "avgpool": 20}

    def test_channels_and_strides(self, model: fastres.Model) -> None:
        backbone = fastres.Backbone(model, STAGES)
        assert backbone.channels == dict(zip("0123", CHANNELS, strict=True))
        assert backbone.strides == {"0": 4, "1": 8, "2": 16, "3": 32}
        assert not hasattr(backbone, "out_channels"), "there is no single number for all maps"
        assert fastres.Backbone(model, {"layer4": "0"}).out_channels == 512
        cifar = fastres.Backbone(fastres.load("resnet20", None), ["relu", "layer1", "layer2", "layer3"])
        assert list(cifar.strides.values()) == [1, 1, 2, 4]
        assert "1: 128 channels, stride 8" in repr(backbone)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ({"layer5": "0"}, r"No layer is called 'layer5'\. Did you mean 'layer4'"),
            ({"relu": "0"}, "'relu' is computed inside the stem's kernel and cannot be returned; resnet18 has maxpool"),
            (["fc"], "No layer is called 'fc'"),
            ({}, "names no layer; pass a mapping from layers to names"),
            ({"layer1": "a", "layer2": "a"}, "two layers under one name"),
        ],
    )
    def test_layers_that_there_are_not(
        self, model: fastres.Model, x: Tensor, layers: dict[str, str], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            fastres.Backbone(model, layers)
        with pytest.raises(InputError, match=message):
            model.features(x, layers)

    def test_other_modules(self, module: nn.Module) -> None:
        with pytest.raises(ArchitectureError, match=r"takes a fastres model, .* was given ResNet"):
            fastres.Backbone(module, STAGES)  # type: ignore[arg-type]
        with pytest.raises(ArchitectureError, match="takes torchvision's IntermediateLayerGetter"):
            fastres.Backbone.from_module(module)


class TestAsModule:
    def test_maps_follow_the_surrounding_models_dtype(self, model: fastres.Model, x: Tensor) -> None:
        around = nn.Sequential(fastres.Backbone(copy.deepcopy(model), ["layer1"]))
        assert around(x)["layer1"].dtype == torch.float32
        if torch.bfloat16 in cpu.supported_dtypes():
            assert around.bfloat16()(x)["layer1"].dtype == torch.bfloat16
            assert around[0].model.dtype == torch.bfloat16
            mixed = fastres.Backbone(copy.deepcopy(model).bfloat16(), ["layer1"])
            assert mixed(x)["layer1"].dtype == torch.float32

    def test_dtype_is_an_option(self, model: fastres.Model, x: Tensor) -> None:
        backbone = fastres.Backbone(model, ["layer1"], dtype="float16")
        assert backbone(x)["layer1"].dtype == torch.float16

    def test_copies(self, model: fastres.Model, x: Tensor) -> None:
        backbone = fastres.Backbone(model, STAGES)
        for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            assert all(torch.equal(twin(x)[name], value) for name, value in backbone(x).items())

    def test_layers_around_it_can_be_trained(self, model: fastres.Model, x: Tensor) -> None:
        head = nn.Conv2d(512, 3, 1)
        around = nn.Sequential(fastres.Backbone(model, {"layer4": "0"}), _Only("0"), head).train()
        assert head.training
        assert not model.training
        optimizer = torch.optim.SGD([p for p in around.parameters() if p.requires_grad], lr=2e-3)
        losses = []
        for _ in range(5):
            loss = around(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        with pytest.raises(GradientError):
            around[0].requires_grad_()

    def test_raw_pixels(self, model: fastres.Model, x: Tensor) -> None:
        raw = pixels(x)
        found = fastres.Backbone(model, ["layer4"])(raw)["layer4"]
        assert torch.equal(found, model.features(raw)["layer4"])


class _Only(nn.Module):
    """Returns one of a backbone's feature maps."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        return maps[self.name]


class Pyramid(nn.Module):
    """A backbone under torchvision's feature pyramid."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(CHANNELS, 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(x))


class TestCompiled:
    """The backbone is one op in the graph of the surrounding model. A graph break would raise."""

    @pytest.fixture
    def pyramid(self, model: fastres.Model) -> nn.Module:
        return Pyramid(fastres.Backbone(model, STAGES)).eval()

    @torch.no_grad()
    def test_one_graph_for_every_batch(self, pyramid: nn.Module) -> None:
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(pyramid, backend=counter, fullgraph=True, dynamic=True)
        for batch, height, width in ((2, 64, 96), (3, 64, 96), (5, 97, 131)):
            x = smooth_images(batch, height, width, seed=batch)
            for name, value in pyramid(x).items():
                torch.testing.assert_close(compiled(x)[name], value)
        assert counter.frame_count == 1

    @torch.no_grad()
    def test_features_and_embeddings(self, model: fastres.Model, x: Tensor) -> None:
        headless = copy.deepcopy(model)
        headless.fc = nn.Identity()

        def around(x: Tensor) -> tuple[Tensor, ...]:
            maps = model.features(x, {"layer1": "0", "maxpool": "1", "stem": "2"})
            return maps["0"] * 2, maps["1"] + maps["2"], model.embed(x).norm(dim=1), headless(x) - 1

        compiled = torch.compile(around, backend="aot_eager", fullgraph=True)
        for result, expected in zip(compiled(x), around(x), strict=True):
            torch.testing.assert_close(result, expected)
            assert result.stride() == expected.stride()

    @pytest.mark.slow
    @torch.no_grad()
    def test_with_the_default_backend(self, model: fastres.Model, x: Tensor) -> None:
        head = nn.Sequential(fastres.Backbone(model, ["layer4"]), _Only("layer4"), nn.Conv2d(512, 4, 1)).eval()
        compiled = torch.compile(head, fullgraph=True)
        torch.testing.assert_close(compiled(x), head(x), rtol=1e-3, atol=1e-4)


class TestInsideTorchvision:
    """The same head on torchvision's own backbone and on fastres's, with the same weights."""

    @torch.no_grad()
    def test_feature_pyramid(self, module: nn.Module, model: fastres.Model, x: Tensor) -> None:
        theirs = BackboneWithFPN(copy.deepcopy(module), STAGES, CHANNELS, 32).eval()
        ours = copy.deepcopy(theirs)
        ours.body = fastres.Backbone(model, STAGES)
        _assert_equal_maps(ours(x), theirs(x))

    @torch.no_grad()
    @pytest.mark.parametrize("epsilon", [None, 0.0, 1e-3])
    def test_the_body_of_a_live_detector(self, module: nn.Module, x: Tensor, epsilon: float | None) -> None:
        """Its batch norm is frozen. torchvision's published detectors have an epsilon of zero."""
        theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None).eval()
        theirs.body.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("fc.")})
        if epsilon is not None:
            torchvision.models.detection._utils.overwrite_eps(theirs, epsilon)
        ours = copy.deepcopy(theirs)
        ours.body = fastres.Backbone.from_module(theirs.body)
        _assert_equal_maps(ours(x), theirs(x))

    @torch.no_grad()
    def test_a_body_without_its_last_stage(self, module: nn.Module, x: Tensor) -> None:
        body = IntermediateLayerGetter(module, {"layer1": "low", "layer3": "high"})
        _assert_equal_maps(fastres.Backbone.from_module(body)(x), body(x))

    def test_dilated_bodies_are_refused(self) -> None:
        dilated = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
        with pytest.raises(ArchitectureError, match=r"cannot be run: layer3\.0"):
            fastres.Backbone.from_module(IntermediateLayerGetter(dilated, {"layer4": "out"}))

    @torch.no_grad()
    @pytest.mark.parametrize(("network", "head"), [(FCN, FCNHead), (DeepLabV3, DeepLabHead)])
    def test_segmentation(
        self, network: type[nn.Module], head: type[nn.Module], module: nn.Module, model: fastres.Model, x: Tensor
    ) -> None:
        layers = {"layer3": "aux", "layer4": "out"}
        theirs = network(IntermediateLayerGetter(module, layers), head(512, 21), FCNHead(256, 21)).eval()
        ours = network(fastres.Backbone(model, layers), theirs.classifier, theirs.aux_classifier).eval()
        _assert_equal_maps(ours(x), theirs(x))
        assert ours(x)["out"].shape == (2, 21, 97, 131)

    @torch.no_grad()
    def test_faster_rcnn(self, module: nn.Module, model: fastres.Model, monkeypatch: pytest.MonkeyPatch) -> None:
        """A whole detector: transform, pyramid, region proposals, boxes."""
        if not torchvision.extension._has_ops():
            monkeypatch.setattr(torchvision.ops.boxes, "nms", _greedy_nms)
        body = BackboneWithFPN(copy.deepcopy(module), STAGES, CHANNELS, 32)
        anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(
            ((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5
        )
        theirs = FasterRCNN(
            body,
            5,
            rpn_anchor_generator=anchors,
            min_size=96,
            max_size=128,
            rpn_post_nms_top_n_test=50,
            box_score_thresh=0.0,
        ).eval()
        for layer in (theirs.roi_heads.box_predictor.cls_score, theirs.roi_heads.box_predictor.bbox_pred):
            nn.init.normal_(layer.weight, std=0.1)
        ours = copy.deepcopy(theirs)
        ours.backbone.body = fastres.Backbone(model, STAGES)
        images = [torch.rand(3, 96, 120), torch.rand(3, 110, 96)]
        with torch._dynamo.config.patch(disable=True):  # compiling roi_align in Python would take minutes
            results = ours(images), theirs(images)
        for found, expected in zip(*results, strict=True):
            assert len(expected["boxes"]) > 10
            assert torch.equal(found["labels"], expected["labels"])
            torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-3, atol=1e-2)
            torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-4)


def _assert_equal_maps(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-5, name


def _greedy_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Do what torchvision's compiled ``nms`` does. Its wheels for CPU builds of torch lack that op."""
    order = scores.argsort(descending=True, stable=True).tolist()
    overlaps = torchvision.ops.box_iou(boxes, boxes) > threshold
    kept: list[int] = []
    suppressed = torch.zeros(len(boxes), dtype=torch.bool)
    for index in order:
        if not suppressed[index]:
            kept.append(index)
            suppressed |= overlaps[index]
    return torch.tensor(kept, dtype=torch.int64)
