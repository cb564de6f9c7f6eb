"""Results on disk: one JSON file per study, and the CSV files, figures and page that are made from it."""

from __future__ import annotations

import base64
import csv
import datetime
import html
import io
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastres.bench.report.results import read_text, write_whole
from fastres.bench.report.words import cpu_words
from fastres.commands.environment import installed_version
from fastres.errors import FastresError
from fastres.executors.processor import processor
from fastres.executors.quota import threads
from fastres.version import __version__

from .common import Data, Settings, Study
from .figures import drawing, png

PAGE_NAME = "index.html"
TITLE = "Why residual networks"
INTRODUCTION = (
    "This page reproduces four observations that motivate residual networks, on real images and with this project's "
    "own networks. One command measures each observation and writes the sentences with numbers below from its "
    "measurements."
)
RUNNING = (
    "To run them from a checkout, use `python -m bench.study all --out DIR`. It takes under an hour on two cores, or "
    "about two minutes with `--quick`. `--data cifar-10-batches-py` trains on CIFAR-10, `--deep 110` compares 110 "
    "layers with 20, and `--docs FILE` writes this page."
)
UNTIMED = "The studies are not timed, because their results do not depend on speed."


@dataclass(frozen=True)
class Result:
    """The measurements of one study, the fingerprint of its settings, and its environment with the command."""

    study: str
    fingerprint: str
    environment: dict[str, Any]
    data: Data


