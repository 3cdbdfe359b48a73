"""Checkpoints: written by Orbax beside the training, and read again onto any mesh.

A save costs the training the copy of adapters and moments to the host. A thread then waits for Orbax, seals the
checkpoint with its manifest, writes the adapters in PEFT's format and deletes what is no longer kept.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from adaptax.config import CheckpointConfig, UserError
from adaptax.manifest import (
    ARRAYS,
    Damaged,
    Manifest,
    clean_up,
    delete_checkpoint,
    list_checkpoints,
    name_step,
    publish,
    seal,
    step_of,
)
from adaptax.progress import Progress
from adaptax.run_folder import RunFolder
from adaptax.step import TrainState

log = logging.getLogger(__name__)
logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's threads log what they raise; here it becomes one line
GIB = 2**30


@dataclass(frozen=True)
class Writer:
    """What a save needs beside the state. All of it is called in the saving thread of process 0."""

    config: dict[str, Any]
    identity: Callable[[], dict[str, Any]]
    save_adapter: Callable[[Mapping[str, np.ndarray], Path], None]


class Saver:
    """Saves the state of a run, one save at a time, in the background."""

    def __init__(self, folder: RunFolder, config: CheckpointConfig, writer: Writer, state: TrainState):
        self._folder, self._config, self._writer = folder, config, writer
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        shapes, self._size = describe(as_tree(state)), measure(state)
        self._digest = self._worker.submit(lambda: digest_arrays.lower(shapes).compile())  # ahead of the first save
        self._pending: Future[None] | None = None
        later = (path for path in list_checkpoints(folder.checkpoints) if (step_of(path) or 0) > int(state.step))
        self._stale = set(later)  # damaged, or of a future that was taken back
        self._last_time = time.monotonic()
        self.last_step: int | None = None  # that was saved whole
        self.failure: str | None = None  # of the last save

    def is_due(self, step: int) -> bool:
        """Whether ``checkpoint.every_steps`` asks for this step."""
        every = self._config.every_steps
        return every is not None and step % every == 0

    def is_time(self) -> bool:
        """Whether ``checkpoint.every_minutes`` have passed since the last save."""
        minutes = self._config.every_minutes
        return minutes is not None and time.monotonic() - self._last_time >= 60 * minutes

    def save(self, step: int, state: TrainState, progress: Progress) -> float:
        """Begins to save; the state may be donated to the next step at once. Returns the seconds that it took."""
        started = self._last_time = time.monotonic()
        self.wait()
        if jax.process_index() == 0:
            clean_up(self._folder.checkpoints)  # a save that failed may have left something
        path = self._folder.checkpoints / name_step(step)
        partial = path.with_name(path.name + ".partial")
        tree = as_tree(state)
        try:
            if jax.process_count() == 1 and shutil.disk_usage(self._folder.path).free < self._size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # Orbax's threads are not even begun
            digests, adapters = self._digest.result()(tree), gather(state.adapters)
            with begin_orbax():
                response = ocp.save_checkpointables_async(str(partial.absolute() / ARRAYS), {"state": tree})
        except (OSError, ValueError, RuntimeError) as error:
            self._fail(partial, path, error)
        else:
            kept = replace(progress, losses=list(progress.losses))
            self._pending = self._worker.submit(self._finish, path, response, digests, adapters, kept)
        return time.monotonic() - started

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way, or has come to its end unseen."""
        return self._pending is not None

    def wait(self) -> None:
        """Waits for the save that is under way; if it fails, :attr:`failure` says why."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Finishes what was begun."""
        self.wait()
        self._worker.shutdown()

    def write_adapters(self, adapters: Mapping[str, np.ndarray], *, is_best: bool) -> None:
        """``adapters/last``, and ``adapters/best`` where these are the best, in PEFT's format."""
        for name in ("last", "best") if is_best else ("last",):
            self._writer.save_adapter(adapters, self._folder.adapters / name)

    def _finish(self, path: Path, response: Any, digests: Any, adapters: Any, progress: Progress) -> None:
        """In the thread: everything after the copy to the host."""
        partial, unwritten, step = path.with_name(path.name + ".partial"), path, step_of(path)
        assert step is not None
        try:
            response.result()
            if jax.process_index() == 0:
                saved_at = datetime.now(UTC).isoformat(timespec="seconds")
                manifest = Manifest(
                    step=step,
                    saved_at=saved_at,
                    progress=dataclasses.asdict(progress),
                    config=self._writer.config,
                    identity=self._writer.identity(),
                    digests=read_digests(digests),
                )
                seal(partial, manifest)
                publish(partial)
                self.last_step, unwritten = step, self._folder.adapters
                self._delete_old(step, progress.best_step)  # first: it makes room
                self.write_adapters(adapters, is_best=progress.best_step == step)
            self.last_step, self.failure = step, None
        except Exception as error:  # whatever Orbax raises: training goes on without this checkpoint
            self._fail(partial, unwritten, error)

    def _fail(self, partial: Path, unwritten: Path, error: BaseException) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self.failure = f"{unwritten} was not written: {explain(error)}"
        has_earlier = set(list_checkpoints(self._folder.checkpoints)) - self._stale
        good = "earlier checkpoints are whole" if has_earlier else "there is no earlier checkpoint"
        log.warning("%s; %s", self.failure, good)

    def _delete_old(self, step: int, best_step: int | None) -> None:
        """Keeps the latest ones and the best; those that are stale go with the first that is whole."""
        stale, self._stale = self._stale - {self._folder.checkpoints / name_step(step)}, set()
        kept = [path for path in list_checkpoints(self._folder.checkpoints) if path not in stale]
        for path in [*stale, *(path for path in kept[: -self._config.keep] if step_of(path) != best_step)]:
            delete_checkpoint(path)


