"""A batch that was not finite, run again from the folder of its run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import small_runs
import support
from adaptax.config import UserError
from adaptax.manifest import name_step
from adaptax.prepare import load_base, prepare
from adaptax.replay import find_state, replay, roll_forward
from adaptax.run_folder import RunFolder
from test_recorder import break_weight

RUNAWAY = {"model.lora_module_path": ".*", "optimizer.learning_rate": 1e30, "optimizer.max_grad_norm": None}
RUNAWAY |= {"schedule.warmup_steps": 0}


def run_to_its_end(home: Path, path: Path, changes: dict[str, object]) -> RunFolder:
    """A run that stops because its numbers are gone."""
    with pytest.raises(UserError, match="not finite"):
        small_runs.train(path, small_runs.make_config(home, changes))
    return RunFolder(path)


def test_a_damaged_weight_is_named_with_its_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = small_runs.write_home(tmp_path)
    break_weight(home / "model", "model.layers.0.mlp.down_proj.weight")
    changes = {"training.max_nonfinite": 2, "data.shuffle": False}
    folder = run_to_its_end(home, tmp_path / "run", changes)
    with caplog.at_level(logging.INFO, "adaptax"):
        found = replay(small_runs.make_config(home, changes), support.make_mesh(), folder)
    assert list(found) == ["float32"]
    assert found["float32"].first is not None
    assert found["float32"].first.startswith("layers/0/mlp (forward): its base weight layers/0/mlp/down_proj/w holds 1")
    assert "step 1 of" in caplog.text
    assert f"{home / 'rows.jsonl'} row 4" in caplog.text


def test_a_run_in_bfloat16_is_looked_at_in_both_types(tmp_path: Path) -> None:
    home = small_runs.write_home(tmp_path)
    break_weight(home / "model", "model.layers.0.self_attn.o_proj.weight")
    changes = {"training.max_nonfinite": 1, "model.dtype": "bfloat16"}
    folder = run_to_its_end(home, tmp_path / "run", changes)
    found = replay(small_runs.make_config(home, changes), support.make_mesh(), folder)
    assert list(found) == ["bfloat16", "float32"]
    assert all("layers/0/attn" in (diagnosis.first or "") for diagnosis in found.values())


@pytest.fixture(scope="module")
def runaway(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFolder, dict[str, object]]:
    """A run whose second step was not finite any more, with a checkpoint behind that."""
    home = small_runs.write_home(tmp_path_factory.mktemp("runaway"))
    changes = RUNAWAY | {"training.max_nonfinite": 2}
    return home, run_to_its_end(home, home / "run", changes), changes


def test_the_adapters_are_those_that_the_step_began_with(runaway, tmp_path: Path) -> None:
    """A checkpoint behind steps that were skipped still has them; trained again from the start, they are the same."""
    home, folder, changes = runaway
    prepared = prepare(small_runs.make_config(home, changes), support.make_mesh())
    done, kept = find_state(prepared, folder, 2)
    assert done == 1  # of a checkpoint of step 4, which the skipped steps 2 to 4 left as it was
    adapters = jax.device_get(kept.adapters)
    bare = RunFolder(tmp_path)
    done, fresh = find_state(prepared, bare, 2)
    assert done == 0
    again = roll_forward(*load_base(prepared), fresh, 0, 1)
    assert all(np.array_equal(again.adapters[name], adapters[name]) for name in adapters)
    assert max(np.abs(array).max() for array in adapters.values()) > 1e29


def test_adapters_that_ran_away_are_told_from_bad_rows(runaway) -> None:
    home, folder, changes = runaway
    found = replay(small_runs.make_config(home, changes), support.make_mesh(), folder, 2)
    finding = found["float32"].finding
    assert finding is not None
    assert finding.place.startswith("layers/0/")
    assert "optimizer.learning_rate" in finding.advice


def test_steps_between_a_checkpoint_and_the_batch_are_trained_again(tmp_path: Path, caplog) -> None:
    home = small_runs.write_home(tmp_path)
    changes = RUNAWAY | {"training.max_nonfinite": 2}
    folder = run_to_its_end(home, tmp_path / "run", changes)
    shutil.rmtree(folder.checkpoints / name_step(4))
    with caplog.at_level(logging.INFO, "adaptax"):
        found = replay(small_runs.make_config(home, changes), support.make_mesh(), folder, 3)
    assert "steps 1 to 2 are trained again" in caplog.text
    assert found["float32"].finding is not None


def test_what_cannot_be_replayed_is_told(runaway, tmp_path: Path) -> None:
    home, folder, changes = runaway
    config, mesh = small_runs.make_config(home, changes), support.make_mesh()
    with pytest.raises(UserError, match=r"--step 77: the steps written down in .* are 2, 3, 4"):
        replay(config, mesh, folder, 77)
    with pytest.raises(UserError, match="there is nothing to replay"):
        replay(config, mesh, RunFolder(tmp_path))
    shutil.copytree(folder.path, tmp_path / "copy")
    for text in ("[]", "{", '{"step": 2}'):
        (tmp_path / "copy" / "nonfinite" / "step_00000002.json").write_text(text)
        with pytest.raises(UserError, match=r"step_00000002.json is not the dump of a batch"):
            replay(config, mesh, RunFolder(tmp_path / "copy"), 2)
