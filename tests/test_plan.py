"""``adaptax plan``: memory and work of a run, told before anything is fetched."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Answer

TINY = ["model=gemma3_tiny", "data.train=rows.jsonl", "data.max_length=512", "training.micro_batch_size=2"]
TINY += ["training.remat=matmul", "schedule.warmup_steps=10"]


def plan(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from adaptax.cli import main; sys.argv[0] = 'adaptax'; main()"
    command = [sys.executable, "-c", code, "plan", *arguments]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120, check=False)


def test_a_run_that_fits(home: Path) -> None:
    done = plan(home, *TINY, "logging.peak_tflops=2")
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    for words in ("base weights", "adapters", "optimizer", "batches", "training", "evaluation", "the device has"):
        assert words in text
    assert "micro_batch_size 2 of 512 tokens, accumulated 1 times" in " ".join(text.split())
    flops = re.search(r"a step: ([\d.e-]+) model TFLOP; it reads [\d.]+ [GM]iB", text)
    seconds = re.search(r"at 2 TFLOP/s a device \(logging.peak_tflops\) a step takes ([\d.e-]+) s", text)
    assert flops
    assert seconds
    assert float(seconds[1]) == pytest.approx(float(flops[1]) / 2, rel=0.01)
    assert sorted(path.name for path in home.iterdir()) == ["rows.jsonl"]  # nothing is left


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_told_with_what_to_change(home: Path) -> None:
    tight = plan(home, *TINY, "training.memory_gib=0.06")
    assert tight.returncode == 1, tight.stderr
    text = tight.stdout + tight.stderr
    assert "it does not fit; the cheapest changes:" in text
    proposed = re.findall(r"^  (\S.*): peak ([\d.]+ [GM]iB)(, still too much)?$", text, re.M)
    assert len(proposed) == 3
    assert any(not excess for _, _, excess in proposed)


def test_mistakes_are_one_line(home: Path, run: Callable[..., Answer]) -> None:
    for arguments, words in (
        (["-m", "model.lora_rank=8,16"], "leave --multirun out"),
        (["model.lora_rank=0"], "model.lora_rank must be at least 1"),
    ):
        answer = run("plan", *TINY, *arguments)
        assert answer.code == 1
        assert words in answer.err
        assert answer.err.count("\n") == 1
        assert not answer.imported_jax
