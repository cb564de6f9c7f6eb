"""A resumed run takes over nothing that it has not checked, and harms no file that is not its own."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fastres
from fastres.classification import folder as folders
from fastres.classification import parts, work
from fastres.errors import FastresError, OutputError, ResumeError, ResumeWarning

from .conftest import classify
from .test_interruption import interrupt


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 5)


@pytest.fixture
def whole(folder: Path, model: fastres.Model, tmp_path: Path) -> bytes:
    """The output of an undisturbed run."""
    classify(folder, tmp_path / "whole.parquet", model)
    return (tmp_path / "whole.parquet").read_bytes()


@pytest.fixture
def interrupted(folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes) -> Path:
    """An interrupted output with three parts of five rows."""
    output = tmp_path / "out.parquet"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, KeyboardInterrupt(), batch=4)
        with pytest.raises(KeyboardInterrupt, match="15 of 24 rows are kept"):
            classify(folder, output, model)
    return output


def kept(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def part_files(output: Path) -> list[Path]:
    return sorted(kept(output).glob("rows-*"), key=lambda path: path.name[-30:])


def other_model(model: fastres.Model) -> fastres.Model:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["fc.bias"][0] += 1
    return fastres.load("resnet20_digits", state, num_classes=10)


class TestParts:
    @pytest.mark.parametrize("which", [[0], [1], [0, 2], [0, 1, 2]], ids=str)
    @pytest.mark.parametrize("how", ["flipped", "cut", "empty", "deleted"])
    def test_what_does_not_match_is_computed_again_and_said_so(
        self, interrupted: Path, folder: Path, model: fastres.Model, whole: bytes, which: list[int], how: str
    ) -> None:
        found = part_files(interrupted)
        for path in [found[index] for index in which]:
            content = path.read_bytes()
            middle = len(content) // 2
            changed = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
            path.write_bytes({"flipped": changed, "cut": content[:-1], "empty": b""}.get(how, content))
            if how == "deleted":
                path.unlink()
        if how == "deleted":  # nobody can tell that the last parts were there
            last = max({0, 1, 2} - set(which), default=-1)
            which = [index for index in which if index < last]
        rows = 5 * len(which)
        with pytest.MonkeyPatch.context() as patch:
            warnings: list[str] = []
            patch.setattr(work, "warn", lambda message, category: warnings.append(message))
            report = classify(folder, interrupted, model, resume=True)
        assert report.recomputed == rows
        assert len(warnings) == (rows > 0)
        assert all(f"{rows} rows in" in warning and "computed again" in warning for warning in warnings)
        assert interrupted.read_bytes() == whole
        assert not kept(interrupted).exists()

    def test_parts_of_another_model_are_not_adopted(
        self, interrupted: Path, folder: Path, model: fastres.Model, whole: bytes
    ) -> None:
        (kept(interrupted) / "manifest.json").unlink()
        with pytest.raises(ResumeError, match="are not those of this run"):
            classify(folder, interrupted, other_model(model), resume=True)
        with pytest.warns(ResumeWarning, match=r"manifest.json .* the rows are those of this run"):
            report = classify(folder, interrupted, model, resume=True)
        assert report.resumed == 15
        assert interrupted.read_bytes() == whole

    def test_a_gap_in_the_joined_rows_is_an_error(
        self, interrupted: Path, folder: Path, model: fastres.Model, whole: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = work.Work.finish

        def finish(self: work.Work, *given: Any) -> None:
            part_files(interrupted)[1].unlink()
            original(self, *given)

        monkeypatch.setattr(work.Work, "finish", finish)
        with pytest.raises(OutputError, match=r"Rows 5 to 10 .* have disappeared; continue with --resume"):
            classify(folder, interrupted, model, resume=True)
        assert not interrupted.exists()
        monkeypatch.setattr(work.Work, "finish", original)
        with pytest.warns(ResumeWarning, match="5 rows"):
            classify(folder, interrupted, model, resume=True)
        assert interrupted.read_bytes() == whole


class TestManifest:
    @pytest.mark.parametrize(
        "content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"settings": {}}', b'{"fastres": 1}', b"[" * 10**5]
    )
    def test_damaged(self, interrupted: Path, folder: Path, model: fastres.Model, whole: bytes, content: bytes) -> None:
        (kept(interrupted) / "manifest.json").write_bytes(content)
        with pytest.warns(ResumeWarning, match="manifest.json"):
            assert classify(folder, interrupted, model, resume=True).resumed == 15
        assert interrupted.read_bytes() == whole

    def test_of_another_version(self, interrupted: Path, folder: Path, model: fastres.Model) -> None:
        path = kept(interrupted) / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "fastres": "0.0.1"}))
        with pytest.raises(ResumeError, match=r"its run with fastres 0\.0\.1 may compute other values"):
            classify(folder, interrupted, model, resume=True)
        assert len(part_files(interrupted)) == 3

    def test_damaged_list_of_images(self, interrupted: Path, folder: Path, model: fastres.Model) -> None:
        (kept(interrupted) / "listing.jsonl").write_bytes(b"damaged")
        (folder / "zz.jpg").write_bytes(b"")
        with pytest.raises(ResumeError, match="had different images"):
            classify(folder, interrupted, model, resume=True)

    def test_a_list_of_an_earlier_version(self, interrupted: Path, folder: Path, model: fastres.Model) -> None:
        """It had another name and, for the same images, another checksum."""
        place = kept(interrupted)
        (place / "listing.jsonl").rename(place / "listing.arrow")
        manifest = json.loads((place / "manifest.json").read_text())
        (place / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "0" * 64}))
        with pytest.raises(ResumeError, match=r"--overwrite to start over.*had different images"):
            classify(folder, interrupted, model, resume=True)
        classify(folder, interrupted, model, overwrite=True)
        assert not place.exists()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_list_of_images_that_becomes_a_pipe(
        self, folder: Path, model: fastres.Model, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = work.Work.begin

        def begin(self: work.Work, *given: Any) -> int:
            errors = original(self, *given)
            self.listing.unlink()
            os.mkfifo(self.listing)
            return errors

        monkeypatch.setattr(work.Work, "begin", begin)
        with pytest.raises(OutputError, match=r"the list of images, cannot be read: .*named pipe"):
            classify(folder, tmp_path / "out.csv", model, workers=workers)

    def test_an_output_replaced_at_the_last_moment(
        self, folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = work.Work._write_manifest

        def write(self: work.Work) -> None:
            original(self)
            if (self.folder / "output").exists():
                (self.folder / "output").unlink()
                (self.folder / "output").write_text("something else")

        monkeypatch.setattr(work.Work, "_write_manifest", write)
        with pytest.raises(OutputError, match="is not what was written"):
            classify(folder, tmp_path / "out.csv", model)

    def test_a_manifest_that_is_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "manifest.json")
        assert work._read_manifest(tmp_path) == {}

    def test_killed_after_the_output_got_its_name(
        self, folder: Path, model: fastres.Model, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "out.parquet"
        monkeypatch.setattr(work, "remove", lambda folder: None)
        first = classify(folder, output, model)
        monkeypatch.undo()
        assert kept(output).is_dir()
        with pytest.raises(OutputError, match="already exists"):
            classify(folder, output, model)
        part_files(output)[0].unlink()  # the folder was half deleted
        report = classify(folder, output, model, resume=True)
        assert (report.rows, report.errors, report.resumed) == (first.rows, first.errors, 24)
        assert output.read_bytes() == whole
        assert not kept(output).exists()


class TestOtherPeoplesFiles:
    @pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe", "known name", "no lock"])
    def test_in_a_folder_of_that_name(self, folder: Path, model: fastres.Model, tmp_path: Path, kind: str) -> None:
        output = tmp_path / "out.parquet"
        place = kept(output)
        place.mkdir()
        if kind != "no lock":
            (place / "lock").write_bytes(b"")
        theirs = place / {"known name": "manifest.json", "no lock": "manifest.json"}.get(kind, "theirs")
        if kind in ("folder", "known name"):
            theirs.mkdir()
            (theirs / "inner").write_text("precious")
        elif kind == "link":
            theirs.symlink_to("elsewhere")
        elif kind == "pipe":
            os.mkfifo(theirs)
        else:
            theirs.write_text("precious")
        before = sorted(place.rglob("*"))
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match=f"holds '{theirs.name}', which fastres has not written"):
                classify(folder, output, model, **options)
        assert sorted(place.rglob("*")) == before
        assert not output.exists()

    def test_the_folder_is_a_link(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir()
        kept(tmp_path / "out.parquet").symlink_to("theirs")
        with pytest.raises(OutputError, match="is a link"):
            classify(folder, tmp_path / "out.parquet", model)
        assert list((tmp_path / "theirs").iterdir()) == []

    def test_put_there_while_it_runs(
        self, folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "out.parquet"
        original = work.Work.flush

        def flush(self: work.Work) -> None:
            (self.folder / "theirs").write_text("precious")
            original(self)

        monkeypatch.setattr(work.Work, "flush", flush)
        with pytest.warns(UserWarning, match="is left behind, because it holds 'theirs'"):
            classify(folder, output, model)
        assert pq.read_table(output).num_rows == 24
        assert [path.name for path in kept(output).iterdir()] == ["theirs"]

    def test_a_folder_that_cannot_be_deleted(
        self, folder: Path, model: fastres.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(place: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(folders, "clear", refuse)
        with pytest.warns(UserWarning, match="cannot be deleted: Permission denied"):
            assert classify(folder, tmp_path / "out.parquet", model).rows == 24


class TestInputs:
    @pytest.mark.parametrize("kind", ["itself", "link", "hard link", "other path"])
    def test_no_output_is_an_input(
        self, folder: Path, model: fastres.Model, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = tmp_path / "images.parquet"
        pq.write_table(images(folder), source)
        content = source.read_bytes()
        output = tmp_path / "out.parquet"
        if kind == "itself":
            output = source
        elif kind == "link":
            output.symlink_to(source)
        elif kind == "hard link":
            output.hardlink_to(source)
        else:
            output = folder / ".." / "images.parquet"
        with pytest.raises(OutputError, match="is the input"):
            classify(source, output, model, overwrite=True)
        assert source.read_bytes() == content
        assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []

    def test_nor_the_folder_of_its_rows(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        place = tmp_path / "out.csv.partial"
        shutil.copytree(folder, place)
        for source in (place, place / "a.jpg", str(place / "*.jpg")):
            with pytest.raises(OutputError, match=r"(is|holds) the input"):
                classify(source, tmp_path / "out.csv", model, overwrite=True)
        assert (place / "a.jpg").exists()

    def test_nor_the_weights(self, folder: Path, tmp_path: Path) -> None:
        weights = tmp_path / "weights.csv"
        weights.write_bytes(b"precious")
        with pytest.raises(OutputError, match="is the input"):
            fastres.classify(folder, weights, model="resnet20_digits", weights=weights, overwrite=True)
        assert weights.read_bytes() == b"precious"

    def test_a_linked_output_is_written_where_the_link_points(
        self, folder: Path, model: fastres.Model, tmp_path: Path
    ) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "out.csv").symlink_to("disk/real.csv")
        assert classify(folder, tmp_path / "out.csv", model).output == tmp_path / "out.csv"
        assert (tmp_path / "out.csv").is_symlink()
        assert (tmp_path / "disk" / "real.csv").read_text().count("\n") == 25
        (tmp_path / "loop.csv").symlink_to("loop.csv")
        with pytest.raises(OutputError, match="cannot be written"):
            classify(folder, tmp_path / "loop.csv", model)

    def test_no_output_is_a_pipe(self, folder: Path, model: fastres.Model, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "out.csv")
        with pytest.raises(OutputError, match=r"is a named pipe \(FIFO\)"):
            classify(folder, tmp_path / "out.csv", model, overwrite=True)


def images(folder: Path) -> pa.Table:
    return pa.table({"image": [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]})


@pytest.mark.filterwarnings("ignore::fastres.errors.ResumeWarning")
def test_any_damage_to_the_folder_gives_the_same_table_or_a_named_error(
    interrupted: Path, folder: Path, model: fastres.Model, whole: bytes, tmp_path: Path
) -> None:
    generator, errors = random.Random(14), 0
    saved = tmp_path / "saved"
    shutil.copytree(kept(interrupted), saved)
    for _ in range(40):
        shutil.rmtree(kept(interrupted), ignore_errors=True)
        interrupted.unlink(missing_ok=True)
        shutil.copytree(saved, kept(interrupted))
        for path in generator.sample(sorted(kept(interrupted).iterdir()), generator.randint(1, 3)):
            damage(path, generator)
        try:
            assert classify(folder, interrupted, model, resume=True).rows == 24
            assert interrupted.read_bytes() == whole
        except FastresError:
            errors += 1
            assert not interrupted.exists()
    assert 0 < errors < 30


def damage(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    how = generator.choice(["flip", "cut", "delete", "rename", "folder", "grow"])
    if how in ("delete", "folder"):
        path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "rename":
        path.rename(path.with_name(f"{path.name}.tmp"))
    elif how == "flip" and content:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[: generator.randint(0, len(content))])
    elif how == "grow":
        path.write_bytes(content + generator.randbytes(9))
