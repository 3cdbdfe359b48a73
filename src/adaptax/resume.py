"""Where a run begins: at its start, or at a checkpoint that goes with the configuration. Needs no jax."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptax.config import Config, UserError, mesh_sizes
from adaptax.manifest import Damaged, Manifest, clean_up, list_checkpoints, read_checkpoint, step_of
from adaptax.run_folder import RunFolder

log = logging.getLogger(__name__)
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)

# May change between two starts of a run. What is read and what is trained may not.
FREE_GROUPS = ("checkpoint", "logging", "generation", "evaluation")
GROUPS = ("model", "data", "optimizer", "schedule", "training", *FREE_GROUPS)
FREE_KEYS = (
    "name",
    "data.cache",
    "data.cache_dir",
    "data.cache_gib",
    "data.prefetch_batches",
    "model.attention",
    "training.compile_cache_gib",
    "training.early_stopping_min_delta",
    "training.early_stopping_patience",
    "training.eval_every_steps",
    "training.exact_match_rows",
    "training.global_batch_size",  # sets gradient_accumulation_steps, which is compared
    "training.max_nonfinite",
    "training.memory_gib",
    "training.num_batches",
    "training.num_epochs",
    "training.profile",
    "training.remat",
    "training.stop_after_steps",
)
# May change where another folder begins from a checkpoint: how it is trained on, not what.
FORK_KEYS = (
    "optimizer.learning_rate",
    "optimizer.max_grad_norm",
    "optimizer.weight_decay",
    "schedule.final_fraction",
    "schedule.name",
    "schedule.warmup_steps",
)
# Compared by content, once it has been read: files may have moved. Rows that are streamed are not read before.
NAMED_KEYS = ("data.train", "data.eval", "model.weights", "model.tokenizer", "model.init_adapter")
# Free as long as the global batch stays the same.
LAYOUT_KEYS = ("model.mesh_shape", "training.micro_batch_size", "training.gradient_accumulation_steps")
INPUTS = {
    "dtype": "compute type",
    "base": "base weights",
    "tokenizer": "tokenizer",
    "data": "training rows",
    "eval": "evaluation rows",
    "initial": "initial adapter's files",
}
# Of this start alone.
START_KEYS = ("checkpoint.resume", "training.stop_after_steps")
LENGTH_KEYS = ("training.num_batches", "training.num_epochs", "training.early_stopping_patience")


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    config: Config  # with a micro-batch that keeps the global batch on another mesh
    checkpoints: tuple[tuple[Path, Manifest], ...] = ()  # to begin from, the newest first; none: at step 0
    is_fork: bool = False  # they are another run's
    summary: dict[str, Any] | None = None  # of a run that has ended, and that the configuration lets end there

    @property
    def is_named(self) -> bool:
        """Whether one step was asked for, and no other will do."""
        path = Path(self.config.checkpoint.resume).absolute()
        return step_of(path) is not None and path in (found.absolute() for found, _ in self.checkpoints)


def find_start(config: Config, folder: RunFolder) -> Start:
    """Looks for checkpoints as ``checkpoint.resume`` says, and holds the configuration against them.

    Damaged checkpoints are told and passed over, unless one was named.

    Raises:
      UserError: there is none where one was asked for, all are damaged, or the configuration is of another run.
    """
    resume = config.checkpoint.resume
    if resume == "never":
        if folder.is_used():
            raise UserError(
                f"{folder.path} holds an earlier run, and checkpoint.resume=never: choose another hydra.run.dir, or "
                "checkpoint.resume=auto to go on with it"
            )
        return Start(config)
    source = folder if resume == "auto" else _find_source(Path(resume))
    is_fork = source.path.resolve() != folder.path.resolve()
    if is_fork and folder.is_used():
        if (read_config(folder) or {}).get("checkpoint", {}).get("resume") != resume:
            raise UserError(f"{folder.path} holds an earlier run: to begin from {resume}, choose another hydra.run.dir")
        if list_checkpoints(folder.checkpoints):  # it began there, and was stopped: a queue starts it again
            start = find_start(_set_resume(config, "auto"), folder)
            return replace(start, config=_set_resume(start.config, resume))
    clean_up(folder.checkpoints)
    if step_of(Path(resume)) is not None:
        try:
            good = [(Path(resume), read_checkpoint(Path(resume)))]
        except Damaged as error:
            raise UserError(f"checkpoint.resume={resume}: {error}; {_list_good(source)}") from None
    else:
        good = _read_good(source)
    if not good:
        return _start_over(config, source, is_fork)
    manifest = good[0][1]
    config = check_config(manifest.config, config, f"the run in {source.path}", is_fork=is_fork)
    summary = None if is_fork or step_of(Path(resume)) is not None else _find_end(config, folder, manifest)
    return Start(config, tuple(good), is_fork, summary)


def _set_resume(config: Config, resume: str) -> Config:
    return replace(config, checkpoint=replace(config.checkpoint, resume=resume))


def share_start(start: Start, folder: RunFolder) -> str:
    """What the other processes of a run must know of where it begins."""
    paths = [str(path.absolute()) for path, _ in start.checkpoints]
    shared = {"folder": str(folder.path.absolute()), "paths": paths, "is_fork": start.is_fork}
    return json.dumps(shared | {"summary": start.summary})


def join_start(config: Config, text: str) -> tuple[Start, RunFolder]:
    """Where process 0 said that the run begins."""
    shared = json.loads(text)
    found = tuple((Path(path), read_checkpoint(Path(path))) for path in shared["paths"])
    if found:
        config = check_config(found[0][1].config, config, f"the run of {found[0][0]}", is_fork=shared["is_fork"])
    return Start(config, found, shared["is_fork"], shared["summary"]), RunFolder(Path(shared["folder"]))


def _find_source(path: Path) -> RunFolder:
    if step_of(path) is not None:
        folder = RunFolder(path.absolute().parents[1])
        if not path.is_dir():
            raise UserError(f"checkpoint.resume={path}: no such checkpoint; {_list_good(folder)}")
        return folder
    if not path.is_dir():
        raise UserError(
            f"checkpoint.resume={path}: no such folder; it is auto, never, a run's folder or one of its checkpoints"
        )
    folder = RunFolder(path)
    if not folder.is_used() and not folder.config.exists():
        raise UserError(f"checkpoint.resume={path}: no run's folder; it has neither checkpoints nor a config.yaml")
    return folder


def _list_good(folder: RunFolder) -> str:
    names = [path.name for path in list_checkpoints(folder.checkpoints)]
    return f"there are {', '.join(names)}" if names else "there are none"


def _read_good(folder: RunFolder) -> list[tuple[Path, Manifest]]:
    """The good checkpoints of a run, the newest first."""
    good, bad = [], []
    for path in reversed(list_checkpoints(folder.checkpoints)):
        try:
            good.append((path, read_checkpoint(path)))
        except Damaged as error:
            log.warning("%s is damaged: %s", path, error)
            bad.append(path.name)
    if bad and not good:
        raise UserError(
            f"every checkpoint in {folder.checkpoints} is damaged ({', '.join(bad)}): restore one from a copy, or "
            "begin anew in another hydra.run.dir"
        )
    return good


def _start_over(config: Config, source: RunFolder, is_fork: bool) -> Start:
    """A run that was killed before its first checkpoint begins anew; another one's folder is left alone."""
    if is_fork:
        raise UserError(f"{source.path} has no checkpoint to begin from")
    if not source.is_used():
        return Start(config)
    saved = read_config(source)
    if saved is None:
        raise UserError(f"{source.path} holds files of another run; choose another hydra.run.dir")
    config = check_config(saved, config, f"the run in {source.path}")
    log.warning("%s has no checkpoint: the run begins anew", source.path)
    return Start(config)


