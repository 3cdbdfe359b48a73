"""Runs that begin from an adapter: what they begin with, what they tell, and how they go on once it is gone."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import small_runs
import support
from adaptax.adapter_files import CONFIG, TENSORS
from adaptax.checking import read_config
from adaptax.config import Config, UserError
from adaptax.export import save_peft_adapter
from adaptax.lora import LoraSpec
from adaptax.models import find_architecture
from adaptax.prepare import identify_inputs, prepare
from adaptax.replay import find_state
from adaptax.resume import bring_config, find_start
from adaptax.run_folder import RunFolder
from adaptax.train import begin
from command_line import Answer

SPEC = LoraSpec({"attn/kv_einsum": (0,), "mlp/up_proj": (0,)}, 3, 6.0, ranks={"layers/0/mlp/up_proj": 2})


def write_adapter(directory: Path, home: Path, seed: int = 0, spec: LoraSpec = SPEC) -> Path:
    """An adapter for the model in a user's folder."""
    arch = find_architecture(support.model_config(home / "model"))
    arrays = support.draw_adapters(arch, spec, seed)
    save_peft_adapter(directory, arrays, spec, support.FAMILY, arch, "org/another")
    return directory


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with model, rows and an adapter."""
    home = small_runs.write_home(tmp_path_factory.mktemp("user"))
    write_adapter(home / "adapter", home)
    return home


def configure(home: Path, adapter: Path | None = None, **changes: Any) -> Config:
    """As the command line makes it of such keys."""
    keys = {"model.init_adapter": str(adapter or home / "adapter"), "training.num_batches": 2}
    keys |= {"training.remat": "none", "model.lora_dropout": 0.1, "training.exact_match_rows": 4} | changes
    return read_config(dataclasses.asdict(small_runs.make_config(home, keys)))


def go_on(config: Config, run: Path, *given: str) -> Config:
    """What ``checkpoint.resume=DIR`` makes, with such keys of a configuration."""
    values = dataclasses.asdict(small_runs.change(config, {"checkpoint.resume": str(run)}))
    return read_config(bring_config(values, given), given, is_saved=True)


def test_a_run_has_the_adapters_ranks_and_numbers_and_its_own_dropout(user: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, "adaptax"):
        prepared = prepare(configure(user), support.make_mesh(2, 1))
    spec, stored = prepared.job.spec, load_file(user / "adapter" / TENSORS)
    assert {kind: spec.rank_of(kind, 0) for kind in spec.layers} == {"attn/kv_einsum": 3, "mlp/up_proj": 2}
    assert (spec.scale_of("attn/kv_einsum", 0), spec.scale_of("mlp/up_proj", 0), spec.dropout) == (2, 3, 0.1)
    up = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    for half in "AB":
        array = np.asarray(prepared.state.adapters[f"layers/mlp/up_proj/w_lora_{half.lower()}"][0])
        np.testing.assert_array_equal(array, stored[f"{up}{half}.weight"].T)
    (told,) = [r for r in caplog.records if "begin from" in r.getMessage()]
    assert told.levelname == "WARNING"  # it says that it is somebody else's
    assert str(user / "adapter") in told.getMessage()
    assert ": 3 modules;" in told.getMessage()  # keys and values are two
    assert "trained on org/another" in told.getMessage()
    assert "model.lora_alpha=null keeps" not in caplog.text


def test_of_an_adapter_on_values_alone_it_is_told_that_keys_are_adapted_too(user: Path, tmp_path: Path, caplog) -> None:
    adapter = shutil.copytree(user / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / TENSORS)
    save_file({name: array for name, array in tensors.items() if "k_proj" not in name}, adapter / TENSORS)
    config = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": "elsewhere/model"}
    (adapter / CONFIG).write_text(json.dumps(config))
    with caplog.at_level(logging.INFO, "adaptax"):
        prepare(configure(user, adapter), support.make_mesh())
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert "does not adapt layers.0.self_attn.k_proj (1 such modules)" in caplog.text
    assert levels[f"the adapters begin from {adapter}: 2 modules"] == "INFO"  # a folder of the same name


@pytest.mark.parametrize("name", ["lora_rank", "lora_alpha", "lora_module_path", "use_rslora", "lora_rank_pattern"])
def test_what_is_the_adapters_to_say_may_not_be_given(name: str, user: Path) -> None:
    values = dataclasses.asdict(small_runs.make_config(user, {"model.init_adapter": str(user / "adapter")}))
    with pytest.raises(UserError, match=rf"model\.{name} is what the adapter in model\.init_adapter has: leave it out"):
        read_config(values, ["data", f"model.{name}"])


# Stopped and resumed


@pytest.fixture(scope="module")
def stopped(user: Path) -> tuple[Path, Path]:
    """(a run in one go, the same stopped after the first of its two steps), from an adapter that is then gone."""
    adapter = shutil.copytree(user / "adapter", user / "moved")
    small_runs.train(user / "straight", configure(user, adapter))
    small_runs.train(user / "stopped", configure(user, adapter, **{"training.stop_after_steps": 1}))
    adapter.rename(user / "gone")
    return user / "straight", user / "stopped"


def test_a_run_is_resumed_to_the_bit_after_its_adapter_is_gone(user: Path, stopped, tmp_path: Path, caplog) -> None:
    straight, run = stopped[0], shutil.copytree(stopped[1], tmp_path / "run")
    small_runs.train(run, go_on(configure(user), run))
    assert "moved is gone: answers before training cannot be told" in caplog.text
    rows, whole = small_runs.read_metrics(run), small_runs.read_metrics(straight)
    assert small_runs.losses_of(rows) == small_runs.losses_of(whole)
    mine, theirs = small_runs.adapter_of(run), small_runs.adapter_of(straight)
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert [any("eval_exact_match_before" in row for row in each) for each in (whole, rows)] == [True, False]
    assert len(read_identities(run)) == 2


def read_identities(run: Path) -> list[str]:
    """Of the initial adapter, in all checkpoints of a run."""
    return [json.loads(path.read_text())["identity"]["initial"] for path in run.glob("checkpoints/*/manifest.json")]


def test_an_adapter_that_has_moved_is_known_by_its_content(user: Path, stopped) -> None:
    config = go_on(configure(user, user / "gone"), stopped[1], "model.init_adapter")
    prepared = prepare(config, support.make_mesh(), is_resumed=True)
    assert read_identities(stopped[1]) == [identify_inputs(prepared)["initial"]]
    state, manifest = begin(find_start(config, RunFolder(stopped[1])), prepared)
    assert manifest is not None
    assert int(state.step) == manifest.step == 1


def test_it_does_not_go_on_from_another_adapter_of_the_same_ranks(user: Path, stopped, tmp_path: Path) -> None:
    run, other = shutil.copytree(stopped[1], tmp_path / "run"), write_adapter(tmp_path / "other", user, seed=1)
    with pytest.raises(UserError, match="its initial adapter's files are not those that it began with"):
        small_runs.train(run, configure(user, other))


def test_nor_from_one_whose_ranks_have_changed(user: Path, stopped, tmp_path: Path) -> None:
    config = configure(user)
    other = write_adapter(tmp_path / "other", user, spec=dataclasses.replace(SPEC, alpha=3.0))
    config = small_runs.change(config, {"model.init_adapter": str(other)})
    with pytest.raises(UserError, match=r"other has other ranks, scales or modules than the run was begun with"):
        prepare(config, support.make_mesh())


def test_without_a_checkpoint_the_adapter_must_be_there(user: Path, stopped, tmp_path: Path) -> None:
    config = go_on(configure(user), stopped[1])
    prepared = prepare(config, support.make_mesh(), is_resumed=True)
    with pytest.raises(UserError, match=r"moved is gone, and no checkpoint is as old as step 1"):
        find_state(prepared, RunFolder(tmp_path), 1)
    with pytest.raises(UserError, match=r"model\.init_adapter=.*moved: no such folder; a run that has saved"):
        prepare(config, support.make_mesh())


def test_the_command_line_takes_what_a_run_has_saved(home: Path, run, tmp_path: Path) -> None:
    """What a folder that is gone had said is known; nothing of this needs jax."""
    config = small_runs.make_config(home, {"model.init_adapter": "gone", "data.train": "rows.jsonl", "data.eval": None})
    small_runs.write_model(home / "model")
    small_runs.write_run(home / "run", config, 1)
    answers: list[Answer] = [
        run("checkpoint.resume=run", "optimizer.learning_rate=7"),
        run("checkpoint.resume=run", "model.init_adapter=none"),
        run("+experiment=quickstart", "model.init_adapter=run", "model.lora_rank=4"),
    ]
    assert [answer.code for answer in answers] == [1, 1, 1]
    assert "optimizer.learning_rate was 0.05, not 7.0" in answers[0].err
    assert "error: model.init_adapter=none: no such folder" in answers[1].err
    assert "error: model.lora_rank is what the adapter in model.init_adapter has" in answers[2].err
    assert not any(answer.imported_jax for answer in answers)
