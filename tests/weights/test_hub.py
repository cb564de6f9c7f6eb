"""Hub ids: which files are downloaded from a hub on loopback, from which commit, and what is shown meanwhile."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastres
from fastres.errors import (
    ArchitectureError,
    DownloadError,
    MissingDependencyError,
    StateDictMismatchError,
    UnknownModelError,
    WeightsError,
)
from fastres.export.metadata import describe_weights
from fastres.weights.folders import names_a_folder
from fastres.weights.inspect import inspect
from fastres.weights.sources import input_files

from .hub_server import ID, PROCESSOR, Files, HubServer, commit_of, complete
from .other_libraries import Logits, check_logits

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[2]


class TestDownload:
    def test_only_the_files_that_are_needed(self, hub: HubServer, small: Logits, tmp_path: Path) -> None:
        model = fastres.load(ID)
        check_logits(small, model, sizes=((64, 64),))
        assert (model.transforms.crop, model.transforms.interpolation) == (96, "bicubic")
        assert hub.files == ["config.json", "preprocessor_config.json", "model.safetensors"]
        assert complete(tmp_path / "cache") == set(hub.files)
        assert all(agent.startswith("fastres/") for agent in hub.agents)

    def test_the_commit_is_recorded(self, hub: HubServer, tmp_path: Path) -> None:
        model = fastres.load(ID)
        pinned = f"{ID}@{commit_of(hub)}"
        assert model.weights == pinned
        assert pinned in repr(model)
        assert describe_weights(model) == (pinned, "")
        model.save(tmp_path / "model.safetensors")
        assert pinned.encode() in (tmp_path / "model.safetensors").read_bytes()
        again = fastres.load(model.weights)
        assert torch.equal(again.fc.weight, model.fc.weight)  # type: ignore[arg-type, union-attr]

    def test_what_is_cached_is_not_downloaded_again(self, hub: HubServer) -> None:
        model = fastres.load(ID)
        hub.requests.clear()
        assert fastres.load(ID).weights == model.weights
        assert hub.requests == [("HEAD", f"/{ID}/resolve/main/config.json")]
        hub.requests.clear()
        fastres.load(model.weights)
        assert hub.requests == []

    def test_a_commit_that_is_not_cached_is_downloaded(self, hub: HubServer, files: Files) -> None:
        first = commit_of(hub)
        hub.repositories[ID].commit({**files, "README.md": b"second"})
        assert fastres.load(f"{ID}@{first}").weights == f"{ID}@{first}"

    def test_the_newest_commit_is_used(self, hub: HubServer, files: Files) -> None:
        first = fastres.load(ID).weights
        processor = json.dumps({**PROCESSOR, "size": 64}).encode()
        second = hub.repositories[ID].commit({**files, "preprocessor_config.json": processor})
        model = fastres.load(ID)
        assert (model.weights, model.transforms.crop) == (f"{ID}@{second}", 64)
        assert fastres.load(first).transforms.crop == 96

    def test_all_files_are_of_one_commit(self, hub: HubServer, files: Files) -> None:
        """The branch moves while the model is downloaded."""
        repository, first = hub.repositories[ID], commit_of(hub)

        def push(path: str) -> None:
            if path.endswith("preprocessor_config.json"):
                repository.commit({"config.json": files["config.json"]})

        hub.fail = push
        assert fastres.load(ID).weights == f"{ID}@{first}"
        assert commit_of(hub) != first

    @pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1"])
    def test_branches_and_tags(self, hub: HubServer, files: Files, revision: str) -> None:
        commit = hub.repositories[ID].commit({**files, "README.md": b"other"}, revision)
        assert fastres.load(f"hf-hub:{ID}@{revision}").weights == f"{ID}@{commit}"

    def test_an_address_that_was_copied_from_the_browser(self, hub: HubServer) -> None:
        assert fastres.load(f"https://huggingface.co/{ID}").weights == f"{ID}@{commit_of(hub)}"

    def test_weights_of_a_named_model(self, hub: HubServer, small: Logits) -> None:
        with pytest.raises(StateDictMismatchError, match=rf"{ID}@\w+ holds resnet-bottleneck-1-2-1 .* not resnet18"):
            fastres.load("resnet18", weights=ID)
        assert "model.safetensors" not in hub.files

    def test_random_weights_need_no_download(self, hub: HubServer) -> None:
        assert fastres.load(ID, weights=None).weights == "random initialisation"
        assert "model.safetensors" not in hub.files

    def test_a_network_that_is_not_run_is_refused_before_its_weights_are_downloaded(
        self, hub: HubServer, files: Files
    ) -> None:
        hub.repositories[ID].commit({**files, "config.json": b'{"model_type": "vit"}'})
        with pytest.raises(ArchitectureError, match="of type 'vit'"):
            fastres.load(ID)
        with pytest.raises(ArchitectureError, match="of type 'vit'"):
            inspect(ID)
        assert hub.files == ["config.json"]

    def test_older_models_have_a_pickle(self, hub: HubServer, small: Logits, files: Files, tmp_path: Path) -> None:
        torch.save(small.module.state_dict(), tmp_path / "old.bin")  # type: ignore[union-attr]
        files["pytorch_model.bin"] = (tmp_path / "old.bin").read_bytes()
        del files["model.safetensors"], files["preprocessor_config.json"]
        hub.repositories[ID].commit(files)
        model = fastres.load(ID)
        check_logits(small, model, sizes=((64, 64),))
        hub.requests.clear()
        fastres.load(model.weights)
        assert hub.requests == [], "the cache knows what the commit does not have"

    def test_split_weights_are_named(self, hub: HubServer, files: Files) -> None:
        del files["model.safetensors"]
        hub.repositories[ID].commit({**files, "model.safetensors.index.json": b"{}"})
        with pytest.raises(WeightsError, match=rf"{ID}@\w+ has its weights in several files"):
            fastres.load(ID)

    @pytest.mark.parametrize(
        ("left", "message"),
        [
            (["config.json"], r"has no weights: there must be model\.safetensors or .* on http://127"),
            (["model.safetensors"], r"http://127\S+ has no config\.json, so neither transformers nor timm saved it"),
        ],
    )
    def test_repositories_without_a_model(self, hub: HubServer, files: Files, left: list[str], message: str) -> None:
        hub.repositories[ID].commit({name: files[name] for name in left})
        with pytest.raises(WeightsError, match=message):
            fastres.load(ID)

    def test_downloaded_files_are_not_written_over(self, hub: HubServer, tmp_path: Path) -> None:
        assert input_files(ID) == []
        fastres.load(ID)
        snapshot = tmp_path / "cache" / "models--someone--small-resnet" / "snapshots" / commit_of(hub)
        assert input_files(ID) == [snapshot / "config.json", snapshot / "model.safetensors"]
        assert input_files("a/b..c") == []

    def test_inspect(self, hub: HubServer) -> None:
        report = inspect(ID)
        assert report.runs
        assert report.load == f"fastres.load('{ID}@{commit_of(hub)}')"

    def test_a_private_model_needs_a_token(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.repositories[ID].token = "hf_secret"
        with pytest.raises(
            DownloadError, match=r"no such model, or it is private \(the answer was 401\).* set HF_TOKEN"
        ):
            fastres.load(ID)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert fastres.load(ID).num_classes == 5


class TestNames:
    @pytest.mark.parametrize("name", ["./resnet50", "saved/-resnet", "saved/a..b"])
    def test_a_folder_that_is_not_there_and_no_hub_id(self, hub: HubServer, name: str) -> None:
        with pytest.raises(WeightsError, match=r"There is no folder .*not a valid hub id"):
            fastres.load(name)
        assert hub.requests == []

    def test_paths_stay_paths(self, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder.parent)
        with pytest.raises(WeightsError, match=r"There is no file checkpoints/best\.pth"):
            fastres.load("resnet18", weights="checkpoints/best.pth")
        for name in (
            "a/b/c",
            "resnet51",
            "models/best.pth",
            "images/cat.JPG",
            "models/resnet.onnx",
            f"{ID}@../../../etc",
        ):
            assert not names_a_folder(name)
        with pytest.raises(UnknownModelError):
            fastres.load("models/deep/resnet")
        (folder.parent / "models").mkdir()
        (folder.parent / "models" / "small").symlink_to(folder)
        assert fastres.load("models/small").weights == "models/small"
        assert hub.requests == []

    @pytest.mark.usefixtures("hub")
    def test_a_mistyped_path_is_named_as_both(self) -> None:
        message = (
            r"There is no folder models/resnet, and the hub id 'models/resnet' .* Check the spelling, of the path if"
        )
        with pytest.raises(DownloadError, match=message):
            fastres.load("models/resnet")

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(MissingDependencyError, match=r"pip install .*\[huggingface\]'"):
            fastres.load(ID)


class Terminal:
    """Standard error that is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        return True


