"""Cross-layer equalisation changes no result in float; bias correction removes mean errors; sensitivity by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastres.network.plan import LOGITS, Plan
from fastres.quantisation.comparison import compare, deviations, margins, noise
from fastres.quantisation.correction import corrected
from fastres.quantisation.equalisation import equalised, largest_weights, pairs
from fastres.quantisation.observation import observe
from fastres.quantisation.rounding import quantisable, quantise_plan
from fastres.quantisation.sensitivity import sensitivities
from fastres.quantisation.simulation import Simulation

from .networks import NETWORKS, float_plan, pictures


def unbalanced(plan: Plan) -> Plan:
    """Return ``plan`` with the channels between two convolutions up to 64 times larger or smaller, each at random."""
    random = {first.output: 2.0 ** torch.randint(-6, 7, (len(first.bias),), device="cpu") for first, _ in pairs(plan)}
    weights = {
        second.input: random[second.input] ** 2 * largest_weights(second) for _, second in pairs(plan)
    }  # the factors are the roots of these values over the weights
    return equalised(plan, weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_equalisation_undoes_what_makes_channels_unlike(name: str) -> None:
    plan, x = unbalanced(float_plan(name)), pictures(8)
    observed = observe(plan, [x])
    other = equalised(plan, observed.channels)
    truth = Simulation(float_plan(name)).run(x)[0]
    for same in (plan, other):  # in float
        torch.testing.assert_close(Simulation(same).run(x)[0], truth, rtol=1e-6, atol=1e-6)
    before, after = (
        compare(Simulation(quantise_plan(each, seen.scales(each, "max"))).run(x)[0], truth).logit_error
        for each, seen in ((plan, observed), (other, observe(other, [x])))
    )
    assert after < 0.5 * before


def test_only_values_that_one_convolution_reads_are_equalised() -> None:
    found = [(first.name, second.name) for first, second in pairs(float_plan("every step"))]
    assert ("layer1.0.conv1", "layer1.0.conv2") in found
    assert ("layer1.0.conv2", "layer1.0.conv3") in found
    assert all(first.split(".")[0] == second.split(".")[0] for first, second in found)
    basic = [(first.name, second.name) for first, second in pairs(float_plan("basic"))]
    assert basic == [("layer1.0.conv1", "layer1.0.conv2"), ("layer2.0.conv1", "layer2.0.conv2")]


@pytest.mark.parametrize("name", NETWORKS)
def test_bias_correction_finds_errors_of_the_bias(name: str) -> None:
    """Wrong biases in every step are found, whatever else rounding changes."""
    plan, x = float_plan(name), pictures(8)
    quantised = quantise_plan(plan, observe(plan, [x]).scales(plan, "max"))
    assert quantised.quantisation is not None
    wrong = replace(
        quantised,
        steps=tuple(
            replace(step, bias=step.bias + 0.2) if step.name in quantised.quantisation.weights else step
            for step in quantised
        ),
    )
    truth = Simulation(plan).run(x)[0]
    error = [
        compare(Simulation(each).run(x)[0], truth).logit_error
        for each in (quantised, corrected(plan, quantised, x), wrong, corrected(plan, wrong, x))
    ]
    assert error[1] < error[0] < error[2]
    assert error[3] < 1.3 * error[1]


def test_one_image_with_clipped_values_does_not_change_the_correction() -> None:
    """White noise gives far larger values than smooth pictures, and these are clipped."""
    plan, x = float_plan("basic"), pictures(9)
    quantised = quantise_plan(plan, observe(plan, [x]).scales(plan, "max"))
    x[4] = torch.randint(0, 2, x[4].shape, dtype=torch.uint8, device="cpu") * 255
    smooth = pictures(8, seed=3)
    truth = Simulation(plan).run(smooth)[0]
    errors = [
        compare(Simulation(each).run(smooth)[0], truth).logit_error
        for each in (corrected(plan, quantised, pictures(9)), corrected(plan, quantised, x))
    ]
    assert errors[1] < 1.2 * errors[0]


def test_the_sensitivity_is_the_error_of_one_step_alone() -> None:
    plan, x = float_plan("basic"), pictures(4)
    scales = observe(plan, [x]).scales(plan, "max")
    quantised = quantise_plan(plan, scales)
    done: list[int] = []
    found = sensitivities(plan, quantised, x, done.append)
    assert set(found) == set(quantisable(plan))
    assert done == [4] * len(found)
    truth = Simulation(plan).run(x)[0]
    for name in ("stem", "head"):  # nothing else reads what these read and write
        alone = quantise_plan(plan, scales, [other for other in quantisable(plan) if other != name])
        if name == "head":
            assert found[name] == pytest.approx(compare(Simulation(alone).run(x)[0], truth).logit_error, rel=0.5)
        else:
            assert found[name] == pytest.approx(compare(Simulation(alone).run(x)[0], truth).logit_error, rel=1e-4)
    coarse = quantise_plan(plan, scales, limit=2)
    assert sensitivities(plan, coarse, x)["layer2.0.conv1"] > 2 * found["layer2.0.conv1"]


def test_agreement_counts_images_whose_margin_exceeds_the_noise() -> None:
    truth = torch.tensor([[3.0, 0, 0], [1, 0.99, 0], [0, 2, 0], [0, 0, 4]], dtype=torch.float64, device="cpu")
    found = truth + 5  # the same for every class: no noise
    assert noise(deviations(found, truth)) == 0
    found[:, 1] += 0.1
    comparison = compare(found, truth)
    assert comparison.agreement == 0.75
    assert comparison.clear == 3
    assert comparison.clear_agreement == 1
    assert margins(truth).tolist() == pytest.approx([3, 0.01, 2, 4])
    assert compare(truth, truth).snr_db == float("inf")
    assert compare(truth * 1.1, truth).logit_error == pytest.approx(0.1)
    assert compare(truth, truth, classes=False).agreement is None
    assert LOGITS in {step.output for step in float_plan("basic")}


def test_a_few_images_with_large_logits_change_neither_the_error_nor_the_noise() -> None:
    truth = torch.randn(50, 10, dtype=torch.float64, device="cpu")
    found = truth + 0.05 * torch.randn(50, 10, dtype=torch.float64, device="cpu")
    before = compare(found, truth)
    truth[7] *= 1000
    found[7] = truth[7] * 0.9
    after = compare(found, truth)
    assert after.logit_error == pytest.approx(before.logit_error, rel=0.1)
    others = truth + 0.05 * torch.randn_like(truth)
    assert noise(deviations(found, truth)) == pytest.approx(noise(deviations(others, truth)), rel=0.3)
    assert abs(after.clear - before.clear) <= 1
    truth[7] = 0  # has no relative error
    assert compare(found.where(truth != 0, 0), truth).logit_error <= before.logit_error
