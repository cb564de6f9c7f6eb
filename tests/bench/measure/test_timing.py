"""Test the timing and memory measurement of engines. No test depends on actual speed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fastres.bench.measure import timing
from fastres.bench.measure.timing import Budget, Quantiles

CPU = torch.device("cpu")


def test_quantiles() -> None:
    assert Quantiles.of([float(value) for value in range(11)]) == Quantiles(2.0, 5.0, 8.0)
    assert Quantiles.of([3.0, 1.0, 100.0]).p50 == 3.0


@pytest.mark.parametrize(("seconds_a_round", "rounds"), [(0.1, 10), (1e-6, 50), (30.0, 4), (0.0, 50)])
def test_budget_bounds_the_rounds(seconds_a_round: float, rounds: int) -> None:
    assert Budget(seconds=1.0, fewest=4, most=50, warmups=1).rounds(seconds_a_round) == rounds


def test_engines_take_turns_in_changing_order() -> None:
    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in "abc"}
    shares: list[float] = []
    samples = timing.interleaved(calls, CPU, Budget(0.0, 8, 8, warmups=2), shares.append)
    warm, timed = called[:6], called[6::2]
    assert timed == called[7::2], "a short call is made twice"
    rounds = [tuple(timed[start : start + 3]) for start in range(0, len(timed), 3)]
    assert warm == list("abcabc")
    assert len(rounds) == 8
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 2
    assert Counter(timed) == {"a": 8, "b": 8, "c": 8}
    assert {name: len(values) for name, values in samples.items()} == {"a": 8, "b": 8, "c": 8}
    assert shares == [turn / 8 for turn in range(1, 9)]


def test_samples_belong_to_the_engine_that_took_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    cost = {"quick": 1, "slow": 5}

    def tick(name: str) -> None:
        counted[name] += 1
        for _ in range(cost[name] - 1):
            next(clock)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    counted: Counter[str] = Counter()
    calls = {name: (lambda name=name: tick(name)) for name in cost}
    samples = timing.interleaved(calls, CPU, Budget(0.0, 6, 6, warmups=1))
    assert samples == {"quick": [1000.0] * 6, "slow": [5000.0] * 6}
    assert counted == {"quick": 7, "slow": 7}, "long calls are made once a round, and once to warm up"


def test_nothing_to_time_is_fine() -> None:
    assert timing.interleaved({}, CPU, timing.QUICK) == {}


def test_memory_that_is_freed_again_counts_at_its_peak() -> None:
    if not timing.can_reset_peak():
        pytest.skip("this system does not let a process reset its peak resident set size")
    megabytes = 96

    def work() -> str:
        torch.ones(megabytes << 18)  # float32, touched, then freed
        return "done"

    result, seconds, growth = timing.measured(work, CPU)
    assert result == "done"
    assert seconds > 0
    assert megabytes << 20 <= growth + (8 << 20)
    assert growth < 2 * megabytes << 20
    _, _, later = timing.measured(lambda: None, CPU)
    assert later < 16 << 20  # the peak before does not count


def test_without_a_reset_the_method_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "clear_refs" in timing.memory_method(CPU) or not timing.can_reset_peak()
    monkeypatch.setattr(timing, "can_reset_peak", lambda: False)
    _, _, growth = timing.measured(lambda: torch.ones(64 << 18).sum(), CPU)
    assert growth >= 0
    assert "ru_maxrss" in timing.memory_method(CPU)
