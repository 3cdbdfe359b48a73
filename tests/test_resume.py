"""Where a run begins: at its start, at a checkpoint that goes with its configuration, or nowhere."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from adaptax.config import Config, UserError, key_paths
from adaptax.manifest import name_step
from adaptax.resume import Start, check_identity, find_start, join_start, share_start
from adaptax.run_folder import RunFolder
from small_runs import change, end, make_config, value_of, write_run

HOME = Path("/home/of/nobody")
# What may change, told here once more: a key that nobody thought of is refused.
FREE = {"name", "data.cache", "data.cache_dir", "data.cache_gib", "data.prefetch_batches"}
FREE |= {"training.early_stopping_min_delta", "training.early_stopping_patience", "training.eval_every_steps"}
FREE |= {"training.exact_match_rows", "training.max_nonfinite", "training.num_batches", "training.num_epochs"}
FREE |= {"training.stop_after_steps", "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep"}
FREE |= {"checkpoint.resume", "checkpoint.grace_seconds", "logging.every_steps", "logging.progress"}
FREE |= {"logging.tensorboard", "logging.plot", "logging.peak_tflops", "model.attention", "training.remat"}
FREE |= {"training.memory_gib", "training.compile_cache_gib", "training.profile"}
FREE |= {"training.global_batch_size"}
FREE |= {key for key in key_paths() if key.startswith(("generation.", "evaluation."))}
BY_CONTENT = {"data.train", "data.eval", "model.weights", "model.tokenizer", "model.init_adapter"}
LAYOUT = {"model.mesh_shape", "training.micro_batch_size", "training.gradient_accumulation_steps"}
FORK = {"optimizer.learning_rate", "optimizer.max_grad_norm", "optimizer.weight_decay"}
FORK |= {"schedule.final_fraction", "schedule.name", "schedule.warmup_steps"}
LEAVES = [key for key in key_paths() if not any(other.startswith(key + ".") for other in key_paths())]


def other_value(value: Any) -> Any:
    """Of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return {type(None): 3, str: "changed", dict: {"a": "b"}, list: ["changed"]}[type(value)]


@pytest.fixture
def config() -> Config:
    return make_config(HOME)


@pytest.fixture
def folder(tmp_path: Path, config: Config) -> RunFolder:
    """A run of 6 steps that was stopped after 4, with checkpoints of 2 and 4."""
    return write_run(tmp_path / "run", config, 2, 4)


def refused(config: Config, folder: RunFolder) -> str:
    """Why it does not begin; nothing in the folder has changed."""
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        find_start(config, folder)
    assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    return str(caught.value)


def steps_of(start: Start) -> list[int]:
    """Of the checkpoints to begin from."""
    return [manifest.step for _, manifest in start.checkpoints]


def damage(folder: RunFolder, *steps: int) -> None:
    """A bit of each of these checkpoints."""
    for step in steps:
        file = folder.checkpoints / name_step(step) / "arrays" / "data"
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]))


# What may change


@pytest.mark.parametrize("key", LEAVES)
def test_every_key_is_free_or_compared_or_refused_with_both_values(
    key: str, config: Config, folder: RunFolder, caplog
) -> None:
    value = other_value(value_of(config, key))
    if key == "model.mesh_shape":
        value = [[2, 1], ["fsdp", "tp"]]
    elif key == "checkpoint.resume":
        value = str(folder.path)
    changed = change(config, {key: value})
    with caplog.at_level(logging.INFO, "adaptax"):
        if key in FREE | BY_CONTENT or key == "model.mesh_shape":
            found = find_start(changed, folder)
            assert steps_of(found) == [4, 2]
            assert value_of(found.config, key) == value
            is_told = key not in ("checkpoint.resume", "training.stop_after_steps")
            assert (f"{key} {json.dumps(value_of(config, key))} -> {json.dumps(value)}" in caplog.text) == is_told
            return
        told = refused(changed, folder)
    if key in LAYOUT:
        assert "a global batch of 4 sequences, this configuration one of" in told
        assert "training.micro_batch_size x fsdp x training.gradient_accumulation_steps" in told
        return
    assert f"{key} was {json.dumps(value_of(config, key))}, not {json.dumps(value)}" in told
    assert ("another folder may begin from its checkpoints/step_N" in told) == (key in FORK)


@pytest.mark.parametrize("key", sorted(FORK | {"model.lora_rank", "training.seed", "optimizer.beta1"}))
def test_another_folder_may_begin_with_another_learning_rate_but_not_with_another_model(
    key: str, config: Config, folder: RunFolder, tmp_path: Path
) -> None:
    changed = change(config, {key: other_value(value_of(config, key)), "checkpoint.resume": str(folder.path)})
    new = RunFolder(tmp_path / "new")
    if key in FORK:
        found = find_start(changed, new)
        assert (found.is_fork, steps_of(found)) == (True, [4, 2])
        assert value_of(found.config, key) == value_of(changed, key)
    else:
        assert f"{key} was" in refused(changed, new)


