"""The result of ``model.explain()``: how each step runs on a device, its cost, and its share of the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastres import markup
from fastres.executors import cpu, cpu_int8, direct
from fastres.network.plan import Plan, Pool, Shape, Step, StepCost, describe
from fastres.roofline.ceilings import Ceilings, bound_by, stated
from fastres.text import dtype_name, text_table

MEASURED, ESTIMATED = "measured", "estimated"


@dataclass(frozen=True)
class ExplainedStep:
    """One step: its kernel, configuration, shapes (NHWC), FLOPs and bytes.

    ``note`` gives the reason if a slower path was taken. If the machine's ceilings are known, ``bound`` names the one
    that limits the step (``"compute"`` or ``"memory"``), and ``roofline_us`` is the least time that the step can take.
    ``microseconds`` is the time of the step, and ``share`` its share of the roofline. ``source`` says whether this time
    was ``"measured"``, or ``"estimated"`` from the tiles of the chosen configuration, see
    :mod:`fastres.roofline.estimate`.

    Steps of a model in 8 bit also have the ``dtype`` in which they are computed, ``"int8"`` or ``"float32"``, the
    ``scale`` of the levels of their output (``None`` if it is in float32), and its ``signal_to_noise`` in dB, from the
    calibration: how much stronger the float values are than their difference from the values in 8 bit.
    """

    step: str
    op: str
    kernel: str
    config: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    flops: int
    bytes: int
    note: str = ""
    bound: str = ""
    roofline_us: float | None = None
    microseconds: float | None = None
    share: float | None = None
    source: str = ""
    dtype: str = ""
    scale: float | None = None
    signal_to_noise: float | None = None


@dataclass(frozen=True)
class Explanation:
    """The rows of ``model.explain()``. Prints as a table and iterates over the rows.

    ``ceilings_source`` is ``"given"`` or ``"data sheet"``, or empty if ``ceilings`` are unknown. ``manner`` says how
    the network as a whole runs, for example up to which stage in micro-batches (on a GPU, as in the tuned table), or is
    empty.
    """

    model: str
    device: str
    dtype: str
    rows: tuple[ExplainedStep, ...]
    ceilings: Ceilings | None = field(default=None, kw_only=True)
    ceilings_source: str = field(default="", kw_only=True)
    manner: str = field(default="", kw_only=True)

    @classmethod
    def of(
        cls,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        batch: int,
        height: int,
        width: int,
        ceilings: Ceilings | None = None,
        microseconds: Mapping[str, float] | None = None,
        signal_to_noise: Mapping[str, float] | None = None,
    ) -> Explanation:
        """Explain ``plan`` for a batch of ``height`` × ``width`` images. Weight data is not needed.

        ``ceilings`` are the machine's ceilings and replace those of its data sheet. A CPU's ceilings are unknown unless
        given. ``microseconds`` are measured times of steps, and ``signal_to_noise`` decibels of their outputs, by name.
        """
        if device.type == "cpu":
            manner = _manner_on_cpu(plan, (batch, height, width, 3), dtype)
        else:
            from fastres.executors import gpu

            plan, how = gpu.as_run(plan, (batch, height, width, 3), dtype, device)
            manner = "" if how is None else how.manner
        costs = plan.costs(batch, height, width, dtype)
        choices = _choices(plan, costs, device, dtype)
        known = "given" if ceilings else ""
        if ceilings is None and (ceilings := _stated(device, dtype)):
            known = "data sheet"
        times = _times(plan, costs, device, dtype, ceilings, microseconds or {})
        rows = []
        for step, cost, choice, (seconds, source) in zip(plan, costs, choices, times, strict=True):
            kernel, config, note = choice
            shapes = (cost.input_shape, cost.output_shape)
            row = (step.name, describe(step), kernel, config, *shapes, cost.flops, cost.bytes, note)
            eight = _eight_bit(plan, step, signal_to_noise or {})
            rows.append(ExplainedStep(*row, *_position(cost, ceilings, seconds, source), **eight))
        name = dtype_name(dtype)
        known_ceilings: dict[str, Any] = {"ceilings": ceilings, "ceilings_source": known}
        return cls(plan.architecture.name, str(device), name, tuple(rows), **known_ceilings, manner=manner)

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries, for JSON."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        return f"{self._title()}\n{text_table(self._table())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return markup.table(self._table(), title=self._title())

    def _table(self) -> list[tuple[str, ...]]:
        header = ["step", "op", "kernel", "config", "input", "output", "MFLOP", "MB"]
        timed = any(row.microseconds is not None for row in self.rows)
        header += ["bound by", "roofline µs"] if self.ceilings else []
        header += ["µs", "of roofline"] if timed else []
        eight = any(row.dtype for row in self.rows)
        header += ["dtype", "scale", "SNR dB"] if eight else []
        table: list[tuple[str, ...]] = [(*header, "note")]
        for row in self.rows:
            shapes = ["×".join(map(str, shape)) for shape in (row.input_shape, row.output_shape)]
            cells = [row.step, row.op, row.kernel, row.config, *shapes]
            cells += [f"{row.flops / 1e6:,.1f}", f"{row.bytes / 1e6:,.2f}"]
            cells += [row.bound, _number(row.roofline_us)] if self.ceilings else []
            cells += _time_and_share(row) if timed else []
            cells += _dtype_and_scale(row) if eight else []
            table.append((*cells, row.note))
        return table

    def _title(self) -> str:
        title = f"{self.model}, {self.dtype} on {self.device}" + (f"; {self.manner}" if self.manner else "")
        if self.ceilings is None:
            return title
        origin = "from its data sheet" if self.ceilings_source == "data sheet" else "as given"
        return f"{title}; ceilings {self.ceilings.tflops:g} TFLOP/s and {self.ceilings.gb_per_s:g} GB/s, {origin}"


def _choices(
    plan: Plan, costs: Sequence[StepCost], device: torch.device, dtype: torch.dtype
) -> list[tuple[str, str, str]]:
    """Return kernel, configuration and note of each step."""
    if device.type == "cpu":
        kernels = [_kernel_on_cpu(plan, step, cost) for step, cost in zip(plan, costs, strict=True)]
        return [(kernel, f"{torch.get_num_threads()} threads", "") for kernel in kernels]
    from fastres.executors import gpu

    return [gpu.describe(step, cost.input_shape, dtype, device) for step, cost in zip(plan, costs, strict=True)]


def _kernel_on_cpu(plan: Plan, step: Step, cost: StepCost) -> str:
    if plan.quantisation is None:
        return cpu.describe(step)
    return cpu_int8.describe(plan.quantisation, step, cost.flops / 2, direct=direct.absent() is None)


def _manner_on_cpu(plan: Plan, shape: Shape, dtype: torch.dtype) -> str:
    images = cpu.micro_batch(plan, shape, dtype)
    manner = f"in micro-batches of {images} images" if images < shape[0] else ""
    if (reason := direct.absent()) is None:
        return manner
    manner = ", ".join(filter(None, (manner, f"through torch's operators, because {reason}")))
    if plan.quantisation is None:
        return manner
    end, part = cpu_int8.first_stages(plan, (images, *shape[1:]))
    parts = f"up to {plan.steps[end - 1].output} {part} images at a time" if part < images else ""
    return ", ".join(filter(None, (manner, parts)))


def _eight_bit(plan: Plan, step: Step, signal_to_noise: Mapping[str, float]) -> dict[str, Any]:
    """Return the fields of a step that only a plan in 8 bit has."""
    if plan.quantisation is None:
        return {}
    in_8_bit = step.name in plan.quantisation.weights or isinstance(step, Pool)
    scale = plan.quantisation.values.get(step.output)
    return {
        "dtype": "int8" if in_8_bit else "float32",
        "scale": None if scale is None else scale.scale,
        "signal_to_noise": signal_to_noise.get(step.name),
    }


def _stated(device: torch.device, dtype: torch.dtype) -> Ceilings | None:
    if device.type == "cpu":
        return None
    from fastres.kernels.launch import float32_precision
    from fastres.kernels.routing.cards import gpu_of

    return stated(gpu_of(device).name, dtype, float32_precision())


def _times(
    plan: Plan,
    costs: Sequence[StepCost],
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings | None,
    microseconds: Mapping[str, float],
) -> list[tuple[float | None, str]]:
    """Return seconds and their source for each step: given, tuned, or estimated on a GPU with known ceilings."""
    times: list[tuple[float | None, str]] = []
    for step, cost in zip(plan, costs, strict=True):
        if step.name in microseconds:
            times.append((microseconds[step.name] / 1e6, MEASURED))
        elif device.type == "cpu" or ceilings is None:
            times.append((None, ""))
        else:
            from fastres.kernels.routing.cards import gpu_of
            from fastres.roofline.estimate import step_estimate

            times.append(step_estimate(step, cost, dtype, gpu_of(device), ceilings))
    return times


def _position(
    cost: StepCost, ceilings: Ceilings | None, seconds: float | None, source: str
) -> tuple[str, float | None, float | None, float | None, str]:
    """Return ``bound``, ``roofline_us``, ``microseconds``, ``share`` and ``source`` of a step."""
    us = None if seconds is None else seconds * 1e6
    if ceilings is None:
        return "", None, us, None, source
    bound, least = bound_by(cost, ceilings)
    if source == ESTIMATED and seconds is not None:
        us = max(us or 0.0, least * 1e6)  # estimates leave out some bytes, so they can fall below the bound
    share = None if us is None else least * 1e6 / us
    return bound, least * 1e6, us, share, source


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _dtype_and_scale(row: ExplainedStep) -> list[str]:
    scale = "" if row.scale is None else f"{row.scale:.4g}"
    return [row.dtype, scale, _number(row.signal_to_noise)]


def _time_and_share(row: ExplainedStep) -> list[str]:
    return [_number(row.microseconds), "" if row.share is None else f"{row.share:.0%} {row.source}"]
