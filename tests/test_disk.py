"""Disks that are full, too small or read-only: runs go on where they can, and say in a line why where they cannot."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import disks
import small_runs
import support
from adaptax.config import LoggingConfig, UserError
from adaptax.manifest import list_checkpoints, read_checkpoint, step_of
from adaptax.metrics import MetricsLog
from adaptax.progress import Progress
from adaptax.run_folder import RunFolder
from command_line import Answer
from small_runs import losses_of, make_config, train

# Where Orbax fails, coroutines are left behind; what they say when they are collected concerns no later test.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"),
    pytest.mark.usefixtures("collected"),
]
EVERY = {"checkpoint.every_steps": 2, "logging.progress": "lines", "logging.every_steps": 1}
FULL = "No space left on device"
NOISE = ("Traceback", "Logging error", "Exception ignored", "Exception in thread", "Event loop", "never awaited")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and rows, on a disk with room."""
    return small_runs.write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB; tests that need one are skipped where none can be mounted."""
    yield from disks.mount_or_skip(tmp_path / "disk", 2048)


def steps_in(run: Path) -> list[int]:
    """The steps of all checkpoints, each of which is whole."""
    return [read_checkpoint(path).step for path in list_checkpoints(run / "checkpoints")]


# Before the first step


def test_too_little_room_is_told_before_a_weight_is_read(home: Path, tmp_path: Path) -> None:
    model = small_runs.write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    changes = {"checkpoint.keep": 10**9, "model.weights": str(model)}
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", make_config(home, changes))
    words = str(caught.value)
    assert "GiB free, and its checkpoints may take" in words
    need, each = (float(words.split(f" {end}")[0].split()[-1]) for end in ("GiB more", "GiB each"))
    assert need == pytest.approx((10**9 + 2) * each, rel=0.01)
    for key in ("checkpoint.keep=1000000000", "model.lora_rank", "hydra.run.dir"):
        assert key in words


def test_what_a_run_holds_already_counts_but_one_more_must_fit(home: Path, disk: Path) -> None:
    train(disk / "run", make_config(home, EVERY | {"training.stop_after_steps": 4}))
    disks.act(disk, "fill:200000")
    with pytest.raises(UserError, match="GiB free, and its checkpoints may take"):
        train(disk / "run", make_config(home, EVERY | {"checkpoint.keep": 1}))
    disks.act(disk, "free")
    (disk / "run" / "notes").write_bytes(bytes(600_000))  # are not checkpoints, and stay
    with pytest.raises(UserError, match="GiB free, and its checkpoints may take"):
        train(disk / "run", make_config(home, EVERY | {"checkpoint.keep": 9}))
    assert steps_in(disk / "run") == [2, 4]


@pytest.mark.parametrize("kind", ["file", "full", "locked"])
def test_a_folder_that_cannot_be_written_to_is_told_in_a_line(
    disk: Path, run: Callable[..., Answer], kind: str
) -> None:
    (disk / "run").mkdir()
    where = disk / "run"
    if kind == "file":
        where = disk / "run" / "file"
        where.write_text("in the way")
    elif kind == "full":
        disks.act(disk, "fill:0")
    else:
        disks.act(disk, "lock:run")
    answer = run("model=gemma3_tiny", "data.train=rows.jsonl", "data.eval_fraction=0", f"hydra.run.dir={where}")
    if kind == "locked":
        disks.act(disk, "unlock:run")
    assert answer.code == 1
    assert not answer.imported_jax or kind == "full"
    lines = [line for line in answer.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert str(where) in lines[0]
    assert not any(noise in answer.err for noise in NOISE), answer.err


# Saves


@pytest.mark.parametrize("left", [0, 8192, 60_000])
def test_a_save_on_a_full_disk_is_told_and_the_next_one_finds_room(disk: Path, caplog, capfd, left: int) -> None:
    folder, state = RunFolder(disk), small_runs.make_state(support.make_mesh())
    saver = small_runs.make_saver(folder, state)
    saver.save(1, state, Progress())
    saver.wait()
    disks.act(disk, f"fill:{left}")
    for step in (2, 3):
        saver.save(step, state, Progress())
        saver.wait()
        path = folder.checkpoints / f"step_0000000{step}"
        assert saver.failure == f"{path} was not written: {FULL}"
    assert [record.getMessage() for record in caplog.records].count(
        f"{saver.failure}; earlier checkpoints are whole"
    ) == 1
    assert steps_in(disk) == [1]
    disks.act(disk, "free")
    saver.save(4, state, Progress())
    saver.close()
    assert (saver.failure, steps_in(disk)) == (None, [1, 4])
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step_00000001", "step_00000004"]
    assert not any(noise in "".join(capfd.readouterr()) for noise in NOISE)


def test_a_disk_that_fills_up_while_a_save_is_written_leaves_the_others_whole(disk: Path) -> None:
    """It has room when the save begins."""
    folder, state = RunFolder(disk), small_runs.make_state(support.make_mesh())
    saver = small_runs.make_saver(folder, state)
    saver.save(1, state, Progress())
    saver.wait()
    saver.save(2, state, Progress())
    disks.act(disk, "fill:0")
    saver.wait()
    steps = steps_in(disk)
    assert steps == ([1, 2] if saver.failure is None or "adapters" in saver.failure else [1])
    disks.act(disk, "free")
    saver.save(3, state, Progress())
    saver.close()
    assert (saver.failure, steps_in(disk)) == (None, [*steps, 3])


def test_nothing_waits_for_a_folder_that_could_not_be_made(disk: Path, caplog, capfd) -> None:
    """Orbax's threads would wait for it for minutes, and keep the process from ending."""
    folder, state = RunFolder(disk), small_runs.make_state(support.make_mesh())
    saver = small_runs.make_saver(folder, state)
    saver.save(1, state, Progress())
    saver.wait()
    before = set(threading.enumerate())
    disks.act(disk, "lock:checkpoints")
    saver.save(2, state, Progress())
    saver.wait()
    disks.act(disk, "unlock:checkpoints")
    assert saver.failure == f"{folder.checkpoints / 'step_00000002'} was not written: Read-only file system"
    saver.close()
    assert set(threading.enumerate()) <= before
    assert steps_in(disk) == [1]
    assert not any(noise in "".join(capfd.readouterr()) for noise in NOISE)


