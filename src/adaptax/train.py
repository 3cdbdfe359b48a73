"""The whole training on one page."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from adaptax.config import Config, UserError
from adaptax.data.chat import last_request
from adaptax.data.feed import Feed, describe_feed, open_feed
from adaptax.data.tokenizer import Tokenizer, open_tokenizer
from adaptax.evaluate import Answers, build_answer, evaluate_loss
from adaptax.export import save_peft_adapter
from adaptax.lora import Arrays, LoraSpec, build_model, init_adapters
from adaptax.mesh import batch_part, shard_batch
from adaptax.metrics import MetricsLog, ProgressDisplay
from adaptax.models import Architecture, Family, find_architecture, find_family, find_source, match_modules
from adaptax.models.hub import SMALL_FILES, fetch_files
from adaptax.optim import build_optimizer
from adaptax.report import describe_adapters, describe_memory, show_answers
from adaptax.step import Program, StepPerLength, TrainState, build_eval_step, build_train_step, init_state
from adaptax.weights import describe_weights, load_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What the parts of one run share."""

    config: Config
    directory: Path
    mesh: Mesh
    family: Family
    arch: Architecture
    spec: LoraSpec
    source: str  # of the base weights
    num_steps: int


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def run(config: Config, mesh: Mesh, directory: Path) -> float:
    """Trains, evaluates, and writes metrics and adapter into ``directory``.

    Returns:
      The final evaluation loss in nats per trained token, or the last training loss where nothing is held out.
    """
    started = time.monotonic()
    seed = config.training.seed
    source = find_source(config.model)
    if not is_main():
        logging.getLogger("adaptax").setLevel(logging.WARNING)
    weights_directory = fetch_files(source, SMALL_FILES)
    family, arch = find_family(config.model.model_family), find_architecture(config.model, weights_directory)
    spec = build_spec(config, arch)
    describe_adapters(config.model, family, arch, spec)

    tokenizer = open_tokenizer(config, weights_directory, arch.vocab_size)
    feed = open_feed(config, tokenizer, batch_part(mesh))
    describe_feed(feed, config)
    job = Job(config, directory, mesh, family, arch, spec, source, feed.num_steps)

    dtype = find_dtype(config.model.dtype, mesh)
    program = Program(build_model(family, arch, spec, mesh, train=True), spec, dtype, mesh)
    eval_program = replace(program, graphdef=build_model(family, arch, spec, mesh, train=False))
    optimizer, schedule = build_optimizer(config.optimizer, config.schedule, job.num_steps)
    state = init_state(init_adapters(family, arch, spec, mesh, seed), optimizer, mesh, seed)

    jax.config.update("jax_default_matmul_precision", "highest" if dtype == jnp.float32 else None)
    weights_directory = fetch_files(source)
    base_shapes = describe_weights(weights_directory, arch, family.checkpoint, mesh, dtype)
    compiling = time.monotonic()
    train_step = StepPerLength(build_train_step(program, optimizer, schedule))
    compiled = train_step.compile(state, base_shapes, shard_batch(feed.batches.blank(), mesh))
    describe_memory(compiled, base_shapes, state, time.monotonic() - compiling)
    base = load_weights(weights_directory, arch, family.checkpoint, base_shapes, seed)
    log.info("base weights from %s; start-up took %.1f s", source, time.monotonic() - started)

    evaluate = functools.partial(evaluate_loss, build_eval_step(eval_program), base, feed.eval_batches, mesh)
    num_rows, batch_size = config.training.exact_match_rows, config.training.micro_batch_size * mesh.shape["fsdp"]
    answer = build_answer(eval_program, base, feed.held_out, num_rows, batch_size)
    metrics = MetricsLog(directory if is_main() else None, config.logging)
    try:
        before = answer(state.adapters)
        state, final_loss = train_loop(job, train_step, evaluate, state, base, feed, metrics)
        save_adapter(job, state.adapters, directory / "adapter")
        compare_answers(tokenizer, before, answer(state.adapters), job.num_steps, metrics)
    finally:
        metrics.close()
    log.info(
        "done in %.0f s: final loss %.4f, adapter in %s", time.monotonic() - started, final_loss, directory / "adapter"
    )
    return final_loss


