"""A whole run, in this process, on the base model and the dataset that ship with the package."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.numpy import load_file

import support
from adaptax import cli
from adaptax.config import Config, UserError, build
from adaptax.devices import multiplies_bfloat16
from adaptax.resume import find_start
from adaptax.run_folder import RunFolder
from adaptax.signals import StopSignals
from adaptax.train import run

GOLDEN = Path(__file__).parent / "golden" / "tiny_run.json"
SHORT = ["+experiment=quickstart", "training.num_batches=6", "training.num_epochs=1", "training.micro_batch_size=4"]
SHORT += [
    "optimizer.learning_rate=6e-3",
    "schedule.warmup_steps=1",
    "training.eval_every_steps=null",
    "training.exact_match_rows=0",
]


def make_config(*overrides: str) -> Config:
    """The configuration of a short run."""
    cli.teach_hydra()
    with initialize_config_dir(cli.find_conf(), version_base="1.3"):
        return build(OmegaConf.to_container(compose("config", [*SHORT, *overrides]), resolve=True))  # type: ignore[arg-type]


def train(directory: Path, *overrides: str) -> tuple[float, list[dict[str, Any]]]:
    """(what the run returned, its rows in metrics.jsonl)."""
    directory.mkdir(exist_ok=True)
    folder = RunFolder(directory)
    with StopSignals(grace_seconds=30) as stop:
        result = run(find_start(make_config(*overrides), folder), support.make_mesh(), folder, stop)
    return result, [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("run")
    return directory, *train(directory, "training.eval_every_steps=3", "checkpoint.every_steps=2", "checkpoint.keep=1")


def test_the_losses_are_the_golden_ones(short_run) -> None:
    """The file holds a run's losses: ``python tests/test_train.py`` writes it, and says why in the commit."""
    _, _, rows = short_run
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text()), rtol=2e-5)
    assert losses[-1] < losses[0]


def test_a_run_writes_metrics_events_picture_and_adapter(short_run) -> None:
    directory, result, rows = short_run
    steps = [row for row in rows if "train_loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert result == losses[-1] < losses[0]
    assert all(0 <= row["train_padding_share"] < 1 and row["train_tokens_per_second"] > 0 for row in steps)
    assert steps[0]["train_learning_rate"] == pytest.approx(6e-3)
    assert steps[-1]["train_learning_rate"] < 2e-3
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((directory / "tensorboard").glob("events.out.tfevents.*"))
    tensors = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert any(np.abs(array).max() > 0 for name, array in tensors.items() if "lora_B" in name)


def test_the_latest_checkpoints_and_the_best_are_kept(short_run) -> None:
    directory, _, rows = short_run
    losses = {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") and row["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == sorted(
        {f"step_0000000{best}", "step_00000006"}
    )
    last, adapter = (load_file(directory / name / "adapter_model.safetensors") for name in ("adapters/last", "adapter"))
    assert all(np.array_equal(last[name], adapter[name]) for name in last)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    options = ("training.num_batches=2", "data.eval=null", "model.lora_dropout=0.1")
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, *options, f"training.seed={seed}")
        files.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_run_that_stays_non_finite_stops_with_a_report_and_keeps_its_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not finite, 2 steps in a row.*optimizer\.learning_rate") as caught:
        train(tmp_path, "optimizer.learning_rate=1e30", "optimizer.max_grad_norm=null", "training.max_nonfinite=2")
    assert "\n" not in str(caught.value)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train_loss" in row]
    assert steps[-1]["train_loss"] is None
    assert steps[-1]["train_nonfinite_steps"] >= 2
    assert not (tmp_path / "adapter").exists()


def test_answers_are_scored_before_and_after_and_shown_side_by_side(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, "adaptax"):
        _, rows = train(tmp_path, "training.exact_match_rows=8", "training.num_batches=2")
    scores = next(row for row in rows if "eval_exact_match" in row)
    assert 0 <= scores["eval_exact_match_before"] <= 1
    assert "held-out rows" in caplog.text
    assert '{"action":' in caplog.text
    assert "│ switch the hallway fan" in caplog.text  # what the user said, without the template
    assert "start_of_turn" not in caplog.text
    assert "exact match on 8 held-out rows" in caplog.text


def test_the_start_up_table_tells_what_is_adapted(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, "adaptax"):
        train(
            tmp_path,
            "training.num_batches=2",
            'model.lora_module_path="layers/[45]/mlp/.*"',
            "model.lora_rank=2",
            "model.lora_alpha=8",
            """model.lora_rank_pattern='{"layers/4/mlp/up_proj": 6}'""",
        )
    text = " ".join(caplog.text.split())
    assert "mlp/gate_proj │ 2 of 6 │ 2 │ 4 │ 2,560" in text
    assert "mlp/up_proj │ 2 of 6 │ 2 to 6 │ 1.33333 to 4 │ 5,120" in text
    assert "rank 2 to 6, alpha 8 (scale 1.33333 to 4); 10,240 trainable beside 1,691,136 frozen parameters" in text
    assert "model.lora_rank=2 to 6 is outside the usual 4 to 128" in text
    assert "lora_alpha / lora_rank = 1.33333 to 4; model.lora_alpha=null keeps alpha at the rank" in text
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"model.layers.4.mlp.up_proj": 6}
    assert "peak" in text
    assert "attention: xla; computed in float32" in text


@pytest.mark.parametrize(("flags", "is_told"), [("fma avx512_bf16 vaes", True), ("fma avx512_bf1 avx2", False)])
def test_a_processor_with_bfloat16_gets_a_hint_where_the_type_is_left_open(
    tmp_path: Path, caplog, monkeypatch, flags: str, is_told: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name\t: one\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr("adaptax.prepare.multiplies_bfloat16", lambda: multiplies_bfloat16(cpuinfo))
    for dtype in ("auto", "float32"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "adaptax"):
            train(tmp_path / dtype, "training.num_batches=2", f"model.dtype={dtype}")
        assert ("model.dtype=bfloat16 is faster" in caplog.text) == (is_told and dtype == "auto")
    assert not multiplies_bfloat16(tmp_path / "nothing")


def test_nothing_held_out_gives_the_last_training_loss(tmp_path: Path) -> None:
    result, rows = train(tmp_path, "data.eval=null", "training.num_batches=2")
    assert not any("eval_loss" in row for row in rows)
    assert result == [row["train_loss"] for row in rows if "train_loss" in row][-1]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        _, made = train(Path(folder))
        GOLDEN.write_text(json.dumps([row["train_loss"] for row in made if "train_loss" in row]) + "\n")
