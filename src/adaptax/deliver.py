"""``adaptax export``: what was trained, for other programs; read again from its files, and compared.

The comparison is of logits on a fixed probe, in float32: those of the base with the adapter in memory, and those of
what the files hold. They are told as the root of the mean square of the difference, over that of the logits about
their mean.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptax.config import Config, UserError
from adaptax.export import make_uniform, save_peft_adapter
from adaptax.gguf_export import save_gguf_adapter
from adaptax.lora import Arrays, LoraSpec, merge_model
from adaptax.merge import MergeReport, add_adapters, save_merged
from adaptax.models import Family
from adaptax.models.gemma3 import take_rows
from adaptax.models.hub import EXPORT_FILES, fetch_files, find_file
from adaptax.new_folder import GIB, check_place, made_whole
from adaptax.options import ExportOptions
from adaptax.orbax_export import save_orbax_checkpoint
from adaptax.orbax_files import find_checkpoint
from adaptax.prepare import PACKAGES
from adaptax.run_folder import write_text
from adaptax.step import HEAD, Program
from adaptax.subject import Subject, open_subject
from adaptax.weights import forget_weights

log = logging.getLogger(__name__)
RECEIPT, CHECKPOINT = "export.json", "checkpoint"
PROBE_SHAPE, PROBE_SEED, PROBE_WORDS = (2, 48), 20, 4096
LAST_WORD = 262_144  # rows behind it stand for images, or for nothing, and not all layouts have them
# How far logits may be apart. Adapters are the same numbers; merged matrices are rounded once more, to their type.
TOLERANCES = {"peft": 1e-5, "F32": 1e-4, "F16": 4e-3, "BF16": 3e-2}


@dataclass(frozen=True)
class Reference:
    """The model in memory."""

    logits: np.ndarray
    effect: float  # how far the base's own logits are from these

    def distance(self, logits: np.ndarray) -> float:
        """Of other logits from these."""
        with np.errstate(all="ignore"):  # a distance that is not finite is too large
            spread = np.sqrt(np.mean(np.square(self.logits - self.logits.mean())))
            return float(np.sqrt(np.mean(np.square(logits - self.logits))) / spread)


def export(options: ExportOptions, config: Config, mesh: Mesh, place: Path | None) -> dict[str, Any]:
    """Writes an adapter, or the base with it, into a new folder, whole or not at all.

    Args:
      options: of the command.
      config: names the base.
      mesh: the devices.
      place: of the adapter.

    Returns:
      The receipt, which ``export.json`` holds.

    Raises:
      UserError: there is nothing to export or no room, or what was read again is not what is in memory.
    """
    if place is None:
        raise UserError("there is no adapter to export: set run=DIR, or adapter=DIR and model=NAME")
    if options.out is None:
        raise UserError("out=DIR is missing: the folder to write")
    if options.uniform and options.format != "peft":
        raise UserError(f"uniform=true is of format=peft; format={options.format} needs none")
    out = Path(options.out).expanduser()
    check_place(out, 0)
    exact = replace(config, model=replace(config.model, dtype="float32", quantization=None))
    subject = open_subject(exact, mesh, [place])
    write = functools.partial(_WRITERS[options.format], subject, options)
    with made_whole(out) as folder:
        said = write(folder)
        receipt = describe(options, subject, said, folder)
        write_text(folder / RECEIPT, json.dumps(receipt, indent=1) + "\n")
    log.info("%s: %d modules; %s, %s in it", out, said["modules"], describe_check(said.get("logits")), RECEIPT)
    return receipt


def describe_check(checked: dict[str, float] | None) -> str:
    """What a comparison of logits has found."""
    if checked is None:
        return "every tensor is what was to be written"
    return "logits differ by {difference:.2g}, and by {adapter_effect:.2g} without the adapter".format(**checked)


def describe(options: ExportOptions, subject: Subject, said: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The receipt: what was written of what, with what, how it was compared, and the hash of every file."""
    adapter, files = subject.adapters[0], {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return {
        "format": options.format,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": subject.job.source,
        "adapter": adapter.name,
        "rank": adapter.job.spec.rank,
        **said,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "files": files,
    }


def read_reference(subject: Subject) -> Reference:
    """The logits of the model in memory; its base is given back."""
    adapter, base = subject.adapters[0], load_bits(subject)
    reference = Reference(probe(base, adapter.place(), adapter.program), 0.0)
    return replace(reference, effect=reference.distance(probe(base, {}, subject.bare_program())))


def load_bits(subject: Subject) -> Arrays:
    """The base for one pass; on a CPU stacks of bfloat16 as integers, of which a step makes no copies."""
    base = dict(subject.load_base())
    forget_weights()
    if subject.job.platform == "cpu":
        for path, array in base.items():
            if array.dtype == jnp.bfloat16 and (path.startswith("layers/") or path == HEAD):
                base[path] = jax.device_put(np.asarray(array).view(np.uint16), array.sharding)
    return base


def probe(base: Arrays, adapters: Arrays, program: Program) -> np.ndarray:
    """Logits of a fixed batch, for words that are spread over the vocabulary, [B, T, V], float32."""
    num_words = min(base[HEAD].shape[0], LAST_WORD)
    words_V = np.linspace(0, num_words - 1, min(num_words, PROBE_WORDS)).astype(np.int32)

    @jax.jit
    def run(base: Arrays, adapters: Arrays, tokens_BT: jax.Array) -> jax.Array:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        model = merge_model(program.graphdef, base, adapters, program.spec, program.adapter_dtype)
        hidden_BTD = model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT), dtype=program.dtype)
        head_VD = take_rows(base[HEAD], jnp.asarray(words_V)).astype(program.dtype)
        return jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)

    tokens_BT = np.random.default_rng(PROBE_SEED).integers(0, num_words, PROBE_SHAPE, dtype=np.int32)
    return np.asarray(run(base, adapters, tokens_BT))


