"""What a run takes of each device, told before weights are read."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import small_runs
import support
from adaptax.config import Config
from adaptax.job import Job, build_job
from adaptax.memory import (
    GIB,
    Footprint,
    compile_steps,
    describe_base,
    foretell,
    free_bytes,
    local_bytes,
    show_bytes,
    tell_measured_peak,
)
from adaptax.mesh import shard_batch
from adaptax.prepare import load_base, prepare


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_home(tmp_path_factory.mktemp("home"))


def job_of(size: str, fsdp: int = 1, tp: int = 1, **training: object) -> Job:
    """A job of a published size that has no weights yet."""
    changes = {"model.model_size": size, "model.weights": None, "model.lora_rank": 32, "model.lora_module_path": ".*"}
    changes |= {"model.mesh_shape": [[fsdp, tp], ["fsdp", "tp"]], "training.remat": "full"}
    changes |= {f"training.{key}": value for key, value in training.items()}
    config = small_runs.make_config(Path("nowhere"), changes)
    return build_job(config, support.make_mesh(fsdp, tp))


def test_kinds_of_memory_are_those_of_the_arrays() -> None:
    """By hand, for the tiny model: every adapter has two moments, float32 each."""
    job = job_of("tiny", micro_batch_size=2)
    footprint = compile_steps(job, describe_base(job, None), 64, with_eval=True)[1]
    count = sum(math.prod(leaf.shape) for leaf in describe_base(job, None).values())
    assert footprint.base_bytes == 2 * count  # as published, in bfloat16
    num_adapted = 6 * 32 * (128 + 128 + 128 + 64 + 128 + 128 + 3 * (128 + 512))
    assert footprint.adapter_bytes == 4 * num_adapted
    assert 8 * num_adapted <= footprint.optimizer_bytes < 8 * num_adapted + 100
    assert footprint.batch_bytes == (1 + job.config.data.prefetch_batches) * 2 * 64 * (4 * 4 + 1)
    assert footprint.held_bytes + footprint.step_bytes == footprint.peak_bytes
    assert 0 < footprint.eval_bytes < footprint.step_bytes
    assert f"peak {show_bytes(footprint.peak_bytes)}" in footprint.describe()


def test_a_device_of_a_mesh_holds_its_share() -> None:
    whole = job_of("tiny", micro_batch_size=4)
    split = job_of("tiny", 2, 2, micro_batch_size=2)
    one, part = (foretell(job, describe_base(job, None), 64) for job in (whole, split))
    assert part.base_bytes < 0.3 * one.base_bytes
    assert part.adapter_bytes < 0.8 * one.adapter_bytes
    assert part.batch_bytes == one.batch_bytes // 2
    assert part.step_bytes < 0.8 * one.step_bytes


def test_what_is_kept_for_the_backward_pass_shows() -> None:
    jobs = [job_of("tiny", micro_batch_size=4, remat=remat) for remat in ("full", "matmul")]
    full, matmul = (foretell(job, describe_base(job, None), 64).step_bytes for job in jobs)
    assert full < 0.8 * matmul


def test_the_base_is_not_copied_in_another_type() -> None:
    """Layers are cast one at a time: a bfloat16 base under float32 takes no room for all of it in float32."""
    job = job_of("tiny", micro_batch_size=1)
    narrow = describe_base(job, None)
    wide = {path: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=leaf.sharding) for path, leaf in narrow.items()}
    more = foretell(job, narrow, 64).step_bytes - foretell(job, wide, 64).step_bytes
    stacked = sum(math.prod(leaf.shape) for path, leaf in wide.items() if path.startswith("layers/")) * 4
    head = math.prod(wide["embedder/embedding"].shape) * 4
    assert more < head + stacked / 2


def test_a_run_has_the_footprint_that_shapes_alone_foretell(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "adaptax")
    config = small_runs.make_config(home, {"training.remat": "matmul"})
    prepared, base = load_base(prepare(config, support.make_mesh()))
    job = dataclasses.replace(prepared.job, config=config)
    length = prepared.feed.batches.lengths[0]
    foretold = compile_steps(job, describe_base(job, home / "model"), length, with_eval=True)[1]
    assert foretold.describe() in caplog.text
    assert foretold.base_bytes == sum(leaf.nbytes for leaf in base.values())
    assert foretold.adapter_bytes == sum(leaf.nbytes for leaf in prepared.state.adapters.values())


def test_a_limit_of_ones_own_is_the_limit(home: Path) -> None:
    config: Config = small_runs.make_config(home)
    mine = small_runs.change(config, {"training.memory_gib": 0.25})
    assert free_bytes(mine, support.make_mesh()) == GIB // 4
    alone, shared = free_bytes(config, support.make_mesh()), free_bytes(config, support.make_mesh(2, 4))
    assert alone is not None
    assert shared is not None
    assert 2**30 // 4 < alone < 2**50
    assert shared == pytest.approx(alone / 8, rel=0.2)  # simulated devices share one machine


def test_what_arrays_hold_already_is_free_for_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's state lies there before its memory is told, and a sweep's base weights do."""
    config = small_runs.make_config(home)
    monkeypatch.setattr("adaptax.memory._free_host_bytes", lambda: 4 * GIB)  # others take and give meanwhile
    held = jnp.ones(1000)
    before = free_bytes(config, support.make_mesh())
    held.delete()
    after = free_bytes(config, support.make_mesh())
    assert before is not None
    assert after is not None
    assert before - after == 4000
    assert after >= 4 * GIB


