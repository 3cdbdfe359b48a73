"""A run that is named brings its own configuration; what is given now is laid over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptax.config import Config, UserError, build, key_paths
from adaptax.manifest import name_step
from adaptax.resume import bring_config, find_start, read_config
from adaptax.run_folder import RunFolder
from command_line import Answer
from small_runs import change, end, make_config, write_run


@pytest.fixture
def config() -> Config:
    return make_config(Path("/home/of/nobody"))


def bring(values: dict[str, Any], *given: str) -> Config:
    """The configuration of a start for which these keys and groups were given."""
    return build(bring_config(values, given))


def test_a_run_brings_its_configuration_and_what_is_given_counts(config: Config, tmp_path: Path) -> None:
    saved = change(config, {"model.lora_rank": 16, "optimizer.name": "lion", "data.columns": {"prompt": "q"}})
    saved = change(saved, {"name": "mine", "training.stop_after_steps": 3, "schedule.name": "linear"})
    folder = write_run(tmp_path / "run", saved, 1)
    for resume in (folder.path, folder.checkpoints / name_step(1)):
        now = change(config, {"checkpoint.resume": str(resume), "training.num_epochs": 7, "schedule.name": "cosine"})
        values = dataclasses.asdict(now)
        mine = change(saved, {"checkpoint.resume": str(resume), "training.stop_after_steps": None})
        assert bring(values) == mine
        assert bring(values, "training.num_epochs") == change(mine, {"training.num_epochs": 7})
        assert bring(values, "schedule", "name") == dataclasses.replace(mine, schedule=now.schedule, name=now.name)
        assert bring(values, *(key for key in key_paths() if "." not in key)) == now  # an experiment
        cleared = bring(values, "data.columns", "optimizer.name")
        assert (cleared.data.columns, cleared.optimizer.name, cleared.model.lora_rank) == ({}, "adamw", 16)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_without_a_run_all_that_is_given_counts(config: Config, resume: str) -> None:
    values = dataclasses.asdict(change(config, {"checkpoint.resume": resume}))
    assert bring_config(values, []) == values


def test_a_configuration_of_another_version_is_told_by_its_keys(config: Config, tmp_path: Path) -> None:
    """Keys that are new have the values that are given now; those that are gone are named."""
    folder = write_run(tmp_path / "run", config, 1)
    saved = yaml.safe_load(folder.config.read_text())
    del saved["logging"]["plot"], saved["checkpoint"]
    folder.config.write_text(yaml.safe_dump(saved))
    now = change(config, {"checkpoint.resume": str(folder.path), "checkpoint.keep": 7})
    assert bring(dataclasses.asdict(now)) == now
    saved["model"]["gone"] = 1
    folder.config.write_text(yaml.safe_dump(saved))
    with pytest.raises(UserError, match=r"unknown key model\.gone"):
        bring(dataclasses.asdict(now))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.system ['touch PWNED']", "cannot be read: could not determine a constructor"),
        ("name: !!python/object/new:os.system [touch PWNED]", "cannot be read: could not determine a constructor"),
        ("name: !!python/name:os.system", "cannot be read: could not determine a constructor"),
        ("name: [", "cannot be read: "),
        ("[" * 1000, "cannot be read: "),
        ("- a", "is not a run's configuration"),
        ("", "is not a run's configuration"),
        ("name: \x00", "cannot be read: "),
        ("a: &a [x, x]\nb: &b [*a, *a]\nmodel: *b", "is not a run's configuration"),
        ("model: 5", "is not a run's configuration"),
        ("checkpoint: 5", "is not a run's configuration"),
        ("model: {mesh_shape: 5}", None),
        ("training: {micro_batch_size: many}", None),
    ],
)
def test_a_configuration_that_is_none_is_refused_and_nothing_in_it_runs(
    config: Config, tmp_path: Path, monkeypatch, text: str, words: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run", config)
    folder.config.write_text(text)
    values = dataclasses.asdict(change(config, {"checkpoint.resume": str(folder.path)}))
    begin: list[Callable[[], Any]] = [lambda: bring(values), lambda: find_start(config, folder)]
    begin += [lambda: read_config(folder)] if words else []
    for attempt in begin:
        with pytest.raises(UserError, match=words) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "PWNED").exists()


def test_texts_that_omegaconf_would_resolve_stay_texts(config: Config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    text = "${oc.env:HF_TOKEN}"
    folder = write_run(tmp_path / "run", change(config, {"name": text}), 1)
    values = dataclasses.asdict(change(config, {"checkpoint.resume": str(folder.path)}))
    assert bring(values).name == text


# On the command line


@pytest.fixture
def ended(config: Config, home: Path) -> RunFolder:
    """A run that has ended, in the user's folder."""
    (home / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = make_config(home, {"model.weights": None, "model.model_size": "tiny", "data.eval": None, "name": "mine"})
    folder = write_run(home / "outputs" / "mine", config, 6)
    end(folder, 6)
    return folder


def test_a_run_is_resumed_by_its_folder_alone(ended: RunFolder, run: Callable[..., Answer]) -> None:
    before = {path: path.read_bytes() for path in ended.path.rglob("*") if path.is_file()}
    answer = run("checkpoint.resume=outputs/mine")
    assert (answer.code, answer.imported_jax) == (0, False), answer.err
    assert "outputs/mine is finished: 6 steps, final loss 1.5000" in answer.err
    wrong = run("checkpoint.resume=outputs/mine", "optimizer.learning_rate=1")
    assert (wrong.code, wrong.imported_jax) == (1, False)
    assert "optimizer.learning_rate was 0.05, not 1.0" in wrong.err.splitlines()[-1]
    group = run("checkpoint.resume=outputs/mine", "optimizer=sgd")
    assert 'optimizer.name was "adamw", not "sgd"' in group.err.splitlines()[-1]
    after = {path: path.read_bytes() for path in ended.path.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {
        ended.path / "run.log",
        ended.path / "run.lock",
    }


def test_a_saved_configuration_cannot_read_the_environment(
    ended: RunFolder, run: Callable[..., Answer], monkeypatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    text = ended.config.read_text()
    ended.config.write_text(text.replace("name: mine", "name: ${oc.env:HF_TOKEN}"))
    answer = run("checkpoint.resume=outputs/mine", "training.num_batches=9", "data.max_length=8")
    assert answer.code == 1
    assert "x" * 30 not in answer.err + answer.out
    assert not [path for path in ended.path.rglob("*") if path.is_file() and b"x" * 30 in path.read_bytes()]
