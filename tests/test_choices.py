"""What is chosen by memory, and what is proposed where a run does not fit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import small_runs
import support
from adaptax.choices import NUM_PROPOSALS, choose_micro_batch, compile_fitting, propose
from adaptax.config import TrainingConfig, UserError, micro_batch
from adaptax.job import Job, build_job, with_training
from adaptax.memory import describe_base, foretell
from adaptax.prepare import load_base, prepare

LENGTH = 64


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_home(tmp_path_factory.mktemp("home"))


def job_of(home: Path, **training: Any) -> Job:
    """A job of a narrow model."""
    values = {"remat": "full"} | training
    config = small_runs.make_config(home, {f"training.{key}": value for key, value in values.items()})
    return build_job(config, support.make_mesh(), home / "model")


def peak_of(job: Job, **training: Any) -> int:
    """Bytes of the job with other values."""
    base = describe_base(job, Path(job.source))
    return foretell(with_training(job, **training), base, LENGTH).peak_bytes


def choose(job: Job, free: int | None, most: int = 1000) -> TrainingConfig:
    """What is chosen for it."""
    return choose_micro_batch(job, Path(job.source), LENGTH, free, most).config.training


def test_the_largest_micro_batch_that_fits_and_no_larger(home: Path) -> None:
    job = job_of(home, micro_batch_size="auto")
    free = (peak_of(job, micro_batch_size=12) + peak_of(job, micro_batch_size=16)) // 2
    assert micro_batch(choose(job, free)) == 12
    assert micro_batch(choose(job, 1 << 40, most=3)) == 3  # there are no more sequences


def test_a_global_batch_is_kept_by_accumulation(home: Path) -> None:
    job = job_of(home, micro_batch_size="auto", global_batch_size=10)
    free = (peak_of(job, micro_batch_size=5) + peak_of(job, micro_batch_size=10)) // 2
    training = choose(job, free)
    assert (training.micro_batch_size, training.gradient_accumulation_steps) == (5, 2)


@pytest.mark.slow
def test_with_remat_open_too_memory_goes_to_the_batch_first(home: Path) -> None:
    """Of a model of several layers: with one, nothing is gained by computing it anew."""
    changes = {"model.model_size": "tiny", "model.weights": None, "training.remat": "auto"}
    job = build_job(small_runs.make_config(home, changes | {"training.micro_batch_size": "auto"}), support.make_mesh())
    base = describe_base(job, None)
    full, matmul = (
        foretell(with_training(job, micro_batch_size=4, remat=remat), base, LENGTH).peak_bytes
        for remat in ("full", "matmul")
    )
    for free, remat in (((full + matmul) // 2, "full"), (1 << 40, "matmul")):
        training = choose_micro_batch(job, None, LENGTH, free, 4).config.training
        assert (training.micro_batch_size, training.remat) == (4, remat)


@pytest.mark.slow
def test_a_policy_that_does_not_fit_is_told_beside_the_one_that_is_taken(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"model.model_size": "tiny", "model.weights": None, "training.remat": "auto"}
    job = build_job(small_runs.make_config(home, changes | {"training.micro_batch_size": 4}), support.make_mesh())
    base = describe_base(job, None)
    with caplog.at_level("INFO", "adaptax"):
        *_, most = compile_fitting(with_training(job, remat="matmul"), base, LENGTH, None, with_eval=False)
        caplog.clear()
        taken, _, least = compile_fitting(job, base, LENGTH, most.peak_bytes - 1, with_eval=False)
    assert taken.config.training.remat == "full"
    assert least.peak_bytes < most.peak_bytes
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said] == ["training.remat=matmul", "training.remat=full"]
    assert [line.endswith(", which does not fit") for line in said] == [True, False]


def test_a_device_that_does_not_say_what_it_has_is_told(home: Path) -> None:
    with pytest.raises(UserError, match=r"set training\.memory_gib"):
        choose(job_of(home, micro_batch_size="auto"), None)


def test_proposals_fit_and_take_what_they_say(home: Path) -> None:
    job = job_of(home, micro_batch_size=8, remat="matmul")
    free = peak_of(job, remat="full", micro_batch_size=4, gradient_accumulation_steps=2)
    proposals = propose(job, Path(job.source), LENGTH, free)
    assert len(proposals) == NUM_PROPOSALS
    overrides = [p.overrides for p in proposals]
    assert "training.remat=full training.micro_batch_size=4 training.gradient_accumulation_steps=2" in overrides
    for proposal in proposals:
        if "micro_batch" in proposal.overrides and "mesh" not in proposal.overrides:
            assert proposal.footprint.peak_bytes <= free
            values = dict(part.removeprefix("training.").split("=") for part in shlex.split(proposal.overrides))
            typed = {key: int(value) if value.isdecimal() else value for key, value in values.items()}
            assert peak_of(job, **typed) == proposal.footprint.peak_bytes


def test_a_run_that_does_not_fit_stops_before_its_first_step(home: Path) -> None:
    prepared = prepare(small_runs.make_config(home, {"training.memory_gib": 1e-9}), support.make_mesh())
    with pytest.raises(UserError, match=r"the run needs .* MiB on each device, which has .*; try "):
        load_base(prepared)


def test_what_was_chosen_is_saved_and_taken_again(home: Path, tmp_path: Path) -> None:
    changes = {"training.micro_batch_size": "auto", "training.global_batch_size": 8, "training.remat": "auto"}
    changes |= {"checkpoint.every_steps": 2, "training.num_batches": 4}
    config = small_runs.make_config(home, changes)
    straight = small_runs.train(tmp_path / "straight", config)
    stopped = small_runs.change(config, {"training.stop_after_steps": 2})
    small_runs.train(tmp_path / "stopped", stopped)
    saved = yaml.safe_load((tmp_path / "stopped" / "config.yaml").read_text())["training"]
    assert (saved["micro_batch_size"], saved["gradient_accumulation_steps"], saved["remat"]) == (8, 1, "matmul")
    resumed = small_runs.train(tmp_path / "stopped", config)
    assert small_runs.losses_of(resumed) == small_runs.losses_of(straight)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"global_batch_size": 7, "micro_batch_size": 2}, "must be a multiple of micro_batch_size=2 x fsdp=1"),
        (
            {"global_batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 3},
            "makes gradient_accumulation_steps 4, not 3",
        ),
        ({"micro_batch_size": "some"}, "micro_batch_size=some: it is one of auto"),
        ({"micro_batch_size": 0.5}, "must be auto or a whole number|must be a whole number or auto"),
    ],
)
def test_batch_sizes_that_do_not_go_together_are_refused(home: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        small_runs.make_config(home, {f"training.{key}": value for key, value in changes.items()})


def test_a_global_batch_sets_the_accumulation(home: Path) -> None:
    config = small_runs.make_config(home, {"training.global_batch_size": 12})
    assert config.training.gradient_accumulation_steps == 3
