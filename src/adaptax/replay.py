"""``adaptax replay``: a batch that was not finite, run again on the adapters that met it, layer by layer."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adaptax.checkpoint import restore
from adaptax.config import Config, UserError
from adaptax.diagnose import Diagnosis, diagnose, show_diagnosis
from adaptax.faults import Dump, list_dumps, read_dump
from adaptax.lora import Arrays
from adaptax.manifest import Damaged, Manifest, list_checkpoints, read_checkpoint
from adaptax.mesh import shard_batch
from adaptax.prepare import Prepared, identify_inputs, load_base, prepare
from adaptax.progress import Progress
from adaptax.resume import check_identity
from adaptax.run_folder import RunFolder
from adaptax.step import TrainState

log = logging.getLogger(__name__)


def replay(config: Config, mesh: Mesh, folder: RunFolder, step: int | None = None) -> dict[str, Diagnosis]:
    """Shows where the numbers of a step ceased to be finite, in the run's own compute type and in float32.

    The adapters are those that the step began with: of a checkpoint that still holds them, or trained again from an
    earlier one, which gives the same bits.

    Args:
      config: the run's own.
      mesh: to run it on.
      folder: the run's.
      step: which of the steps that were written down; None for the first.

    Returns:
      The diagnosis by compute type.

    Raises:
      UserError: there is no such step.
    """
    dump = find_dump(folder, step)
    prepared = prepare(config, mesh, is_resumed=True)
    checkpoint, state = find_state(prepared, folder, dump.step)
    prepared, base = load_base(prepared, compile_step=checkpoint < dump.step - 1)
    state = roll_forward(prepared, base, state, checkpoint, dump.step - 1)
    batch = shard_batch(dump.batch, mesh)
    key = jax.random.fold_in(state.key, dump.step - 1) if prepared.job.spec.dropout else None
    found = {}
    for dtype in dict.fromkeys((prepared.job.dtype, jnp.dtype(jnp.float32))):
        jax.config.update("jax_default_matmul_precision", "highest" if dtype == jnp.float32 else None)
        program = replace(prepared.steps.program, dtype=dtype)
        found[str(dtype)] = diagnose(program, base, state.adapters, batch, key)
    log.info("step %d of %s: loss %s, gradient norm %s", dump.step, folder.path, dump.loss, dump.grad_norm)
    show_diagnosis(found)
    show_rows(dump, next(iter(found.values())))
    return found


def find_dump(folder: RunFolder, step: int | None) -> Dump:
    """The batch of that step, or of the first one that was written down."""
    steps = list_dumps(folder.nonfinite)
    if not steps:
        raise UserError(f"{folder.path}: loss and gradient of every step were finite; there is nothing to replay")
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: the steps written down in {folder.nonfinite} are {', '.join(map(str, steps))}")
    return read_dump(folder.nonfinite, steps[0] if step is None else step)


def find_state(prepared: Prepared, folder: RunFolder, step: int) -> tuple[int, TrainState]:
    """(steps done, state) from which the adapters at the start of ``step`` can be had with the least work.

    A step that is not finite leaves the adapters as they were. So a checkpoint behind a row of them, up to which no
    step was finite, still has what the first of them began with, and counts as if it were from before ``step``.
    """
    inputs, best = identify_inputs(prepared), (0, prepared.state)
    for path in list_checkpoints(folder.checkpoints):
        try:
            manifest = read_checkpoint(path)
            done = steps_done(manifest, step)
            if done is None or done <= best[0]:
                continue
            check_identity(manifest.identity, inputs, f"the run of {path}")
            best = done, restore(path, manifest, prepared.state)
        except Damaged as error:
            log.warning("%s is damaged: %s", path, error)
    if not best[0] and prepared.initial.is_gone:
        name = prepared.job.config.model.init_adapter
        raise UserError(f"model.init_adapter={name} is gone, and no checkpoint is as old as step {step}")
    return best


def steps_done(manifest: Manifest, step: int) -> int | None:
    """How many of the steps before ``step`` a checkpoint's adapters have been through; None if it is a later one's."""
    if manifest.step < step:
        return manifest.step
    skipped = Progress(**manifest.progress).nonfinite_in_row
    return step - 1 if step > manifest.step - skipped else None


def roll_forward(prepared: Prepared, base: Arrays, state: TrainState, first: int, last: int) -> TrainState:
    """Trains the steps between a checkpoint and the one to look at once more."""
    if first == last:
        return state
    log.info("steps %d to %d are trained again: no checkpoint is nearer", first + 1, last)
    place = functools.partial(shard_batch, mesh=prepared.job.mesh)
    prefetch = prepared.job.config.data.prefetch_batches
    for done, batch in enumerate(prepared.feed.batches.iterate(first, last, prefetch, place), start=first + 1):
        state, _ = prepared.steps.train(state, base, batch)
        if done % 10 == 0:
            jax.block_until_ready(state.step)
            log.info("step %d of %d", done, last)
    return state


def show_rows(dump: Dump, diagnosis: Diagnosis) -> None:
    """Names the rows of the sequences that are not finite; of all, where only their gradient is not."""
    num_micro, width, _ = dump.batch["tokens"].shape
    every = [(micro, sequence) for micro in range(num_micro) for sequence in range(width)]
    for micro, sequence in diagnosis.sequences or every:
        number = micro * width + sequence
        places = dump.places[number] if number < len(dump.places) else []
        log.info("sequence %d (micro-batch %d): %s", sequence, micro, ", ".join(places) or "rows that were streamed")
