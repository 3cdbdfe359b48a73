"""What a run notices on its way: spikes, steps without a number, evaluations that no longer get better."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import small_runs
from adaptax.config import UserError
from adaptax.data.pipeline import load_data
from adaptax.data.tokenizer import Tokenizer
from rows import chat


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_home(tmp_path_factory.mktemp("home"))


def break_weight(model: Path, name: str) -> None:
    """Writes a NaN into one of a checkpoint's tensors."""
    tensors = load_file(model / "model.safetensors")
    tensors[name].flat[7] = np.nan
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize(("min_delta", "last"), [(100.0, 3), (0.0, 6)])
def test_a_run_stops_early_where_evaluations_get_no_better(
    home: Path, tmp_path: Path, min_delta: float, last: int
) -> None:
    patience = {"training.eval_every_steps": 1, "training.early_stopping_patience": 2}
    changes = patience | {"training.early_stopping_min_delta": min_delta}
    rows = small_runs.train(tmp_path / "run", small_runs.make_config(home, changes))
    assert [row["step"] for row in rows if "eval_loss" in row] == list(range(last + 1))
    assert max(row["step"] for row in rows) == last
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == last
    assert summary["final_loss"] == [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_that_stopped_early_goes_on_without_patience_as_if_it_had_not(home: Path, tmp_path: Path) -> None:
    changes = {"training.eval_every_steps": 1, "training.early_stopping_min_delta": 100.0}
    straight = small_runs.train(tmp_path / "straight", small_runs.make_config(home, changes))
    patience = {"training.early_stopping_patience": 2}
    small_runs.train(tmp_path / "run", small_runs.make_config(home, changes | patience))
    rows = small_runs.train(tmp_path / "run", small_runs.make_config(home, changes))
    assert small_runs.losses_of(rows) == small_runs.losses_of(straight)


def test_a_spike_is_told_with_its_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = small_runs.write_home(tmp_path)
    rows = [chat("light", "on")] * 30 + [chat("door", "blue red warm")] + [chat("light", "on")] * 3
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.shuffle": False, "training.micro_batch_size": 1, "training.num_batches": None}
    with caplog.at_level(logging.WARNING, "adaptax"):
        small_runs.train(tmp_path / "run", small_runs.make_config(home, changes))
    told = [record.getMessage() for record in caplog.records if "stands out" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("step 31: loss ")
    assert f"{home / 'rows.jsonl'} row 31" in told[0]


def test_batches_without_a_number_are_written_down_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = small_runs.write_home(tmp_path)
    break_weight(home / "model", "model.layers.0.mlp.down_proj.weight")
    changes = {"training.max_nonfinite": 100, "data.shuffle": False}
    with caplog.at_level(logging.WARNING, "adaptax"):
        rows = small_runs.train(tmp_path / "run", small_runs.make_config(home, changes))
    steps = [row for row in rows if "train_loss" in row]
    assert [row["train_loss"] for row in steps] == [None] * 6
    assert steps[-1]["train_nonfinite_steps"] == 6
    tensors = small_runs.adapter_of(tmp_path / "run")
    assert not any(array.any() for name, array in tensors.items() if "lora_B" in name)  # as they began
    dump = json.loads((tmp_path / "run" / "nonfinite" / "step_00000002.json").read_text())
    assert dump["step"] == 2
    assert dump["loss"] == "nan"
    assert [sequence["rows"] for sequence in dump["sequences"]] == [
        [f"{home / 'rows.jsonl'} row {number}"] for number in range(5, 9)
    ]
    first = json.loads((home / "rows.jsonl").read_text().splitlines()[4])["messages"]
    assert all(message["content"] in dump["sequences"][0]["text"] for message in first)
    assert len(dump["sequences"][0]["tokens"]) == dump["shape"][2]
    assert "the update is skipped, the batch is in" in caplog.text


def test_a_run_that_has_lost_its_numbers_stops_saved_and_says_what_to_do(tmp_path: Path) -> None:
    home = small_runs.write_home(tmp_path)
    break_weight(home / "model", "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(UserError, match=r"not finite, 3 steps in a row now \(3 in all\).*adaptax replay") as caught:
        small_runs.train(tmp_path / "run", small_runs.make_config(home, {"training.max_nonfinite": 3}))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_rows_and_the_summary_tell_how_fast_a_run_was(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peak = {"logging.peak_tflops": 0.5, "model.mesh_shape": [[2, 1], ["fsdp", "tp"]], "training.micro_batch_size": 2}
    with caplog.at_level(logging.INFO, "adaptax"):
        rows = small_runs.train(tmp_path, small_runs.make_config(home, peak))
    steps = [row for row in rows if "train_loss" in row]
    for row in steps:
        seconds, padding = row["train_step_seconds"], row["train_padding_share"]
        assert row["train_tokens_per_second"] == pytest.approx(row["train_supervised_tokens"] / seconds)
        nonpadding, total = row["train_nonpadding_tokens_per_second"], row["train_total_tokens_per_second"]
        assert row["train_tokens_per_second"] < nonpadding < total
        assert nonpadding / total == pytest.approx(1 - padding)
        assert row["train_mfu"] == pytest.approx(row["train_model_tflops_per_second"] / (2 * 0.5))  # two devices
        assert 0 <= row["train_input_stall_share"] <= 1
    speed = json.loads((tmp_path / "summary.json").read_text())["speed"]
    assert (speed["num_steps"], speed["num_typical_steps"]) == (6, 5)
    assert speed["seconds"] == pytest.approx(sum(row["train_step_seconds"] for row in steps))
    assert speed["trained_tokens"] == sum(row["train_supervised_tokens"] for row in steps)
    tflops = [row["train_model_tflops_per_second"] * row["train_step_seconds"] for row in steps]
    assert speed["mfu"] == pytest.approx(sum(tflops[1:]) / sum(row["train_step_seconds"] for row in steps[1:]))
    assert sum(tflops) * 1e12 == pytest.approx(flops_by_hand(home), rel=1e-9)
    assert "speed of 5 steps" in caplog.text
    assert "no MFU" not in caplog.text


def flops_by_hand(home: Path) -> float:
    """Of all rows of ``rows.jsonl``, once each: one layer, D 32, F 64, N 4, K 1, H 8; rank 4 on q and down."""
    data, _ = load_data(small_runs.make_config(home).data, Tokenizer(home / "model" / "tokenizer.model"))
    tokens, pairs = data.num_tokens, int((data.examples.lengths * (data.examples.lengths + 1) // 2).sum())
    frozen, adapters = 32 * (32 + 2 * 8 + 32) + 3 * 32 * 64, 4 * (32 + 32) + 4 * (64 + 32)
    return 4 * frozen * tokens + 6 * adapters * tokens + 12 * 4 * 8 * pairs + 4 * 32 * 2048 * data.num_supervised


def test_where_the_peak_is_not_known_a_line_says_how_to_set_it(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "adaptax"):
        rows = small_runs.train(tmp_path, small_runs.make_config(home, {"training.stop_after_steps": 2}))
    assert {row["train_mfu"] for row in rows if "train_loss" in row} == {None}
    assert "no MFU: the peak of 'cpu' in float32 is not known; logging.peak_tflops sets it" in caplog.text
    assert "TFLOP/s; " in caplog.text