def test_the_order_of_patterns_may_not_change(tmp_path: Path, config: Config) -> None:
    patterns = {".*q_einsum": 4, ".*": 8}
    begun = change(config, {"model.lora_rank_pattern": patterns})
    folder = write_run(tmp_path / "ordered", begun, 2)
    assert steps_of(find_start(begun, folder)) == [2]
    told = refused(change(config, {"model.lora_rank_pattern": dict(reversed(patterns.items()))}), folder)
    assert 'model.lora_rank_pattern was {".*q_einsum": 4, ".*": 8}, not {".*": 8, ".*q_einsum": 4}' in told


def test_all_that_may_not_change_is_named_at_once(config: Config, folder: RunFolder) -> None:
    told = refused(change(config, {"model.lora_rank": 8, "optimizer.name": "sgd", "logging.plot": True}), folder)
    assert 'model.lora_rank was 4, not 8; optimizer.name was "adamw", not "sgd"' in told
    assert "plot" not in told


@pytest.mark.parametrize(
    ("mesh", "micro", "accumulation"),
    [([4, 1], 1, 1), ([2, 1], 2, 1), ([1, 4], 4, 1), ([2, 4], 1, 2), ([1, 1], 2, 2), ([1, 1], 1, 4)],
)
def test_the_same_global_batch_may_be_laid_out_otherwise(
    config: Config, folder: RunFolder, mesh: list[int], micro: int, accumulation: int
) -> None:
    layout = {"model.mesh_shape": [mesh, ["fsdp", "tp"]], "training.micro_batch_size": micro}
    changed = change(config, layout | {"training.gradient_accumulation_steps": accumulation})
    assert find_start(changed, folder).config == changed


@pytest.mark.parametrize(
    ("before", "mesh", "after"),
    [((4, 1), [2, 4], (2, 1)), ((4, 3), [4, 1], (1, 3)), ((1, 4), [2, 1], (1, 2)), ((2, 3), [6, 1], (1, 1))],
)
def test_another_mesh_alone_keeps_the_global_batch(
    config: Config, tmp_path: Path, caplog, before: tuple[int, int], mesh: list[int], after: tuple[int, int]
) -> None:
    names = ("training.micro_batch_size", "training.gradient_accumulation_steps")
    config = change(config, dict(zip(names, before, strict=True)))
    folder = write_run(tmp_path / "run", config, 1)
    found = find_start(change(config, {"model.mesh_shape": [mesh, ["fsdp", "tp"]]}), folder).config
    assert tuple(value_of(found, name) for name in names) == after
    assert f"keep the global batch of {before[0] * before[1]} on fsdp={mesh[0]}" in caplog.text


def test_a_mesh_that_does_not_divide_the_global_batch_is_refused(config: Config, folder: RunFolder) -> None:
    told = refused(change(config, {"model.mesh_shape": [[8, 1], ["fsdp", "tp"]]}), folder)
    assert "a global batch of 4 sequences, which fsdp=8 does not divide" in told
    assert "model.mesh_shape" in told


def test_axes_named_in_the_other_order_are_the_same_mesh(config: Config, folder: RunFolder) -> None:
    swapped = change(config, {"model.mesh_shape": [[4, 1], ["tp", "fsdp"]]})
    assert find_start(swapped, folder).config == swapped


def test_streamed_rows_must_keep_their_name_but_weights_may_move(config: Config, tmp_path: Path) -> None:
    config = change(config, {"data.streaming": True, "data.packing": True})
    folder = write_run(tmp_path / "run", config, 1)
    assert "data.train was" in refused(change(config, {"data.train": "elsewhere.jsonl"}), folder)
    for key in BY_CONTENT - {"data.train"}:
        moved = change(config, {key: "elsewhere"})
        assert find_start(moved, folder).config == moved


def test_a_longer_run_tells_that_its_schedule_spans_it(
    config: Config, folder: RunFolder, tmp_path: Path, caplog
) -> None:
    find_start(change(config, {"training.num_epochs": 3}), folder)
    assert "schedule" not in caplog.text  # it is constant
    cosine = change(config, {"schedule.name": "cosine"})
    longer = change(cosine, {"training.num_epochs": 3})
    assert find_start(longer, write_run(tmp_path / "cosine", cosine, 1)).config == longer
    assert "the learning-rate schedule (cosine) now spans the new number of steps" in caplog.text


