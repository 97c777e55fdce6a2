"""Whether another process lives, told from what it wrote down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pbd_ray.search.process import Process, lives, this_process

WHOLE = "pid:[4026531836]"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that says which it is, and waits."""
    code = (
        "import dataclasses, json, sys; from pbd_ray.search.process import this_process\n"
        "print(json.dumps(dataclasses.asdict(this_process())), flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()


def test_this_process_lives() -> None:
    assert lives(this_process()) is True


def test_a_process_lives_until_it_is_killed(child: subprocess.Popen[str]) -> None:

    assert child.stdout is not None
    other = Process(**json.loads(child.stdout.readline()))
    assert other.pid == child.pid
    assert lives(other) is True
    child.kill()
    child.communicate()  # buries it
    assert lives(other) is False


def test_a_zombie_is_dead(child: subprocess.Popen[str]) -> None:
    """A driver whose parent has not asked for its exit status yet still has its pid."""

    assert child.stdout is not None
    other = Process(**json.loads(child.stdout.readline()))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not buried
    assert lives(other) is False


@pytest.mark.parametrize(
    ("changes", "asker", "expected"),
    [
        ({}, {}, True),
        ({"ticks": 1}, {}, False),  # the pid is another process's by now
        ({"pid": 2**22 + 1}, {}, False),  # above Linux's largest
        ({"ticks": None}, {}, None),
        ({"host": "elsewhere"}, {}, None),
        ({"machine": "elsewhere"}, {}, None),
        ({"namespace": "pid:[1]"}, {}, None),  # a container of the same name
        ({"boot": ""}, {}, None),
        ({"boot": "before"}, {}, False),  # rebooted since
        ({"boot": "before", "namespace": "pid:[1]"}, {"namespace": "pid:[1]"}, None),
        ({"boot": "before", "machine": ""}, {"machine": ""}, None),
    ],
)
def test_what_can_be_told(changes: dict[str, Any], asker: dict[str, Any], expected: bool | None) -> None:
    me = replace(this_process(), machine="m", boot="b", namespace=WHOLE)
    assert lives(replace(me, **changes), replace(me, **asker)) is expected
