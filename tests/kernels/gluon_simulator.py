"""Simulate Gluon on a CPU, as far as warp-specialised TMA kernels need it. Triton's interpreter cannot run Gluon.

The partitions of a kernel run as threads, one program after the other. Everything asynchronous is as late as the
hardware may be. A TMA load fills its target with NaN at once, and with data after a random delay, in any order with
other loads. A TMA store reads its source after such a delay. A product is only computed when the kernel waits for it.
mbarriers count arrivals and bytes as on the GPU. So a buffer that is read too early, or released too early, gives a
wrong result, and a missing arrival raises ``Deadlock``.

Not simulated: what happens between the warps of one partition (the compiler's part), memory proxies, and layouts.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

PATIENCE_S = 20.0


class Deadlock(AssertionError):
    """A partition waits for an arrival that never comes."""


class Whole(int):
    """An integer that rejects divisions for which Python and the GPU, which round differently, disagree."""

    def __floordiv__(self, other: int) -> Whole:
        assert self >= 0, "the GPU rounds towards zero"
        return Whole(int(self) // int(other))

    def __mod__(self, other: int) -> Whole:
        assert self >= 0, "the GPU's remainder has the sign of the dividend"
        return Whole(int(self) % int(other))

    def __and__(self, other: int) -> Whole:
        return Whole(int(self) & int(other))

    def __xor__(self, other: int) -> Whole:
        return Whole(int(self) ^ int(other))


def _keeping(name: str) -> Callable[..., Any]:
    def method(self: Whole, other: Any) -> Any:
        result = getattr(int, name)(self, other)
        return result if result is NotImplemented else Whole(result)

    return method


for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__"):
    setattr(Whole, _name, _keeping(_name))


class Barrier:
    """An mbarrier: a phase ends after all arrivals, when all expected bytes have been transferred."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count, self.arrived, self.bytes, self.phase = 0, 0, 0, 0

    def index(self, _: int) -> Barrier:
        raise AssertionError("this barrier is a single one")

    def add(self, arrivals: int, expected: int) -> None:
        with self.changed:
            assert self.count > 0, "init comes first"
            self.arrived += arrivals
            self.bytes += expected
            assert self.arrived <= self.count, "more arrivals than the barrier was made for"
            if self.arrived == self.count and self.bytes == 0:
                self.arrived, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE_S):
                raise Deadlock(f"waited {PATIENCE_S:.0f} s for parity {parity}, the barrier is in phase {self.phase}")


@dataclass
class Shared:
    """Buffers in shared memory, as float32. Elements that are not yet written, or being written, are NaN."""

    values: Tensor

    def index(self, slot: int) -> Shared:
        return Shared(self.values[slot])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.values.view(*shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.values.permute(*order))

    def load(self, _layout: object) -> Tensor:
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        self.values.copy_(values)


@dataclass
class Pointer:
    """The address of a tensor's elements."""

    tensor: Tensor
    offsets: Any = 0

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.tensor, self.offsets + offsets)


class Descriptor:
    """A tensor that TMA moves in boxes. Outside the tensor, reads give zeros and writes do nothing."""

    def __init__(self, host: Any) -> None:
        self.tensor = host.base.as_strided(host.shape, host.strides)
        self.box, self.layout, self.dtype = list(host.block_shape), host.layout, host.base.dtype
        size = math.prod(self.box) * host.base.element_size()
        self.block_type = SimpleNamespace(shape=self.box, nbytes=size)

    def _parts(self, corner: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return the part of a box inside the tensor, as slices of the tensor and of the box."""
        assert len(corner) == len(self.box)
        inside, within = [], []
        for start, length, size in zip(corner, self.box, self.tensor.shape, strict=True):
            low, high = max(start, 0), min(start + length, size)
            high = max(low, high)
            inside.append(slice(low, high))
            within.append(slice(low - start, high - start))
        return tuple(inside), tuple(within)

    def read(self, corner: Sequence[int]) -> Tensor:
        inside, within = self._parts(corner)
        box = torch.zeros(self.box)
        box[within] = self.tensor[inside].float()
        return box

    def write(self, corner: Sequence[int], values: Tensor) -> None:
        inside, within = self._parts(corner)
        self.tensor[inside] = values[within].to(self.dtype)


@dataclass
class Accumulator:
    """The products that have been issued, and those that are done."""

    done: Tensor
    issued: list[tuple[Shared, Shared]] = field(default_factory=list)


class Engine:
    """The TMA unit: runs its commands after a delay, in random order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.work: list[Callable[[], None]] = []
        self.changed = threading.Condition()
        self.stores, self.stopped = 0, False
        self.failures: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.work or self.stopped)
                if not self.work:
                    return
                # Often wait for more work, so that the order differs from the order of issue.
                if self.random.random() < 0.5:
                    self.changed.wait(0.0005)
                todo = self.work.pop(self.random.randrange(len(self.work)))
            try:
                todo()
            except BaseException as error:
                self.failures.append(error)

    def put(self, todo: Callable[[], None]) -> None:
        with self.changed:
            self.work.append(todo)
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        self.thread.join()


