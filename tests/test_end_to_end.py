"""The promises of the README, kept by real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from safetensors.numpy import load_file

import checkpoints
import support

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
TINY = ["model=gemma3_tiny", "data=home", "training.num_batches=2", "training.micro_batch_size=2"]
pytestmark = pytest.mark.slow


def train(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python run_training.py`` from another directory."""
    command = [sys.executable, str(ROOT / "run_training.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def metrics_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_quickstart_learns_the_skill(tmp_path: Path) -> None:
    """In the run that the gate has just made, where it says so."""
    folder = Path(os.environ.get("ADAPTAX_QUICKSTART_RUN") or tmp_path / "run")
    if not folder.exists():
        train(tmp_path, "+experiment=quickstart", f"hydra.run.dir={folder}")
    scores = next(row for row in metrics_of(folder) if "eval_exact_match" in row)
    assert scores["eval_exact_match_before"] <= 0.05
    assert scores["eval_exact_match"] >= 0.90
    log = (folder / "run.log").read_text()
    assert re.search(r"exact match on 200 held-out rows: 0\.0% before, \d+\.\d% after", log)
    assert (folder / "loss.png").stat().st_size > 5000


def test_a_sweep_writes_one_folder_per_job_and_returns_its_losses(tmp_path: Path) -> None:
    train(tmp_path, "+experiment=rank_sweep", "--multirun", "model.lora_rank=2,4", *TINY, "name=sweep")
    jobs = sorted((tmp_path / "outputs" / "sweep").glob("*/*/[01]"))
    assert [job.name for job in jobs] == ["0", "1"]
    for job, rank in zip(jobs, (2, 4), strict=True):
        config = json.loads((job / "adapter" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == rank  # the sweep keeps alpha at the rank


def test_a_failed_job_of_a_sweep_is_told_at_once_and_the_others_go_on(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run_training.py"), "--multirun", "model.lora_rank=0,4", *TINY, "name=sweep"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error in job 0: model.lora_rank must be at least 1, not 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "outputs" / "sweep").glob("*/*/1/adapter/adapter_model.safetensors"))


def test_a_wheel_works_in_a_foreign_directory(tmp_path: Path) -> None:
    """Configuration and assets are inside; what git ignores is not."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "adaptax/conf/config.yaml" in names
    assert "adaptax/assets/gemma3_tiny/model.safetensors" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    sizes = [p.stat().st_size for p in (tmp_path / "site" / "adaptax" / "assets").rglob("*") if p.is_file()]
    assert sum(sizes) <= 12 << 20
    (tmp_path / "elsewhere" / "my").mkdir(parents=True)
    custom = (ROOT / "conf" / "model" / "gemma3_tiny.yaml").read_text().replace("lora_rank: 32", "lora_rank: 4")
    (tmp_path / "elsewhere" / "my" / "model").mkdir()
    (tmp_path / "elsewhere" / "my" / "model" / "custom.yaml").write_text(custom)
    program = "from adaptax.cli import main; import adaptax; print(adaptax.__file__); main()"
    command = [sys.executable, "-c", program, *TINY[1:], "model=custom", "--config-dir", "my", "name=wheel"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    (config,) = (tmp_path / "elsewhere" / "outputs" / "wheel").glob("*/*/adapter/adapter_config.json")
    assert json.loads(config.read_text())["r"] == 4


def test_a_command_trains_a_checkpoint_of_transformers_and_peft_computes_what_we_computed(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = checkpoints.build_multimodal_model(seed=11)
    base = checkpoints.save(model, tmp_path / "base")
    rows = [{"prompt": f"turn {i} on", "completion": f"on: {i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(
        tmp_path,
        f"model.weights={base}",
        "model.model_size=auto",
        "model.tokenizer=embedded:gemma3_tiny/tokenizer.model",
        "model.lora_rank=4",
        f"data.train={tmp_path / 'rows.jsonl'}",
        "data.eval_fraction=0.25",
        "training.num_epochs=3",
        "optimizer.learning_rate=1e-2",
        "hydra.run.dir=run",
    )
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    arch, weights = support.open_checkpoint(base)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    spec = support.full_spec(arch, config["r"], config["lora_alpha"])
    adapters = support.adapters_from_peft(tensors, arch, spec)
    tokens = np.random.default_rng(3).integers(4, 2000, (2, 30))
    ours = support.logits(support.make_program(arch, spec, support.make_mesh()), weights, adapters, tokens)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "run" / "adapter"))
    with torch.no_grad():
        theirs = loaded(input_ids=torch.tensor(tokens)).logits.numpy()
        with loaded.disable_adapter():
            plain = loaded(input_ids=torch.tensor(tokens)).logits.numpy()
    assert np.abs(theirs - ours).max() <= 1e-4
    assert np.abs(theirs - plain).max() > 1e-3
