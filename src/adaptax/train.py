"""The whole training on one page."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adaptax.checkpoint import Saver, Writer, check_room, gather, restore
from adaptax.config import UserError, micro_batch
from adaptax.data.chat import last_request
from adaptax.data.tokenizer import Tokenizer
from adaptax.evaluate import Answers, build_answer, build_sample, evaluate_loss
from adaptax.export import save_peft_adapter
from adaptax.generate import Generator
from adaptax.lora import Arrays
from adaptax.manifest import Damaged, Manifest
from adaptax.mesh import Votes, shard_batch, share_text
from adaptax.metrics import read_rows
from adaptax.prepare import Job, Prepared, identify_base, identify_inputs, is_main, load_base, prepare
from adaptax.progress import Progress
from adaptax.recorder import Recorder
from adaptax.report import show_answers
from adaptax.resume import Start, check_identity, how_to_resume
from adaptax.run_folder import RunFolder, write_text
from adaptax.signals import Interrupted, StopSignals
from adaptax.step import TrainState

log = logging.getLogger(__name__)


def run(start: Start, mesh: Mesh, folder: RunFolder, stop: StopSignals) -> float:
    """Trains from where ``start`` says, evaluates, and writes metrics, checkpoints and adapters into the folder.

    Returns:
      The final evaluation loss in nats per trained token, or the last training loss where nothing is held out.

    Raises:
      Interrupted: a signal came; what was trained has been saved.
    """
    started = time.monotonic()
    prepared = prepare(start.config, mesh, is_resumed=bool(start.checkpoints))
    state, manifest = begin(start, prepared)
    if is_main():
        check_room(folder, start.config.checkpoint.keep, state, has_best=prepared.feed.eval_batches is not None)
    prepared, base = load_base(prepared)
    config, identity = prepared.job.config, check_inputs(prepared, base, manifest)
    if is_main() and (manifest or config != start.config):  # what was left open has been chosen
        folder.begin(dataclasses.asdict(config))
    log.info("base weights from %s; start-up took %.1f s", prepared.job.source, time.monotonic() - started)

    evaluate = build_evaluate(prepared, base, stop)
    num_rows, batch_size = config.training.exact_match_rows, micro_batch(config.training) * mesh.shape["fsdp"]
    generator = Generator(prepared.steps.eval_program, prepared.job.arch)
    answer = build_answer(generator, base, prepared.feed.held_out, num_rows, batch_size)
    before = None if prepared.initial.is_gone else answer(prepared.state.adapters)
    if manifest:  # the fresh adapters were needed up to here
        jax.tree.map(lambda array: array.delete(), prepared.state)
    writer = Writer(dataclasses.asdict(config), identity, functools.partial(save_peft, prepared.job))
    saver = Saver(folder, config.checkpoint, writer, state)
    sample = build_sample(generator, base, prepared.feed.held_out, prepared.tokenizer, config)
    recorder = Recorder(prepared, folder, *read_past(start, manifest, folder), sample)
    try:
        stop.hold()
        if manifest and not start.is_fork:  # a kill may have come between the checkpoint and these
            saver.write_adapters(gather(state.adapters), is_best=recorder.progress.best_step == manifest.step)
        state, is_complete = train_loop(prepared, base, state, evaluate, recorder, saver, stop)
        stop.release()
        if is_complete:
            save_peft(prepared.job, gather(state.adapters), folder.adapter)
            compare_answers(prepared.tokenizer, before, answer(state.adapters), int(state.step), recorder)
            write_summary(folder, int(state.step), prepared.job.num_steps, recorder)
    finally:
        saver.close()
        recorder.close()
    seconds, loss = time.monotonic() - started, recorder.progress.final_loss
    if is_complete:
        log.info("done in %.0f s: final loss %.4f, adapter in %s", seconds, loss, folder.adapter)
    else:
        log.info("stopped after step %d, as training.stop_after_steps says; %s", int(state.step), how_to_resume(folder))
    return loss


def train_loop(
    prepared: Prepared,
    base: Arrays,
    state: TrainState,
    evaluate: Callable[[Arrays], float | None],
    recorder: Recorder,
    saver: Saver,
    stop: StopSignals,
) -> tuple[TrainState, bool]:
    """Every step that is left; a step's numbers are read while the next one runs.

    Returns:
      The last state, which has been saved, and whether the run has come to its end.
    """
    job, training, votes = prepared.job, prepared.job.config.training, Votes()
    first = step = int(state.step)
    number = 0
    is_due = recorder.progress.eval_step != first and is_evaluated(first, job)  # a signal may have cut it short
    if is_due and recorder.evaluate(first, state.adapters, evaluate):
        recorder.save(first, state, saver)
    last = min(job.num_steps, first + (training.stop_after_steps or job.num_steps))
    last = first if recorder.is_exhausted else last
    place = functools.partial(shard_batch, mesh=job.mesh)
    with recorder.show(first + 1, last):
        ahead = job.config.data.prefetch_batches
        stream = prepared.feed.batches.iterate(first, last, ahead, place) if first < last else ()
        for step, batch in enumerate(recorder.speed.feed(stream), start=first + 1):
            with recorder.mark(step):
                state, values = prepared.steps.train(state, base, batch)
            recorder.put(step, values, batch)
            number, is_save = divmod(votes.cast(2 * (stop.requested or 0) + saver.is_time()), 2)
            is_over = step == last or number > 0 or recorder.lost is not None
            is_save |= saver.is_due(step)
            if is_over or is_save or is_evaluated(step, job):
                recorder.flush()
                is_best = False
                if is_evaluated(step, job) and not number:
                    try:
                        is_best = recorder.evaluate(step, state.adapters, evaluate)
                    except Interrupted as interrupted:
                        number = interrupted.number
                is_over |= number > 0 or recorder.is_exhausted
                if is_over or is_save or is_best:
                    recorder.save(step, state, saver)
                if is_over:
                    break
                recorder.speed.restart()
    recorder.speed.tell()
    saver.wait()
    failure = share_text(saver.failure or "")  # of process 0, which writes: all of them end
    if failure:
        raise UserError(failure)
    if recorder.lost:
        raise UserError(recorder.lost)
    if recorder.is_exhausted and step < job.num_steps:
        words = "stopped early after step %d of %d: %d evaluations without a better loss than %.4f"
        log.info(words, step, job.num_steps, recorder.progress.num_worse, recorder.progress.reference_loss)
    if number:
        raise Interrupted(number)
    return state, step == job.num_steps or recorder.is_exhausted


def begin(start: Start, prepared: Prepared) -> tuple[TrainState, Manifest | None]:
    """The state to begin from, and what its checkpoint says; the fresh state where there is no checkpoint.

    Raises:
      UserError: all checkpoints are damaged, or of other data, or have more steps than the run.
    """
    inputs = identify_inputs(prepared)
    for path, manifest in start.checkpoints:
        check_identity(manifest.identity, inputs, f"the run of {path}")
        if manifest.step > prepared.job.num_steps:
            raise UserError(f"{path} is {manifest.step} steps in; this configuration has only {prepared.job.num_steps}")
        try:
            state = restore(path, manifest, prepared.state)
        except Damaged as error:
            if start.is_named:
                raise UserError(f"{path} is damaged: {error}") from None
            log.warning("%s is damaged: %s", path, error)
            continue
        log.info("resumed from %s: %d of %d steps are done", path, manifest.step, prepared.job.num_steps)
        return state, manifest
    if start.checkpoints:
        raise UserError(f"{start.checkpoints[0][0].parent}: every checkpoint is damaged; restore one from a copy")
    return prepared.state, None


def check_inputs(prepared: Prepared, base: Arrays, manifest: Manifest | None) -> Callable[[], dict[str, Any]]:
    """What the run is about, for its checkpoints; a resumed run must be about the same.

    Raises:
      UserError: the base weights are others than the run began with.
    """
    inputs, read_base = identify_inputs(prepared), identify_base(base)
    if manifest:
        inputs = {key: manifest.identity[key] for key in ("initial",) if key in manifest.identity} | inputs
        check_identity(manifest.identity, {"base": read_base()}, f"the run of step {manifest.step}")
    return lambda: inputs | {"base": read_base()}


def build_evaluate(prepared: Prepared, base: Arrays, stop: StopSignals) -> Callable[[Arrays], float | None]:
    """From adapters to the loss over the held-out rows. A process that is alone leaves off where a signal comes."""
    check = stop.raise_requested if jax.process_count() == 1 else lambda: None
    return functools.partial(
        evaluate_loss, prepared.steps.evaluate, base, prepared.feed.eval_batches, prepared.job.mesh, check=check
    )


def read_past(
    start: Start, manifest: Manifest | None, folder: RunFolder
) -> tuple[Sequence[Mapping[str, Any]], Progress]:
    """(the metrics up to where the run begins, what it remembers of its losses)."""
    if manifest is None:
        return [], Progress()
    progress = Progress(**manifest.progress)
    if start.is_fork:  # the best checkpoint lies elsewhere
        progress = replace(progress, best_step=None, best_loss=None)
    source = RunFolder(start.checkpoints[0][0].absolute().parents[1])
    return read_rows(source.metrics, manifest.step), progress


def is_evaluated(step: int, job: Job) -> bool:
    """Whether the run evaluates after this step: before the first, after the last, and as often as is asked for."""
    every = job.config.training.eval_every_steps
    return step in (0, job.num_steps) or (every is not None and step % every == 0)


def save_peft(job: Job, adapters: Mapping[str, np.ndarray], directory: Path) -> None:
    """Writes adapters in PEFT's format, from the main process."""
    if is_main():
        save_peft_adapter(directory, adapters, job.spec, job.family, job.arch, job.source)