class Simulator:
    """Replaces the Gluon modules that a kernel's module imports. ``launch`` runs one of its kernels."""

    def __init__(self, module: ModuleType, patch: pytest.MonkeyPatch, seed: int = 0) -> None:
        self.module, self.seed, self.programs, self.program = module, seed, 1, 0
        self.engine: Engine
        for name, value in vars(module).copy().items():
            if hasattr(value, "is_gluon"):  # run the Python function itself
                patch.setattr(module, name, value.fn)
        self.tma = SimpleNamespace(
            async_copy_global_to_shared=self._load, async_copy_shared_to_global=self._store, store_wait=self._store_wait
        )
        self.mbarrier = SimpleNamespace(
            init=self._init,
            wait=lambda barrier, parity: barrier.wait(parity),
            expect=lambda barrier, size: barrier.add(1, size),
            arrive=lambda barrier, count: barrier.add(count, 0),
            MBarrierLayout=lambda: "mbarrier",
        )
        patch.setattr(module, "gl", self._language(module.gl))
        patch.setattr(module, "tma", self.tma)
        patch.setattr(module, "mbarrier", self.mbarrier)
        patch.setattr(module, "fence_async_shared", lambda: None)
        patch.setattr(module, "warpgroup_mma", self._multiply)
        patch.setattr(
            module, "warpgroup_mma_init", lambda acc: acc if isinstance(acc, Accumulator) else Accumulator(acc)
        )
        patch.setattr(module, "warpgroup_mma_wait", self._products)
        patch.setattr(module, "range", lambda *of: map(Whole, range(*of)), raising=False)

    def _language(self, real: ModuleType) -> SimpleNamespace:
        return SimpleNamespace(
            constexpr=real.constexpr,
            float32=torch.float32,
            int64=torch.int64,
            NVMMASharedLayout=real.NVMMASharedLayout,
            NVMMADistributedLayout=real.NVMMADistributedLayout,
            SliceLayout=lambda _dim, _parent: None,
            static_range=range,
            program_id=lambda _axis: Whole(self.program),
            num_programs=lambda _axis: Whole(self.programs),
            minimum=lambda a, b: Whole(min(a, b)),
            maximum=_maximum,
            arange=lambda low, high, _layout: torch.arange(low, high),
            zeros=lambda shape, dtype, _layout: torch.zeros(shape, dtype=dtype),
            load=_masked_load,
            allocate_shared_memory=_allocate,
            warp_specialize=self._specialize,
        )

    # -- a launch ------------------------------------------------------------------------------------------------

    def launch(self, kernel: Callable[..., None]) -> Any:
        """Return ``kernel`` in a form that is launched like Triton's: ``launch(kernel)[grid](…)``, with CPU tensors."""

        class Launcher:
            def __getitem__(_, grid: tuple[int]) -> Callable[..., None]:
                return lambda **arguments: self._launch(kernel, grid[0], arguments)

        return Launcher()

    def _launch(self, kernel: Callable[..., None], programs: int, arguments: dict[str, Any]) -> None:
        del arguments["num_warps"]
        given = {name: _argument(value) for name, value in arguments.items()}
        self.programs = programs
        for self.program in range(programs):
            self.engine = Engine(self.seed + self.program)
            try:
                kernel(**given)
            finally:
                self.engine.stop()
            if self.engine.failures:
                raise self.engine.failures[0]
            assert not self.engine.stores, "the program ended before its stores had read shared memory"

    def _specialize(
        self, partitions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]
    ) -> None:
        assert len(partitions) == len(warps) + 1 == len(registers) + 1
        failures: list[BaseException] = []

        def run(function: Any, arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    # -- operations ----------------------------------------------------------------------------------------------

    @staticmethod
    def _init(barrier: Barrier, count: int) -> None:
        barrier.count = count

    def _load(self, desc: Descriptor, corner: Sequence[int], barrier: Barrier, target: Shared) -> None:
        target.values.fill_(math.nan)

        def copy() -> None:
            target.store(desc.read(corner))
            barrier.add(0, -desc.block_type.nbytes)

        self.engine.put(copy)

    def _store(self, desc: Descriptor, corner: Sequence[int], source: Shared) -> None:
        def copy() -> None:
            desc.write(corner, source.values)
            with self.engine.changed:
                self.engine.stores -= 1
                self.engine.changed.notify_all()

        with self.engine.changed:
            self.engine.stores += 1
        self.engine.put(copy)

    def _store_wait(self, pendings: int) -> None:
        with self.engine.changed:
            if not self.engine.changed.wait_for(lambda: self.engine.stores <= pendings, PATIENCE_S):
                raise Deadlock("a store does not end")

    @staticmethod
    def _multiply(a: Shared, b: Shared, acc: Accumulator, is_async: bool) -> Accumulator:
        assert is_async
        return Accumulator(acc.done, [*acc.issued, (a, b)])

    @staticmethod
    def _products(num_outstanding: int, deps: tuple[Accumulator]) -> Any:
        (acc,) = deps
        ready = acc.issued[: len(acc.issued) - num_outstanding]
        done = acc.done
        for a, b in ready:
            done = done + a.values @ b.values
        rest = acc.issued[len(ready) :]
        return Accumulator(done, rest) if num_outstanding else done


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value)
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    return Whole(value) if type(value) is int else value


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Any:
    if layout == "mbarrier":
        return _Barriers([Barrier() for _ in range(shape[0])]) if len(shape) > 1 else Barrier()
    return Shared(torch.full(list(shape), math.nan))


@dataclass
class _Barriers:
    barriers: list[Barrier]

    def index(self, slot: int) -> Barrier:
        return self.barriers[slot]


def _maximum(a: Any, b: Any, propagate_nan: object = None) -> Any:
    if isinstance(a, Tensor):
        assert propagate_nan is not None
        return a.clamp_min(b)  # keeps NaN
    return Whole(max(a, b))


def _masked_load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    offsets = pointer.offsets.clamp(max=pointer.tensor.numel() - 1)
    return torch.where(mask, pointer.tensor.flatten()[offsets], other)
