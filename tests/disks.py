"""Small disks that become full, or read-only, when a run says a certain thing.

As a program (``python disks.py DISK RULES key=value ...``) it is ``run_training.py`` with such rules.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

Rules = Mapping[str, list[str]]  # how a message begins -> what is done to the disk, once


@contextlib.contextmanager
def mount(path: Path, kib: int) -> Iterator[Path]:
    """A disk in memory; OSError where that is not permitted."""
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kib}k", "none", str(path)]
    try:
        done = subprocess.run(["mount", *options], capture_output=True, check=False)
    except FileNotFoundError:
        raise PermissionError("there is no mount here") from None
    if done.returncode:
        raise PermissionError(done.stderr.decode())
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=False)


def mount_or_skip(path: Path, kib: int) -> Iterator[Path]:
    """The same for a fixture: tests that need a disk are skipped where none can be mounted."""
    with contextlib.ExitStack() as stack:
        try:
            mounted = stack.enter_context(mount(path, kib))
        except PermissionError as error:
            pytest.skip(f"mounting is not permitted: {error}")
        yield mounted


def act(disk: Path, action: str) -> None:
    """``fill:N`` but for N bytes, ``free`` again, ``wait:FILE``, ``lock:FOLDER`` against writing, ``unlock:FOLDER``."""
    verb, _, name = action.partition(":")
    if verb == "fill":
        stats = os.statvfs(disk)
        with contextlib.suppress(OSError), (disk / "filler").open("ab") as file:
            file.write(bytes(max(0, stats.f_bavail * stats.f_frsize - int(name))))
    elif verb == "free":
        (disk / "filler").unlink()
    elif verb == "wait":
        deadline = time.monotonic() + 30
        while not (disk / name).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    else:
        folder = str(disk / name)
        commands = [["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder]]
        for command in commands if verb == "lock" else [["umount", folder]]:
            subprocess.run(command, check=True)


@contextlib.contextmanager
def when_said(disk: Path, rules: Rules) -> Iterator[None]:
    """Does it as soon as a message of a log begins like that, before it is written."""
    make, left = logging.getLogRecordFactory(), dict(rules)

    def make_record(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        text = record.getMessage()
        for start in [start for start in left if text.startswith(start)]:
            for action in left.pop(start):
                act(disk, action)
        return record

    logging.setLogRecordFactory(make_record)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


if __name__ == "__main__":
    from adaptax.cli import main

    where, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.argv[1:] = sys.argv[3:]
    with when_said(where, given):
        main()
