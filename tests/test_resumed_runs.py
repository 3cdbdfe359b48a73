"""Whole runs that are stopped and resumed: the same as those that were not, or refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import small_runs
from adaptax.config import UserError
from adaptax.manifest import list_checkpoints, name_step, read_checkpoint, seal, step_of
from small_runs import adapter_of, losses_of, make_config, train

STOP = "training.stop_after_steps"
EVERY = {"checkpoint.every_steps": 2, "training.eval_every_steps": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and rows that no test changes."""
    return small_runs.write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def stopped(home: Path) -> Path:
    """A run of 6 steps that was stopped after the fourth, with checkpoints of 2, 3 and 4."""
    train(home / "stopped", make_config(home, EVERY | {STOP: 4}))
    return home / "stopped"


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    """The same run, not stopped."""
    train(home / "straight", make_config(home, EVERY))
    return home / "straight"


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run, to go on with."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def hash_tree(path: Path) -> dict[str, str]:
    """Every file below a folder."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def steps_in(run: Path) -> list[int | None]:
    """The steps of all checkpoints."""
    return [step_of(path) for path in list_checkpoints(run / "checkpoints")]


def assert_same_run(one: Path, other: Path) -> None:
    """The same losses at every step, the same adapter, the same end."""
    a, b = (losses_of(small_runs.read_metrics(path)) for path in (one, other))
    assert a == b
    first, second = adapter_of(one), adapter_of(other)
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert small_runs.read_summary(one) == small_runs.read_summary(other) != {}


# Stopped and resumed

MIXTURE = [{"path": "rows.jsonl", "weight": 2}, {"path": "eval.jsonl", "weight": 1}]
KINDS: dict[str, dict[str, Any]] = {
    "mixture_packed_with_dropout": {
        "data.train": None,
        "data.mixture": MIXTURE,
        "data.packing": True,
        "model.lora_dropout": 0.3,
        "training.gradient_accumulation_steps": 2,
        "training.micro_batch_size": 1,
        "optimizer.name": "lion",
        "schedule.name": "cosine",
        "schedule.warmup_steps": 2,
    },
    "length_buckets_and_early_stopping": {
        "data.length_buckets": 2,
        "training.num_batches": None,
        "training.num_epochs": 4,
        "training.eval_every_steps": 1,
        "training.early_stopping_patience": 3,
        "training.early_stopping_min_delta": 0.6,
    },
    "streaming_with_adafactor": {
        "data.streaming": True,
        "data.packing": True,
        "optimizer.name": "adafactor",
        "optimizer.momentum": 0.9,
    },
}


@pytest.mark.parametrize("kind", [next(iter(KINDS)), *(pytest.param(k, marks=pytest.mark.slow) for k in [*KINDS][1:])])
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(
    home: Path, tmp_path: Path, monkeypatch, kind: str
) -> None:
    monkeypatch.chdir(home)
    changes = EVERY | KINDS[kind]
    train(tmp_path / "straight", make_config(home, changes))
    for stop in (1, 3):
        train(tmp_path / "resumed", make_config(home, changes | {STOP: stop}))
        assert not (tmp_path / "resumed" / "summary.json").exists()
    train(tmp_path / "resumed", make_config(home, changes))
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    if "early" in kind:
        summary = json.loads((tmp_path / "straight" / "summary.json").read_text())
        assert 4 < summary["step"] < 24


def test_what_a_resumed_run_leaves_is_what_the_other_one_leaves(straight: Path, copy: Path, home: Path) -> None:
    train(copy, make_config(home, EVERY))
    assert_same_run(straight, copy)
    assert steps_in(copy) == steps_in(straight)
    names = [{file.name for file in run.iterdir()} for run in (copy, straight)]
    assert names[0] == names[1]
    for kind in ("last", "best"):
        a, b = (load_file(run / "adapters" / kind / "adapter_model.safetensors") for run in (straight, copy))
        assert all(np.array_equal(a[name], b[name]) for name in a)
    before = hash_tree(copy)
    train(copy, make_config(home, EVERY))  # it is finished
    assert hash_tree(copy) == before


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_and_comes_back(home: Path, tmp_path: Path) -> None:
    """Sums are taken in another order there, so the last bits differ."""
    wide = EVERY | {"model.mesh_shape": [[2, 4], ["fsdp", "tp"]]}
    whole = losses_of(train(tmp_path / "straight", make_config(home, EVERY)))
    for changes in (EVERY | {STOP: 2}, wide | {STOP: 2}, EVERY):
        rows = train(tmp_path / "moved", make_config(home, changes))
    assert [row[:2] for row in losses_of(rows)] == [row[:2] for row in whole]
    values, expected = ([value for _, name, value in part if "loss" in name] for part in (losses_of(rows), whole))
    np.testing.assert_allclose(values, expected, atol=1e-5, rtol=0)
    assert [row for row in losses_of(rows) if row[0] <= 2] == [row for row in whole if row[0] <= 2]


# What may have moved, and what may not have changed


def test_files_may_have_moved(straight: Path, copy: Path, home: Path, tmp_path: Path, caplog) -> None:
    moved = Path(shutil.copytree(home, tmp_path / "moved", ignore=shutil.ignore_patterns("stopped", "straight")))
    (moved / "rows.jsonl").rename(moved / "train.jsonl")
    with caplog.at_level(logging.INFO, "adaptax"):
        train(copy, make_config(moved, EVERY | {"data.train": str(moved / "train.jsonl")}))
    assert_same_run(straight, copy)
    assert "data.train" in caplog.text
    assert read_checkpoint(copy / "checkpoints" / name_step(6)).config["model"]["weights"] == str(moved / "model")


def change_one_word(path: Path) -> None:
    """Of the first row."""
    text = path.read_text()
    assert "light" in text or "fan" in text
    word = "light" if "light" in text else "fan"
    path.write_text(text.replace(word, "door", 1))


def change_one_weight(model: Path) -> None:
    """By the smallest amount."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nextafter(tensors["model.norm.weight"][3], np.float32(9))
    save_file(tensors, model / "model.safetensors")