def train_loop(
    job: Job,
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    evaluate: Callable[[Arrays], float | None],
    state: TrainState,
    base: Arrays,
    feed: Feed,
    metrics: MetricsLog,
) -> tuple[TrainState, float]:
    """Every step; a step's metrics are read while the next one runs. Returns the state and the final loss."""
    training, every = job.config.training, job.config.checkpoint.every_steps
    record_evaluation(0, evaluate(state.adapters), metrics)
    losses: dict[str, float | None] = {}
    unread: tuple[int, dict[str, jax.Array]] | None = None
    sizes: dict[int, int] = {}  # places of a step's batch, padding included
    clock = time.monotonic()

    def read(step: int, values: dict[str, jax.Array]) -> None:
        nonlocal clock
        host = {name: float(value) for name, value in jax.device_get(values).items()}
        seconds, clock = time.monotonic() - clock, time.monotonic()
        row = step_row(host, seconds, sizes.pop(step))
        metrics.write(step, row)
        display.update(step, row)
        losses["train"] = host["loss"]
        if host["nonfinite_in_row"] >= training.max_nonfinite:
            raise UserError(nonfinite_report(step, host))

    with ProgressDisplay(job.config.logging, job.num_steps, is_main()) as display:
        place = functools.partial(shard_batch, mesh=job.mesh)
        stream = feed.batches.iterate(0, job.num_steps, job.config.data.prefetch_batches, place)
        for step, batch in enumerate(stream, start=1):
            sizes[step] = batch["tokens"].size
            state, values = train_step(state, base, batch)
            if unread:
                read(*unread)
            unread = step, values
            is_last = step == job.num_steps
            if is_last or (training.eval_every_steps and step % training.eval_every_steps == 0):
                read(*unread)
                unread = None
                losses["eval"] = record_evaluation(step, evaluate(state.adapters), metrics)
                clock = time.monotonic()
            if every and step % every == 0 and not is_last:
                keep_adapter(job, state.adapters, step)
                clock = time.monotonic()
    return state, next(loss for loss in (losses["eval"], losses["train"]) if loss is not None)


def build_spec(config: Config, arch: Architecture) -> LoraSpec:
    """The adapters that the configuration asks for; a null alpha is the rank."""
    model = config.model
    alpha = model.lora_alpha or float(model.lora_rank)
    return LoraSpec(match_modules(model, arch), model.lora_rank, alpha, model.lora_dropout)


def find_dtype(name: str, mesh: Mesh) -> Any:
    """The compute type; ``auto`` is float32 on CPU, where bfloat16 is no faster, and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def step_row(values: dict[str, float], seconds: float, tokens_per_batch: int) -> dict[str, float]:
    """A step's row in the metrics."""
    return {
        "train_loss": values["loss"],
        "train_grad_norm": values["grad_norm"],
        "train_learning_rate": values["learning_rate"],
        "train_supervised_tokens": values["num_supervised"],
        "train_tokens_per_second": values["num_supervised"] / seconds,
        "train_padding_share": 1 - values["num_tokens"] / tokens_per_batch,
        "train_nonfinite_steps": values["num_nonfinite"],
        "train_step_seconds": seconds,
    }


def record_evaluation(step: int, loss: float | None, metrics: MetricsLog) -> float | None:
    """Writes an evaluation loss down, if anything is held out, and hands it back."""
    if loss is not None:
        metrics.write(step, {"eval_loss": loss})
        log.info("evaluation loss after %d steps: %.4f", step, loss)
    return loss


def nonfinite_report(step: int, values: dict[str, float]) -> str:
    """Why the run stops: the loss or gradient has not been finite for too long."""
    return (
        f"step {step}: loss {values['loss']} and gradient norm {values['grad_norm']} are not finite, "
        f"{int(values['nonfinite_in_row'])} steps in a row now ({int(values['num_nonfinite'])} in all); their updates "
        f"were skipped. Lower optimizer.learning_rate, look at the rows, or use model.dtype=float32"
    )


def save_adapter(job: Job, adapters: Arrays, directory: Path) -> None:
    """Writes the adapters in PEFT's format, from the main process."""
    is_alone = jax.process_count() == 1
    host = jax.device_get(adapters) if is_alone else multihost_utils.process_allgather(adapters, tiled=True)
    if is_main():
        arrays = {path: np.asarray(array) for path, array in host.items()}
        save_peft_adapter(directory, arrays, job.spec, job.family, job.arch, job.source)


def keep_adapter(job: Job, adapters: Arrays, step: int) -> None:
    """Writes the adapters of a step beside the run, and deletes the oldest ones over ``checkpoint.keep``."""
    folder = job.directory / "adapters"
    save_adapter(job, adapters, folder / f"step_{step:08d}")
    if is_main():
        for old in sorted(folder.glob("step_????????"))[: -job.config.checkpoint.keep]:
            shutil.rmtree(old)


def compare_answers(
    tokenizer: Tokenizer, before: Answers | None, after: Answers | None, step: int, metrics: MetricsLog
) -> None:
    """Writes exact match before and after training, and shows a few answers side by side."""
    if before is None or after is None:
        return
    metrics.write(step, {"eval_exact_match_before": before.exact_match, "eval_exact_match": after.exact_match})
    requests = [last_request(tokens, tokenizer) for tokens in after.prompts]
    columns = (after.expected, before.given, after.given)
    expected, earlier, later = ([tokenizer.decode(tokens) for tokens in column] for column in columns)
    show_answers(requests, expected, earlier, later)
    shares = 100 * before.exact_match, 100 * after.exact_match
    log.info("exact match on %d held-out rows: %.1f%% before, %.1f%% after", after.num_rows, *shares)