def environment(settings: Settings, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "size": settings.size,
        "seeds": list(range(settings.seeds)),
        "fastres": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": installed_version("numpy"),
        "scikit-learn": installed_version("scikit-learn"),
        **processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def read(path: Path) -> Result | None:
    """Read a study's JSON file. Return ``None`` if it does not exist. Raise ``FastresError`` if it is not a result."""
    if not path.exists():
        return None
    try:
        result = Result(**json.loads(read_text(path)))
        if not (isinstance(result.environment, dict) and isinstance(result.data, dict)):
            raise ValueError("environment and data must be objects")
        return result
    except (FastresError, ValueError, TypeError, RecursionError) as error:
        raise FastresError(f"{path} is not a study's result ({error}); remove it and run the study again") from error


def measured(study: Study, settings: Settings, command: str, again: bool = False) -> Result:
    """Return the study's result: read it from ``settings.folder`` if the settings are the same, else measure it now."""
    path = settings.folder / f"{study.name}.json"
    found = None if again else read(path)
    if found is not None and found.fingerprint == settings.fingerprint:
        return found
    with threads(1):  # so that the numbers do not depend on the number of cores
        result = Result(study.name, settings.fingerprint, environment(settings, command), study.measure(settings))
    write_whole(path, (json.dumps(vars(result), ensure_ascii=False) + "\n").encode())
    return result


def write_study(study: Study, result: Result, folder: Path) -> None:
    """Write a study's CSV files and figures."""
    for name, records in study.tables(result.data).items():
        write_whole(folder / f"{name}.csv", as_csv(records))
    with drawing():
        for picture in study.draw(result.data):
            write_whole(folder / picture.file, png(picture.figure))


def as_csv(records: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def _captions(study: Study, data: Data) -> list[tuple[str, str]]:
    with drawing():
        return [(picture.file, picture.caption) for picture in study.draw(data)]


def _runs(data: Data) -> str:
    """Say how fastres ran the study's networks, compared with PyTorch."""
    runs = data["runs"]
    same = sum(run["fastres_error"] == run["pytorch_error"] for run in runs)
    equal = "all" if same == len(runs) else str(same)
    worst = max(runs, key=lambda run: run["fastres_distance"])
    return (
        f"fastres also ran {len(runs)} networks of this study. For {equal} of them its error rate on the images equals "
        f"PyTorch's. Its logits differ from float64 by at most {worst['fastres_distance']:.1e} (relative; "
        f"{worst['network']}). For that network, PyTorch's float32 logits differ by {worst['pytorch_distance']:.1e}."
    )


def _where(result: Result) -> str:
    at = result.environment
    seeds = ", ".join(map(str, at["seeds"]))
    return (
        f"Data: {result.data['dataset']}. Size: {at['size']}; seeds {seeds}. fastres {at['fastres']}, torch "
        f"{at['torch']}, Python {at['python']}, scikit-learn {at['scikit-learn']}; {cpu_words(at)}, {at['system']}; "
        f"{at['date']}."
    )


def as_markdown(results: Sequence[tuple[Study, Result]], figures: str) -> str:
    """Return the page as Markdown, with its figures and data at the relative address ``figures``."""
    html_page = f"This page is also available as one HTML file: [{PAGE_NAME}]({figures}/{PAGE_NAME})."
    parts = [f"# {TITLE}", INTRODUCTION, RUNNING, html_page]
    for number, (study, result) in enumerate(results, start=1):
        data = result.data
        parts += [f"## {number}. {study.title}", f"`{result.environment['command']}`. Source: {study.source}."]
        parts.append(study.paragraph(data))
        for file, caption in _captions(study, data):
            parts.append(f"![{study.title}]({figures}/{file})\n\n*{caption}*")
        rows = [f"| {line.what} | {line.value} | {line.expected} |" for line in study.numbers(data)]
        parts.append("\n".join(["| quantity | measured | theory or paper |", "|---|---|---|", *rows]))
        files = ", ".join(f"[{name}.csv]({figures}/{name}.csv)" for name in study.tables(data))
        parts += [_runs(data), f"{_where(result)} Tables: {files}."]
    parts.append(UNTIMED)
    return "\n\n".join(parts) + "\n"


_STYLE = """
:root { color: #1f2933; background: #fff; font: 17px/1.6 system-ui, sans-serif; }
body { max-width: 62rem; margin: 3rem auto; padding: 0 1.5rem; }
h1 { font-size: 2.2rem; } h2 { margin-top: 4rem; border-top: 1px solid #e4e7eb; padding-top: 1.5rem; }
code { background: #f5f7fa; padding: .15rem .4rem; border-radius: 4px; font-size: .9em; }
figure { margin: 2rem 0; } img { width: 100%; } figcaption, .where { color: #52606d; font-size: .85rem; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
td, th { padding: .3rem .8rem .3rem 0; text-align: left; }
tr { border-bottom: 1px solid #e4e7eb; } td:nth-child(2) { font-variant-numeric: tabular-nums; font-weight: 600; }
"""


def as_html(results: Sequence[tuple[Study, Result]], folder: Path) -> str:
    """Return the page as one self-contained HTML file, with the figures of ``folder`` embedded."""
    e = html.escape
    running = re.sub("`(.*?)`", r"<code>\1</code>", e(RUNNING))
    parts = [f"<h1>{TITLE}</h1>", f"<p>{e(INTRODUCTION)}</p>", f"<p>{running}</p>"]
    for number, (study, result) in enumerate(results, start=1):
        data = result.data
        parts.append(f"<h2>{number}. {e(study.title)}</h2>")
        parts.append(f"<p><code>{e(result.environment['command'])}</code></p><p>{e(study.paragraph(data))}</p>")
        for file, caption in _captions(study, data):
            image = base64.b64encode((folder / file).read_bytes()).decode()
            parts.append(
                f'<figure><img alt="{e(caption)}" src="data:image/png;base64,{image}">'
                f"<figcaption>{e(caption)}</figcaption></figure>"
            )
        rows = "".join(
            f"<tr><td>{e(line.what)}</td><td>{e(line.value)}</td><td>{e(line.expected)}</td></tr>"
            for line in study.numbers(data)
        )
        parts.append(f"<table><tr><th>quantity</th><th>measured</th><th>theory or paper</th></tr>{rows}</table>")
        parts.append(f"<p>{e(_runs(data))}</p>")
        parts.append(f'<p class="where">Source: {e(study.source)}. {e(_where(result))}</p>')
    parts.append(f'<p class="where">{e(UNTIMED)}</p>')
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{TITLE}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def write_page(studies: Sequence[Study], folder: Path, docs: Path | None = None) -> Path:
    """Write ``index.html`` with all studies that have results in ``folder``; to ``docs``, the same page as Markdown."""
    results = [(study, found) for study in studies if (found := read(folder / f"{study.name}.json")) is not None]
    write_whole(folder / PAGE_NAME, as_html(results, folder).encode())
    if docs is not None:
        figures = Path(os.path.relpath(folder, docs.parent)).as_posix()
        write_whole(docs, as_markdown(results, figures).encode())
    return folder / PAGE_NAME
