"""What the commands after training work on: a base model, with an adapter or without, and its tokenizer."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptax.adapter_files import adopt, open_adapter, read_arrays
from adaptax.checkpoint import gather, restore
from adaptax.config import Config, ModelConfig, OptimizerConfig, UserError
from adaptax.data.tokenizer import Tokenizer, open_tokenizer
from adaptax.job import Job, build_job, set_precision
from adaptax.lora import Arrays, build_model, init_adapters, place_adapters
from adaptax.manifest import Damaged, list_checkpoints, read_checkpoint, step_of
from adaptax.memory import describe_base, free_bytes, local_bytes, show_bytes
from adaptax.models import find_architecture, find_source
from adaptax.models.cache import cache_shapes
from adaptax.models.hub import SMALL_FILES, fetch_files
from adaptax.optim import build_optimizer
from adaptax.run_folder import RunFolder
from adaptax.schema import build_group
from adaptax.step import Program, init_state
from adaptax.weights import load_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """An adapter, on the host, and the job of a configuration that has its ranks, scales and modules."""

    name: str
    job: Job
    arrays: dict[str, np.ndarray]
    program: Program

    def place(self) -> Arrays:
        """Its arrays on the mesh."""
        job = self.job
        return place_adapters(job.family, job.arch, job.spec, job.mesh, self.arrays) if self.arrays else {}


@dataclass(frozen=True)
class Subject:
    """A base model, and the adapters to look at; all share the base."""

    job: Job  # of the first adapter
    directory: Path | None  # of the small files of the base
    adapters: tuple[Adapter, ...]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the model; raises UserError where there is none."""
        return open_tokenizer(self.job.config, self.directory, self.job.arch.vocab_size)

    def load_base(self) -> Arrays:
        """Reads the frozen weights."""
        job, directory = self.job, fetch_files(self.job.source)
        seed = job.config.training.seed
        return load_weights(directory, job.arch, job.family.checkpoint, describe_base(job, directory), seed)

    def bare_program(self) -> Program:
        """Of the base alone."""
        return build_program(self.job, is_adapted=False)

    def check_room(self, num_rows: int, num_tokens: int) -> None:
        """Tells what generation takes of a device, and refuses what does not fit.

        Raises:
          UserError: with what is needed, and what to lower.
        """
        job = self.job
        shapes = describe_base(job, fetch_files(job.source))
        if job.platform == "cpu":  # where take_apart widens what is narrower than the compute type
            for path, leaf in shapes.items():
                dtype = jnp.promote_types(leaf.dtype, job.dtype) if leaf.dtype == jnp.bfloat16 else leaf.dtype
                shapes[path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        base = local_bytes(shapes)
        sizes = [np.prod(shape) for shape in cache_shapes(job.arch, num_rows, num_tokens)]
        cache = 2 * int(sum(sizes)) * job.dtype.itemsize // job.mesh.shape["fsdp"]
        words = f"base weights {show_bytes(base)}, keys and values of {num_rows} x {num_tokens} tokens"
        log.info("%s %s on each device", words, show_bytes(cache))
        free = free_bytes(job.config, job.mesh)
        if free is not None and base + cache > free:
            raise UserError(
                f"{words} {show_bytes(cache)} do not fit the device, which has {show_bytes(free)}: lower "
                "generation.batch_size or generation.max_new_tokens, or set model.quantization=int8"
            )


def open_subject(config: Config, mesh: Mesh, places: Sequence[Path | None]) -> Subject:
    """Reads the adapters; no weight of the base is read.

    Args:
      config: names the base, and how it is run.
      mesh: the devices.
      places: folders of adapters or ``checkpoints/step_N``; None is the base alone.

    Raises:
      UserError: an adapter is none, or is of another model.
    """
    directory = fetch_files(find_source(config.model), SMALL_FILES)
    job = build_job(config, mesh, directory)
    set_precision(job)
    adapters = tuple(read_adapter(job, place, directory) for place in places)
    return Subject(adapters[0].job, directory, adapters)


def read_adapter(job: Job, place: Path | None, directory: Path | None) -> Adapter:
    """An adapter from where it lies."""
    if place is None:
        return Adapter("base", job, {}, build_program(job, is_adapted=False))
    if step_of(place) is not None:
        job, arrays = _read_checkpoint(job, place, directory)
    else:
        files = open_adapter(place, job.family.checkpoint, job.arch)
        arrays = read_arrays(files, job.family.checkpoint, job.arch)
        model = replace(adopt(job.config.model, files, job.arch), lora_dropout=files.dropout)
        job = build_job(replace(job.config, model=model), job.mesh, directory)
    log.info("adapter %s: rank %d, %d modules", place, job.spec.rank, sum(map(len, job.spec.layers.values())))
    return Adapter(str(place), job, arrays, build_program(job))


def build_program(job: Job, *, is_adapted: bool = True) -> Program:
    """The model without dropout and without anything kept for a backward pass."""
    spec = job.spec if is_adapted else None
    attention = job.attention
    graphdef = build_model(job.family, job.arch, spec, job.mesh, train=False, remat="none", attention=attention)
    return Program(graphdef, spec, job.dtype, job.mesh)


def _read_checkpoint(job: Job, path: Path, directory: Path | None) -> tuple[Job, dict[str, np.ndarray]]:
    """The adapters of a checkpoint of a run, with the modules and ranks of that run."""
    try:
        manifest = read_checkpoint(path)
        problems: list[str] = []  # not by build, which looks for files that may have moved
        saved = build_group(ModelConfig, manifest.config["model"], problems)
        rule = build_group(OptimizerConfig, manifest.config["optimizer"], problems)
        if problems:
            raise Damaged(f"its configuration is of another version of adaptax: {problems[0]}")
        _check_same_model(job, saved, path)
        names = ("lora_rank", "lora_alpha", "lora_module_path", "lora_dropout")
        names += ("use_rslora", "lora_rank_pattern", "lora_alpha_pattern")
        model = replace(job.config.model, **{name: getattr(saved, name) for name in names})
        job = build_job(replace(job.config, model=model, optimizer=rule), job.mesh, directory)
        optimizer, _ = build_optimizer(rule, job.config.schedule, job.num_steps)
        fresh = init_adapters(job.family, job.arch, job.spec, job.mesh, 0)
        state = restore(path, manifest, init_state(fresh, optimizer, job.mesh, 0))
    except Damaged as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    return job, gather(state.adapters)


def _check_same_model(job: Job, saved: ModelConfig, path: Path) -> None:
    """Refuses a checkpoint of another size, as far as the weights that it was trained on are still where they were."""
    theirs = None
    with contextlib.suppress(UserError):
        theirs = find_architecture(saved)
    names = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
    if theirs is not None and any(getattr(theirs, name) != getattr(job.arch, name) for name in names):
        size = f"{saved.model_family} {saved.model_size}"
        raise UserError(f"{path} is of another model ({size}): model= must be the one that it was trained on")


def find_adapter(run: Path | None, adapter: str | None) -> Path | None:
    """Where an adapter lies; None for the base alone.

    Args:
      run: a run's folder.
      adapter: a folder, ``best`` or ``last`` of the run, ``none``, or None for what the run ended with.

    Raises:
      UserError: there is none.
    """
    if adapter == "none":
        return None
    folder = RunFolder(run) if run else None
    if adapter in ("best", "last"):
        if folder is None:
            raise UserError(f"adapter={adapter} is one of a run's: set run=DIR")
        if not (folder.adapters / adapter).is_dir():
            raise UserError(f"{folder.adapters / adapter} is not there: the run has saved no checkpoint")
        return folder.adapters / adapter
    if adapter is not None:
        return _find_folder(adapter)
    if folder is None:
        return None
    candidates = (folder.adapter, folder.adapters / "best", folder.adapters / "last")
    found = next((path for path in candidates if path.is_dir()), None)
    if found is None:
        raise UserError(f"{folder.path} holds no adapter: the run has saved nothing yet; adapter=none takes the base")
    if found != folder.adapter:
        log.warning("%s has not ended: %s is taken", folder.path, found)
    return found


def _find_folder(adapter: str) -> Path:
    path = Path(adapter).expanduser()
    if path.is_dir():
        return path
    if step_of(path) is not None:
        beside = ", ".join(found.name for found in list_checkpoints(path.parent))
        raise UserError(f"{path}: no such checkpoint; there are {beside or 'none'}")
    what = "it is a file; name its folder" if path.exists() else "no such folder"
    raise UserError(f"adapter={adapter}: {what}. An adapter is a folder, best or last of a run, or none")


def check_new_file(name: str, key: str = "out") -> Path:
    """A file that can be written, and is not there yet; ``key`` is the option that names it.

    Raises:
      UserError: it is there, or what a try that was cut short has left; or its folder is not there or not writable.
    """
    path = Path(name).expanduser()
    if os.path.lexists(path):
        raise UserError(f"{key}={path} is there already: choose another name, or take it away")
    partial = path.with_name(f"{path.name}.partial")
    if os.path.lexists(partial):
        raise UserError(f"{partial} is what an earlier try has left: take it away, or choose another {key}=")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{key}={path}: the folder {path.parent} is not there")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{key}={path}: the folder {path.parent} cannot be written to")
    return path
