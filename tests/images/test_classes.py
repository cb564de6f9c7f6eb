"""The classes that labels mean: names, WordNet ids, numbers, and the order of names as text."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastres.errors import LabelError
from fastres.images.categories import load
from fastres.images.classes import as_label, match_classes, match_labels, may_be_imagenet, wordnet_ids

ANIMALS = ("cat", "dog", "polar bear", "Owl")


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def test_the_ids_are_those_of_timm_in_order() -> None:
    timm = pytest.importorskip("timm")
    stored = Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt"
    ids = wordnet_ids()
    assert list(ids) == stored.read_text().split()
    assert len(set(ids)) == 1000
    assert sorted(ids) == list(ids)
    assert all(re.fullmatch(r"n\d{8}", name) for name in ids)


class TestNames:
    def test_exactly_and_apart_from_case_and_underscores(self) -> None:
        found = match_classes(["Polar_Bear", "dog", "owl", "CAT"], 4, ANIMALS)
        assert found.index == {"Polar_Bear": 2, "dog": 1, "owl": 3, "CAT": 0}
        assert found.order == "names"
        assert found.text.startswith("4 folders, named as the model's classes, apart from upper case or '_'")
        assert match_classes(["cat"], 4, ANIMALS).text == "1 folder, named as the model's classes"

    def test_an_exact_name_wins(self) -> None:
        found = match_classes(["Cardigan", "cardigan"], 1000, load("imagenet"))
        assert found.index == {"Cardigan": 264, "cardigan": 474}
        with pytest.raises(LabelError, match=r"'CARDIGAN' is the name of several classes: 264 .*, 474 .*numbers'"):
            match_classes(["CARDIGAN"], 1000, load("imagenet"))

    def test_every_name_of_imagenet(self) -> None:
        names = list(load("imagenet"))
        random.Random(0).shuffle(names)
        spelled = [name.replace(" ", "_") for name in names]
        found = match_classes(spelled, 1000, load("imagenet"))
        assert [load("imagenet")[found.index[name]] for name in spelled] == names

    def test_a_negative_number_is_no_name(self) -> None:
        """In place of ``-``, a space would make it the name of another class."""
        digits = numbers(10)
        with pytest.raises(LabelError, match=r"1 of 2 labels is not named as a class of the model: '-1' \(x\)"):
            match_labels({"2": "y", "-1": "x"}, 10, digits)
        with pytest.raises(LabelError, match=r"'-1', which is no class .* a negative number often marks images"):
            match_classes(["-1"], 10, digits)
        assert match_classes(["-1", "x-ray"], 2, ("-1", "X ray")).index == {"-1": 0, "x-ray": 1}

    def test_one_name_for_two_classes(self) -> None:
        with pytest.raises(LabelError, match=r"'crane' is the name of several classes: 0 \('crane'\), 2 \('crane'\)"):
            match_classes(["crane", "cat"], 3, ("crane", "cat", "crane"))

    def test_digits_that_are_names(self) -> None:
        found = match_classes(["1", "2"], 3, ("1", "10", "2"))
        assert found.index == {"1": 0, "2": 2}
        assert "'1' is the name of class 0, and was not read as the class index 1" in found.text
        assert "class index" not in match_classes(["1"], 10, numbers(10)).text

    def test_some_that_are_none(self) -> None:
        message = r"1 of 2 folders is not named as a class of the model: 'dgo'\. Did you mean 'dog'\?.*categories="
        with pytest.raises(LabelError, match=message):
            match_classes(["cat", "dgo"], 4, ANIMALS)
        with pytest.raises(LabelError, match="no class names; give categories="):
            match_classes(["cat"], 4, None, "names")
        with pytest.raises(LabelError, match=r"'lion' \(labels\[3\]\)"):
            match_classes(["cat", "lion"], 4, ANIMALS, noun="label", where={"lion": "labels[3]"})


class TestWordNet:
    @pytest.mark.parametrize("categories", [None, load("imagenet")])
    def test_any_of_the_ids(self, categories: Any) -> None:
        for count in (1, 10, 1000):
            chosen = random.Random(count).sample(range(1000), count)
            names = [wordnet_ids()[index] for index in chosen]
            found = match_classes(names, 1000, categories)
            assert [found.index[name] for name in names] == chosen
            assert found.order == "wordnet"

    def test_names_with_synonyms_are_imagenets(self) -> None:
        synonyms = tuple(f"{name.upper()}, something else" for name in load("imagenet"))
        assert may_be_imagenet(1000, synonyms)
        assert match_classes(["n01443537"], 1000, synonyms).index == {"n01443537": 1}
        assert not may_be_imagenet(1000, tuple(sorted(load("imagenet"), reverse=True)))

    def test_other_models(self) -> None:
        assert match_classes(["n02", "n01440764"], 2, None).order == "text"
        assert match_classes(["n01443537", "n01440764"], 2, None).index == {"n01440764": 0, "n01443537": 1}
        with pytest.raises(LabelError, match="They are WordNet ids of ImageNet-1k, but this is no model for"):
            match_classes(["n01440764"], 4, ANIMALS)
        with pytest.raises(LabelError, match=r"order is 'wordnet', but .* \(it has 4 classes with names\)"):
            match_classes(["n01440764"], 4, ANIMALS, "wordnet")
        ids = ("n01443537", "n01440764")
        assert match_classes(ids[:1], 2, ids).index == {"n01443537": 0}, "the model's own order wins"

    def test_one_folder_that_is_no_id(self) -> None:
        names = [*wordnet_ids()[:999], "misc"]
        with pytest.raises(LabelError, match=r"1 of 1,000 folders is not among the WordNet ids .* 'misc'"):
            match_classes(names, 1000, None)
        assert match_classes(names, 1000, None, "text").index["misc"] == 0


class TestNumbers:
    @pytest.mark.parametrize("count", [1, 2, 9, 10])
    def test_up_to_ten_text_and_numbers_agree(self, count: int) -> None:
        found = match_classes(numbers(count), count, None)
        assert found.order == "numbers"
        assert (
            found.index
            == {str(number): number for number in range(count)}
            == dict(match_classes(numbers(count), count, None, "text").index)
        )

    @pytest.mark.parametrize("count", [11, 12, 99, 100, 101, 1000])
    def test_more_than_ten_demand_a_choice(self, count: int) -> None:
        message = "as a number, '10' is class 10; .* it is class 2. Give order='numbers' or order='text'"
        with pytest.raises(LabelError, match=message):
            match_classes(numbers(count), count, None)
        as_text = match_classes(numbers(count), count, None, "text")
        assert as_text.index == {name: place for place, name in enumerate(sorted(numbers(count)))}
        assert "'10' is class 2" in as_text.text
        assert match_classes(numbers(count), count, None, "numbers").index["10"] == 10
        padded = [f"{number:04}" for number in range(count)]
        assert list(match_classes(padded, count, None).index.values()) == list(range(count))

    def test_some_of_the_classes(self) -> None:
        """Every subset of numbers is accepted if, and only if, the names of all classes as text agree with it."""
        for count in (5, 11, 30, 120):
            places = {name: place for place, name in enumerate(sorted(numbers(count)))}
            for name in numbers(count):
                if places[name] == int(name):
                    assert match_classes([name], count, None).index == {name: int(name)}
                else:
                    with pytest.raises(LabelError, match=r"not clear .* Give order='numbers', or categories="):
                        match_classes([name], count, None)

    def test_padded_and_plain_names_together(self) -> None:
        assert match_classes(["02", "10"], 100, None).index == {"02": 2, "10": 10}
        with pytest.raises(LabelError, match="it is another class"):
            match_classes(["02", "3"], 5, None)

    def test_a_model_with_names_has_no_doubt(self) -> None:
        found = match_classes(["10", "2"], 1000, load("imagenet"))
        assert found.index == {"10": 10, "2": 2}
        assert found.text == "2 folders, read as class indices: '10' is class 10, 'brambling'"
        assert match_classes(["10"], 1000, None, digits_are_indices=True).index == {"10": 10}

    @pytest.mark.parametrize("count", [1, 3, 9, 10, 12])
    @pytest.mark.parametrize("options", [{}, {"digits_are_indices": True, "noun": "label"}])
    def test_numbers_from_one(self, count: int, options: dict[str, Any]) -> None:
        names = numbers(count + 1)[1:]
        with pytest.raises(LabelError, match=f"numbers from 1 to {count}, .* Count from 0; .*categories=.*'text'"):
            match_classes(names, count, None, **options)
        assert match_classes(names, count, None, "text").index["1"] == 0
        assert match_classes(names, count, names).index["1"] == 0

    def test_out_of_range(self) -> None:
        with pytest.raises(LabelError, match=r"A folder is '10', .* from 0 to 9; the labels seem to count from 1"):
            match_classes(["3", "10"], 10, None)
        with pytest.raises(LabelError, match=r"'-1', .* images without a label"):
            match_classes(["-1", "0"], 10, None)
        assert match_classes(["2019", "2020"], 2, None).order == "text"
        with pytest.raises(LabelError, match=r"3 folders do not fit .*order='text'"):
            match_classes(["5", "20", "100"], 3, None)
        with pytest.raises(LabelError, match="order is 'numbers', but 1 of 2 folders is no class indices: 'x'"):
            match_classes(["5", "x"], 10, None, "numbers")


class TestText:
    def test_one_name_for_each_class(self) -> None:
        found = match_classes(["dog", "Zebra", "cat"], 3, None)
        assert found.index == {"Zebra": 0, "cat": 1, "dog": 2}
        assert found.text == (
            "3 folders in the order of their names as text: 'Zebra' is class 0, 'cat' is class 1, 'dog' is class 2"
        )
        assert match_classes(["dog", "cat"], 2, ("x", "y"), "text").index == {"cat": 0, "dog": 1}

    @pytest.mark.parametrize("names", [["cat"], ["cat", "dog", "owl"]])
    def test_too_few_or_too_many(self, names: Sequence[str]) -> None:
        with pytest.raises(LabelError, match=r"fit the model, which has 2 classes without names.*categories=.*'text'"):
            match_classes(names, 2, None)
        with pytest.raises(LabelError, match=r"order is 'text', which needs one folder for each class, but there"):
            match_classes(names, 2, None, "text")

    def test_nothing_fits(self) -> None:
        with pytest.raises(LabelError, match=r"1 folder does not fit .*4 classes with names: 'pig'.*such as 'cat', "):
            match_classes(["pig"], 4, ANIMALS)
        with pytest.raises(LabelError, match="There are no folders"):
            match_classes([], 4, ANIMALS)
        with pytest.raises(LabelError, match="labels_order is 'sorted'; give 'auto', 'names'"):
            match_classes(["cat"], 4, ANIMALS, "sorted", setting="labels_order")


class TestLabels:
    def test_numbers_are_indices_and_texts_are_names(self) -> None:
        mixed = match_labels({2: "a", "dog": "b"}, 4, ANIMALS)
        assert mixed.index == {2: 2, "dog": 1}
        assert match_labels({2: "a", "2": "b"}, 3, ("2", "1", "0")).index == {2: 2, "2": 0}
        assert match_labels({"10": "a", "2": "b"}, 100, None).index == {"10": 10, "2": 2}
        with pytest.raises(LabelError, match="not clear"):
            match_labels({"10": "a"}, 100, None, digits_are_indices=False)

    def test_wrong_labels_are_named_with_their_place(self) -> None:
        with pytest.raises(
            LabelError, match=r"labels\[7\] is 10, which is no class of this model with 10 classes; give"
        ):
            match_labels({10: "labels[7]"}, 10, None)
        with pytest.raises(LabelError, match=r"from 0 to 3 or the name of a class; a negative number"):
            match_labels({-1: "x"}, 4, ANIMALS)
        with pytest.raises(LabelError, match="x is 1, which is no class of this model with 1 class; give an index"):
            match_labels({1: "x"}, 1, None)
        with pytest.raises(LabelError, match=r"'pig' \(labels\[0\]\).* or names of classes"):
            match_labels({"pig": "labels[0]"}, 4, ANIMALS)
        with pytest.raises(LabelError, match="order is 'text', but x is 3, and whole numbers are class indices"):
            match_labels({3: "x"}, 4, ANIMALS, "text")

    @pytest.mark.parametrize(
        "value", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3, device="cpu"), "3", " 3 "], ids=repr
    )
    def test_kinds_of_labels(self, value: Any) -> None:
        assert as_label(value, "x") in (3, "3")

    @pytest.mark.parametrize("value", [3.0, True, None, "", " ", [3], np.array([3, 4]), b"3", np.nan], ids=repr)
    def test_what_is_no_label(self, value: Any) -> None:
        with pytest.raises(LabelError, match=r"^labels\[2\] is .*; a label is a class index"):
            as_label(value, "labels[2]")

    def test_a_long_value_is_shortened(self) -> None:
        """As in JSON whose labels are one level deeper."""
        with pytest.raises(LabelError) as caught:
            as_label({f"{number}.jpg": number for number in range(10_000)}, "labels['images']")
        assert len(str(caught.value)) < 300
