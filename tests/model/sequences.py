"""Random sequences of what people do to a model, on a fastres model and on a PyTorch model side by side."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fastres
from fastres.bench.measure.calibration import pixels, smooth_images
from fastres.images.transforms import Transforms
from tests.measures import relative_error

seeds = st.integers(0, 3)
factors = st.sampled_from([0.6, 0.8, 1.25, 1.5])

Step = tuple[str, dict[str, Any]]  # a method of Pair and its arguments

WAYS_TO_CHANGE: dict[str, Callable[[nn.Module, str, Tensor], object]] = {
    "copy_": lambda m, name, value: tensor_of(m, name).copy_(value),
    "data copy_": lambda m, name, value: tensor_of(m, name).data.copy_(value),
    "data =": lambda m, name, value: setattr(tensor_of(m, name), "data", value.clone()),
    "view": lambda m, name, value: tensor_of(m, name).view(-1).copy_(value.reshape(-1)),
    "alias": lambda m, name, value: tensor_of(m, name).detach().copy_(value),
    "state dict": lambda m, name, value: m.state_dict()[name].copy_(value),
    "foreach": lambda m, name, value: torch._foreach_copy_([tensor_of(m, name)], [value]),
    "assign": lambda m, name, value: assign(m, name, value.clone()),
    "assign and change": lambda m, name, value: (assign(m, name, 2 * value), tensor_of(m, name).mul_(0.5)),
    "table": lambda m, name, value: set_in_table(m, name, value.clone()),
    "load one": lambda m, name, value: m.load_state_dict({name: value}, strict=False),
    "load by assignment": lambda m, name, value: m.load_state_dict({name: value.clone()}, strict=False, assign=True),
}
# Few, so that a sequence changes the same tensor in several ways.
names = st.sampled_from(["conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.weight", "fc.bias"])
ONLY_PARAMETERS = ("data copy_", "data =")  # fastres documents that it does not see these in buffers


def tensor_of(module: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if leaf in owner._parameters else value)


def set_in_table(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def saved_and_loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS_TO_COPY: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


class Pair:
    """A fastres model and a PyTorch model. Each method does the same to both, or compares their results.

    ``networks`` have the same layers and other weights, one for each seed, on the CPU. ``sizes`` are image sizes.
    """

    def __init__(
        self, networks: Sequence[nn.Module], sizes: Sequence[int], device: str, tolerance: float, seed: int
    ) -> None:
        self.networks, self.sizes, self.device, self.tolerance = networks, sizes, device, tolerance
        self.theirs: Any = copy.deepcopy(self.networks[seed]).to(self.device)
        self.ours: Any = fastres.from_module(self.networks[seed], dtype=torch.float32).to(self.device)
        self.kept: list[tuple[Any, Any]] = []
        self.compiled: Any = None

    def network(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.networks[seed]).to(self.device)

    @property
    def head_is_original(self) -> bool:
        return self.theirs.fc.out_features == self.networks[0].fc.out_features  # type: ignore[union-attr]

    def compare(self, ours: Any, theirs: Any, x: Tensor, expected_of: Tensor | None = None) -> None:
        error = relative_error(ours(x), theirs(x if expected_of is None else expected_of))
        assert error < self.tolerance, error

    def images(self, batch: int, size: int, seed: int) -> Tensor:
        return smooth_images(batch, size, size + 1, seed=seed).to(self.device)

    def follows(self) -> None:
        """Call after every step, so that each change comes between two calls."""
        self.compare(self.ours, self.theirs, self.images(1, self.sizes[0], 0))

    def call(self, batch: int, size: int, seed: int, times: int) -> None:
        x = self.images(batch, self.sizes[size], seed)
        for _ in range(times):
            self.compare(self.ours, self.theirs, x)
            if self.compiled is not None:
                self.compare(self.compiled, self.theirs, x)

    def call_with_pixels(self, batch: int, seed: int) -> None:
        x = pixels(self.images(batch, self.sizes[0], seed))
        transforms = self.ours.transforms
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (transforms.mean, transforms.std))
        self.compare(self.ours, self.theirs, x, (x.float() / 255 - mean) / std)

    def embed(self, seed: int) -> None:
        x = self.images(2, self.sizes[0], seed)
        head, self.theirs.fc = self.theirs.fc, nn.Identity()
        self.compare(self.ours.embed, self.theirs, x)
        self.theirs.fc = head

    def compare_copies(self, seed: int) -> None:
        for ours, theirs in self.kept:
            self.compare(ours, theirs, self.images(1, self.sizes[0], seed))

    def change(self, way: str, name: str, seed: int, factor: float) -> None:
        source = self.network(seed).state_dict()[name]
        buffer = name not in dict(self.theirs.named_parameters())
        if source.shape == self.theirs.state_dict()[name].shape and not (buffer and way in ONLY_PARAMETERS):
            for module in (self.ours, self.theirs):
                WAYS_TO_CHANGE[way](module, name, factor * source)

    def average(self, seed: int, weight: float) -> None:
        source = dict(self.network(seed).named_parameters())
        for module in (self.ours, self.theirs):
            for name, parameter in module.named_parameters():
                if parameter.shape == source[name].shape:
                    parameter.lerp_(source[name], weight)

    def load(self, seed: int, around: bool) -> None:
        state = self.network(seed).state_dict()
        if not self.head_is_original:
            state |= {key: value for key, value in self.theirs.state_dict().items() if key.startswith("fc.")}
        for module in (self.ours, self.theirs):
            if around:
                nn.Sequential(module).load_state_dict({f"0.{key}": value for key, value in state.items()})
            else:
                module.load_state_dict(state)

    def load_a_layer(self, seed: int) -> None:
        for module in (self.ours, self.theirs):
            module.layer1.load_state_dict(self.network(seed).layer1.state_dict())  # type: ignore[union-attr]

    def call_with_other_tensors(self, seed: int) -> None:
        if self.head_is_original:
            other, x = self.network(seed), self.images(1, self.sizes[0], seed)
            tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
            self.compare(lambda x: torch.func.functional_call(self.ours, tensors, (x,)), other, x)

    def replace_the_head(self, classes: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Linear(self.theirs.fc.in_features, classes).requires_grad_(False)
        self.theirs.fc = copy.deepcopy(head).to(self.device)
        self.ours.fc = head

    def copy(self, way: str, go_on_with_the_copy: bool) -> None:
        pair = WAYS_TO_COPY[way](self.ours), WAYS_TO_COPY[way](self.theirs)
        if way == "copy":  # a shallow copy's head may be replaced without the original's knowledge
            self.compare(*pair, self.images(1, self.sizes[0], 0))
            return
        self.compiled = None
        if go_on_with_the_copy:
            self.kept.append((self.ours, self.theirs))
            self.ours, self.theirs = pair
        else:
            self.kept.append(pair)

    def move(self, way: str) -> None:
        if way == "refresh":
            self.ours.refresh()
        else:
            for module in (self.ours, self.theirs):
                _move(module, way, self.device)

    def change_the_transforms(self, mean: float, std: float) -> None:
        self.ours.transforms = Transforms(32, 32, mean=(mean, 0.4, 0.5), std=(0.25, std, 0.2))

    def make_a_program(self, way: str) -> None:
        x = self.images(2, self.sizes[0], 1)
        if way == "fx":
            self.compare(torch.fx.symbolic_trace(self.ours), self.theirs, x)
        elif way == "jit":
            self.compare(torch.jit.trace(self.ours, (x,)), self.theirs, x)
        elif way == "export":
            self.compare(torch.export.export(self.ours, (x,)).module(), self.theirs, x)
        elif self.compiled is None:
            self.compiled = torch.compile(self.ours, backend="eager", fullgraph=True)


def _move(module: Any, way: str, device: str) -> None:
    if way == "cpu":
        module.to("cpu").to(device)
    elif way == "float":
        module.float()
    elif way == "device":
        module.to(device)
    elif way == "share" and device == "cpu":
        module.share_memory()
    elif way == "layer":
        module.layer1.to(device)
    else:
        module.eval()


def _step(method: str, /, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.tuples(st.just(method), st.fixed_dictionaries(arguments))


def _one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


CHANGE = _step("change", way=_one_of(*WAYS_TO_CHANGE), name=names, seed=seeds, factor=factors)
OTHER_STEPS = (
    _step("call", batch=st.integers(1, 3), size=st.integers(0, 2), seed=seeds, times=st.integers(1, 3)),
    _step("call_with_pixels", batch=st.integers(1, 2), seed=seeds),
    _step("embed", seed=seeds),
    _step("compare_copies", seed=seeds),
    _step("average", seed=seeds, weight=_one_of(0.3, 0.7)),
    _step("load", seed=seeds, around=st.booleans()),
    _step("load_a_layer", seed=seeds),
    _step("call_with_other_tensors", seed=seeds),
    _step("replace_the_head", classes=st.integers(2, 5), seed=seeds),
    _step("copy", way=_one_of(*WAYS_TO_COPY), go_on_with_the_copy=st.booleans()),
    _step("move", way=_one_of("cpu", "float", "device", "share", "layer", "eval", "refresh")),
    _step("change_the_transforms", mean=_one_of(0.2, 0.5), std=_one_of(0.2, 0.3)),
)
MAKE_A_PROGRAM = _step("make_a_program", way=_one_of("fx", "jit", "export", "compile"))


def steps(*others: st.SearchStrategy[Step]) -> st.SearchStrategy[Step]:
    """Return a step, or one of ``others``. Every second step is a change of one tensor."""
    return st.booleans().flatmap(lambda other: st.one_of(*OTHER_STEPS, *others) if other else CHANGE)


def run(pair: Pair, sequence: Sequence[Step]) -> None:
    """Do the steps of ``sequence``, and compare the results after each."""
    pair.follows()
    for name, arguments in sequence:
        getattr(pair, name)(**arguments)
        pair.follows()