def _find_end(config: Config, folder: RunFolder, manifest: Manifest) -> dict[str, Any] | None:
    """The summary of a run that has ended, if the configuration asks for nothing more."""
    summary = folder.read_summary()
    if summary is None or summary.get("step") != manifest.step:
        return None
    before, now = _flatten(manifest.config), _flatten(dataclasses.asdict(config))
    keys = (*LENGTH_KEYS, "training.early_stopping_min_delta")
    return summary if all(before.get(key) == now[key] for key in keys) else None


def read_config(folder: RunFolder) -> dict[str, Any] | None:
    """The configuration that a run has saved; None where there is none.

    Raises:
      UserError: it is not readable as plain YAML.
    """
    import yaml

    try:
        values = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{folder.config} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(values.get(group, {}), dict) for group in GROUPS):
        values = {}
    if "model" not in values:
        raise UserError(f"{folder.config} is not a run's configuration: choose another folder")
    return values


def check_config(saved: Mapping[str, Any], config: Config, what: str, *, is_fork: bool = False) -> Config:
    """Refuses a configuration that would train something else than was begun; tells what else has changed.

    Returns:
      The configuration; where only the mesh differs, with a micro-batch that keeps the global batch.

    Raises:
      UserError: naming every key that may not change, with both values.
    """
    config = _keep_global_batch(saved, _keep_choices(saved, config))
    before, now = _flatten(saved), _flatten(dataclasses.asdict(config))
    changed = [key for key in now if key in before and _differs(key, before[key], now[key])]
    changed += [key for key in now if key not in before]
    others = {*LAYOUT_KEYS, *NAMED_KEYS, *(FORK_KEYS if is_fork else ())}
    others -= {"data.train"} if config.data.streaming else set()
    refused = [key for key in changed if not _is_free(key) and key not in others]
    told = [f"{k} {_show(before.get(k))} -> {_show(now[k])}" for k in changed if k not in START_KEYS]
    if refused:
        words = [f"{k} was {_show(before[k]) if k in before else 'not set'}, not {_show(now[k])}" for k in refused]
        fork = "; another folder may begin from its checkpoints/step_N with other values"
        raise UserError(
            f"{what} cannot go on with another configuration: {'; '.join(words)}. Give what it was begun with, or "
            f"choose another hydra.run.dir{fork if set(refused) <= set(FORK_KEYS) and not is_fork else ''}"
        )
    sizes = global_batch(before), global_batch(now)
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{what} has a global batch of {sizes[0]} sequences, this configuration one of {sizes[1]}: set "
            "training.micro_batch_size x fsdp x training.gradient_accumulation_steps to the same"
        )
    if told:
        log.info("changed since the run began: %s", "; ".join(told))
    if any(key in LENGTH_KEYS[:2] for key in changed) and now["schedule.name"] != "constant":
        log.warning("the learning-rate schedule (%s) now spans the new number of steps", now["schedule.name"])
    return config