def write_summary(folder: RunFolder, step: int, num_steps: int, recorder: Recorder) -> None:
    """How the run ended; that it is there means that it has."""
    progress = recorder.progress
    summary = {"step": step, "stopped_early": step < num_steps, "final_loss": progress.final_loss}
    summary |= {"best_step": progress.best_step, "best_loss": progress.best_loss, "speed": recorder.speed.summarize()}
    if is_main():
        write_text(folder.summary, json.dumps(summary, indent=1) + "\n")


def compare_answers(
    tokenizer: Tokenizer, before: Answers | None, after: Answers | None, step: int, recorder: Recorder
) -> None:
    """Writes exact match before and after training, and shows a few answers side by side."""
    if before is None or after is None:
        return
    recorder.write(step, {"eval_exact_match_before": before.exact_match, "eval_exact_match": after.exact_match})
    requests = [last_request(tokens, tokenizer) for tokens in after.prompts]
    columns = (after.expected, before.given, after.given)
    expected, earlier, later = ([tokenizer.decode(tokens) for tokens in column] for column in columns)
    show_answers(requests, expected, earlier, later)
    shares = 100 * before.exact_match, 100 * after.exact_match
    log.info("exact match on %d held-out rows: %.1f%% before, %.1f%% after", after.num_rows, *shares)
