"""Ctrl-C, SIGTERM and SIGHUP: one line, the right status, no traceback, whenever they come."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fastres.commands.cli import main

ROOT = Path(__file__).parents[2]
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
LONG = 30  # seconds, which no test waits for


def start(*arguments: str, ignored: signal.Signals | None = None) -> subprocess.Popen[str]:
    def dispositions() -> None:
        for number in (INT, TERM, HUP):
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=dispositions,
    )  # fmt: skip


def program(body: str, ignored: signal.Signals | None = None) -> subprocess.Popen[str]:
    """Start a program whose main function has this ``body``, and return when it has printed ``ready`` and gone on."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    code = (
        "import ctypes, hashlib, os, sys, time\nfrom fastres.program import run_program\n"
        f"def ready(): print('ready', flush=True)\ndef main():\n{lines}\n"
        "sys.exit(run_program(main, 'program'))"
    )
    process = start("-c", code, ignored=ignored)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)  # now it does what comes next
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=LONG / 2)
    finally:
        process.kill()
    return process.returncode, said


BODIES = {
    "sleeping": f"ready(); time.sleep({LONG})",
    "opening a FIFO": "os.mkfifo(FIFO); ready(); open(FIFO)",
    "cleaning up": f"try:\n    ready(); time.sleep({LONG})\nfinally: time.sleep(0.3)",
    "in a finaliser": f"class D:\n    def __del__(self): ready(); time.sleep({LONG})\nD(); time.sleep({LONG})",
}


@pytest.mark.parametrize("body", BODIES)
def test_a_signal_stops_the_program(body: str, tmp_path: Path) -> None:
    for number, words in ((INT, "interrupted"), (TERM, "interrupted by SIGTERM"), (HUP, "interrupted by SIGHUP")):
        process = program(BODIES[body].replace("FIFO", repr(str(tmp_path / f"fifo{number}"))))
        process.send_signal(number)
        assert finish(process) == (128 + number, f"program: {words}; run the command again\n")


@pytest.mark.parametrize(("first", "second"), [(INT, INT), (TERM, TERM), (INT, TERM)])
def test_a_second_signal_ends_the_program_at_once(first: signal.Signals, second: signal.Signals) -> None:
    for body in (
        f"try:\n    ready(); time.sleep({LONG})\nfinally: time.sleep({LONG})",
        "ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",  # a call that no Python handler interrupts
    ):
        process = program(body)
        process.send_signal(first)
        time.sleep(0.3)
        process.send_signal(second)
        assert finish(process) == (128 + second, "program: interrupted again; the program ended at once\n")


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_two_signals_for_one_event_are_one(number: signal.Signals) -> None:
    """As timeout(1) sends them, and as a terminal and its shell do when the terminal vanishes."""
    process = program(f"try:\n    ready(); time.sleep({LONG})\nfinally: time.sleep(0.5)")
    process.send_signal(number)
    time.sleep(0.4 if number == HUP else 0.02)
    process.send_signal(number)
    status, said = finish(process)
    assert status == 128 + number
    assert "at once" not in said


def test_other_signals_do_not_count() -> None:
    """Python tells of every signal that has a handler. The DataLoader handles the end of its workers."""
    process = program(
        "import signal\nsignal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "os.waitpid(os.fork() or os._exit(0), 0)\ntime.sleep(0.3)\n"
        f"try:\n    ready(); time.sleep({LONG})\nfinally: time.sleep(0.3)"
    )
    process.send_signal(INT)
    assert finish(process) == (128 + INT, "program: interrupted; run the command again\n")


@pytest.mark.parametrize("number", [INT, HUP])
def test_what_was_ignored_stays_ignored(number: signal.Signals) -> None:
    process = program("ready(); time.sleep(0.4)", ignored=number)
    process.send_signal(number)
    assert finish(process) == (0, "")


def test_forked_children_have_the_usual_handlers() -> None:
    """A pool ends its workers with SIGTERM. That must not look like an interruption."""
    process = program(
        f"child = os.fork()\nif not child: time.sleep({LONG})\n"
        "os.kill(child, 15); status = os.waitpid(child, 0)[1]; ready(); return status"
    )
    assert finish(process) == (TERM, "")


def test_the_end_of_the_program_is_quiet() -> None:
    process = program(f"import atexit\natexit.register(lambda: (ready(), time.sleep({LONG})))\nreturn 3")
    process.send_signal(INT)
    assert finish(process) == (3, "")


def test_a_call_of_main_leaves_signals_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (INT, TERM, HUP)]
    assert main(["list"]) == 0
    assert [signal.getsignal(number) for number in (INT, TERM, HUP)] == before
    assert sys.unraisablehook is sys.__unraisablehook__ or sys.unraisablehook.__module__ != "fastres.interruption"


@pytest.mark.parametrize("seed", range(5))
def test_a_command_is_interrupted_at_any_moment(seed: int, tmp_path: Path) -> None:
    """At a random moment of the start, in which torch is imported, or of the work."""
    generator = random.Random(seed)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    number = generator.choice((INT, TERM, HUP))
    process = start("-m", "fastres", "predict", str(tmp_path / "a.png"), "--model", "resnet20_digits")
    time.sleep(generator.uniform(0.1, 1.2))
    process.send_signal(number)
    status, said = finish(process)
    assert status in (0, 128 + number)
    assert said.count("\n") == bool(status)
    assert said.startswith("fastres: interrupted") or not status


def test_a_module_of_the_benchmark_is_interrupted_while_it_is_imported() -> None:
    process = start("-m", "bench.run", "--help")
    time.sleep(0.4)
    process.send_signal(INT)
    status, said = finish(process)
    assert status in (0, 128 + INT, -INT)  # Python ends itself with SIGINT, which shells report as 130
    assert said in ("", "fastres: interrupted; run the command again\n")