def test_what_lies_on_several_devices_is_counted_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, mesh = small_runs.make_config(home), support.make_mesh(2, 2)
    monkeypatch.setattr("adaptax.memory._free_host_bytes", lambda: 4 * GIB)
    before = free_bytes(config, mesh)
    held = jax.device_put(jnp.ones((8, 1000)), NamedSharding(mesh, PartitionSpec("fsdp", "tp")))
    found = [free_bytes(config, mesh) for _ in range(2)]
    held.delete()
    assert before is not None
    assert [free - before for free in found if free is not None] == [8000, 8000]  # of 32,000 on each of four devices


def test_the_measured_peak_is_told_beside_the_foretold_one(caplog: pytest.LogCaptureFixture) -> None:
    def make_device(peak: int, process: int = 0) -> SimpleNamespace:
        return SimpleNamespace(
            process_index=process, memory_stats=lambda: {"peak_bytes_in_use": peak} if peak else None
        )

    caplog.set_level("INFO", "adaptax")
    footprint = Footprint(GIB, 0, 0, 0, GIB, 0)
    for devices in ([make_device(0)], [make_device(GIB), make_device(2 * GIB + GIB // 10), make_device(5 * GIB, 1)]):
        tell_measured_peak(footprint, SimpleNamespace(devices=np.array(devices, object)))  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == [
        "measured peak 2.10 GiB on a device, +5.0% of what was foretold"
    ]


@pytest.mark.gpu
def test_a_gpu_measures_what_was_foretold(home: Path) -> None:
    """Before any other test of this process has used more of it."""
    keys = {"model.weights": "random", "model.model_size": "270m", "data.max_length": 512}
    prepared, base = load_base(prepare(small_runs.make_config(home, keys), support.make_mesh()))
    assert prepared.footprint is not None
    batch = next(iter(prepared.feed.batches.iterate(0, 1, 1, lambda batch: shard_batch(batch, prepared.job.mesh))))
    jax.block_until_ready(prepared.steps.train(prepared.state, base, batch))
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    assert peak == pytest.approx(prepared.footprint.peak_bytes, rel=0.05)


def test_sizes_are_told_in_what_suits_them() -> None:
    assert [show_bytes(size) for size in (0, 3 << 20, 1 << 29, 3 << 30)] == [
        "0.0 MiB",
        "3.0 MiB",
        "0.50 GiB",
        "3.00 GiB",
    ]


def test_keys_take_eight_bytes() -> None:
    assert local_bytes(jax.random.split(jax.random.key(0), 3)) == 24