def change_tokenizer(path: Path) -> None:
    """By a field that nobody reads: the tokens stay the same."""
    path.write_bytes(path.read_bytes() + bytes([0xC0, 0x0C, 0x01]))


CHANGES = {
    "training rows": lambda home: change_one_word(home / "rows.jsonl"),
    "evaluation rows": lambda home: change_one_word(home / "eval.jsonl"),
    "base weights": lambda home: change_one_weight(home / "model"),
    "tokenizer": lambda home: change_tokenizer(home / "model" / "tokenizer.model"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_content_is_refused_by_name(copy: Path, home: Path, tmp_path: Path, what: str) -> None:
    other = Path(shutil.copytree(home, tmp_path / "other", ignore=shutil.ignore_patterns("stopped", "straight")))
    CHANGES[what](other)
    (copy / "summary.json").write_text('{"step": 4}')
    before = hash_tree(copy)
    with pytest.raises(UserError) as caught:
        train(copy, make_config(other, EVERY | {"training.num_epochs": 2}))
    assert f"cannot go on: its {what} are not those that it began with" in str(caught.value)
    assert "hydra.run.dir" in str(caught.value)
    assert hash_tree(copy) == before  # what is refused leaves no trace


def test_fewer_rows_and_rows_in_another_order_are_other_rows(copy: Path, home: Path, tmp_path: Path) -> None:
    lines = (home / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, kept in (("fewer", lines[:-1]), ("reversed", lines[::-1]), ("more", [*lines, lines[0]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(kept))
        with pytest.raises(UserError, match="its training rows are not those"):
            train(copy, make_config(home, EVERY | {"data.train": str(tmp_path / f"{name}.jsonl")}))


def test_another_compute_type_is_refused(copy: Path, home: Path) -> None:
    for dtype in ("bfloat16", "auto"):  # auto is float32 here: the same, but not on a GPU
        with pytest.raises(UserError, match="model.dtype was"):
            train(copy, make_config(home, EVERY | {"model.dtype": dtype}))


# How long it is


def test_a_run_that_has_ended_goes_on_if_more_is_asked_for(straight: Path, home: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    first = losses_of(small_runs.read_metrics(run))
    rows = losses_of(train(run, make_config(home, EVERY | {"training.num_epochs": 2})))
    assert rows[: len(first)] == first
    assert rows[-1][0] == 12
    assert json.loads((run / "summary.json").read_text())["step"] == 12


def test_a_run_of_fewer_steps_than_are_done_is_refused(copy: Path, home: Path) -> None:
    with pytest.raises(UserError, match=r"step_00000004 is 4 steps in; this configuration has only 3"):
        train(copy, make_config(home, EVERY | {"training.num_batches": 3}))
    rows = train(copy, make_config(home, EVERY | {"training.num_batches": 4}))
    assert (rows[-1]["step"], (copy / "adapter").is_dir()) == (4, True)


# Another folder, another step


def test_another_folder_begins_where_the_run_was_and_leaves_it_alone(
    stopped: Path, straight: Path, home: Path, tmp_path: Path
) -> None:
    before = hash_tree(stopped)
    train(tmp_path / "fork", make_config(home, EVERY | {"checkpoint.resume": str(stopped)}))
    assert hash_tree(stopped) == before
    a, b = (losses_of(small_runs.read_metrics(path)) for path in (straight, tmp_path / "fork"))
    assert a == b
    assert all(
        np.array_equal(adapter_of(straight)[name], array) for name, array in adapter_of(tmp_path / "fork").items()
    )
    assert steps_in(tmp_path / "fork") == [6]


@pytest.mark.slow
def test_another_learning_rate_counts_from_the_step_on(
    stopped: Path, straight: Path, home: Path, tmp_path: Path
) -> None:
    changes = {"checkpoint.resume": str(stopped / "checkpoints" / name_step(2)), "optimizer.learning_rate": 0.01}
    rows = losses_of(train(tmp_path / "fork", make_config(home, EVERY | changes)))
    whole = losses_of(small_runs.read_metrics(straight))
    assert [row for row in rows if row[0] <= 2] == [row for row in whole if row[0] <= 2]
    rates = [{step: value for step, name, value in part if name.endswith("rate")} for part in (rows, whole)]
    assert rates[0][3] == pytest.approx(rates[1][3] / 5)
    assert [step for step, name, _ in rows if name == "train_loss"] == [1, 2, 3, 4, 5, 6]


def test_a_run_can_be_taken_back(straight: Path, copy: Path, home: Path) -> None:
    step = copy / "checkpoints" / name_step(2)
    train(copy, make_config(home, EVERY | {"checkpoint.resume": str(step), STOP: 1, "checkpoint.keep": 9}))
    assert steps_in(copy) == [2, 3]  # 4 is of a future that was taken back
    assert small_runs.read_metrics(copy)[-1]["step"] == 3
    train(copy, make_config(home, EVERY))
    assert_same_run(straight, copy)


# Damage


def test_damaged_arrays_are_passed_over(straight: Path, copy: Path, home: Path, caplog) -> None:
    """All files of the newest one are as they were sealed; it is the arrays that are not what was saved."""
    newest = copy / "checkpoints" / name_step(4)
    manifest = read_checkpoint(newest)
    name = min(name for name in manifest.digests if "w_lora_a" in name)
    seal(newest, dataclasses.replace(manifest, digests=manifest.digests | {name: "00000000"}))
    train(copy, make_config(home, EVERY))
    assert f"{newest} is damaged: the array {name} is not what was saved" in caplog.text
    assert_same_run(straight, copy)
    assert read_checkpoint(newest).step == 4
    assert read_checkpoint(newest).digests[name] != "00000000"


def test_where_no_arrays_are_good_nothing_begins(copy: Path, home: Path) -> None:
    for path in list_checkpoints(copy / "checkpoints"):
        manifest = read_checkpoint(path)
        seal(path, dataclasses.replace(manifest, digests=dict.fromkeys(manifest.digests, "00000000")))
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        train(copy, make_config(home, EVERY))
    named = {"checkpoint.resume": str(path)}
    with pytest.raises(UserError, match="step_00000004 is damaged: the array"):
        train(copy, make_config(home, EVERY | named))


def test_metrics_that_were_cut_short_or_are_gone_are_made_good(straight: Path, copy: Path, home: Path) -> None:
    """What a kill leaves behind the last checkpoint, and lines of a later future, are dropped."""
    lines = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(lines + '{"step": 5, "train_loss": 99.0}\n{"step": 6, "tra')
    train(copy, make_config(home, EVERY | {STOP: 1}))
    (copy / "tensorboard").mkdir()
    (copy / "adapters" / "last.partial").mkdir()
    shutil.rmtree(copy / "adapters" / "best")
    train(copy, make_config(home, EVERY))
    assert_same_run(straight, copy)
    (copy / "metrics.jsonl").unlink()
    (copy / "summary.json").unlink()
    assert train(copy, make_config(home, EVERY)) == []
    assert small_runs.read_summary(copy) == small_runs.read_summary(straight)
