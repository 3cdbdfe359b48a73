"""What is written down while a run goes on."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaptax.config import LoggingConfig
from adaptax.metrics import MetricsLog, ProgressDisplay, describe_step

QUIET = LoggingConfig(every_steps=2, progress="lines", tensorboard=False, plot=False, peak_tflops=None)
ROW = {
    "train_loss": 1.5,
    "train_learning_rate": 1e-4,
    "train_tokens_per_second": 1234.0,
    "train_padding_share": 0.25,
}


def test_every_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, QUIET)
    log.write(1, {"train_loss": 2.0})
    log.write(1, {"eval_loss": float("nan")})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "train_loss": 2.0}, {"step": 1, "eval_loss": None}]
    log.close()


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path, LoggingConfig(1, "off", tensorboard=True, plot=False, peak_tflops=None))
    for step in (1, 2):
        log.write(step, {"train_loss": 3.0 - step})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]


def test_without_a_terminal_lines_tell_loss_rate_speed_padding_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "adaptax"), ProgressDisplay(QUIET, 5, is_shown=True) as display:
        for step in range(1, 6):
            display.update(step, ROW)
    lines = [record.message for record in caplog.records]
    assert [line.split()[1] for line in lines] == ["1/5", "2/5", "4/5", "5/5"]
    assert "loss 1.5000  lr 1.00e-04  1,234 trained tok/s  padding 25%" in lines[1]
    assert lines[-1].endswith("0:00:00 left")


def test_a_line_tells_mfu_where_it_is_known_and_waiting_where_it_is_much() -> None:
    plain = describe_step(ROW)
    assert describe_step(ROW | {"train_mfu": None, "train_input_stall_share": 0.04}) == plain
    assert describe_step(ROW | {"train_mfu": 0.4123, "train_input_stall_share": 0.0}) == f"{plain}  MFU 41.2%"
    both = describe_step(ROW | {"train_mfu": 0.4123, "train_input_stall_share": 0.123})
    assert both == f"{plain}  MFU 41.2%  waiting for input 12%"


def test_other_processes_write_and_say_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    log = MetricsLog(None, QUIET)
    log.write(1, {"train_loss": 2.0})
    log.close()
    with caplog.at_level(logging.INFO, "adaptax"), ProgressDisplay(QUIET, 1, is_shown=False) as display:
        display.update(1, ROW)
    assert not caplog.records
    assert not list(tmp_path.iterdir())


def test_tensorboard_events_are_written_without_loading_torch(tmp_path: Path) -> None:
    """tensorboardX would import it where it is installed, which takes seconds of every start."""
    code = (
        "import sys, adaptax.metrics as m; m.EventLog(m.Path(sys.argv[1]), None).close(); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", f"{code}; import importlib.util; print(importlib.util.find_spec('torch') is None)"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, check=True)
    is_loaded, is_absent = done.stdout.split()
    assert is_loaded == "False"
    assert is_absent == str(importlib.util.find_spec("torch") is None)  # it can be imported again
    assert any(tmp_path.iterdir())
