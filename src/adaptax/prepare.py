"""What every command that runs the model of a configuration begins with: data, program, compiled step, weights."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from adaptax.adapter_files import adopt, open_initial, read_arrays
from adaptax.checkpoint import digest_arrays, read_digests
from adaptax.choices import choose_micro_batch, compile_fitting, describe_excess, remat_policies
from adaptax.config import Config, UserError
from adaptax.data.feed import Feed, describe_feed, plan_feed, read_rows
from adaptax.data.pipeline import Dataset
from adaptax.data.tokenizer import Tokenizer, open_tokenizer
from adaptax.devices import multiplies_bfloat16
from adaptax.job import Job, Steps, build_job, build_steps, set_precision, with_training
from adaptax.lora import Arrays, init_adapters, place_adapters
from adaptax.memory import Footprint, Shapes, describe_base, free_bytes, local_bytes
from adaptax.mesh import batch_part
from adaptax.models import find_source
from adaptax.models.hub import SMALL_FILES, fetch_files
from adaptax.optim import build_optimizer
from adaptax.report import show_adapters
from adaptax.step import TrainState, init_state
from adaptax.weights import load_weights

log = logging.getLogger(__name__)
PACKAGES = ("adaptax", "jax", "jaxlib", "flax", "optax", "qwix", "numpy", "orbax-checkpoint")


@dataclass(frozen=True)
class Initial:
    """What the adapters begin from: the files of ``model.init_adapter``; nothing where they are new."""

    arrays: Mapping[str, np.ndarray] | None = None
    digest: str | None = None  # of the files
    is_gone: bool = False  # the files were there when the run began

    @property
    def identity(self) -> dict[str, str | None]:
        """Its share in what checkpoints know of a run."""
        return {} if self.is_gone else {"initial": self.digest}


@dataclass(frozen=True)
class Prepared:
    """All of a run but its base weights, before the first step."""

    job: Job
    tokenizer: Tokenizer
    feed: Feed
    steps: Steps
    state: TrainState
    initial: Initial
    footprint: Footprint | None = None  # once the steps are compiled


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def prepare(config: Config, mesh: Mesh, *, is_resumed: bool = False) -> Prepared:
    """Opens the data and builds model, adapters and optimizer; no weight is read.

    Where the configuration leaves the micro-batch open it is chosen here; the job's configuration says what was chosen.
    A run that is resumed has its adapters in a checkpoint, and may do without ``model.init_adapter``.
    """
    if not is_main():
        logging.getLogger("adaptax").setLevel(logging.WARNING)
    directory = fetch_files(find_source(config.model), SMALL_FILES)
    job = build_job(config, mesh, directory)
    set_precision(job)
    show_adapters(config.model, job.family, job.arch, job.spec)
    initial = read_initial(job, is_resumed=is_resumed)
    is_slower = job.config.model.dtype == "auto" and job.platform == "cpu" and multiplies_bfloat16()
    hint = "; model.dtype=bfloat16 is faster on this processor, and less exact" if is_slower else ""
    log.info("attention: %s; computed in %s%s", job.attention, job.dtype, hint)
    tokenizer = open_tokenizer(config, directory, job.arch.vocab_size)
    rows = read_rows(config, tokenizer)
    if config.training.micro_batch_size == "auto":
        most = max(1, rows.count(config) // mesh.shape["fsdp"])
        free = free_bytes(config, mesh)
        job = choose_micro_batch(job, fetch_files(job.source), rows.longest, free, most)
    feed = plan_feed(rows, job.config, tokenizer, batch_part(mesh))
    describe_feed(feed, job.config)

    job = replace(job, num_steps=feed.num_steps)
    optimizer, _ = build_optimizer(config.optimizer, config.schedule, feed.num_steps)
    if initial.arrays is None:
        adapters = init_adapters(job.family, job.arch, job.spec, mesh, config.training.seed)
    else:
        adapters = place_adapters(job.family, job.arch, job.spec, mesh, initial.arrays)
    state = init_state(adapters, optimizer, mesh, config.training.seed)
    steps = build_steps(with_training(job, remat=remat_policies(job)[-1]))
    return Prepared(job, tokenizer, feed, steps, state, replace(initial, arrays=None))


def read_initial(job: Job, *, is_resumed: bool) -> Initial:
    """Reads what ``model.init_adapter`` names, and tells what is worth knowing of it.

    Raises:
      UserError: it is no adapter of this model, or another one than the configuration has taken its ranks from.
    """
    model, checkpoint = job.config.model, job.family.checkpoint
    if model.init_adapter is None:
        return Initial()
    path = Path(model.init_adapter).expanduser()
    if is_resumed and not path.exists():
        log.warning("model.init_adapter=%s is gone: answers before training cannot be told", path)
        return Initial(is_gone=True)
    files = open_initial(model, checkpoint, job.arch)
    if adopt(model, files, job.arch) != model:
        raise UserError(f"model.init_adapter={path} has other ranks, scales or modules than the run was begun with")
    arrays = read_arrays(files, checkpoint, job.arch)
    is_other = bool(files.base) and Path(files.base).name != Path(job.source).name
    other = f"; it says that it was trained on {files.base:.200}, and this is {job.source}" if is_other else ""
    log.log(
        logging.WARNING if is_other else logging.INFO,
        "the adapters begin from %s: %d modules%s",
        path,
        files.num_modules,
        other,
    )
    if files.left_out:
        words = "%s does not adapt %s (%d such modules): they are adapted from here on, as they share A with others"
        log.warning(words, path, files.left_out[0], len(files.left_out))
    return Initial(arrays, files.hash())


def load_base(prepared: Prepared, *, compile_step: bool = True) -> tuple[Prepared, Arrays]:
    """Reads the frozen base weights, and compiles the steps meanwhile; tells their memory.

    Returns:
      What was prepared, with the remat policy that was chosen, and the base.

    Raises:
      UserError: the run does not fit the device; what to change is told.
    """
    job = prepared.job
    directory = fetch_files(job.source)
    shapes = describe_base(job, directory)
    read = functools.partial(load_weights, directory, job.arch, job.family.checkpoint, shapes, job.config.training.seed)
    if not compile_step:
        return prepared, read()
    free = free_bytes(job.config, job.mesh)
    if free is not None and local_bytes(shapes) + local_bytes(prepared.state) > free:
        fit_steps(prepared, shapes, directory, free)  # which refuses, before any weight is read
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(read)
        prepared = fit_steps(prepared, shapes, directory, free)
        return prepared, loading.result()


def fit_steps(prepared: Prepared, base: Shapes, directory: Path | None, free: int | None) -> Prepared:
    """Compiles the steps with the fastest remat policy that fits the device, and tells what they take.

    Raises:
      UserError: none fits.
    """
    feed = prepared.feed
    length, with_eval = feed.batches.lengths[0], feed.eval_batches is not None
    job, steps, footprint = compile_fitting(prepared.job, base, length, free, with_eval=with_eval)
    if free is not None and footprint.peak_bytes > free:
        raise UserError(describe_excess(job, footprint, directory, length, free))
    return replace(prepared, job=job, steps=steps, footprint=footprint)


def identify_inputs(prepared: Prepared) -> dict[str, Any]:
    """What is trained on, and with what, by content; saved with every checkpoint and compared on a resume."""
    job, feed = prepared.job, prepared.feed
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    identity: dict[str, Any] = {
        "dtype": str(job.dtype),
        "tokenizer": prepared.tokenizer.digest,
        "versions": versions | {"device": job.mesh.devices.flat[0].device_kind},
        "mesh": dict(job.mesh.shape),
    }
    if feed.train is not None:  # else rows are streamed, and nobody has seen them all
        identity["data"] = _hash_rows(feed.train)
    return identity | {"eval": _hash_rows(feed.held_out)} | prepared.initial.identity


def identify_base(base: Arrays) -> Callable[[], str]:
    """Begins to take the hash of the base weights, the same on every mesh; the function waits for it."""
    digests = digest_arrays(base)
    return lambda: hashlib.sha256(json.dumps(read_digests(digests), sort_keys=True).encode()).hexdigest()


def _hash_rows(data: Dataset) -> str:
    digest = hashlib.sha256()
    for array in (data.examples.digests, data.examples.lengths, data.examples.supervised):
        digest.update(array.tobytes())
    return digest.hexdigest()