# What is written down


def test_rows_and_events_wait_for_room(disk: Path, caplog) -> None:
    """TensorBoard's own writer would end in a thread, and the training wait for it for ever."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(disk, LoggingConfig(1, "off", tensorboard=True, plot=False, peak_tflops=None))
    for step in range(1, 401):
        if step == 100:
            disks.act(disk, "fill:0")
        if step == 300:
            whole = (disk / "metrics.jsonl").read_text()
            assert whole.endswith("}\n")
            assert 99 <= len(whole.splitlines()) < 299
            disks.act(disk, "free")
        log.write(step, {"train_loss": 1 / step})
    log.close()
    rows = small_runs.read_metrics(disk)
    assert [row["step"] for row in rows] == list(range(1, 401))
    events = accumulator.EventAccumulator(str(disk / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 401))
    told = [record.getMessage() for record in caplog.records if record.name.startswith("adaptax")]
    assert [FULL in line for line in told] == [True, True]
    assert ["metrics.jsonl" in line for line in told].count(True) == 1


def test_events_of_a_future_that_was_taken_back_are_not_shown(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = LoggingConfig(1, "off", tensorboard=True, plot=False, peak_tflops=None)
    for first, last, earlier in ((1, 5, []), (3, 6, [{"step": 1, "train_loss": 0.0}, {"step": 2, "train_loss": 0.0}])):
        log = MetricsLog(tmp_path, config, earlier)
        for step in range(first, last):
            log.write(step, {"train_loss": float(first), "eval_loss": float("nan")})
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1),
        (2, 1),
        (3, 3),
        (4, 3),
        (5, 3),
    ]
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [row["step"] for row in small_runs.read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


# Whole runs


@pytest.fixture(scope="module")
def straight(home: Path) -> list[Any]:
    """The losses of a run with room."""
    return losses_of(train(home / "straight", make_config(home, EVERY)))


@pytest.mark.parametrize(
    ("begin", "end", "reason"),
    [("fill:0", "free", FULL), ("lock:run/checkpoints", "unlock:run/checkpoints", "Read-only file system")],
    ids=["full", "read_only"],
)
def test_a_run_goes_on_and_saves_again_when_it_can(
    home: Path, disk: Path, straight: list[Any], caplog, begin: str, end: str, reason: str
) -> None:
    rules = {"step 3/6": ["wait:run/checkpoints/step_00000002", begin], "step 5/6": [end]}
    with caplog.at_level(logging.INFO, "adaptax"), disks.when_said(disk, rules):
        rows = train(disk / "run", make_config(home, EVERY))
    assert losses_of(rows) == straight
    failed = [line for line in caplog.messages if line.endswith("earlier checkpoints are whole")]
    path = disk / "run" / "checkpoints" / "step_00000004"
    assert failed == [f"{path} was not written: {reason}; earlier checkpoints are whole"]
    assert steps_in(disk / "run") == [2, 6]
    assert (disk / "run" / "adapter").is_dir()


def test_a_run_that_cannot_save_its_end_says_so_and_can_be_resumed(
    home: Path, disk: Path, straight: list[Any], caplog
) -> None:
    rules = {"evaluation loss after 6": ["wait:run/checkpoints/step_00000004", "fill:0"]}
    with caplog.at_level(logging.INFO, "adaptax"), disks.when_said(disk, rules), pytest.raises(UserError) as caught:
        train(disk / "run", make_config(home, EVERY))
    assert str(caught.value) == f"{disk / 'run' / 'checkpoints' / 'step_00000006'} was not written: {FULL}"
    assert steps_in(disk / "run") == [2, 4]
    assert not (disk / "run" / "summary.json").exists()
    disks.act(disk, "free")
    assert losses_of(train(disk / "run", make_config(home, EVERY))) == straight


def start(home: Path, disk: Path, rules: disks.Rules, **changes: Any) -> subprocess.CompletedProcess[str]:
    """A run as a process."""
    values = EVERY | {"training.num_batches": 60, "checkpoint.every_steps": 20, "hydra.run.dir": str(disk / "run")}
    values |= {"logging.tensorboard": True, "logging.plot": True}
    overrides = small_runs.as_overrides(values | changes)
    command = [sys.executable, disks.__file__, str(disk), json.dumps(rules), *overrides]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_process_on_a_full_disk_ends_with_one_line_and_no_traceback(home: Path, disk: Path) -> None:
    done = start(home, disk, {"step 23/60": ["wait:run/checkpoints/step_00000020", "fill:0"]})
    assert done.returncode == 1
    assert not any(noise in done.stderr for noise in NOISE), done.stderr
    for step, count in ((40, 1), (60, 2)):  # the last one is also why it ends
        assert done.stderr.count(f"step_000000{step} was not written: {FULL}") == count
    *_, last = done.stderr.splitlines()
    assert last == f"error: {disk}/run/checkpoints/step_00000060 was not written: {FULL}"
    assert steps_in(disk / "run") == [20]
    full = start(home, disk, {})
    assert full.returncode == 1
    assert [FULL in line or "GiB free" in line for line in full.stderr.splitlines() if line.startswith("error")] == [
        True
    ]
    assert not any(noise in full.stderr for noise in NOISE), full.stderr
    disks.act(disk, "free")
    again = start(home, disk, {})
    assert again.returncode == 0, again.stderr
    steps = [row["step"] for row in small_runs.read_metrics(disk / "run") if "train_loss" in row]
    assert steps == list(range(1, 61))
    log = (disk / "run" / "run.log").read_text()
    assert "step 60/60" in log


@pytest.mark.slow
def test_a_disk_that_fills_up_while_a_process_saves_is_told_in_a_line_too(home: Path, disk: Path) -> None:
    done = start(home, disk, {"checkpoint of step 60": ["fill:0"]}, **{"checkpoint.every_steps": None})
    assert done.returncode == 1
    assert not any(noise in done.stderr for noise in NOISE), done.stderr
    assert FULL in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_full_disk_behind_the_last_save_is_told_in_a_line(home: Path, disk: Path) -> None:
    rules = {"checkpoint of step 60": ["wait:run/adapters/best", "fill:0"]}
    done = start(home, disk, rules, **{"checkpoint.every_steps": None})
    assert done.returncode == 1
    assert not any(noise in done.stderr for noise in NOISE), done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert f"cannot be written: {FULL}; make room, then start again" in last
    disks.act(disk, "free")
    again = start(home, disk, {})
    assert again.returncode == 0, again.stderr
    assert [step_of(path) for path in list_checkpoints(disk / "run" / "checkpoints")] == [60]
    assert (disk / "run" / "adapter").is_dir()
