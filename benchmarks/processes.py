"""Trainers timed from outside, step by step."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02


@dataclass
class Timed:
    """What a process told of its steps, and what it took."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # one for each step
    seconds: list[float] = field(default_factory=list)  # of each step; of the first, from what was told before it
    first_seconds: float = 0.0  # from the start of the process to the end of the first step
    peak_gib: float = 0.0  # of its memory
    device_gib: float | None = None  # of the device's memory, if it tells that
    status: int = 0  # as os.wait4 gives it
    said: str = ""  # on standard error


def time_process(command: Sequence[str], folder: Path, metrics: Path | None = None) -> Timed:
    """Runs a process to its end.

    Args:
      command: of the process.
      folder: where its output is kept while it runs.
      metrics: the ``metrics.jsonl`` that its steps are read from; None for JSON lines on its standard output, each with
        a ``step`` unless it marks the beginning of the first, or tells ``device_gib``.
    """
    result = Timed()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "log").open("w") as log:
        output = subprocess.PIPE if metrics is None else log
        last = started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=log, text=True, env=environment)
        for row in _read_output(process) if metrics is None else _read_metrics(process, metrics):
            now = time.monotonic()
            if "step" in row:
                result.rows.append(row)
                result.seconds.append(now - last)
                result.first_seconds = result.first_seconds or now - started
            result.device_gib = row.get("device_gib", result.device_gib)
            last = now
        _, result.status, usage = os.wait4(process.pid, 0)
    process.returncode = result.status
    if process.stdout:
        process.stdout.close()
    result.peak_gib = usage.ru_maxrss / 2**20
    result.said = (folder / "log").read_text()
    return result


def _read_output(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def _read_metrics(process: subprocess.Popen[str], metrics: Path) -> Iterator[dict[str, Any]]:
    num_read, is_running = 0, True
    while is_running:  # it is not reaped here, so that what it used can be asked for
        is_running = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        yield from (row for row in map(json.loads, lines[num_read:]) if "train_loss" in row)
        num_read = len(lines)
        time.sleep(POLL_SECONDS)
