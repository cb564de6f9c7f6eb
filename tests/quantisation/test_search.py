"""The choice of scales, corrections and kept steps by measured error."""

from __future__ import annotations

import functools

import pytest
import torch

from fastres.errors import CalibrationError, InputError
from fastres.network.plan import POOLED
from fastres.network.quantisation import WEIGHT_LIMIT
from fastres.quantisation.comparison import compare
from fastres.quantisation.rounding import quantisable
from fastres.quantisation.search import Calibrated, Search, check_keep, images_to_run
from fastres.quantisation.simulation import Simulation
from fastres.quantisation.thresholds import METHODS

from .networks import NETWORKS, float_plan, pictures


@functools.lru_cache(maxsize=1)
def automatic() -> tuple[Calibrated, int]:
    done: list[int] = []
    search = Search(
        float_plan("basic"), pictures(12), pictures(6, seed=2), advance=lambda phase, images: done.append(images)
    )
    return search.calibrate(), sum(done)


def test_the_chosen_candidate_has_the_least_error() -> None:
    found, _ = automatic()
    assert found.chosen.logit_error == min(candidate.logit_error for candidate in found.candidates)
    assert {candidate.method for candidate in found.candidates} == set(METHODS)
    assert {(c.equalised, c.corrected) for c in found.candidates} == {(a, b) for a in (0, 1) for b in (0, 1)}
    x = pictures(6, seed=2)
    truth, logits = (Simulation(plan).run(x)[0] for plan in (float_plan("basic"), found.plan))
    assert compare(logits, truth).logit_error == pytest.approx(found.chosen.logit_error, rel=0.1)
    assert list(found.sensitivity.values()) == sorted(found.sensitivity.values(), reverse=True)
    assert set(found.signal_to_noise) == {step.name for step in found.plan}


def test_the_progress_is_known_in_advance() -> None:
    _, done = automatic()
    expected = images_to_run(float_plan("basic"), 12, 6, 40, "auto")
    assert abs(done - expected) <= 6  # the float network on the images of the choice is not counted


@pytest.mark.parametrize("name", NETWORKS)
def test_one_method_can_be_asked_for(name: str) -> None:
    found = Search(float_plan(name), pictures(4), pictures(4, seed=2), limit=64).calibrate("percentile", ["stem"])
    assert found.chosen.logit_error < 0.3
    assert {candidate.method for candidate in found.candidates} == {"percentile"}
    assert found.chosen.kept == ("stem",)
    assert found.plan.quantisation is not None
    assert "stem" not in found.plan.quantisation.weights
    assert found.plan.stem.weight.dtype == torch.float32
    assert max(int(s.weight.abs().max()) for s in found.plan if s.name in found.plan.quantisation.weights) == 64


def test_sensitive_steps_stay_in_float_until_the_error_is_small_enough() -> None:
    first, _ = automatic()
    wanted = 0.9 * first.chosen.logit_error
    search = Search(float_plan("basic"), pictures(12), pictures(6, seed=2))
    found = search.calibrate(first.chosen.method, largest_error=wanted)
    assert found.chosen.logit_error <= wanted
    assert found.chosen.kept
    assert set(found.chosen.kept) <= set(list(found.sensitivity)[: len(found.chosen.kept)])
    assert len(found.chosen.kept) <= len(quantisable(float_plan("basic"))) // 2
    with pytest.raises(CalibrationError, match="up to half of its steps in float32"):
        search.calibrate(first.chosen.method, largest_error=1e-9)


def test_names_are_checked() -> None:
    plan = float_plan("basic")
    with pytest.raises(InputError, match=r"'layer1\.0\.conv9'.*Did you mean 'layer1\.0\.conv"):
        check_keep(plan, ["layer1.0.conv9"])
    with pytest.raises(InputError, match="every step"):
        check_keep(plan, quantisable(plan))
    assert check_keep(plan, ("head", "stem")) == ("stem", "head")
    with pytest.raises(InputError, match="'average'; use 'auto', 'max'"):
        Search(plan, pictures(2), pictures(2)).calibrate("average")
    assert WEIGHT_LIMIT == 127
    assert POOLED in automatic()[0].plan.quantisation.values  # type: ignore[union-attr]
