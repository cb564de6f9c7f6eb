"""The tuner's results as text tables."""

from __future__ import annotations

from collections.abc import Sequence

from fastres.kernels.routing.tables import Network, Tuned, TunedBlock
from fastres.text import text_table


def blocks_table(entries: Sequence[TunedBlock]) -> str:
    """Return a table of the time that joining saves or costs, largest saving first."""
    lines = [("joined run", "kernel", "configuration", "µs", "separate µs")]
    for entry in sorted(entries, key=lambda entry: entry.microseconds - entry.apart_microseconds):
        block, shape = entry.layer, entry.layer.shape
        chain = [str(shape.C), *([str(shape.K)] if block.fused else []), str(block.channels)]
        chain += [str(block.next_channels)] * bool(block.next_channels)
        name = f"N{shape.N} {shape.P}×{shape.Q} {shape.R}×{shape.S}/{shape.stride} {'→'.join(chain)}"
        name += f" shortcut {block.shortcut_channels}/{block.shortcut_stride}" * bool(block.shortcut_channels)
        times = (f"{entry.microseconds:.1f}", f"{entry.apart_microseconds:.1f}")
        lines.append((name, entry.config.kernel, str(entry.config), *times))
    return text_table(lines, right=(3, 4))


def networks_table(entries: Sequence[Network]) -> str:
    """Return a table of the fastest way to run each network."""
    lines = [("network", "batch", "joined", "other settings", "µs", "plain µs")]
    for entry in entries:
        times = (f"{entry.microseconds:.0f}", f"{entry.plain_microseconds:.0f}")
        lines.append((entry.model, str(entry.batch), "yes" if entry.joined else "no", entry.manner or "-", *times))
    return text_table(lines, right=(1, 4, 5))


def table(entries: Sequence[Tuned], rows: int = 20) -> str:
    """Return a table of the slowest layers with the chosen configuration and the time of the rules' own choice."""
    lines = [("layer", "kernel", "configuration", "µs", "rules µs")]
    for entry in sorted(entries, key=lambda entry: -entry.microseconds)[:rows]:
        shape = entry.layer.shape
        name = f"N{shape.N} {shape.H}×{shape.W} {shape.R}×{shape.S}/{shape.stride} {shape.C}→{shape.K}"
        name += f" g{shape.groups}" * (shape.groups > 1) + " +res" * entry.layer.residual
        times = (f"{entry.microseconds:.1f}", f"{entry.rules_microseconds:.1f}")
        lines.append((name, entry.config.kernel, str(entry.config), *times))
    return text_table(lines, right=(3, 4))
