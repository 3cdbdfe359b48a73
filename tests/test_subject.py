"""Adapters that are looked up, opened and held against the base."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import small_runs
import support
from adaptax.config import Config, UserError
from adaptax.data.tokenizer import Tokenizer
from adaptax.subject import Subject, check_new_file, find_adapter, open_subject


def open_with(home: Path, *places: Path | None, **changes: Any) -> Subject:
    return open_subject(configure(home, **changes), support.make_mesh(), places)


def configure(home: Path, **changes: Any) -> Config:
    """As a command has it: nothing of its training counts."""
    names = {"rank": "model.lora_rank", "pattern": "model.lora_module_path"}
    return small_runs.make_config(home, {names.get(name, name): value for name, value in changes.items()})


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The trained run, to be changed."""
    return Path(shutil.copytree(trained / "out", tmp_path / "out"))


# Where adapters lie


def test_adapters_of_a_run_by_name(trained: Path) -> None:
    run = trained / "out"
    assert find_adapter(run, None) == run / "adapter"
    assert find_adapter(run, "best") == run / "adapters" / "best"
    assert find_adapter(run, "last") == run / "adapters" / "last"
    assert find_adapter(run, "none") is None
    assert find_adapter(None, None) is None
    assert find_adapter(None, str(run / "adapter")) == run / "adapter"
    step = run / "checkpoints" / "step_00000003"
    assert find_adapter(run, str(step)) == step


def test_a_run_that_has_not_ended_has_its_best_or_else_its_last_adapter(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    shutil.rmtree(copied / "adapter")
    assert find_adapter(copied, None) == copied / "adapters" / "best"
    shutil.rmtree(copied / "adapters" / "best")
    assert find_adapter(copied, None) == copied / "adapters" / "last"
    assert caplog.messages[0] == f"{copied} has not ended: {copied / 'adapters' / 'best'} is taken"
    shutil.rmtree(copied / "adapters")
    with pytest.raises(UserError, match="holds no adapter: the run has saved nothing yet; adapter=none takes the base"):
        find_adapter(copied, None)
    with pytest.raises(UserError, match="the run has saved no checkpoint"):
        find_adapter(copied, "best")


def test_adapters_that_are_not_there(trained: Path) -> None:
    run = trained / "out"
    with pytest.raises(UserError, match="adapter=best is one of a run's: set run=DIR"):
        find_adapter(None, "best")
    with pytest.raises(UserError, match="adapter=bets: no such folder. An adapter is a folder, best or last"):
        find_adapter(run, "bets")
    with pytest.raises(UserError, match="it is a file; name its folder"):
        find_adapter(run, str(run / "adapter" / "adapter_config.json"))
    with pytest.raises(UserError, match="no such checkpoint; there are step_00000003, step_00000006"):
        find_adapter(run, str(run / "checkpoints" / "step_00000009"))


# What they hold


def test_the_adapter_of_a_run_is_that_of_its_last_checkpoint(trained: Path) -> None:
    """Its rank, scale and modules are its own, whatever the configuration says."""
    run = trained / "out"
    places = [run / "adapter", run / "checkpoints" / "step_00000006", None, run / "checkpoints" / "step_00000003"]
    subject = open_with(trained, *places, rank=2, pattern=".*")
    ended, last, base, earlier = subject.adapters
    assert [adapter.name for adapter in subject.adapters] == [str(place) if place else "base" for place in places]
    assert ended.arrays.keys() == last.arrays.keys()
    for path, array in ended.arrays.items():
        np.testing.assert_array_equal(array, last.arrays[path])
        assert not np.array_equal(array, earlier.arrays[path])
    assert (ended.job.spec.rank, ended.job.spec.layers.keys()) == (4, {"attn/q_einsum", "mlp/down_proj"})
    assert dataclasses.asdict(ended.job.spec) == dataclasses.asdict(last.job.spec)
    assert (base.arrays, base.place(), base.program.spec) == ({}, {}, None)
    assert ended.program.spec == ended.job.spec
    assert ended.place().keys() == ended.arrays.keys()
    assert isinstance(subject.tokenizer, Tokenizer)


def test_a_checkpoint_needs_neither_the_weights_nor_the_rows_where_they_were(trained: Path, copied: Path) -> None:
    """It is read by its own configuration, which a run that has moved may contradict."""
    moved = copied.parent / "elsewhere"
    shutil.copytree(trained / "model", moved / "model")
    subject = open_with(moved, copied / "checkpoints" / "step_00000006")
    assert subject.adapters[0].job.spec.rank == 4
    assert subject.adapters[0].job.source == str(moved / "model")


@pytest.mark.parametrize("name", ["adapter", "checkpoints/step_00000006"])
def test_adapters_of_another_model_are_refused(trained: Path, name: str) -> None:
    tiny = {"model.weights": None, "model.model_size": "tiny"}
    with pytest.raises(UserError, match="model= must be the (model|one) that (the adapter|it) was trained on"):
        open_with(trained, trained / "out" / name, **tiny)


def test_a_damaged_checkpoint_is_refused(trained: Path, copied: Path) -> None:
    step = copied / "checkpoints" / "step_00000006"
    with (step / "manifest.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="step_00000006 cannot be used: manifest.json is not what was written"):
        open_with(trained, step)


# The base


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({}, "float32"), ({"model.dtype": "bfloat16"}, "bfloat16"), ({"model.quantization": "int8"}, "int8")],
)
def test_the_base_is_read_as_the_configuration_says(trained: Path, changes: dict[str, Any], dtype: str) -> None:
    base = open_with(trained, None, **changes).load_base()
    assert dtype in {str(leaf.dtype) for array in base.values() for leaf in jax.tree.leaves(array)}


def test_what_does_not_fit_is_refused(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    subject = open_with(trained, None)
    subject.check_room(4, 512)
    [message] = [message for message in caplog.messages if "keys and values" in message]
    # One layer of one key/value head of 8 numbers, and of float32.
    cache = 2 * 4 * 512 * subject.job.arch.num_kv_heads * 8 * 4
    assert message.endswith(f"keys and values of 4 x 512 tokens {cache / 2**20:.1f} MiB on each device")
    config = replace(subject.job.config, training=replace(subject.job.config.training, memory_gib=1e-4))
    small = replace(subject, job=replace(subject.job, config=config))
    with pytest.raises(UserError, match=r"which has 0\.1 MiB: lower generation\.batch_size"):
        small.check_room(4, 512)


# New files


def test_files_that_can_be_written_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_new_file("a.jsonl") == Path("a.jsonl")
    assert check_new_file("~/a.jsonl") == tmp_path / "a.jsonl"
    (tmp_path / "old.jsonl").touch()
    (tmp_path / "cut.jsonl.partial").touch()
    (tmp_path / "link.jsonl").symlink_to("gone")
    for name, problem in (
        ("old.jsonl", "out=old.jsonl is there already"),
        ("link.jsonl", "out=link.jsonl is there already"),
        (".", "out=. is there already"),
        ("cut.jsonl", "cut.jsonl.partial is what an earlier try has left"),
        ("gone/a.jsonl", "out=gone/a.jsonl: the folder gone is not there"),
    ):
        with pytest.raises(UserError, match=re.escape(problem)):
            check_new_file(name)
    with pytest.raises(UserError, match="plot=old.jsonl is there already"):
        check_new_file("old.jsonl", "plot")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to"):
        check_new_file(str(tmp_path / "a.jsonl"))
