"""Match the labels of images with the classes of a model: names, WordNet ids, numbers, or the order of names as text.

:func:`match_classes` is the one place that decides what names of folders and other texts mean. :func:`match_labels` is
for labels that may be numbers, too. Nothing is guessed: if two rules would give different classes, it is an error.
"""

from __future__ import annotations

import functools
import operator
import re
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastres.arguments import is_whole
from fastres.errors import LabelError, near_matches

from .categories import load

AUTO, NAMES, WORDNET, NUMBERS, TEXT = ORDERS = ("auto", "names", "wordnet", "numbers", "text")
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class Matched:
    """Labels and their classes: ``index`` has the class of each label, ``order`` is the rule, ``text`` describes it."""

    index: Mapping[Any, int]
    order: str
    text: str


@functools.cache
def wordnet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's 1000 classes, in the order of the logits."""
    text = resources.files("fastres").joinpath("data", "imagenet_wordnet_ids.txt").read_text(encoding="utf-8")
    return tuple(text.split())


def may_be_imagenet(num_classes: int, categories: Sequence[str] | None) -> bool:
    """Return True if a model with these classes may be one for ImageNet-1k: its names are ImageNet's, or unknown.

    Names may have synonyms, separated by commas: ``tench, Tinca tinca``.
    """
    if num_classes != 1000 or categories is None:
        return num_classes == 1000
    pairs = zip(categories, load("imagenet"), strict=True)
    return sum(_loose(ours) in map(_loose, theirs.split(",")) for theirs, ours in pairs) >= 900


def check_order(order: str, setting: str = "order") -> None:
    """Raise ``LabelError`` unless ``order`` is one of ``ORDERS``; ``setting`` is the name of the argument."""
    if order not in ORDERS:
        raise LabelError(f"{setting} is {order!r}; give {', '.join(map(repr, ORDERS[:-1]))} or {ORDERS[-1]!r}")