def _keep_choices(saved: Mapping[str, Any], config: Config) -> Config:
    """What was chosen when the run began, where the configuration leaves it open."""
    before, training = saved.get("training", {}), config.training
    if training.micro_batch_size == "auto":
        names = ("micro_batch_size", "gradient_accumulation_steps")
        training = replace(training, **{name: before[name] for name in names if name in before})
    if training.remat == "auto":
        training = replace(training, remat=before.get("remat", "full"))
    return replace(config, training=training)


def _keep_global_batch(saved: Mapping[str, Any], config: Config) -> Config:
    before, now = _flatten(saved), _flatten(dataclasses.asdict(config))
    is_same = all(before.get(key) == now[key] for key in LAYOUT_KEYS[1:])
    if not is_same or before.get("model.mesh_shape") == now["model.mesh_shape"]:
        return config
    (fsdp, _), wanted = mesh_sizes(config.model.mesh_shape), global_batch(before)
    num_micro = config.training.gradient_accumulation_steps
    if wanted % fsdp:
        raise UserError(
            f"the run has a global batch of {wanted} sequences, which fsdp={fsdp} does not divide: choose another "
            "model.mesh_shape"
        )
    if wanted % (fsdp * num_micro):
        num_micro = math.gcd(wanted // fsdp, num_micro)
    training = replace(
        config.training, micro_batch_size=wanted // (fsdp * num_micro), gradient_accumulation_steps=num_micro
    )
    if training != config.training:
        log.warning(
            "training.micro_batch_size=%d and gradient_accumulation_steps=%d keep the global batch of %d on fsdp=%d",
            training.micro_batch_size,
            num_micro,
            wanted,
            fsdp,
        )
    return replace(config, training=training)


def global_batch(values: Mapping[str, Any]) -> int:
    """Sequences of an optimizer step, of flat values."""
    fsdp, _ = mesh_sizes(values["model.mesh_shape"])
    return fsdp * values["training.micro_batch_size"] * values["training.gradient_accumulation_steps"]


def check_identity(saved: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Refuses base weights, a tokenizer or rows that are not those the run began with; tells of other packages.

    Raises:
      UserError: naming what differs.
    """
    wrong = [words for key, words in INPUTS.items() if key in found and saved.get(key) != found[key]]
    if wrong:
        raise UserError(
            f"{what} cannot go on: its {' and '.join(wrong)} are not those that it began with; give the same files, or "
            "choose another hydra.run.dir"
        )
    before, now = saved.get("versions", {}), found.get("versions", {})
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        log.warning("other versions than the run began with (%s): the last bits may differ", ", ".join(changed))


def bring_config(values: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The configuration that a run in ``checkpoint.resume`` was begun with, and of what is given now only some keys.

    Args:
      values: what is given now, all of it.
      keys: keys and groups that count of it; without a run's folder all do.
    """
    resume = values["checkpoint"]["resume"]
    if resume in ("auto", "never"):
        return values
    saved = read_config(_find_source(Path(str(resume))))
    return values if saved is None else bring_saved(values, saved, (*keys, *START_KEYS))


def bring_saved(values: Mapping[str, Any], saved: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """What a run has saved, and of the values only some keys and groups, and what it did not know."""
    brought = {
        name: {**value, **saved.get(name, {})} if isinstance(value, dict) else saved.get(name, value)
        for name, value in values.items()
    }
    for key in keys:
        group, _, name = key.partition(".")
        if name:
            brought[group][name] = values[group][name]
        else:
            brought[group] = values[group]
    return brought


def how_to_resume(folder: RunFolder) -> str:
    """What to type to go on with a run."""
    path = folder.path
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    program = f"python {shlex.quote(sys.argv[0])}" if sys.argv[0].endswith(".py") else "adaptax"
    text = str(path)
    if not _PLAIN.fullmatch(text) or text in ("null", "true", "false"):  # Hydra wants quotes of its own
        text = '"' + text.replace('"', '\\"') + '"'
    return f"go on with: {program} {shlex.quote(f'checkpoint.resume={text}')}"


def _differs(key: str, before: Any, now: Any) -> bool:
    """Of patterns, the first that matches counts, so their order does."""
    is_ordered = key.endswith("_pattern") and isinstance(before, Mapping)
    return before != now or (is_ordered and list(before) != list(now))


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or key.partition(".")[0] in FREE_GROUPS


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested groups as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and name in GROUPS:
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
