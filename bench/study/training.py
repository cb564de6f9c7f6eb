"""Train CIFAR-family networks as He et al. do (CVPR 2016, §4.2), several at a time, with resumption.

One process trains one network on one thread, so that the weights depend on the seed and not on the number of cores.
After each epoch the whole training state is written, and an interrupted run resumes from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import multiprocessing
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastres.bench.engines.eager import EagerResNet
from fastres.bench.report.results import write_whole
from fastres.executors.quota import threads
from fastres.network.architectures import get_architecture
from fastres.terminal import progress_bar, warn

from .data import CLASSES, Dataset, load_dataset

EVALUATION_BATCH = 180
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum. The learning rate rises linearly to its peak, then falls to zero along a cosine.

    Images are shifted by up to ``shift`` pixels in each direction and, if the data set allows it, mirrored. Weight
    decay, momentum, shift and initialisation are those of He et al. Their 64,000 steps of 128 images would take a day
    per network, so the schedule here is that of ``bench/digits/training.py``. The peak rate is also from there, 0.1 for
    batches of 64, scaled in proportion to the batch size. (With 0.1 from the first step, without the rise, neither
    56-layer network had learned the digits after six epochs: training errors 65 % plain, 79 % residual.)
    """

    epochs: int
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.15
    shift: int = 4

    def rate(self, done: float) -> float:
        """Return the learning rate after the fraction ``done`` of all steps."""
        if done < self.warmup:
            return self.learning_rate * done / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))


@dataclass(frozen=True)
class Job:
    """One network to train: architecture name, seed, recipe, and data (the folder that ``load_dataset`` takes)."""

    model: str
    seed: int
    recipe: Recipe
    data: str | None = None
    limit: int | None = None

    @property
    def key(self) -> str:
        """The name of its files, without extension."""
        return f"{self.model}-{'cifar10' if self.data else 'digits'}-seed{self.seed}"

    @property
    def fingerprint(self) -> str:
        """A hash of everything that affects the trained weights."""
        settings = {**dataclasses.asdict(self), "data": bool(self.data), "torch": torch.__version__}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Epoch:
    """The loss and the errors of one epoch.

    Errors are fractions. The training error is measured during training, the test error after the epoch.
    """

    train_loss: float
    train_error: float
    test_error: float


@dataclass(frozen=True)
class Trained:
    """A trained network: its job, its state dict (float32, torchvision's names), and the results of each epoch."""

    job: Job
    state: dict[str, Tensor]
    epochs: list[Epoch]

    def module(self) -> EagerResNet:
        """Return the network in eval mode."""
        return module_of(self.job.model, self.state)


def module_of(model: str, state: dict[str, Tensor]) -> EagerResNet:
    """Return the plain PyTorch module of an architecture with these weights, in eval mode."""
    module = EagerResNet(get_architecture(model).with_classes(CLASSES))
    module.load_state_dict(state)
    return module.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


@torch.inference_mode()
def logits(module: nn.Module, images: Tensor) -> Tensor:
    """Return logits ``[N, 10]`` of normalised images ``[N, 3, 32, 32]``."""
    return torch.cat([module(part) for part in images.split(EVALUATION_BATCH)])


def error_of(scores: Tensor, labels: Tensor) -> float:
    """Return the fraction of images for which the largest logit is not that of the label."""
    return float((scores.argmax(1) != labels).double().mean())


def augment(images: Tensor, shift: int, mirror: bool, generator: torch.Generator) -> Tensor:
    """Shift each image of ``[N, C, H, W]`` by up to ``shift`` pixels. With ``mirror``, mirror half of them at random.

    Pixels that move in at the edge are zero: black, or paper in the digits.
    """
    count, channels, height, width = images.shape
    padded = nn.functional.pad(images, (shift,) * 4)
    top, left = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # [N, H], [N, W]
    if mirror:
        flip = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    index = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[(*index, rows[:, None, :, None], columns[:, None, None, :])]


def train(job: Job, dataset: Dataset, folder: Path, tick: Callable[[], None] = lambda: None) -> Trained:
    """Train one network, or read it if ``folder`` has it. ``tick`` is called after each epoch."""
    finished = read(job, folder)
    if finished is not None:
        for _ in finished.epochs:
            tick()
        return finished
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        module = EagerResNet(get_architecture(job.model).with_classes(CLASSES))
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        module.parameters(),
        job.recipe.learning_rate,
        job.recipe.momentum,
        weight_decay=job.recipe.weight_decay,
        nesterov=True,
    )
    generator = torch.Generator().manual_seed(job.seed + 1)
    partial = folder / f"{job.key}.partial"
    epochs = _resume(job, partial, module, optimizer, generator)
    for _ in epochs:
        tick()
    test_images = dataset.normalise(dataset.test_images)
    while len(epochs) < job.recipe.epochs:
        loss, error = _train_epoch(job, dataset, module, optimizer, generator, len(epochs))
        test_error = error_of(logits(module.eval(), test_images), dataset.test_labels)
        epochs.append(Epoch(loss, error, test_error))
        _save_partial(job, partial, module, optimizer, generator, epochs)
        tick()
    state = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    _write(Trained(job, state, epochs), folder)
    partial.unlink(missing_ok=True)
    return Trained(job, state, epochs)


