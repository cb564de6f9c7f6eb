"""The class of every image of a folder, a glob or files: from folders, mappings and sequences."""

from __future__ import annotations

import os
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")

from fastres.errors import LabelError
from fastres.images.classes import wordnet_ids

from .found import ANIMALS, labels, write_images


class TestFolders:
    @pytest.mark.parametrize("given", ["auto", "folders"])
    @pytest.mark.parametrize("ending", ["", "/", "//"])
    def test_the_first_folder_below_the_source(self, given: str, ending: str, tmp_path: Path) -> None:
        top = write_images(tmp_path / "photos", "cat/2023/owl/a.jpg", "cat/b.png", "dog/a.jpg", "owl/x/y/z.jpg")
        found = labels(f"{top}{ending}", given, tmp_path, ANIMALS)
        assert found.indices.tolist() == [0, 0, 1, 2]
        assert (found.order, found.source, found.names, found.missing) == ("names", "folders", None, ())
        assert found.text == "3 folders, named as the model's classes."

    def test_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(write_images(tmp_path / "photos", "cat/a.jpg", "owl/a.jpg"))
        assert labels(".", "auto", tmp_path, ANIMALS).indices.tolist() == [0, 2]
        assert labels("*/*.jpg", "folders", tmp_path, ANIMALS).missing == (1,)
        assert labels(["cat", "owl/a.jpg"], [0, 1], tmp_path).indices.tolist() == [0, 1]
        monkeypatch.chdir("cat")
        assert labels("*.jpg", "folders", tmp_path, ANIMALS).indices.tolist() == [0]

    def test_globs_and_files_take_the_folder_of_the_file(self, tmp_path: Path) -> None:
        top = write_images(tmp_path, "x/cat/a.jpg", "x/dog/b.jpg", "y/owl/c.jpg")
        assert labels(str(top / "*" / "*" / "*.jpg"), "folders", tmp_path, ANIMALS).indices.tolist() == [0, 1, 2]
        files = [top / "y/owl/c.jpg", top / "x/cat/a.jpg"]
        assert labels(files, "folders", tmp_path, ANIMALS).indices.tolist() == [2, 0]
        with pytest.raises(LabelError, match="not clear where their labels are; give 'folders'"):
            labels(files, "auto", tmp_path, ANIMALS)

    def test_several_sources(self, tmp_path: Path) -> None:
        write_images(tmp_path, "a/cat/1.jpg", "a/owl/2.jpg", "b/cat/3.jpg", "b/dog/4.jpg")
        assert labels([tmp_path / "a", tmp_path / "b"], "auto", tmp_path, ANIMALS).indices.tolist() == [0, 2, 0, 1]
        inner = labels([tmp_path / "a", tmp_path / "a" / "cat"], "auto", tmp_path, ANIMALS)
        assert inner.indices.tolist() == [0, 2], "a folder inside another one is not a source of its own"

    def test_as_torchvision_orders_folders(self, tmp_path: Path) -> None:
        """Also an empty folder counts; hidden ones do not."""
        top = write_images(tmp_path / "x", "Zoo/a.jpg", "ant/a.jpg", "bee/", "b/a.jpg", ".hidden/a.jpg", "notes.txt")
        found = labels(top, "auto", tmp_path, 4, allow_empty=True)
        assert found.names == ("Zoo", "ant", "b", "bee")
        assert found.indices.tolist() == [0, 1, 2]
        assert (found.order, found.missing) == ("text", (3,))
        assert "in the order of their names as text: 'Zoo' is class 0, 'ant' is class 1" in found.text

    def test_torchvision_gives_the_same_classes(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("torchvision.datasets")
        names = ["10", "2", "B", "a", "É", "\U0001f600", "_x", "-", "z z", "ﬀ"]
        top = write_images(tmp_path / "x", *(f"{name}/deep/{name}.jpg" for name in names), "a/b.png")
        expected = datasets.ImageFolder(str(top))
        found = labels(top, "auto", tmp_path, len(names))
        assert found.names == tuple(expected.classes)
        assert sorted(found.indices.tolist()) == sorted(expected.targets)

    @pytest.mark.parametrize("inside", ["owl/", "owl/.a.jpg", "owl/notes.txt", "owl/deep/er/"])
    def test_a_class_without_images(self, inside: str, tmp_path: Path) -> None:
        top = write_images(tmp_path / "x", "cat/a.jpg", inside)
        with pytest.raises(LabelError, match=r"1 of 2 class folders has no image: '.*x/owl'; add images or remove"):
            labels(top, "auto", tmp_path, ANIMALS)
        assert labels(top, "auto", tmp_path, ANIMALS, allow_empty=True).missing == (1, 2)

    def test_links_to_folders(self, tmp_path: Path) -> None:
        write_images(tmp_path, "store/1/a.jpg", "store/2/b.jpg", "x/dog/c.jpg")
        (tmp_path / "x" / "owl").symlink_to(tmp_path / "store" / "2")
        (tmp_path / "x" / "cat").symlink_to(tmp_path / "store" / "1")
        assert labels(tmp_path / "x", "auto", tmp_path, ANIMALS).indices.tolist() == [1, 0, 2]
        (tmp_path / "y").symlink_to(tmp_path / "x")
        assert labels(tmp_path / "y", "auto", tmp_path, ANIMALS).indices.tolist() == [1, 0, 2]
        (tmp_path / "x" / "puma").symlink_to(tmp_path / "x" / "dog")
        with pytest.raises(LabelError, match=r"x/puma'.*A link to a folder of the source counts as empty"):
            labels(tmp_path / "x", "auto", tmp_path, 4)

    def test_wordnet_ids(self, tmp_path: Path) -> None:
        ids = wordnet_ids()
        top = write_images(tmp_path / "x", f"{ids[7]}/a.jpg", f"{ids[500]}/b.jpg")
        found = labels(top, "auto", tmp_path, 1000)
        assert found.indices.tolist() == [7, 500]
        assert found.names is not None
        assert found.names[7] == "cock"
        assert len(found.missing) == 998

    def test_numbers_need_a_choice(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "x", *(f"{number}/a.jpg" for number in range(11)))
        with pytest.raises(LabelError, match=r"'10' .*the folder of .*x/10/a.jpg.* is class 10; .* class 2"):
            labels(top, "auto", tmp_path, 11)
        as_text = labels(top, "auto", tmp_path, 11, order="text")
        assert as_text.indices.tolist() == list(range(11)), "images are listed in the order of their paths as text"
        assert as_text.names == ("0", "1", "10", *"23456789")
        as_numbers = labels(top, "auto", tmp_path, 11, order="numbers")
        assert as_numbers.indices.tolist() == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
        assert as_numbers.names is None

    def test_images_outside_the_folders_of_classes(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "x", "cat/a.jpg", "b.jpg", "c.jpg")
        with pytest.raises(LabelError, match=r"x/b.jpg' and 1 more are directly in the source folder"):
            labels(top, "auto", tmp_path, ANIMALS)

    @pytest.mark.parametrize("classes", [3, 1000, ANIMALS])
    def test_parts_of_a_data_set(self, classes: Any, tmp_path: Path) -> None:
        top = write_images(tmp_path / "x", "train/cat/a.jpg", "Val/cat/a.jpg", "test/cat/a.jpg")
        with pytest.raises(LabelError, match=r"like parts of a data set, .* give one of them, such as '.*Val'"):
            labels(top, "auto", tmp_path, classes)
        named = labels(top, "auto", tmp_path, ("train", "Val", "test"))
        assert named.indices.tolist() == [1, 2, 0]
        assert labels(top, "auto", tmp_path, 3, order="text").indices.tolist() == [0, 1, 2]

    def test_errors_keep_the_label_of_their_folder(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "x", "cat/a.jpg", "dog/b.jpg")
        (top / "dog" / "c.jpg").symlink_to("nowhere")
        (top / "d.jpg").symlink_to("nowhere")
        (top / "puma").symlink_to("nowhere")
        os.mkfifo(top / "cat" / "pipe.jpg")
        found = labels(top, "auto", tmp_path, ANIMALS)
        assert sorted(found.indices.tolist()) == [-1, -1, 0, 0, 1, 1]
        assert labels(str(top / "*" / "*.jpg"), "folders", tmp_path, ANIMALS).indices.tolist() == [0, 0, 1, 1, -1]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root can list every folder")
    def test_a_folder_that_cannot_be_listed_is_a_class(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "x", "cat/a.jpg", "dog/b.jpg")
        (top / "cat").chmod(0)
        try:
            assert labels(top, "auto", tmp_path, 2).indices.tolist() == [0, 1]
        finally:
            (top / "cat").chmod(0o755)

    def test_names_that_are_not_utf_8(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "x", os.fsdecode(b"caf\xe9/\xff.jpg"), "zoo/a.jpg")
        found = labels(top, "auto", tmp_path, 2)
        assert sorted(found.indices.tolist()) == [0, 1]
        assert found.names == ("caf\\xe9", "zoo")
        found.text.encode()
        with pytest.raises(LabelError) as caught:
            labels(top, "auto", tmp_path, ("zoo", "bar"))
        str(caught.value).encode()

    def test_what_folders_cannot_be(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "x", "cat/a.jpg", "puma/b.jpg")
        with pytest.raises(LabelError, match=r"folders is not named as a class of the model: 'puma' .the folder of"):
            labels(top, "folders", tmp_path, ANIMALS)
        with pytest.raises(LabelError, match="2 folders do not fit the model, which has 5 classes without names"):
            labels(top, "folders", tmp_path, 5)
        with pytest.raises(LabelError, match="label_column is 'x', but labels are 'folders'"):
            labels(top, "folders", tmp_path, ANIMALS, label_column="x")
        with pytest.raises(LabelError, match="no classifier"):
            labels(top, "folders", tmp_path, 0)
        with pytest.raises(LabelError, match="sorted is 'x'; give 'auto'"):
            labels(top, "folders", tmp_path, 3, order="x", setting="sorted")


class TestNamed:
    @pytest.mark.parametrize(
        "names",
        [
            ("x/a.jpg", "y/a.jpg", "y/b.jpg"),
            ("photos/x/a.jpg", "./y/a.jpg", "b.jpg"),
            ("{top}/x/a.jpg", "{top}/y/../y/a.jpg", "b"),
            ("x/a", "y/a", "y/b"),
        ],
    )
    @pytest.mark.parametrize("is_file", [False, True])
    def test_paths_ends_and_file_names(self, names: tuple[str, ...], is_file: bool, tmp_path: Path) -> None:
        top = write_images(tmp_path / "photos", "x/a.jpg", "y/a.jpg", "y/b.jpg")
        given: Any = {name.format(top=top): label for name, label in zip(names, ("owl", "cat", "1"), strict=True)}
        given[names[2]] = "dog"
        if is_file:
            (tmp_path / "l.csv").write_text("".join(f"{name},{label}\n" for name, label in reversed(given.items())))
            given = tmp_path / "l.csv"
        found = labels(top, given, tmp_path, ANIMALS)
        assert found.indices.tolist() == [2, 0, 1]
        assert found.order == "names"

    def test_relative_sources_and_absolute_entries(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(write_images(tmp_path, "x/a.jpg"))
        assert labels("x", {str(tmp_path / "x" / "a.jpg"): 2}, tmp_path).indices.tolist() == [2]
        assert labels("x", {Path("x/a.jpg"): 2}, tmp_path).indices.tolist() == [2]

    def test_the_longest_entry_counts(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "p", "a.jpg", "x/a.jpg")
        assert labels(top, {"x/a.jpg": 2, "a.jpg": 1}, tmp_path).indices.tolist() == [1, 2]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"a.jpg": 0, "b.jpg": 1}, r"the entry 'a.jpg', which means several images: '.*x/a.jpg' and '.*y/a.jpg'"),
            ({"x/a.jpg": 0, "b.jpg": 1}, "labels has no entry for '.*y/a.jpg'; give one for each image"),
            ({"b.jpg": 0}, r"no entry for '.*x/a.jpg', '.*y/a.jpg'; give"),
            ({"x/a.jpg": 0, "y/a.jpg": 1, "b.jpg": 1, "c.jpg": 1}, "match no image: 'c.jpg'; the first image is '"),
            ({f"{n}.png": 0 for n in range(9)}, "match no image: '0.png', '1.png', '2.png' and 6 others; the first"),
            ({"x\\a.jpg": 0, "b.jpg": 1}, "and leave out other entries. Write '/' in place of "),
            ({"x/a.jpg": 0, "y/a.jpg": 1, "y/b.jpg": 1, "b.jpg": 2}, "one image: 'y/b.jpg' is 1, and 'b.jpg' is 2"),
            ({"x/a.jpg": 0, "./x/a.jpg": 1}, "two entries for 'x/a.jpg': 0 and 1; keep one"),
            ({"x/a.jpg": 0, "y/a.jpg": 1, "b.jpg": 3}, "the label of '.*b.jpg' is 3, which is"),
            ({"x/a.jpg": 0.5}, "the label of 'x/a.jpg' is 0.5; a label is a class index"),
            ({"x/a.jpg": "lion", "y/a.jpg": "cat", "b.jpg": "cat"}, r"'lion' \(labels: the label of '.*x/a.jpg'\)"),
        ],
    )  # fmt: skip
    def test_wrong_entries(self, given: Any, message: str, tmp_path: Path) -> None:
        top = write_images(tmp_path / "p", "x/a.jpg", "y/a.jpg", "y/b.jpg")
        with pytest.raises(LabelError, match=message):
            labels(top, given, tmp_path, ANIMALS)

    def test_repetitions_and_extra_entries(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "p", "x/a.jpg")
        given = {"x/a.jpg": 1, "a.jpg": 1}
        assert labels(top, given, tmp_path).indices.tolist() == [1]
        assert labels(top, given | {"other.jpg": 2}, tmp_path, allow_extra=True).indices.tolist() == [1]

    def test_images_that_cannot_be_read_need_no_entry(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "p", "a.jpg")
        (top / "b.jpg").symlink_to("nowhere")
        assert labels(top, {"a.jpg": 1}, tmp_path).indices.tolist() == [1, -1]
        assert labels(top, {"a.jpg": 1, "b.jpg": 2}, tmp_path).indices.tolist() == [1, 2]

    def test_strange_names(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "p", os.fsdecode(b"\xe9.jpg"), "b.jpg")
        for given in (
            {os.fsdecode(b"\xe9.jpg"): 1, "b.jpg": 0},
            {"\\xe9.jpg": 1, "b.jpg": 0},
            {b"\xe9.jpg": 1, "b": 0},
        ):
            assert sorted(labels(top, given, tmp_path).indices.tolist()) == [0, 1]
        with pytest.raises(LabelError, match="match no image"):
            labels(top, {"\ud800": 1}, tmp_path)

    def test_many_images(self, tmp_path: Path) -> None:
        names = [f"{number % 7}/{number:05}.jpg" for number in range(3000)]
        top = write_images(tmp_path / "p", *names)
        given = {Path(name).stem: int(name[0]) for name in names}
        assert labels(top, given, tmp_path, 7).indices.tolist() == sorted(given.values())