def begin_orbax() -> ocp.Context:
    """Has folders made before the threads that write to them begin: these would wait for them for minutes.

    Of several processes only the first one knows that a folder could not be made; the others wait in the background.
    """
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = jax.process_count() > 1
    return context


def restore(path: Path, manifest: Manifest, like: TrainState) -> TrainState:
    """The state of a checkpoint, laid on the mesh as ``like`` is.

    Raises:
      Damaged: an array is not what it was when it was saved.
    """
    names = {jax.tree_util.keystr(place) for place, _ in jax.tree_util.tree_leaves_with_path(as_tree(like))}
    if names != manifest.digests.keys():
        raise Damaged(
            f"it holds other arrays than this version of adaptax, such as {min(names ^ manifest.digests.keys())}"
        )
    try:
        tree = ocp.load_checkpointables(str(path.absolute() / ARRAYS), {"state": describe(as_tree(like))})["state"]
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise Damaged(f"its arrays cannot be read: {explain(error)}") from None
    found = read_digests(digest_arrays(tree))
    wrong = [name for name in found.keys() | manifest.digests if found.get(name) != manifest.digests.get(name)]
    if wrong:
        raise Damaged(f"the array {min(wrong)} is not what was saved")
    key = jax.random.wrap_key_data(tree["key"])
    return TrainState(**(tree | {"key": jax.device_put(key, like.key.sharding)}))


def describe(tree: Any) -> Any:
    """Shapes, types and places of arrays."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), tree)


def as_tree(state: TrainState) -> dict[str, Any]:
    """The state as arrays that can be stored."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return fields | {"key": jax.random.key_data(state.key)}


@jax.jit
def digest_arrays(tree: Any) -> dict[str, jax.Array]:
    """A number per array, the same on every mesh, that any changed bit changes.

    The words of an array are mixed with their places (the end of MurmurHash3), then summed modulo 2^32.
    """
    return {jax.tree_util.keystr(path): _digest(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def read_digests(digests: Mapping[str, jax.Array]) -> dict[str, str]:
    """As text."""
    return {name: f"{int(value):08x}" for name, value in jax.device_get(dict(digests)).items()}


def _digest(array: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    mixed = words ^ place * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ mixed >> shift) * jnp.uint32(factor)
    return mixed.sum(dtype=jnp.uint32)


def gather(arrays: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Whole arrays on the host of every process."""
    is_alone = jax.process_count() == 1
    host = jax.device_get(dict(arrays)) if is_alone else multihost_utils.process_allgather(dict(arrays), tiled=True)
    return {path: np.asarray(array) for path, array in host.items()}


def measure(state: TrainState) -> int:
    """Bytes of a checkpoint and of what is written beside it, hardly less than it takes."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(as_tree(state)))
    return size + (1 << 18) + 2 * sum(array.nbytes for array in state.adapters.values())  # manifest; adapters


def check_room(folder: RunFolder, keep: int, state: TrainState, *, has_best: bool) -> None:
    """Refuses to start where the disk cannot hold the checkpoints that are kept and one more.

    Raises:
      UserError: with what is needed and what there is.
    """
    size = measure(state)
    needed = size * (keep + 1 + has_best)
    needed -= sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
    needed, free = max(needed, size), shutil.disk_usage(folder.path).free  # each is written before another one goes
    if needed > free:
        raise UserError(
            f"{folder.path} has {free / GIB:.3g} GiB free, and its checkpoints may take {needed / GIB:.3g} GiB more: "
            f"checkpoint.keep={keep} of {size / GIB:.3g} GiB each, the best one and one being written; lower "
            "checkpoint.keep or model.lora_rank, or choose another hydra.run.dir"
        )


def explain(error: BaseException) -> str:
    """What went wrong, without Orbax's and tensorstore's context."""
    cause: BaseException | None = error
    while cause is not None:
        for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO):
            text = os.strerror(number)
            if getattr(cause, "errno", None) == number or text.lower() in str(cause).lower():
                return text
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:300] or type(error).__name__
