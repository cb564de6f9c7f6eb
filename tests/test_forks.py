"""A forked child finds every lock open, whatever the parent's threads were doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from fastres import forks
from fastres.forks import Guard

# Threads of the parent call the model with a new size each time, so they often hold its locks. Every child calls it
# too. A child that waits for ever is ended by its alarm.
BUSY = """
import os, signal, sys, threading, time
import torch, fastres

torch.set_num_threads(1)
model = fastres.load("resnet20_digits")
expected = model(torch.zeros(1, 3, 32, 32))
stop = threading.Event()

def work(offset):
    size = 16 + offset
    while not stop.is_set():
        size = 16 + (size - 15) % 48
        with torch.no_grad():
            if size % 8 == 0:
                model.fc.bias.add_(0)
        model(torch.zeros(1, 3, size, 32))

threads = [threading.Thread(target=work, args=(13 * index,)) for index in range(4)]
for thread in threads:
    thread.start()
failed = 0
for attempt in range(CHILDREN):
    time.sleep(0.02)
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            equal = torch.equal(model(torch.zeros(1, 3, 32, 32)), expected)
            model(torch.zeros(2, 3, 20 + attempt, 36))
            os._exit(0 if equal else 3)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(4)
    status = os.waitpid(child, 0)[1]
    if status:
        failed += 1
        print("status", status, file=sys.stderr, flush=True)
stop.set()
for thread in threads:
    thread.join()
print("failed:", failed)
"""


def test_a_child_is_not_blocked_by_a_thread_that_it_does_not_have() -> None:
    guard = Guard()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with guard:
            inside.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    child = os.fork()
    if not child:
        signal.alarm(30)
        with guard:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    leave.set()
    holder.join()
    assert status == 0


def test_guards_exclude_each_other() -> None:
    guard, order = Guard(), []
    with guard:
        waiting = threading.Thread(target=lambda: (guard.__enter__(), order.append("second"), guard.__exit__()))
        waiting.start()
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def fork(inside: Callable[[], object]) -> int:
    """Run ``inside`` in a child, and return its exit status."""
    child = os.fork()
    if not child:
        signal.alarm(30)
        inside()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_fork_waits_for_calls_and_calls_wait_for_a_fork() -> None:
    own, events = forks.Calls(), list[str]()
    inside, leave = threading.Event(), threading.Event()

    def call() -> None:
        with own:
            inside.set()
            leave.wait()
            events.append("first call")

    def later_call() -> None:
        with own:
            events.append("second call")

    threads = [threading.Thread(target=call), threading.Thread(target=later_call)]
    threads[0].start()
    inside.wait()
    forking = threading.Thread(target=lambda: (own.before_fork(), events.append("fork"), own.after_fork_in_parent()))
    forking.start()
    while not own._forks:
        time.sleep(0.001)
    threads[1].start()
    leave.set()
    for thread in (*threads, forking):
        thread.join()
    assert events == ["first call", "fork", "second call"]


def test_a_fork_inside_a_call_does_not_wait_for_itself() -> None:
    with forks.calls, forks.calls:
        assert fork(lambda: forks.calls.__enter__()) == 0
        assert fork(lambda: forks.calls.__exit__()) == 0


def test_a_fork_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "LONGEST_WAIT", 0.05)
    inside, leave = threading.Event(), threading.Event()

    def call() -> None:
        with forks.calls:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=call)
    thread.start()
    inside.wait()
    assert fork(lambda: forks.calls.__enter__()) == 0
    leave.set()
    thread.join()


def test_children_of_a_busy_process_call_the_model() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUSY.replace("CHILDREN", "8")],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["failed:", "0"], done.stdout + done.stderr
