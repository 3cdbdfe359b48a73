"""The proof of exactness on a configuration of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import small_runs
from adaptax.config import UserError
from adaptax.run_folder import RunFolder
from adaptax.verify_resume import compare_runs, verify_resume

PROGRAM = Path(__file__).parents[1] / "run_training.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_home(tmp_path_factory.mktemp("home"))


@pytest.mark.slow
def test_a_run_with_dropout_and_accumulation_is_proved_exact(home: Path) -> None:
    keys = [f"model.weights={home / 'model'}", "model.model_size=auto", "model.lora_dropout=0.2"]
    keys += ["data.train=rows.jsonl", "data.eval=eval.jsonl", "data.packing=false", "training.num_epochs=3"]
    keys += ["training.gradient_accumulation_steps=2", "training.eval_every_steps=1", "name='an odd (name)'"]
    command = [sys.executable, PROGRAM, "verify-resume", "--steps", "4", "--at", "3", *keys]
    done = subprocess.run(command, cwd=home, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "a resumed run is the uninterrupted run" in done.stdout
    assert done.stdout.count("equal") == 4 + 5 + 1  # steps, evaluations, arrays
    assert "DIFFERENT" not in done.stdout
    assert sorted(path.name for path in home.iterdir()) == ["eval.jsonl", "model", "rows.jsonl"]  # nothing is left


def test_a_run_that_differs_is_told(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for seed in (0, 1):
        folders.append(RunFolder(tmp_path / str(seed)))
        small_runs.train(folders[-1].path, small_runs.make_config(home, {"training.seed": seed}))
    assert compare_runs(folders[0], folders[0], 3)
    assert "a resumed run is the uninterrupted run" in capsys.readouterr().out
    assert not compare_runs(folders[0], folders[1], 3)
    told = capsys.readouterr().out
    assert "DIFFERENT" in told
    assert "A RESUMED RUN IS NOT THE UNINTERRUPTED RUN" in told
    assert "different: ['adapters']" in told


def test_a_run_that_breaks_keeps_its_traceback(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another user's broken numpy, say."""
    (tmp_path / "numpy.py").write_text("raise ZeroDivisionError('of the environment')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="the run failed with exit code 1; what it wrote stands above"):
        verify_resume([f"model.weights={home / 'model'}", "model.model_size=auto"], 4, 2)
    told = capfd.readouterr().err
    assert "Traceback" in told
    assert "ZeroDivisionError: of the environment" in told


@pytest.mark.parametrize(
    ("overrides", "steps", "at", "words"),
    [
        ([], 4, 4, "--at 4 must lie between 0 and --steps 4"),
        ([], 4, 0, "--at 0 must lie between"),
        (["hydra.run.dir=x"], 4, 2, "hydra.run.dir=x: adaptax verify-resume runs one configuration"),
        (["--multirun", "model.lora_rank=8,16"], 4, 2, "--multirun: adaptax verify-resume runs one"),
        (["data.train=gone.jsonl"], 4, 2, "data.train=gone.jsonl: no such file"),
    ],
)
def test_what_makes_no_proof_is_refused(overrides: list[str], steps: int, at: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        verify_resume(overrides, steps, at)