class TestSequences:
    @pytest.mark.parametrize(
        "given", [[2, 0], ("owl", "cat"), np.array([2, 0]), ["2", 0], iter([2, 0]), ["OWL", "CAT"]]
    )
    def test_one_label_for_each_image(self, given: Any, tmp_path: Path) -> None:
        found = labels(write_images(tmp_path / "p", "a.jpg", "b.jpg"), given, tmp_path, ANIMALS)
        assert found.indices.tolist() == [2, 0]
        assert found.text.startswith("Labels, in the order of the images: ")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([1], "There is 1 label for 2 images; give one for each"),
            ([1, 2, 0], "There are 3 labels for 2 images"),
            ([1, 3], r"labels\[1\] is 3, which is no class .* 3 classes; .* the labels seem to count from 1"),
            ([1, -1], r"labels\[1\] is -1.*without a label"),
            ([1, None], r"labels\[1\] is None; a label is"),
            (["cat", "lion"], r"'lion' \(labels\[1\]\)"),
            (7, "labels is 7; give 'folders'"),
            (b"ab", "labels is b'ab'; give"),
            ({0, 1}, "labels is {0, 1}; give"),
            (repeat(1), "There are 3 labels for 2 images"),
        ],
    )
    def test_wrong_labels(self, given: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(LabelError, match=message):
            labels(write_images(tmp_path / "p", "a.jpg", "b.jpg"), given, tmp_path, ANIMALS)

    def test_digits_are_class_indices(self, tmp_path: Path) -> None:
        top = write_images(tmp_path / "p", "a.jpg", "b.jpg")
        assert labels(top, ["10", "2"], tmp_path, 11).indices.tolist() == [10, 2]
        assert labels(top, ["10", "2"], tmp_path, ("2", "x", "10")).indices.tolist() == [2, 0]
        assert labels(top, [2, 1], tmp_path, ("2", "x", "10")).indices.tolist() == [2, 1], "numbers are no names"
        assert labels(top, ["b", "a"], tmp_path, 2, order="text").names == ("a", "b")