def check_logits(reference: Reference, logits: np.ndarray, tolerance: float, folder: Path) -> dict[str, float]:
    """What is told of a comparison.

    Raises:
      UserError: the logits are further apart than the tolerance.
    """
    found = reference.distance(logits)
    if not found <= tolerance:
        raise UserError(
            f"{folder.name}: the logits of the files differ from those in memory by {found:.3g} of their spread, and "
            f"{tolerance:g} is allowed; nothing was written"
        )
    return {"difference": found, "tolerance": tolerance, "adapter_effect": reference.effect}


def _write_peft(subject: Subject, options: ExportOptions, folder: Path) -> dict[str, Any]:
    adapter, job = subject.adapters[0], subject.job
    arrays, spec = adapter.arrays, job.spec
    if options.uniform:
        arrays, spec = make_uniform(arrays, spec)
    reference = read_reference(subject)
    save_peft_adapter(folder / "new", arrays, spec, job.family, job.arch, job.source)
    _move_up(folder / "new")
    again = open_subject(job.config, job.mesh, [folder])
    found = again.adapters[0]
    logits = probe(load_bits(again), found.place(), found.program)
    count = _count_modules(job.spec, job.family)
    if _count_modules(found.job.spec, job.family) != count:
        raise UserError(f"{options.out}: {_count_modules(found.job.spec, job.family)} modules were read, not {count}")
    return {"modules": count, "logits": check_logits(reference, logits, TOLERANCES["peft"], Path(str(options.out)))}


