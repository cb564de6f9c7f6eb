"""The peak rates of a machine, and the least time that a step of a plan can take on it: the roofline of one step.

    T = max(FLOPs / (FLOP/s), bytes / (bytes/s))

Williams, Waterman, Patterson: *Roofline*, CACM 52(4), 2009. The benchmark measures ceilings
(``fastres.bench.measure.ceilings``). ``PEAKS`` has the manufacturers' figures, for ``model.explain()`` on a GPU
without measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastres.network.plan import StepCost


@dataclass(frozen=True)
class Ceilings:
    """Rates of a machine: ``tflops`` (10¹² FLOP/s) of a matrix product, ``gb_per_s`` (10⁹ bytes/s) of its memory.

    Measured ceilings are the best rates of a square product and of a copy. Each byte of a copy counts twice.
    """

    tflops: float
    gb_per_s: float


@dataclass(frozen=True)
class Peak:
    """The figures of a GPU's data sheet: dense TFLOP/s by precision, and memory bandwidth in GB/s."""

    half: float  # float16 and bfloat16, matrix units
    tf32: float
    float32: float
    gb_per_s: float

    def ceilings(self, dtype: torch.dtype, precision: str = "ieee") -> Ceilings:
        if dtype != torch.float32:
            return Ceilings(self.half, self.gb_per_s)
        return Ceilings(self.float32 if precision == "ieee" else self.tf32, self.gb_per_s)


# Without sparsity. NVIDIA A100, H100 and H200 Tensor Core GPU data sheets, AMD Instinct MI300X data sheet. The keys are
# torch's device names and must match exactly: a MIG slice has a longer name and is a different machine.
_A100 = {"half": 312.0, "tf32": 156.0, "float32": 19.5}
_SXM = {"half": 989.4, "tf32": 494.7, "float32": 66.9}
_H100 = Peak(**_SXM, gb_per_s=3350.0)
_MI300X = Peak(half=1307.4, tf32=653.7, float32=163.4, gb_per_s=5300.0)
PEAKS = {
    "A100": Peak(**_A100, gb_per_s=1555.0),
    "NVIDIA A100-SXM4-40GB": Peak(**_A100, gb_per_s=1555.0),
    "NVIDIA A100-PCIE-40GB": Peak(**_A100, gb_per_s=1555.0),
    "NVIDIA A100 80GB PCIe": Peak(**_A100, gb_per_s=1935.0),
    "NVIDIA A100-SXM4-80GB": Peak(**_A100, gb_per_s=2039.0),
    "H100": _H100,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": Peak(half=756.0, tf32=378.0, float32=51.0, gb_per_s=2000.0),
    "NVIDIA H100 NVL": Peak(half=835.0, tf32=417.5, float32=60.0, gb_per_s=3900.0),
    "NVIDIA H200": Peak(**_SXM, gb_per_s=4800.0),
    "NVIDIA H200 NVL": Peak(half=835.5, tf32=417.5, float32=60.0, gb_per_s=4800.0),
    # T4 data sheet (it has no tf32); GA102, Ada and Blackwell RTX architecture papers, float16 with float32
    # accumulate; A10G, L4 and L40S data sheets.
    "Tesla T4": Peak(half=65.0, tf32=8.1, float32=8.1, gb_per_s=320.0),
    "NVIDIA GeForce RTX 3090": Peak(half=71.0, tf32=35.6, float32=35.6, gb_per_s=936.0),
    "NVIDIA A10G": Peak(half=70.0, tf32=35.0, float32=35.0, gb_per_s=600.0),
    "NVIDIA L4": Peak(half=121.0, tf32=60.0, float32=30.3, gb_per_s=300.0),
    "NVIDIA L40S": Peak(half=362.05, tf32=183.0, float32=91.6, gb_per_s=864.0),
    "NVIDIA GeForce RTX 4090": Peak(half=165.2, tf32=82.6, float32=82.6, gb_per_s=1008.0),
    "NVIDIA GeForce RTX 5090": Peak(half=209.5, tf32=104.8, float32=104.8, gb_per_s=1792.0),
    "MI300X": _MI300X,
    "AMD Instinct MI300X": _MI300X,
}


def stated(gpu_name: str, dtype: torch.dtype, precision: str = "ieee") -> Ceilings | None:
    """Return the data sheet's ceilings of a GPU for products of ``dtype``, or ``None`` if ``PEAKS`` lacks the GPU.

    ``precision`` is ``"ieee"`` or ``"tf32"`` and only affects float32.
    """
    peak = PEAKS.get(gpu_name)
    return None if peak is None else peak.ceilings(dtype, precision)


def step_seconds(cost: StepCost, ceilings: Ceilings) -> tuple[float, float]:
    """Return the seconds of one step's arithmetic and of its memory traffic at the ceilings."""
    return cost.flops / (ceilings.tflops * 1e12), cost.bytes / (ceilings.gb_per_s * 1e9)


def bound_by(cost: StepCost, ceilings: Ceilings) -> tuple[str, float]:
    """Return ``"compute"`` or ``"memory"``, and the least seconds that one step takes."""
    compute, memory = step_seconds(cost, ceilings)
    return ("memory", memory) if memory > compute else ("compute", compute)