def as_label(value: Any, where: str) -> int | str:
    """Return a label as an int or as text. Raise ``LabelError``, which begins with ``where``, for anything else."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    try:
        if is_whole(value):
            return operator.index(value)
    except TypeError:  # an array of several numbers, or of fractions
        pass
    shown = reprlib.repr(value)
    raise LabelError(f"{where} is {shown}; a label is a class index (a whole number) or the name of a class")


def known_names(names: Sequence[str], categories: Sequence[str] | None) -> dict[str, list[int]]:
    """Return those of ``names`` that are names of classes: exactly, else loosely; with the indices of the classes."""
    exact: dict[str, list[int]] = {}
    loose: dict[str, list[int]] = {}
    for index, category in enumerate(categories or ()):
        exact.setdefault(category, []).append(index)
        loose.setdefault(_loose(category), []).append(index)
    found = {name: exact.get(name) or loose.get(_loose(name)) for name in names}
    return {name: indices for name, indices in found.items() if indices}


def match_classes(
    names: Sequence[str],
    num_classes: int,
    categories: Sequence[str] | None,
    order: str = AUTO,
    *,
    noun: str = "folder",
    setting: str = "order",
    where: Mapping[str, str] | None = None,
    digits_are_indices: bool = False,
) -> Matched:
    """Return the class of each of the distinct ``names``, for a model with these classes.

    ``order`` is the rule:

    - ``names``: each is the name of a class, exactly or apart from case and ``_`` or ``-`` for spaces.
    - ``wordnet``: each is an id of ImageNet-1k, such as ``n01440764``, and the model is one for ImageNet.
    - ``numbers``: each is a class index.
    - ``text``: there is one for each class, in the order of the names as text, as in torchvision's ``ImageFolder``.
    - ``auto``: the only one of these that fits. Numbers that mean other classes as text are an error if the model has
      no class names, unless ``digits_are_indices``.

    For the messages, ``noun`` is what has the names, ``setting`` the name of the argument ``order``, and ``where`` has
    places in which names occur. Raises ``LabelError`` if no rule fits, or a name fits two classes.
    """
    check_order(order, setting)
    names = list(dict.fromkeys(names))
    if not names:
        raise LabelError(f"There are no {_plural(noun)}; give images with labels")
    match = _Match(names, num_classes, categories or None, noun, setting, where or {}, digits_are_indices)
    return {AUTO: match.auto, NAMES: match.names, WORDNET: match.wordnet, NUMBERS: match.numbers, TEXT: match.text}[
        order
    ]()


def match_labels(
    places: Mapping[int | str, str],
    num_classes: int,
    categories: Sequence[str] | None,
    order: str = AUTO,
    *,
    setting: str = "order",
    digits_are_indices: bool = True,
) -> Matched:
    """Return the class of each distinct label; ``places`` has the labels, and where each first occurs.

    Ints are class indices. Texts are matched as :func:`match_classes` does; if all are whole numbers and not names of
    classes, they are class indices. Raises ``LabelError`` that names place and label.
    """
    check_order(order, setting)
    texts = [label for label in places if isinstance(label, str)]
    numbers = [label for label in places if isinstance(label, int)]
    if numbers and order not in (AUTO, NUMBERS):
        raise LabelError(
            f"{setting} is {order!r}, but {places[numbers[0]]} is {numbers[0]}, and whole numbers are class indices; "
            f"leave {setting} out"
        )
    _check_range({number: number for number in numbers}, num_classes, places, bool(categories))
    index: dict[Any, int] = {number: number for number in numbers}
    text, used = f"{_counted(numbers, 'label')}, read as class indices", NUMBERS
    if texts:
        found = match_classes(
            texts, num_classes, categories, order, noun="label", setting=setting,
            where={label: places[label] for label in texts}, digits_are_indices=digits_are_indices,
        )  # fmt: skip
        index |= found.index
        text, used = f"{text}; {found.text}" if numbers else found.text, found.order
    return Matched(index, used, text)


@dataclass(frozen=True)
class _Match:
    """The rules for some names; each returns the classes or raises ``LabelError``."""

    given: list[str]
    num_classes: int
    categories: Sequence[str] | None
    noun: str
    setting: str
    where: Mapping[str, str]
    digits_are_indices: bool

    def auto(self) -> Matched:
        known = self._known
        if len(known) == len(self.given):
            return self.names()
        ids = set(wordnet_ids()).intersection(self.given)
        if ids and may_be_imagenet(self.num_classes, self.categories):
            return self.wordnet()
        if known:
            raise self._unknown_names()
        if all(map(_NUMBER.fullmatch, self.given)):
            return self._numbers_or_text()
        if not self.categories and len(self.given) == self.num_classes:
            return self.text()
        raise self._misfit()

    def names(self) -> Matched:
        if not self.categories:
            raise LabelError(f"{self.setting} is 'names', but the model has no class names; give categories=")
        known = self._known
        if len(known) < len(self.given):
            raise self._unknown_names()
        for name, found in known.items():
            if len(found) > 1:
                raise LabelError(
                    f"{self._of(name)} is the name of several classes: "
                    f"{', '.join(f'{index} ({self.categories[index]!r})' for index in found)}; use "
                    f"{self._plural} that are class indices, with {self.setting}='numbers', or give categories= with "
                    "different names"
                )
        index = {name: found[0] for name, found in known.items()}
        text = f"{self._counted}, named as the model's classes"
        if loose := [name for name in index if name != self.categories[index[name]]]:
            text += f", apart from upper case or '_' ({loose[0]!r} is {self.categories[index[loose[0]]]!r})"
        for name, found_at in index.items():
            if _NUMBER.fullmatch(name) and int(name) != found_at:
                text += f"; {name!r} is the name of class {found_at}, and was not read as the class index {int(name)}"
                break
        return Matched(index, NAMES, text)

    def wordnet(self) -> Matched:
        places = {name: index for index, name in enumerate(wordnet_ids())}
        odd = [name for name in self.given if name not in places]
        if odd:
            raise LabelError(
                f"{len(odd):,} of {self._counted} {_are(odd)} not among the WordNet ids of ImageNet-1k: "
                f"{self._some(odd)}; all must be ids such as 'n01440764'. {self._choose_text}"
            )
        if not may_be_imagenet(self.num_classes, self.categories):
            raise LabelError(
                f"{self.setting} is 'wordnet', but the model is not one for ImageNet-1k (it has {self._classes}); give "
                f"{self.setting}='names' or 'text'"
            )
        index = {name: places[name] for name in self.given}
        return Matched(index, WORDNET, f"{self._counted}, named by the WordNet ids of ImageNet-1k")

    def numbers(self) -> Matched:
        odd = [name for name in self.given if not _NUMBER.fullmatch(name)]
        if odd:
            raise LabelError(
                f"{self.setting} is 'numbers', but {len(odd):,} of {self._counted} {_are(odd)} no class indices: "
                f"{self._some(odd)}; give whole numbers, or another {self.setting}"
            )
        index = {name: int(name) for name in self.given}
        _check_range(index, self.num_classes, {name: self._place(name) for name in self.given}, bool(self.categories))
        example = max(index, key=lambda name: index[name])
        named = f", {self.categories[index[example]]!r}" if self.categories else ""
        return Matched(
            index, NUMBERS, f"{self._counted}, read as class indices: {example!r} is class {index[example]}{named}"
        )

    def text(self) -> Matched:
        if len(self.given) != self.num_classes:
            raise LabelError(
                f"{self.setting} is 'text', which needs one {self.noun} for each class, but there {_are(self.given)} "
                f"{self._counted} for {self._classes}: {self._some(self.given)}; give one for each class, or name the "
                f"{self._plural} as the model's classes"
            )
        index = {name: place for place, name in enumerate(sorted(self.given))}
        moved = [name for name in index if _NUMBER.fullmatch(name) and int(name) != index[name]]
        examples = ", ".join(f"{name!r} is class {index[name]}" for name in (moved or list(index))[:_SHOWN])
        return Matched(index, TEXT, f"{self._counted} in the order of their names as text: {examples}")

    def _numbers_or_text(self) -> Matched:
        """Return the classes of whole numbers that are no names of classes."""
        values = {name: int(name) for name in self.given}
        if set(values.values()) == set(range(1, self.num_classes + 1)):
            raise LabelError(
                f"The {self._plural} are numbers from 1 to {self.num_classes}, but class indices go from 0 to "
                f"{self.num_classes - 1}, so it is not clear what {self._of(self.given[0])} means. Count from 0; or "
                f"give categories= with these numbers, in the order of the model's classes; or, if the model was "
                f"trained on folders with these names with torchvision's ImageFolder, {self.setting}='text', which "
                f"sorts them as text"
            )
        if self.categories or self.digits_are_indices:
            return self.numbers()
        fits = all(0 <= value < self.num_classes for value in values.values())
        if not fits:
            same = sorted(self.given) == sorted(self.given, key=lambda name: values[name])
            if len(self.given) != self.num_classes:
                return self.numbers()
            if not same:
                raise self._misfit()
            return self.text()
        moved = self._moved(values)
        if not moved:
            return self.numbers()
        name = "10" if "10" in moved else next(iter(moved))  # people know that 10 comes before 2 as text
        other = moved[name]
        choice = f"{self.setting}='numbers' or {self.setting}='text'"
        if len(self.given) != self.num_classes:
            choice = f"{self.setting}='numbers', or categories= with the names in the order of the model's classes"
        raise LabelError(
            f"It is not clear which classes the {self._plural} mean: as a number, {self._of(name)} is class "
            f"{values[name]}; in the order of the names as text, as in torchvision's ImageFolder, it is "
            f"{'another class' if other is None else f'class {other}'}. Give {choice}"
        )

    def _moved(self, values: Mapping[str, int]) -> dict[str, int | None]:
        """Return the names that are other classes as text than as numbers, and their classes as text.

        If only some classes have names here, the others are written in the same way: with as many digits, or as few as
        possible.
        """
        everything = list(self.given)
        if len(self.given) != self.num_classes:
            padded = any(len(name) > 1 and name.startswith("0") for name in self.given)
            width = min(map(len, self.given)) if padded else 1
            everything = [f"{number:0{width}}" for number in range(self.num_classes)]
        places = {name: place for place, name in enumerate(sorted(everything))}
        return {name: places.get(name) for name, value in values.items() if places.get(name) != value}

    @functools.cached_property
    def _known(self) -> dict[str, list[int]]:
        return known_names(self.given, self.categories)

    def _unknown_names(self) -> LabelError:
        assert self.categories is not None
        odd = [name for name in self.given if name not in self._known]
        return LabelError(
            f"{len(odd):,} of {self._counted} {_are(odd)} not named as a class of the model: {self._some(odd)}."
            f"{near_matches(odd[0], self.categories)} Correct the name{'s' * (len(odd) > 1)}, or give categories= with "
            f"the names in the order of the model's classes"
        )

    def _misfit(self) -> LabelError:
        do = "does" if len(self.given) == 1 else "do"
        odd_first = sorted(self.given, key=lambda name: bool(_NUMBER.fullmatch(name)))
        start = f"{self._counted} {do} not fit the model, which has {self._classes}: {self._some(odd_first)}."
        if set(wordnet_ids()).intersection(self.given):
            return LabelError(
                f"{start} They are WordNet ids of ImageNet-1k, but this is no model for ImageNet-1k; give categories= "
                "with the ids in the order of the model's classes"
            )
        accepted = "class indices"
        if self.categories:
            accepted += f" or names of classes, such as {', '.join(map(repr, self.categories[:_SHOWN]))}"
            start += near_matches(odd_first[0], self.categories)
        elif self.noun == "folder":
            accepted += f", or one {self.noun} for each class"
        return LabelError(
            f"{start} Give {accepted}; or categories= with the names in the order of the model's classes. "
            f"{self._choose_text}"
        )

    @property
    def _choose_text(self) -> str:
        return (
            f"If there is one {self.noun} for each class, {self.setting}='text' takes them in the order of their names "
            "as text, as torchvision's ImageFolder does"
        )

    @property
    def _plural(self) -> str:
        return _plural(self.noun)

    @property
    def _counted(self) -> str:
        return _counted(self.given, self.noun)

    @property
    def _classes(self) -> str:
        known = "with" if self.categories else "without"
        return f"{self.num_classes:,} class{'es' * (self.num_classes != 1)} {known} names"

    def _of(self, name: str) -> str:
        """Return a name, and where it occurs."""
        return f"{name!r} ({self.where[name]})" if name in self.where else repr(name)

    def _place(self, name: str) -> str:
        place = self.where.get(name, f"a {self.noun}")
        return place[0].upper() + place[1:] if place.startswith(("a ", "the ")) else place

    def _some(self, names: Sequence[str]) -> str:
        return ", ".join(map(self._of, names[:_SHOWN])) + ", …" * (len(names) > _SHOWN)


def _check_range(values: Mapping[Any, int], num_classes: int, places: Mapping[Any, str], named: bool) -> None:
    """Raise ``LabelError`` for the first label whose value is no class index."""
    for label, value in values.items():
        if not 0 <= value < num_classes:
            hint = ""
            if value < 0:
                hint = "; a negative number often marks images without a label, which cannot be used"
            elif value == num_classes == max(values.values()) and min(values.values()) > 0:
                hint = "; the labels seem to count from 1"
            classes = f"{num_classes} class{'es' * (num_classes != 1)}"
            raise LabelError(
                f"{places[label]} is {label!r}, which is no class of this model with {classes}; give an index from 0 "
                f"to {num_classes - 1}{' or the name of a class' * named}{hint}"
            )


def _loose(name: str) -> str:
    """Return a name without what people write differently: case, and ``_`` or ``-`` for spaces. ``-1`` is not ``1``."""
    text = unicodedata.normalize("NFC", name).casefold().replace("_", " ").strip()
    return " ".join((text[:1] + text[1:].replace("-", " ")).split())


def _plural(noun: str) -> str:
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def _counted(items: Sequence[Any], noun: str) -> str:
    return f"{len(items):,} {noun if len(items) == 1 else _plural(noun)}"


def _are(items: Sequence[Any]) -> str:
    return "is" if len(items) == 1 else "are"
