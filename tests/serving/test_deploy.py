"""docs/serve.md and the files in docs/serve say what the server does: options, errors, metrics, times and rights."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastres.commands import serve as command
from tests.docs.blocks import ROOT, blocks

yaml = pytest.importorskip("yaml")

PAGE = ROOT / "docs" / "serve.md"
FILES = ROOT / "docs" / "serve"
SERVING = ROOT / "fastres" / "serving"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="fastres serve", exit_on_error=False)
    command.add_arguments(found)
    return found


def table(heading: str) -> list[list[str]]:
    """Return the rows of the first table below ``heading``, without its head."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    end = next((row for row, line in enumerate(lines) if row > 1 and line.startswith("|---")), len(lines) + 1) - 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]]


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, such as ``("USER", "10001:10001")``."""
    text = re.sub(r"^#.*\n", "", (FILES / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def last(word: str) -> str:
    return [rest for name, rest in instructions() if name == word][-1]


def unit() -> dict[str, str]:
    lines = (FILES / "fastres.service").read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=") for line in lines if "=" in line and not line.startswith("#")]
    assert len({name for name, _, _ in pairs}) == len(pairs)  # none twice
    return {name: value for name, _, value in pairs}


def pod() -> Any:
    (code,) = (block.code for block in blocks(PAGE) if "kind: Deployment" in block.code)
    return next(yaml.safe_load_all(code))["spec"]["template"]["spec"]


def drain() -> int:
    """Return the seconds that requests have after SIGTERM."""
    from fastres.serving import running

    return running._DRAIN


# The options


def test_the_table_of_options_is_that_of_the_parser() -> None:
    options = {action.option_strings[-1]: action for action in parser()._actions if action.option_strings}
    del options["--help"]
    rows = table("Options")
    assert [row[0].strip("`").split()[0] for row in rows] == list(options)
    for names, shown, _ in rows:
        action = options[names.strip("`").split()[0]]
        if action.default:
            assert shown.strip("`").replace(",", "").split()[0] == str(action.default).removesuffix(".0")
        assert ("…" in names) == (action.nargs == "+")


def commands() -> list[str]:
    """Return the arguments of every ``fastres serve`` in the page, the Dockerfile, the unit and the pod."""
    found = []
    for block in blocks(PAGE):
        code = block.code.replace("\\\n", " ")
        found += re.findall(r"^(?:\$ )?fastres serve ([^>&\n]*)", code, re.MULTILINE)
        found += re.findall(r"docker run .* fastres-serve(?::\w+)? (.*)", code)
    found += re.findall(r"`fastres serve ([^`]+)`", PAGE.read_text(encoding="utf-8"))
    entry = json.loads(last("ENTRYPOINT"))
    assert entry[:2] == ["fastres", "serve"]
    for more in (json.loads(last("CMD")), pod()["containers"][0]["args"]):
        found.append(shlex.join([*entry[2:], *more]))
    program, verb, *arguments = shlex.split(unit()["ExecStart"])
    assert (Path(program).name, verb) == ("fastres", "serve")
    return [*found, shlex.join(arguments)]


def test_every_command_has_options_that_exist() -> None:
    found = commands()
    assert len(found) > 6
    for arguments in found:
        parser().parse_args(shlex.split(arguments))
    with pytest.raises(argparse.ArgumentError):
        parser().parse_args(["resnet50", "--max-queue", "many"])


# Errors and metrics


def refusals() -> set[tuple[int, str]]:
    """Return status and name of every ``Refusal`` in the code."""
    found = set()
    for path in SERVING.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refusal":
                status, kind = node.args[:2]
                if isinstance(status, ast.Constant) and isinstance(kind, ast.Constant):
                    found.add((status.value, kind.value))
            if isinstance(node, ast.Dict) and ast.unparse(node) == "{404: 'NotFoundError', 405: 'MethodError'}":
                found |= set(ast.literal_eval(node).items())
    return found


def test_the_table_of_errors_is_that_of_the_code() -> None:
    rows = [(int(row[0]), row[1].strip("`")) for row in table("Errors")]
    assert len(set(rows)) == len(rows)
    assert set(rows) == refusals()


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    from fastres.serving.metrics import Metrics

    added = re.findall(r'metrics\.gauge\(\s*"(\w+)"', (SERVING / "app.py").read_text(encoding="utf-8"))
    metrics = Metrics()
    for name in added:
        metrics.gauge(name, "", lambda: 0.0)
    families = {
        f"{family.name}_total" if family.type == "counter" else family.name: family.type
        for family in metrics.registry.collect()
    }
    assert {row[0].strip("`"): row[1] for row in table("Metrics")} == families
    shown = set(re.findall(r"fastres_[a-z_]+", PAGE.read_text(encoding="utf-8")))
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in shown} <= set(families)


# The image


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server that answers /ready with ``status``; yield its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ready" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_of_the_image_asks_whether_the_server_is_ready(status: int, healthy: bool) -> None:
    _, _, check = last("HEALTHCHECK").partition("CMD ")
    _, option, code = json.loads(check)
    assert option == "-c"
    port = json.loads(last("ENTRYPOINT"))[-1]
    assert last("EXPOSE") == port
    with answering(status) as free:
        local = code.replace(f"'127.0.0.1', {port},", f"'127.0.0.1', {free},")
        assert local != code
        proxy = {**os.environ, "http_proxy": "http://127.0.0.1:1"}
        done = subprocess.run([sys.executable, "-c", local], env=proxy, capture_output=True)
    assert (done.returncode == 0) == healthy


def test_the_image_has_a_user_without_rights_and_no_secrets() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last("USER"))
    names = re.findall(r"(\w+)=", " ".join(rest for word, rest in instructions() if word in ("ENV", "ARG")))
    assert not [name for name in names if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]
    assert sum(word == "FROM" for word, _ in instructions()) == 2


def test_the_image_gets_the_files_that_pip_needs_and_no_results() -> None:
    lines = (FILES / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert "bench/results" in lines
    links = {os.readlink(path).removeprefix("../") for path in (ROOT / "fastres").iterdir() if path.is_symlink()}
    assert sent == {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "fastres", *links}
    assert all((ROOT / name).exists() for name in sent)


# systemd


def test_the_unit_lets_the_server_answer_what_it_has_begun() -> None:
    found = unit()
    assert found["KillMode"] == "mixed"
    assert int(found["TimeoutStopSec"]) > drain()
    assert found["OOMPolicy"] == "continue"
    assert set(found["RestrictAddressFamilies"].split()) == {"AF_INET", "AF_INET6", "AF_UNIX"}
    assert found["EnvironmentFile"].startswith("-")
    assert found["EnvironmentFile"][1:] in PAGE.read_text(encoding="utf-8")
    assert "MemoryDenyWriteExecute" not in found  # oneDNN could not write machine code
    for setting in re.findall(r"^\| `(\w+=[\w]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        name, _, value = setting.partition("=")
        assert found[name] == value


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_knows_every_setting_of_the_unit(tmp_path: Path) -> None:
    program = shlex.split(unit()["ExecStart"])[0]
    text = (FILES / "fastres.service").read_text(encoding="utf-8").replace(program, sys.executable)
    for content, expected in ((text, ""), (text.replace("KillMode=", "KillMod="), "KillMod")):
        (tmp_path / "fastres.service").write_text(content)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", tmp_path / "fastres.service"], capture_output=True, text=True
        )
        said = [line for line in done.stderr.splitlines() if "fastres.service" in line]
        assert bool(said) == bool(expected), done.stderr
        assert expected in "".join(said)


# Docker and Kubernetes


def test_containers_leave_requests_their_time() -> None:
    stops = [int(seconds) for block in blocks(PAGE) for seconds in re.findall(r"--stop-timeout (\d+)", block.code)]
    assert stops
    assert min(stops) > drain()
    wait = pod()["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod()["terminationGracePeriodSeconds"] > drain() + wait


def test_the_pod_fits_to_the_image_and_the_server() -> None:
    (container,) = pod()["containers"]
    routes = (SERVING / "app.py").read_text(encoding="utf-8")
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert f'("{container[probe]["httpGet"]["path"]}", service.' in routes
    assert container["ports"][0]["containerPort"] == int(last("EXPOSE"))
    user = pod()["securityContext"]
    assert f"{user['runAsUser']}:{user['fsGroup']}" == last("USER")
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"/tmp", last("VOLUME")}
    assert container["env"][0]["name"] == command.KEY_VARIABLE


# Ray Serve

ASK = """
import json, sys, urllib.request
from concurrent.futures import ThreadPoolExecutor
import ray
from ray import serve
from images import app
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20, logging_level="ERROR")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(app)

