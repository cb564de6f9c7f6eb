"""The estimates' arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fastres.bench.estimates import by_card
from fastres.bench.estimates.rooflines import joined_plan, main, parts, roofline_table, tiles_seconds
from fastres.bench.tuning.configurations import candidates
from fastres.folding.build import outline
from fastres.kernels.routing.cards import CARDS, H100
from fastres.kernels.routing.tables import Layer
from fastres.network.architectures import get_architecture
from fastres.network.plan import Conv, Joined
from fastres.roofline.bound import roofline
from fastres.roofline.ceilings import Ceilings
from fastres.roofline.estimate import conv_seconds
from fastres.roofline.gpu_shapes import conv_shape


def test_parts_are_the_network() -> None:
    costs = outline(get_architecture("resnet50"), torch.float16).costs(1)
    found = parts(costs)
    assert list(found) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert sum(len(members) for members in found.values()) == len(costs)


def test_compute_bound_and_memory_bound() -> None:
    """With infinite bandwidth the time is that of the arithmetic, and with infinite arithmetic that of the traffic."""
    costs = outline(get_architecture("resnet18"), torch.float16).costs(8, 224, 224, torch.float16)
    flops, moved = sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs)
    text = roofline_table("resnet18", 8, 224, torch.float16, Ceilings(1.0, 1e12))
    assert f"roofline: {8 / (flops / 1e12):,.0f} images/s" in text
    text = roofline_table("resnet18", 8, 224, torch.float16, Ceilings(1e12, 1.0))
    assert f"roofline: {8 / (moved / 1e9):,.0f} images/s" in text


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch", "256", "--roofline"]) == 0
    assert "resnet50, batch 256" in capsys.readouterr().out
    assert main(["--batch", "1", "--card", "H100", "Tesla T4", "--model", "resnet18"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "estimated, not measured on a GPU" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["H100", "Tesla"]
    assert "split" in lines[2]
    assert main(["--batch", "1", "--card", "H100", "--plain"]) == 0
    assert "left out" in capsys.readouterr().out
    assert main(["--card", "H1000"]) == 2
    assert "no card called 'H1000'" in capsys.readouterr().err


def test_estimates_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "rules.json"
    assert main(["--batch", "1", "64", "--card", "NVIDIA L40S", "--out", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["command"].startswith("python -m bench.estimates --batch 1 64 --card 'NVIDIA L40S' --out")
    assert {"fastres", "torch", "triton"} == set(document["versions"])
    before, after = [[row for row in document["rows"] if row["plain"] is plain] for plain in (True, False)]
    assert [row["batch"] for row in before] == [row["batch"] for row in after] == [1, 64]
    for old, new in zip(before, after, strict=True):
        assert new["ms"] < old["ms"]
        assert new["images_per_s"] == pytest.approx(1e3 * new["batch"] / new["ms"], rel=1e-3)
        assert old["split"] == old["wide"] == old["images"] == 0
    assert after[0]["split"]
    assert after[1]["through"]
    assert after[1]["images_per_s"] > after[1]["roofline_images_per_s"], "of kernels that share nothing through L2"


RULES = Path(__file__).parents[3] / "bench" / "results" / "estimates" / "rules.json"


def test_the_committed_estimates_are_what_the_command_writes_and_what_the_page_shows() -> None:
    rows = json.loads(RULES.read_text())["rows"]
    page = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()
    assert by_card.markdown([row for row in rows if row["batch"] in (1, 256)]) in page
    for row in rows[::9]:  # some of both, on every kind of card
        gpu = next(gpu for gpu in CARDS if gpu.name == row["gpu"])
        found = by_card.estimate_card(gpu, row["model"], row["batch"], row["size"], torch.float16, row["plain"])
        assert asdict(found) == pytest.approx(row)


def test_no_card_is_estimated_to_lose_by_the_rules() -> None:
    rows = json.loads(RULES.read_text())["rows"]
    before = {(row["gpu"], row["batch"]): row["ms"] for row in rows if row["plain"]}
    for row in rows:
        assert row["ms"] <= 1.001 * before[row["gpu"], row["batch"]], row


def test_joined_plans_have_a_lower_bound() -> None:
    limits = Ceilings(790, 4300)
    plan = outline(get_architecture("resnet50"), torch.float16)
    joined = joined_plan(plan, 256, 224, torch.float16, limits)
    before, after = (roofline(p.costs(256), limits) for p in (plan, joined))
    assert after.flops == before.flops
    assert after.seconds < 0.8 * before.seconds
    # A run of 256 channels or more is not fused: it is bound by arithmetic, and does not fit any kernel.
    assert all(step.first is None for step in joined if isinstance(step, Joined) and "layer3" in step.last.name)
    assert len(joined_plan(plan, 8, 224, torch.float16, limits)) > len(joined), "the kernels' tiles are 64 images"
    assert f"{len(joined)} kernels" in roofline_table("resnet50", 256, 224, torch.float16, limits, joined=True)


def test_split_reductions_shorten_a_batch_of_one() -> None:
    limits = Ceilings(790, 4300)
    plan = outline(get_architecture("resnet50"), torch.float16)
    one = tiles_seconds(plan, 1, 224, torch.float16, limits)
    shapes, unsplit = plan.shapes(1, 224, 224), 0.0
    for step in plan:
        if isinstance(step, Conv):
            layer = Layer.of(conv_shape(step, shapes[step.input]), torch.float16, step.residual is not None)
            found = [config for config in candidates(layer, H100) if config.split == 1]
            unsplit += min(conv_seconds(layer, config, H100, limits) for config in found)
    assert roofline(plan.costs(1), limits).seconds < one < 0.75 * unsplit