def _write_merged(subject: Subject, options: ExportOptions, folder: Path) -> dict[str, Any]:
    adapter, job = subject.adapters[0], subject.job
    directory = fetch_files(job.source, EXPORT_FILES)
    if directory is None:
        raise UserError("model.weights=random is no checkpoint to add an adapter to; format=peft writes the adapter")
    if find_checkpoint(directory) is not None:
        raise UserError(
            f"format=merged needs a Hugging Face checkpoint, and {directory} is Google's; take format=orbax"
        )
    reference = read_reference(subject)
    size = int(options.max_shard_gib * GIB)
    report = save_merged(
        folder / "new", directory, adapter.arrays, job.spec, job.family, job.arch, max_shard_bytes=size
    )
    _move_up(folder / "new")
    _copy_tokenizer(subject, folder)
    if report.unchanged:
        words = "%d modules are what they were: their update is zero, or less than %s can hold"
        log.warning(words, len(report.unchanged), " and ".join(report.dtypes))
    tolerance = max(TOLERANCES[name] for name in report.dtypes)
    return _describe_sum(report) | _check_sum(subject, folder, reference, tolerance, options)


def _write_orbax(subject: Subject, options: ExportOptions, folder: Path) -> dict[str, Any]:
    adapter, job = subject.adapters[0], subject.job
    reference = read_reference(subject)
    base = dict(subject.load_base())
    forget_weights()
    base = add_adapters(base, adapter.arrays, job.spec)
    tolerance = max(TOLERANCES["F32" if array.dtype == jnp.float32 else "BF16"] for array in base.values())
    save_orbax_checkpoint(folder / CHECKPOINT, base, job.family, job.arch)
    del base
    _copy_tokenizer(subject, folder)
    config = None if subject.directory is None else find_file(subject.directory, "config.json")
    if config is not None and config.exists():  # tells of shapes that are no published size's
        shutil.copy(config, folder / config.name)
    said = {"modules": _count_modules(job.spec, job.family)}
    return said | _check_sum(subject, folder, reference, tolerance, options)


def _write_gguf(subject: Subject, options: ExportOptions, folder: Path) -> dict[str, Any]:
    adapter, job = subject.adapters[0], subject.job
    save_gguf_adapter(folder / "adapter.gguf", adapter.arrays, job.spec, job.family, job.arch)
    return {"modules": _count_modules(job.spec, job.family)}


_WRITERS: dict[str, Callable[[Subject, ExportOptions, Path], dict[str, Any]]] = {
    "peft": _write_peft,
    "merged": _write_merged,
    "orbax": _write_orbax,
    "gguf": _write_gguf,
}


def _check_sum(
    subject: Subject, folder: Path, reference: Reference, tolerance: float, options: ExportOptions
) -> dict[str, Any]:
    """The logits of a written model, loaded as any base is."""
    config = subject.job.config
    again = open_subject(
        replace(config, model=replace(config.model, weights=str(folder), tokenizer=None)), subject.job.mesh, [None]
    )
    logits = probe(load_bits(again), {}, again.adapters[0].program)
    return {"logits": check_logits(reference, logits, tolerance, Path(str(options.out)))}


def _describe_sum(report: MergeReport) -> dict[str, Any]:
    relative = report.largest_relative_change
    return {
        "modules": report.num_merged,
        "carried_over": report.num_carried,
        "largest_change": report.largest_change,
        "largest_relative_change": relative if np.isfinite(relative) else None,
    }


def _count_modules(spec: LoraSpec, family: Family) -> int:
    """As checkpoints count them: keys and values are two."""
    return sum(len(layers) * len(family.checkpoint.LINEARS[kind].tensors) for kind, layers in spec.layers.items())


def _copy_tokenizer(subject: Subject, folder: Path) -> None:
    """The model's tokenizer goes with it, where it has one."""
    named = subject.job.config.model.tokenizer
    beside = find_file(subject.directory, "tokenizer.model") if subject.directory else None
    path = subject.tokenizer.path if named else beside
    if path is not None and path.exists() and not (folder / "tokenizer.model").exists():
        shutil.copy(path, folder / "tokenizer.model")


def _move_up(folder: Path) -> None:
    """Moves what a folder holds to beside it."""
    for path in folder.iterdir():
        path.rename(folder.parent / path.name)
    folder.rmdir()
