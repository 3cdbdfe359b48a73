"""What every command that runs the model of a configuration begins with: data, program, compiled step, weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adaptax.checkpoint import digest_arrays, read_digests
from adaptax.config import Config
from adaptax.data.feed import Feed, describe_feed, open_feed
from adaptax.data.pipeline import Dataset
from adaptax.data.tokenizer import Tokenizer, open_tokenizer
from adaptax.lora import Arrays, LoraSpec, build_model, init_adapters
from adaptax.mesh import batch_part, shard_batch
from adaptax.models import Architecture, Family, find_architecture, find_family, find_source, match_modules
from adaptax.models.hub import SMALL_FILES, fetch_files
from adaptax.optim import build_optimizer
from adaptax.report import describe_adapters, describe_memory
from adaptax.step import Program, StepPerLength, TrainState, build_train_step, init_state
from adaptax.weights import describe_weights, load_weights

log = logging.getLogger(__name__)
PACKAGES = ("adaptax", "jax", "jaxlib", "flax", "optax", "qwix", "numpy", "orbax-checkpoint")


@dataclass(frozen=True)
class Job:
    """What the parts of one run share."""

    config: Config
    mesh: Mesh
    family: Family
    arch: Architecture
    spec: LoraSpec
    source: str  # of the base weights
    num_steps: int


@dataclass(frozen=True)
class Prepared:
    """All of a run but its base weights, before the first step."""

    job: Job
    tokenizer: Tokenizer
    feed: Feed
    program: Program
    eval_program: Program
    train_step: StepPerLength
    state: TrainState


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def prepare(config: Config, mesh: Mesh) -> Prepared:
    """Opens the data and builds model, adapters and optimizer; nothing is compiled, no weight is read."""
    if not is_main():
        logging.getLogger("adaptax").setLevel(logging.WARNING)
    seed, source = config.training.seed, find_source(config.model)
    weights_directory = fetch_files(source, SMALL_FILES)
    family, arch = find_family(config.model.model_family), find_architecture(config.model, weights_directory)
    spec = build_spec(config, arch)
    describe_adapters(config.model, family, arch, spec)
    tokenizer = open_tokenizer(config, weights_directory, arch.vocab_size)
    feed = open_feed(config, tokenizer, batch_part(mesh))
    describe_feed(feed, config)

    dtype = find_dtype(config.model.dtype, mesh)
    program = Program(build_model(family, arch, spec, mesh, train=True), spec, dtype, mesh)
    eval_program = replace(program, graphdef=build_model(family, arch, spec, mesh, train=False))
    optimizer, schedule = build_optimizer(config.optimizer, config.schedule, feed.num_steps)
    state = init_state(init_adapters(family, arch, spec, mesh, seed), optimizer, mesh, seed)
    train_step = StepPerLength(build_train_step(program, optimizer, schedule))
    job = Job(config, mesh, family, arch, spec, source, feed.num_steps)
    return Prepared(job, tokenizer, feed, program, eval_program, train_step, state)


def load_base(prepared: Prepared, *, compile_step: bool = True) -> Arrays:
    """Compiles the step, tells its memory, then reads the frozen base weights."""
    job, dtype = prepared.job, prepared.program.dtype
    jax.config.update("jax_default_matmul_precision", "highest" if dtype == jnp.float32 else None)
    directory = fetch_files(job.source)
    shapes = describe_weights(directory, job.arch, job.family.checkpoint, job.mesh, dtype)
    if compile_step:
        started = time.monotonic()
        blank = shard_batch(prepared.feed.batches.blank(), job.mesh)
        compiled = prepared.train_step.compile(prepared.state, shapes, blank)
        describe_memory(compiled, shapes, prepared.state, time.monotonic() - started)
    return load_weights(directory, job.arch, job.family.checkpoint, shapes, job.config.training.seed)


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


def identify_inputs(prepared: Prepared) -> dict[str, Any]:
    """What is trained on, and with what, by content; saved with every checkpoint and compared on a resume."""
    job, feed = prepared.job, prepared.feed
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    identity: dict[str, Any] = {
        "dtype": str(prepared.program.dtype),
        "tokenizer": prepared.tokenizer.digest,
        "versions": versions | {"device": job.mesh.devices.flat[0].device_kind},
        "mesh": dict(job.mesh.shape),
    }
    if feed.train is not None:  # else rows are streamed, and nobody has seen them all
        identity["data"] = _hash_rows(feed.train)
    return identity | {"eval": _hash_rows(feed.held_out)}


def identify_base(base: Arrays) -> Callable[[], str]:
    """Begins to take the hash of the base weights, the same on every mesh; the function waits for it."""
    digests = digest_arrays(base)
    return lambda: hashlib.sha256(json.dumps(read_digests(digests), sort_keys=True).encode()).hexdigest()


def _hash_rows(data: Dataset) -> str:
    digest = hashlib.sha256()
    for array in (data.examples.digests, data.examples.lengths, data.examples.supervised):
        digest.update(array.tobytes())
    return digest.hexdigest()
