"""The device mesh, where every array lies on it, and how several processes find each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptax.config import MESH_AXES, UserError, mesh_sizes

HEARTBEAT_SECONDS = 30  # until the others notice that a process is gone
# Axis letter -> mesh axis. Letters that are absent are never split; keys and values only where K divides.
PARTITION_RULES: dict[str, str] = {"B": "fsdp", "D": "fsdp", "V": "tp", "N": "tp", "F": "tp", "K": "tp"}


def start_processes() -> None:
    """Joins the other processes of this run, if the environment tells of any (``JAX_*`` variables, or srun)."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if jax.distributed.is_initialized():  # by an earlier job of a sweep
        return
    if address:
        count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
        if not (count or "").isdecimal() or not (index or "").isdecimal():
            raise UserError("JAX_COORDINATOR_ADDRESS is set: JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers too")
        of, number = int(count or 0), int(index or 0)
        jax.distributed.initialize(address, of, number, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    elif "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def build_mesh(mesh_shape: Any) -> Mesh:
    """The mesh of ``model.mesh_shape`` over the first fsdp x tp devices.

    Raises:
      UserError: there are too few devices, or several processes of which some would stand idle.
    """
    fsdp, tp = mesh_sizes(mesh_shape)
    devices = jax.devices()
    if fsdp * tp > len(devices):
        raise UserError(
            f"model.mesh_shape asks for {fsdp} x {tp} = {fsdp * tp} devices; this run sees {len(devices)} "
            f"({devices[0].platform}): fsdp x tp must not be more"
        )
    if jax.process_count() > 1 and fsdp * tp != len(devices):
        raise UserError(f"model.mesh_shape must use all {len(devices)} devices of the {jax.process_count()} processes")
    return Mesh(np.array(devices[: fsdp * tp]).reshape(fsdp, tp), MESH_AXES)


def partition(axes: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose axes have these letters.

    Vectors (norm scales, also stacked) are whole on every device, and so is an axis that the mesh does not divide.
    """
    if len(axes.lstrip("L")) < 2:
        return replicated(mesh)
    names = [PARTITION_RULES.get(letter) for letter in axes]
    split = [n if n and size % mesh.shape[n] == 0 else None for n, size in zip(names, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*split))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


class Votes:
    """Agreement between processes on what to do after a step, without waiting for each other.

    Alone, a process gets its own vote back. Several get the highest vote of the step before, which is computed on the
    devices behind that step, so that all of them read the same at the same step.
    """

    def __init__(self) -> None:
        everything = Mesh(np.array(jax.devices()), ("all",))
        self._sharding = NamedSharding(everything, PartitionSpec("all"))
        self._highest = jax.jit(jnp.max, out_shardings=replicated(everything))
        self._before: jax.Array | None = None

    def cast(self, vote: int) -> int:
        """Gives a vote after a step, and returns what is agreed on."""
        if jax.process_count() == 1:
            return vote
        num_devices = jax.device_count()
        shape, mine = (num_devices,), np.full(num_devices, vote, np.int32)
        votes = jax.make_array_from_callback(shape, self._sharding, mine.__getitem__)
        agreed, self._before = self._before, self._highest(votes)
        return 0 if agreed is None else int(agreed)


def share_text(text: str) -> str:
    """The text of process 0, in every process."""
    if jax.process_count() == 1:
        return text
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text.encode()))))
    buffer = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(text.encode(), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).decode()


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """(i, n): the devices of this process hold the i-th of n equal parts of a batch's rows."""
    mine = [i for i, row in enumerate(mesh.devices) if any(d.process_index == jax.process_index() for d in row)]
    n, rest = divmod(mesh.shape["fsdp"], len(mine))
    if rest or mine[0] % len(mine) or mine != list(range(mine[0], mine[0] + len(mine))):
        return 0, 1
    return mine[0] // len(mine), n


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Lays a global batch [A, B, T] on the mesh, B over fsdp. Each process passes its :func:`batch_part` of B."""
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    if jax.process_count() == 1:
        return {k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in batch.items()}
    _, n = batch_part(mesh)
    shapes = {k: (v.shape[0], v.shape[1] * n, *v.shape[2:]) for k, v in batch.items()}
    return {k: jax.make_array_from_process_local_data(sharding, v, shapes[k]) for k, v in batch.items()}
