"""Traces of steps, of real runs."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import small_runs
from adaptax.config import UserError

SCOPES = ("embedding", "attention", "mlp", "head", "optimizer")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_home(tmp_path_factory.mktemp("home"))


def read_trace(run: Path) -> list[dict[str, Any]]:
    """The events of the one trace that Perfetto is to show."""
    (path,) = (run / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    return [event for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if "name" in event]


def traced_steps(run: Path) -> list[int]:
    return sorted(int(event["args"]["step_num"]) for event in read_trace(run) if event["name"] == "train")


def test_a_trace_has_the_steps_their_operations_and_the_names_of_the_parts(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "adaptax"):
        traced = small_runs.train(tmp_path / "run", small_runs.make_config(home, {"training.profile": "3:5"}))
    assert traced_steps(tmp_path / "run") == [3, 4]
    events = read_trace(tmp_path / "run")
    operations = {event["args"]["hlo_op"] for event in events if event.get("args", {}).get("hlo_module")}
    assert any("fusion" in name for name in operations)
    assert [event["name"] for event in events].count("wait for input") == 2  # for the batch behind each step
    (protocol,) = (tmp_path / "run" / "profile").glob("plugins/profile/*/*.xplane.pb")
    names = set(re.findall(r"jit\(train_step\)[ -~]+", protocol.read_text("latin-1")))
    for scope in SCOPES:
        assert any(re.search(rf"[/(]{scope}[/)]", name) for name in names), scope
    assert f"trace of steps 3 to 4 written into {tmp_path / 'run' / 'profile'}" in caplog.text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["speed"]["num_typical_steps"] == 6 - 1 - 2
    plain = small_runs.train(tmp_path / "plain", small_runs.make_config(home))
    assert small_runs.losses_of(traced) == small_runs.losses_of(plain)
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_resumed_run_traces_what_is_left(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_runs.train(tmp_path, small_runs.make_config(home, {"training.stop_after_steps": 3}))
    small_runs.train(tmp_path, small_runs.make_config(home, {"training.profile": "2:50"}))
    assert traced_steps(tmp_path) == [4, 5, 6]
    assert "training.profile=2:50: of these, this start has steps 4 to 6, which are traced" in caplog.text


def test_steps_that_a_start_does_not_have_are_told(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_runs.train(tmp_path, small_runs.make_config(home, {"training.stop_after_steps": 3}))
    small_runs.train(tmp_path, small_runs.make_config(home, {"training.profile": "2:4"}))
    assert "training.profile=2:4: nothing is traced, as this start has steps 4 to 6" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_a_trace_is_finished_where_the_run_fails(tmp_path: Path) -> None:
    home = small_runs.write_home(tmp_path)
    tensors = load_file(home / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].flat[7] = np.nan
    save_file(tensors, home / "model" / "model.safetensors")
    changes = {"training.max_nonfinite": 3, "training.profile": "2:50"}
    with pytest.raises(UserError, match="not finite"):
        small_runs.train(tmp_path / "run", small_runs.make_config(home, changes))
    assert traced_steps(tmp_path / "run") == [2, 3, 4]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("in the way")
    rows = small_runs.train(tmp_path, small_runs.make_config(home, {"training.profile": "2:4"}))
    assert max(row["step"] for row in rows) == 6
    assert "no steps are traced: " in caplog.text


@pytest.mark.parametrize("text", ["5", "b:a", "0:3", "7:7", "7:3", "1:2:3", "-1:3", "1: 3", "", "308", "٣:٥"])
def test_nonsense_is_refused_in_a_line(home: Path, text: str) -> None:
    with pytest.raises(UserError) as caught:
        small_runs.make_config(home, {"training.profile": text})
    assert str(caught.value).startswith(f"training.profile={text} must be START:STOP with 1 <= START < STOP: ")
    assert "\n" not in str(caught.value)
