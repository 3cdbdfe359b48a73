"""What the parts of a run share: its configuration on a mesh, the model's numbers, where adapters go, its programs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adaptax.config import Config
from adaptax.lora import LoraSpec, build_model
from adaptax.models import (
    Architecture,
    Family,
    find_architecture,
    find_family,
    find_source,
    match_modules,
    match_patterns,
)
from adaptax.models.attention import choose_attention
from adaptax.optim import build_optimizer
from adaptax.step import Program, StepPerLength, build_eval_step, build_train_step


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

    @property
    def dtype(self) -> Any:
        """The compute type; ``auto`` is bfloat16, but on CPU the exact float32: few have instructions for the other."""
        name = self.config.model.dtype
        if name == "auto":
            name = "float32" if self.platform == "cpu" else "bfloat16"
        return jnp.dtype(name)

    @property
    def platform(self) -> str:
        """Kind of the devices: ``cpu``, ``gpu`` or ``tpu``."""
        return self.mesh.devices.flat[0].platform

    @property
    def attention(self) -> str:
        """The implementation of attention.

        Raises:
          UserError: the one that is asked for cannot be had.
        """
        name, device = self.config.model.attention, self.mesh.devices.flat[0]
        is_packed = self.config.data.packing or self.config.data.streaming
        return choose_attention(name, device, self.arch, self.dtype, is_packed=is_packed)


def build_job(config: Config, mesh: Mesh, directory: Path | None = None) -> Job:
    """The job of a configuration; how many steps it has is not known yet: as few as its schedule allows.

    Args:
      config: of the run.
      mesh: its devices.
      directory: where the small files of its weights lie, if they were fetched.
    """
    family, arch = find_family(config.model.model_family), find_architecture(config.model, directory)
    source = find_source(config.model)
    return Job(config, mesh, family, arch, build_spec(config, arch), source, config.schedule.warmup_steps + 1)


def build_spec(config: Config, arch: Architecture) -> LoraSpec:
    """The adapters that the configuration asks for; a null alpha is the module's rank."""
    model = config.model
    layers = match_modules(model, arch)
    matched = match_patterns(model, layers)
    ranks = {path: int(rank) for path, rank in matched["lora_rank_pattern"].items() if rank != model.lora_rank}
    alphas = {} if model.lora_alpha else {path: float(rank) for path, rank in ranks.items()}
    alphas |= {path: float(alpha) for path, alpha in matched["lora_alpha_pattern"].items()}
    alpha = model.lora_alpha or float(model.lora_rank)
    alphas = {path: value for path, value in alphas.items() if value != alpha}
    return LoraSpec(layers, model.lora_rank, alpha, model.lora_dropout, model.use_rslora, ranks, alphas)


@dataclass(frozen=True)
class Steps:
    """The programs of a run, and its steps, each compiled for a length of sequences when it first meets it."""

    program: Program
    eval_program: Program
    train: StepPerLength
    evaluate: StepPerLength


def build_steps(job: Job) -> Steps:
    """The steps of a job whose ``training.remat`` has been chosen; nothing is compiled."""
    build = functools.partial(build_model, job.family, job.arch, job.spec, job.mesh, attention=job.attention)
    train, evaluation = (build(train=is_train, remat=job.config.training.remat) for is_train in (True, False))
    windows = tuple(dict.fromkeys(job.family.checkpoint.attention_windows(job.arch)))
    program = Program(train, job.spec, job.dtype, job.mesh, windows)
    eval_program = replace(program, graphdef=evaluation)
    train_step = build_train_step(program, *build_optimizer(job.config.optimizer, job.config.schedule, job.num_steps))
    return Steps(program, eval_program, StepPerLength(train_step), StepPerLength(build_eval_step(eval_program)))


def with_training(job: Job, **values: Any) -> Job:
    """The job with other values under ``training``."""
    return replace(job, config=replace(job.config, training=replace(job.config.training, **values)))


def set_precision(job: Job) -> None:
    """Products in float32 are exact to float32, also where the device has a faster way."""
    jax.config.update("jax_default_matmul_precision", "highest" if job.dtype == jnp.float32 else None)