def test_what_is_read_is_compared_by_content(caplog) -> None:
    inputs = {"dtype": "float32", "base": "a", "tokenizer": "b", "data": "c", "eval": "d"}
    saved = inputs | {"versions": {"jax": "0.1", "flax": "0.2"}, "mesh": {"fsdp": 1}}
    check_identity(saved, inputs | {"mesh": {"fsdp": 8}}, "the run")
    check_identity(saved, {"base": "a"}, "the run")  # the weights are read later
    words = {"dtype": "compute type", "base": "base weights", "tokenizer": "tokenizer", "data": "training rows"}
    for key, name in (words | {"eval": "evaluation rows"}).items():
        with pytest.raises(UserError, match=f"the run cannot go on: its {name} are not those that it began with"):
            check_identity(saved, inputs | {key: "other"}, "the run")
    with pytest.raises(UserError, match="tokenizer and training rows"):
        check_identity(saved, inputs | {"data": "x", "tokenizer": "x"}, "the run")
    assert not caplog.records
    check_identity(saved, inputs | {"versions": {"jax": "0.3", "flax": "0.2"}}, "the run")
    assert "jax 0.1 -> 0.3" in caplog.text
    assert "flax" not in caplog.text


# Where it begins


def test_the_newest_comes_first_and_nothing_is_asked_for_in_an_empty_folder(
    config: Config, folder: RunFolder, tmp_path: Path
) -> None:
    assert find_start(config, RunFolder(tmp_path / "new")) == Start(config)
    assert steps_of(find_start(config, folder)) == [4, 2]


def test_never_refuses_a_used_folder_and_no_other(config: Config, folder: RunFolder, tmp_path: Path) -> None:
    never = change(config, {"checkpoint.resume": "never"})
    assert find_start(never, RunFolder(tmp_path / "new")) == Start(never)
    told = refused(never, folder)
    assert str(folder.path) in told
    assert "hydra.run.dir" in told
    assert "checkpoint.resume=auto" in told


def test_a_named_run_or_step_goes_on_in_its_folder_or_begins_another(
    config: Config, folder: RunFolder, tmp_path: Path
) -> None:
    step = folder.checkpoints / name_step(2)
    for resume, steps in ((folder.path, [4, 2]), (step, [2])):
        named = change(config, {"checkpoint.resume": str(resume)})
        here, there = find_start(named, folder), find_start(named, RunFolder(tmp_path / "new"))
        assert (here.is_fork, there.is_fork) == (False, True)
        assert steps_of(here) == steps_of(there) == steps
        assert here.is_named == there.is_named == (resume == step)
    used = write_run(tmp_path / "used", config, 1)
    assert "holds an earlier run: to begin from" in refused(named, used)


def test_a_run_that_began_from_another_goes_on_where_it_was(config: Config, folder: RunFolder, tmp_path: Path) -> None:
    """A queue starts it again with the same command."""
    step = folder.checkpoints / name_step(2)
    fork = change(config, {"checkpoint.resume": str(step), "optimizer.learning_rate": 0.5})
    new = write_run(tmp_path / "new", fork)
    first = find_start(fork, new)
    assert (first.is_fork, first.is_named, steps_of(first)) == (True, True, [2])
    shutil.rmtree(new.path)
    again = find_start(fork, write_run(new.path, fork, 3))
    assert (again.is_fork, again.is_named, steps_of(again), again.config) == (False, False, [3], fork)
    assert "optimizer.learning_rate was 0.5, not" in refused(change(fork, {"optimizer.learning_rate": 0.25}), new)


