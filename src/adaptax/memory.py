"""What a run takes of each device, told from its compiled programs alone, and what is chosen by that."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptax.config import Config, micro_batch
from adaptax.data.pipeline import pad_batch
from adaptax.job import Job, Steps, build_steps
from adaptax.lora import describe_adapters
from adaptax.mesh import share_text
from adaptax.optim import build_optimizer
from adaptax.step import describe_state
from adaptax.weights import describe_weights

log = logging.getLogger(__name__)
GIB = 2**30
Shapes = Mapping[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Footprint:
    """Bytes on each device."""

    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    batch_bytes: int  # those prepared ahead included
    step_bytes: int  # activations and temporaries of the train step
    eval_bytes: int  # and of the evaluation step; 0 without one

    @property
    def held_bytes(self) -> int:
        """What is there all the time."""
        return self.base_bytes + self.adapter_bytes + self.optimizer_bytes + self.batch_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that is there at one time."""
        return self.held_bytes + max(self.step_bytes, self.eval_bytes)

    def describe(self) -> str:
        """One line of it."""
        parts = {
            "base weights": self.base_bytes,
            "adapters and optimizer": self.adapter_bytes + self.optimizer_bytes,
            "batches": self.batch_bytes,
            "activations and temporaries": self.peak_bytes - self.held_bytes,
            "peak": self.peak_bytes,
        }
        return ", ".join(f"{name} {show_bytes(size)}" for name, size in parts.items())


def measure(steps: Sequence[jax.stages.Compiled], state: Any, base: Any, batch: Any, num_ahead: int) -> Footprint:
    """The footprint of the train step and, where there is one, the evaluation step.

    State, base and batch may be shapes alone; ``num_ahead`` batches are prepared ahead.
    """
    return Footprint(
        base_bytes=local_bytes(base),
        adapter_bytes=local_bytes(state.adapters),
        optimizer_bytes=local_bytes(state) - local_bytes(state.adapters),
        batch_bytes=(1 + num_ahead) * local_bytes(batch),
        step_bytes=_temporary_bytes(steps[0]),
        eval_bytes=sum(map(_temporary_bytes, steps[1:])),
    )


def _temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program needs beside its arguments."""
    analysis: Any = compiled.memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # those that are not donated arguments
    return analysis.temp_size_in_bytes + outputs


def show_bytes(size: int) -> str:
    """``1.25 GiB``, or ``87.5 MiB`` where it is little."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 2 else f"{size / 2**20:.1f} MiB"


def local_bytes(tree: Any) -> int:
    """Bytes of arrays, or of their shapes, on one device."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 8 * math.prod(shape)
    return math.prod(shape) * dtype.itemsize


def tell_measured_peak(footprint: Footprint, mesh: Mesh) -> None:
    """Logs the most that the devices have held so far beside what was foretold; nothing where they do not say it."""
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    peak = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices)
    if peak:
        excess = peak / footprint.peak_bytes - 1
        log.info("measured peak %s on a device, %+.1f%% of what was foretold", show_bytes(peak), 100 * excess)


def free_bytes(config: Config, mesh: Mesh) -> int | None:
    """What a device has for a run: ``training.memory_gib``, or what the device says; the same in every process.

    On CPU the memory that is free now and what arrays take already, in equal parts for the devices. None where nobody
    knows.
    """
    if config.training.memory_gib is not None:
        return int(config.training.memory_gib * GIB)
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if devices[0].platform == "cpu":
        limit = (_free_host_bytes() + _held_bytes()) // len(devices)
    else:
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        limit = min((size for size in limits if size), default=0)
    return int(share_text(str(limit))) or None


def _held_bytes() -> int:
    """What the arrays of this process take: a run's state, a sweep's base weights. What is foretold contains them."""
    arrays = [array for array in jax.live_arrays() if not array.is_deleted()]
    arrays = [array for array in arrays if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)]  # of no weight
    # By buffer: a part of an array on several devices is an array too, once somebody has asked for it.
    parts = [shard.data for array in arrays for shard in array.addressable_shards]
    return sum({part.unsafe_buffer_pointer(): part.nbytes for part in parts}.values())


def _free_host_bytes() -> int:
    """Free memory of the machine, or of the control group that this process is in."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            free = min(free, int((root / limit).read_text()) - int((root / usage).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return free


def describe_base(job: Job, directory: Path | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the base weights: from the files' headers, or, before they are there, as they are published."""
    is_published = directory is None and job.source != "random"
    dtype = jnp.bfloat16 if is_published else job.dtype
    quantization = job.config.model.quantization
    return describe_weights(directory, job.arch, job.family.checkpoint, job.mesh, dtype, quantization)


def foretell(job: Job, base: Shapes, length: int) -> Footprint:
    """What the train step of a job takes, from :func:`compile_steps`."""
    return compile_steps(job, base, length, with_eval=False)[1]


def compile_steps(job: Job, base: Shapes, length: int, *, with_eval: bool) -> tuple[Steps, Footprint]:
    """Compiles the steps of a job from shapes alone, for sequences of a length, and measures them.

    Args:
      job: whose micro-batch and ``training.remat`` have been chosen.
      base: shapes of the base weights.
      length: tokens of a sequence.
      with_eval: whether the evaluation step, which keeps less, is compiled too.
    """
    config, training = job.config, job.config.training
    steps = build_steps(job)
    optimizer, _ = build_optimizer(config.optimizer, config.schedule, job.num_steps)
    state = describe_state(describe_adapters(job.family, job.arch, job.spec, job.mesh), optimizer, job.mesh)
    num_micro, rows = training.gradient_accumulation_steps, micro_batch(training) * job.mesh.shape["fsdp"]
    batch, eval_batch = (describe_batch((count, rows, length), job.mesh) for count in (num_micro, 1))
    compiled = [steps.train.compile(state, base, batch)]
    if with_eval:
        compiled.append(steps.evaluate.compile(state.adapters, base, eval_batch))
    return steps, measure(compiled, state, base, batch, config.data.prefetch_batches)


def describe_batch(shape: tuple[int, int, int], mesh: Mesh) -> Shapes:
    """Shapes of a global batch [A, B, T]."""
    blank = pad_batch([()] * (shape[0] * shape[1]), shape)
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    return {name: jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding) for name, array in blank.items()}