class TestProgress:
    @pytest.mark.usefixtures("hub")
    @pytest.mark.parametrize("progress", [True, False])
    def test_a_bar_for_the_weights(self, progress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub.utils import are_progress_bars_disabled

        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        fastres.load(ID, progress=progress)
        assert ("100%" in terminal.text) == progress
        assert "config.json" not in terminal.text
        assert not are_progress_bars_disabled("huggingface_hub.http_get"), "as before"

    @pytest.mark.usefixtures("hub")
    def test_no_bar_without_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        fastres.load(ID)
        assert capsys.readouterr().err == ""


class TestPrograms:
    """What a user sees, with nothing replaced."""

    def run(self, hub: HubServer, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)

    def test_inspect_and_a_later_load(self, hub: HubServer, tmp_path: Path) -> None:
        done = self.run(hub, tmp_path, "-m", "fastres", "inspect", ID)
        assert (done.returncode, done.stderr) == (0, "")
        line = done.stdout.splitlines()[-1].partition("runs it: ")[2]
        hub.requests.clear()
        again = self.run(hub, tmp_path, "-c", f"import fastres; print({line})", HF_HUB_OFFLINE="1")
        assert f"{ID}@{commit_of(hub)}, 5 classes" in again.stdout
        assert (again.stderr, hub.requests) == ("", [])

    def test_predict(self, hub: HubServer, tmp_path: Path) -> None:
        from PIL import Image

        Image.new("RGB", (96, 96), "red").save(tmp_path / "red.png")
        done = self.run(hub, tmp_path, "-m", "fastres", "predict", "red.png", "--model", ID)
        assert (done.returncode, done.stderr) == (0, "")
        assert "LABEL_" in done.stdout

    def test_errors_are_one_line(self, hub: HubServer, tmp_path: Path) -> None:
        done = self.run(hub, tmp_path, "-m", "fastres", "inspect", "someone/other")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        code = f"import fastres; fastres.load({ID!r})"
        with socket.socket() as listening:  # takes connections, but never answers
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            done = self.run(hub, tmp_path, "-c", code, HF_ENDPOINT=url, HF_HUB_ETAG_TIMEOUT="1")
        assert "there was no answer in time" in done.stderr.splitlines()[-1]
        assert "site-packages" not in done.stderr