def _train_epoch(
    job: Job,
    dataset: Dataset,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    epoch: int,
) -> tuple[float, float]:
    """Train for one epoch. Return its mean loss and its error, both measured during training."""
    module.train()
    images = dataset.train_images
    order = torch.randperm(len(images), generator=generator)
    losses, wrong = 0.0, 0
    batches = order.tensor_split(-(-len(images) // job.recipe.batch_size))
    for number, batch in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = job.recipe.rate((epoch + number / len(batches)) / job.recipe.epochs)
        x = dataset.normalise(augment(images[batch], job.recipe.shift, dataset.mirror, generator))
        labels = dataset.train_labels[batch]
        scores = module(x.contiguous(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += loss.item() * len(batch)
        wrong += int((scores.detach().argmax(1) != labels).sum())
    return losses / len(images), wrong / len(images)


def _save_partial(
    job: Job,
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    epochs: Sequence[Epoch],
) -> None:
    content = io.BytesIO()
    torch.save(
        {
            "fingerprint": job.fingerprint,
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "epochs": [dataclasses.astuple(epoch) for epoch in epochs],
        },
        content,
    )
    write_whole(path, content.getvalue())


def _resume(
    job: Job, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> list[Epoch]:
    """Restore the state of an interrupted training of the same job. Return its finished epochs."""
    if not path.exists():
        return []
    try:
        saved = torch.load(path, weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        warn(f"{path} is damaged ({error}), so the training begins again", UserWarning)
        return []
    if saved["fingerprint"] != job.fingerprint:
        return []
    module.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    return [Epoch(*values) for values in saved["epochs"]]


def _write(trained: Trained, folder: Path) -> None:
    """Write ``KEY.safetensors``. Its metadata name the architecture, because plain networks and ResNets have the same
    tensors.
    """
    metadata = {
        "format": "pt",
        "architecture": trained.job.model,
        "fingerprint": trained.job.fingerprint,
        "job": json.dumps(dataclasses.asdict(trained.job) | {"data": bool(trained.job.data)}),
        "epochs": json.dumps([dataclasses.astuple(epoch) for epoch in trained.epochs]),
    }
    write_whole(folder / f"{trained.job.key}.safetensors", safetensors.torch.save(trained.state, metadata))


def read(job: Job, folder: Path) -> Trained | None:
    """Return the network in ``folder`` for exactly this job, or ``None``."""
    path = folder / f"{job.key}.safetensors"
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != job.fingerprint:
                return None
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Trained(job, state, [Epoch(*values) for values in json.loads(metadata["epochs"])])
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        warn(f"{path} is damaged ({error}), so its network is trained again", UserWarning)
        return None


def train_all(jobs: Sequence[Job], folder: Path, workers: int) -> list[Trained]:
    """Train the ``jobs`` that are not in ``folder``, ``workers`` at a time, with one progress bar over all epochs.

    Return the networks in the order of ``jobs``. Re-raise the exception of a training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pending = [job for job in jobs if read(job, folder) is None]
    # Train the deepest first. A long job that starts last would leave the other processes idle.
    pending.sort(key=lambda job: sum(get_architecture(job.model).depths), reverse=True)
    if pending:
        total = sum(job.recipe.epochs for job in pending)
        with progress_bar(total=total, desc=f"Training {len(pending)} networks", unit="epoch") as bar, threads(1):
            if workers == 1:
                for job in pending:
                    train(job, load_dataset(_path(job), job.limit), folder, bar.update)
            else:
                _train_in_processes(pending, folder, workers, bar)
    return [trained for job in jobs if (trained := read(job, folder)) is not None]


def _train_in_processes(jobs: Sequence[Job], folder: Path, workers: int, bar: Any) -> None:
    """Train in spawned processes. A forked process can hang if threads of the parent hold locks."""
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with ProcessPoolExecutor(workers, context, _start_worker, (ticks,)) as pool:
        futures = [pool.submit(_train_in_worker, job, folder) for job in jobs]
        running = set(futures)
        while running:
            done, running = wait(running, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
            with contextlib.suppress(queue.Empty):
                while True:
                    bar.update(ticks.get_nowait())
            if any(future.exception() for future in done):
                pool.shutdown(cancel_futures=True)
                break
        for future in futures:
            if not future.cancelled():
                future.result()


_ticks: Any = None  # in a worker process: the queue to which it reports finished epochs


def _start_worker(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)


def _train_in_worker(job: Job, folder: Path) -> None:
    """Train in a worker. Weights go through ``folder``: if sent to the parent, each tensor would keep a file open."""
    train(job, load_dataset(_path(job), job.limit), folder, _tick_of_worker)


def _tick_of_worker() -> None:
    """Report that an epoch is saved. Exit if the parent process was killed."""
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)
    _ticks.put(1)


def _path(job: Job) -> Path | None:
    return None if job.data is None else Path(job.data)