@pytest.mark.parametrize("where", [".", "..", "checkpoints"])
def test_names_are_relative_to_where_one_stands(config: Config, folder: RunFolder, monkeypatch, where: str) -> None:
    monkeypatch.chdir(folder.path / where)
    step = os.path.relpath(folder.checkpoints / name_step(2))
    found = find_start(change(config, {"checkpoint.resume": step}), folder)
    assert steps_of(found) == [2]
    assert not found.is_fork
    told = refused(change(config, {"checkpoint.resume": step.replace("2", "3")}), folder)
    assert "no such checkpoint; there are step_00000002, step_00000004" in told
    run = os.path.relpath(folder.path)
    assert steps_of(find_start(change(config, {"checkpoint.resume": run}), folder)) == [4, 2]


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        ("nowhere", "no such folder; it is auto, never, a run's folder or one of its checkpoints"),
        ("nowhere/checkpoints/step_00000001", "no such checkpoint; there are none"),
        ("Auto", "no such folder; it is auto, never"),
        ("empty", "no run's folder; it has neither checkpoints nor a config.yaml"),
        ("run/checkpoints", "no run's folder"),
        ("run/config.yaml", "no such folder"),
    ],
)
def test_what_is_no_run_is_refused(
    config: Config, folder: RunFolder, monkeypatch, tmp_path: Path, resume: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    told = refused(change(config, {"checkpoint.resume": resume}), RunFolder(tmp_path / "new"))
    assert told.startswith(f"checkpoint.resume={resume}: ")
    assert words in told


def test_a_damaged_checkpoint_is_told_and_passed_over(config: Config, folder: RunFolder, caplog) -> None:
    damage(folder, 4)
    assert steps_of(find_start(config, folder)) == [2]
    path = folder.checkpoints / name_step(4)
    assert f"{path} is damaged: arrays/data is not what was written" in caplog.text
    assert path.is_dir()  # it goes when a new one is whole


@pytest.mark.parametrize("how", ["auto", "run", "fork"])
def test_where_all_are_damaged_nothing_begins(config: Config, folder: RunFolder, tmp_path: Path, how: str) -> None:
    damage(folder, 2, 4)
    resume, where = {"auto": ("auto", folder), "run": (str(folder.path), folder)}.get(
        how, (str(folder.path), RunFolder(tmp_path / "new"))
    )
    told = refused(change(config, {"checkpoint.resume": resume}), where)
    assert "is damaged (step_00000004, step_00000002)" in told
    assert "restore one from a copy" in told


def test_a_named_step_that_is_damaged_is_an_error(config: Config, folder: RunFolder) -> None:
    damage(folder, 4)
    path = folder.checkpoints / name_step(4)
    told = refused(change(config, {"checkpoint.resume": str(path)}), folder)
    assert told.startswith(f"checkpoint.resume={path}: arrays/data is not what was written")


def test_what_a_kill_left_is_cleared_away_in_the_own_folder_alone(
    config: Config, folder: RunFolder, tmp_path: Path
) -> None:
    (folder.checkpoints / "step_00000006.partial").mkdir()
    (folder.checkpoints / name_step(4)).rename(folder.checkpoints / "step_00000004.replaced")
    fork = change(config, {"checkpoint.resume": str(folder.path)})
    assert steps_of(find_start(fork, RunFolder(tmp_path / "new"))) == [2]
    assert (folder.checkpoints / "step_00000006.partial").exists()
    assert steps_of(find_start(config, folder)) == [4, 2]
    assert not (folder.checkpoints / "step_00000006.partial").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(config: Config, tmp_path: Path, caplog) -> None:
    folder = write_run(tmp_path / "run", config)
    for where in (config, change(config, {"checkpoint.resume": str(folder.path), "logging.every_steps": 7})):
        assert find_start(where, folder) == Start(where)
        assert "has no checkpoint: the run begins anew" in caplog.text
    told = refused(change(config, {"model.lora_rank": 8}), folder)
    assert "model.lora_rank was 4, not 8" in told
    fork = change(config, {"checkpoint.resume": str(folder.path)})
    assert "has no checkpoint to begin from" in refused(fork, RunFolder(tmp_path / "new"))


def test_a_used_folder_that_is_not_known_is_refused(config: Config, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", config)
    folder.config.unlink()
    assert "holds files of another run; choose another hydra.run.dir" in refused(config, folder)


# A run that has ended


def test_a_run_that_has_ended_is_over_unless_more_is_asked_for(config: Config, folder: RunFolder) -> None:
    end(folder, 4)
    summary = find_start(config, folder).summary
    assert summary is not None
    assert summary["final_loss"] == 1.5
    assert find_start(change(config, {"logging.plot": True, "checkpoint.keep": 1}), folder).summary
    for key, value in (("num_batches", 9), ("num_epochs", 2), ("early_stopping_patience", 3)):
        found = find_start(change(config, {f"training.{key}": value}), folder)
        assert (found.summary, steps_of(found)) == (None, [4, 2])
    step = change(config, {"checkpoint.resume": str(folder.checkpoints / name_step(2))})
    assert find_start(step, folder).summary is None
    damage(folder, 4)
    assert find_start(config, folder).summary is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"final_loss": 1}', '{"step": 2, "final_loss": 1.0}'])
def test_a_summary_that_is_none_or_of_another_step_ends_nothing(config: Config, folder: RunFolder, text: str) -> None:
    folder.summary.write_text(text)
    assert find_start(config, folder).summary is None


def test_other_processes_begin_where_the_first_one_says(config: Config, folder: RunFolder, tmp_path: Path) -> None:
    damage(folder, 4)
    mesh = change(config, {"model.mesh_shape": [[2, 1], ["fsdp", "tp"]]})
    for where in (folder, RunFolder(tmp_path / "new")):
        resume = change(mesh, {"checkpoint.resume": str(folder.path)})
        first = find_start(resume, where)
        second, common = join_start(resume, share_start(first, where))
        assert second == first
        assert common == where