def ask(data):
    with urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/", data) as answer:
        return json.load(answer)

files = [open(name, "rb").read() for name in ("0.png", "1.png", "2.png")] + [b"not an image"]
with ThreadPoolExecutor(16) as pool:
    print(json.dumps(list(pool.map(ask, files * 8))))
serve.shutdown()
"""


def has_ray_serve() -> bool:
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("grpc_reflection") is None:
        return False  # grpc_reflection comes with ray[serve]
    return importlib.util.find_spec("ray.serve") is not None


def test_a_batch_of_ray_serve_can_become_full() -> None:
    (code,) = (block.code for block in blocks(PAGE) if "@serve.deployment" in block.code)
    limits = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", code)}
    assert limits["max_ongoing_requests"] >= limits["max_batch_size"] * limits.get("max_concurrent_batches", 1)


@pytest.mark.slow
@pytest.mark.skipif(not has_ray_serve(), reason="needs ray[serve]")
def test_the_application_for_ray_serve_answers(tmp_path: Path) -> None:
    from fastres.bench.digits import as_image, load_scans
    from tests.docs.run_page import free_port

    (code,) = (block.code for block in blocks(PAGE) if "@serve.deployment" in block.code)
    (tmp_path / "images.py").write_text(code)
    (tmp_path / "ask.py").write_text(ASK)
    for number in range(3):
        as_image(load_scans()[0][number]).save(tmp_path / f"{number}.png")
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # a short path: Ray's sockets lie deep inside
    path = os.pathsep.join(map(str, (ROOT, tmp_path)))
    variables = {**os.environ, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path}
    try:
        done = subprocess.run(
            [sys.executable, "ask.py", str(free_port())], cwd=tmp_path, env=variables, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert [answer.get("label") for answer in answers] == ["0", "1", "2", None] * 8
    assert "not an image" in answers[3]["error"]
