"""The same training on any mesh, with every device holding its share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import small_runs
import support
from adaptax.config import UserError
from adaptax.mesh import build_mesh
from adaptax.models.gemma3_weights import SIZES

ARCH = SIZES["tiny"]  # one key/value head: replicated under tp


def train(fsdp: int, tp: int, num_steps: int = 20) -> tuple[list[float], support.Trainer]:
    """Losses of a few steps on global batches of eight rows, whatever the mesh."""
    mesh = support.make_mesh(fsdp, tp)
    base = support.load(Path(support.find_source_of_tiny()), ARCH, mesh)
    optimizer = support.optimizer_config(learning_rate=5e-3)
    trainer = support.Trainer(ARCH, base, support.full_spec(ARCH), mesh, optimizer)
    batches = [support.random_batch(ARCH.vocab_size, (1, 8, 24), seed=k % 4) for k in range(num_steps)]
    return [trainer.run(batch)["loss"] for batch in batches], trainer


@pytest.fixture(scope="module")
def alone() -> list[float]:
    losses, _ = train(1, 1)
    assert losses[-1] < losses[0] - 0.5  # it learns, so that agreement means something
    return losses


@pytest.mark.parametrize(("fsdp", "tp"), [(8, 1), (1, 4), (2, 4), (4, 2)])
def test_losses_agree_with_those_of_one_device_and_shares_are_held(fsdp: int, tp: int, alone: list[float]) -> None:
    losses, trainer = train(fsdp, tp)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    held = {d: 0 for d in trainer.mesh.devices.flat}
    arrays = [*trainer.base.values(), *jax.tree.leaves(trainer.state)]
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    split, whole = _ideal_bytes(trainer, fsdp, tp)
    assert max(held.values()) == min(held.values())
    assert max(held.values()) <= split + whole
    assert split < 0.7 * sum(a.nbytes for a in arrays)  # most of it is really split


def _ideal_bytes(trainer: support.Trainer, fsdp: int, tp: int) -> tuple[int, int]:
    """(bytes of a device's share of what has a width, heads, mlp or vocabulary axis; bytes of what has none)."""
    axes = support.FAMILY.checkpoint.parameter_axes(ARCH)
    split = whole = 0
    for path, array in trainer.base.items():
        letters = axes[path]
        if len(letters.lstrip("L")) < 2:
            whole += array.nbytes
        else:
            divisor = (fsdp if "D" in letters else 1) * (tp if set(letters) & set("VNF") else 1)
            split += array.nbytes // divisor
    for path, array in trainer.state.adapters.items():
        kind = path.removeprefix("layers/").rpartition("/")[0]
        (in_axis, _), (out_axis, _) = support.FAMILY.checkpoint.adapter_axes(ARCH, kind)
        divisor = {"D": fsdp, "N": tp, "F": tp, "C": 1}[in_axis if path.endswith("_a") else out_axis]
        split += 3 * array.nbytes // divisor  # with both of Adam's moments
    return split, whole + 1024  # counters and keys


def test_a_mesh_over_too_many_devices_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"4 x 4 = 16 devices; this run sees 8"):
        build_mesh([[4, 4], ["fsdp", "tp"]])


def test_the_order_of_the_axis_names_is_free() -> None:
    assert dict(build_mesh([[4, 2], ["tp", "fsdp"]]).shape) == {"fsdp": 2, "tp": 4}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Two real processes of two devices each, on mesh [[2, 2]], give the loss and adapter of one process."""
    root = Path(__file__).parents[1]
    command = [
        sys.executable,
        str(root / "run_training.py"),
        *small_runs.as_overrides({"training.num_batches": 3, "model.mesh_shape": [[2, 2], ["fsdp", "tp"]]}),
    ]
    home = small_runs.write_home(tmp_path / "home")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def start(folder: str, devices: int, **variables: str) -> subprocess.Popen[str]:
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        return subprocess.Popen(
            [*command, f"hydra.run.dir={tmp_path / folder}"],
            env=environment | flags | variables,
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    together = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:29511", "JAX_NUM_PROCESSES": "2"}
    processes = [start(f"two_{i}", 2, JAX_PROCESS_ID=str(i), **together) for i in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    alone = start("one", 4)
    output, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, output
    from safetensors.numpy import load_file

    a, b = (load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors") for folder in ("two_0", "one"))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5)
    assert not (tmp_path / "two_1" / "adapter").exists()
