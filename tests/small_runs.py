"""Runs, states and checkpoints so small that they take a moment."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import yaml
from hydra import compose, initialize_config_dir
from jax.sharding import Mesh
from omegaconf import OmegaConf
from safetensors.numpy import load_file, save_file

import support
from adaptax.checkpoint import Saver, Writer
from adaptax.compose import find_conf, teach_hydra
from adaptax.config import CheckpointConfig, Config, build
from adaptax.lora import LoraSpec, adapter_shapes
from adaptax.manifest import ARRAYS, Manifest, name_step, seal
from adaptax.mesh import partition
from adaptax.models import ASSETS, find_architecture
from adaptax.models.gemma3_weights import tensor_shapes
from adaptax.optim import build_optimizer
from adaptax.progress import Progress
from adaptax.resume import find_start
from adaptax.run_folder import RunFolder
from adaptax.signals import StopSignals
from adaptax.step import TrainState, init_state
from rows import chat

Rows = list[dict[str, Any]]
NUMBERS = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
NUMBERS |= {"query_pre_attn_scalar": 8, "layer_types": ["full_attention"]}
SHORT = {
    "data.eval_fraction": 0.0,
    "data.max_length": 24,
    "data.packing": False,
    "data.length_buckets": 1,
    "data.cache": False,
    "optimizer.learning_rate": 0.05,
    "schedule.name": "constant",  # the same program, however many steps there are
    "schedule.warmup_steps": 0,
    "training.micro_batch_size": 4,
    "training.num_batches": 6,
    "checkpoint.every_minutes": None,
    "logging.progress": "off",
    "logging.tensorboard": False,
    "logging.plot": False,
}


# Whole runs


def write_model(directory: Path, seed: int = 0) -> Path:
    """A checkpoint of one narrow layer with random weights, beside the tokenizer that ships with the package."""
    directory.mkdir(parents=True)
    tiny = ASSETS / "gemma3_tiny"
    numbers = json.loads((tiny / "config.json").read_text()) | NUMBERS | {"torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(numbers))
    shutil.copy(tiny / "tokenizer.model", directory)
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(find_architecture(support.model_config(directory)), "model.")
    tensors = {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_rows(path: Path, num_rows: int = 24, seed: int = 0) -> Path:
    """Conversations of different lengths."""
    rng = np.random.default_rng(seed)
    words = ["light", "fan", "door", "on", "off", "warm", "red", "blue"]
    rows = [
        chat(" ".join(rng.choice(words, 1 + i % 4)), " ".join(rng.choice(words, 1 + i % 3))) for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@functools.cache
def _compose() -> dict[str, Any]:
    teach_hydra()
    with initialize_config_dir(find_conf(), version_base="1.3"):
        return OmegaConf.to_container(compose("config", ["model=gemma3_tiny"]), resolve=True)  # type: ignore[return-value]


def make_config(home: Path, changes: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a short run.

    Args:
      home: where :func:`write_home` has put model and rows.
      changes: dotted key -> value.
    """
    values = copy.deepcopy(_compose())
    here = {"model.model_size": "auto", "model.weights": str(home / "model"), "model.lora_rank": 4}
    here |= {"model.lora_module_path": ".*(q_einsum|down_proj)", "model.dtype": "float32"}
    here |= {"data.train": str(home / "rows.jsonl"), "data.eval": str(home / "eval.jsonl")}
    for key, value in (here | SHORT | dict(changes or {})).items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = value
    return build(values)


def value_of(config: Config, key: str) -> Any:
    """By dotted key."""
    group, _, name = key.rpartition(".")
    return getattr(getattr(config, group) if group else config, name)


def change(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with other values, by dotted key."""
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        inner = dataclasses.replace(getattr(config, group), **{name: value}) if group else value
        config = dataclasses.replace(config, **{group or name: inner})
    return config


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """The same for the command line, in the folder where :func:`write_home` has put model and rows."""
    here = {"model.model_size": "auto", "model.weights": "model", "model.lora_rank": 4, "model.dtype": "float32"}
    here |= {"model.lora_module_path": ".*(q_einsum|down_proj)", "data.train": "rows.jsonl", "data.eval": "eval.jsonl"}
    values = {key: json.dumps(value) for key, value in (here | SHORT | dict(changes)).items()}
    return ["model=gemma3_tiny", *(f"{key}={value}" for key, value in values.items())]


def write_home(home: Path) -> Path:
    """A user's folder: ``model``, ``rows.jsonl`` and ``eval.jsonl``."""
    write_model(home / "model")
    write_rows(home / "rows.jsonl")
    write_rows(home / "eval.jsonl", 6, seed=1)
    return home


def train(path: Path, config: Config) -> Rows:
    """One start of a run, in this process, as the command line does it; its rows in metrics.jsonl."""
    from adaptax.train import run

    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    with StopSignals(grace_seconds=30) as stop:
        start = find_start(config, folder)
        if not start.summary:
            if not start.checkpoints:
                folder.begin(dataclasses.asdict(start.config))
            run(start, support.make_mesh(*start.config.model.mesh_shape[0]), folder, stop)
    return read_metrics(path)


def write_run(path: Path, config: Config, *steps: int) -> RunFolder:
    """What a run leaves, but for arrays: enough to find out where the next start begins."""
    folder, values = RunFolder(path), dataclasses.asdict(config)
    path.mkdir(parents=True)
    folder.config.write_text(yaml.safe_dump(values, sort_keys=False))
    folder.metrics.write_text(
        "".join(json.dumps({"step": i + 1, "train_loss": 1.0}) + "\n" for i in range(max(steps, default=0)))
    )
    for step in steps:
        arrays = folder.checkpoints / name_step(step) / ARRAYS
        arrays.mkdir(parents=True)
        (arrays / "data").write_text(str(step))
        progress = Progress(train_loss=step / 4, eval_step=step, eval_loss=step / 2, best_step=steps[0], best_loss=0.5)
        manifest = Manifest(step, "2026-01-01T00:00:00+00:00", progress.as_dict(), values, {"base": "none"}, {})
        seal(arrays.parent, manifest)
    return folder


def end(folder: RunFolder, step: int) -> None:
    """Ends it as a run does."""
    folder.summary.write_text(json.dumps({"step": step, "final_loss": 1.5, "best_step": 2, "best_loss": 0.5}))


def read_metrics(path: Path) -> Rows:
    """All rows of a run's metrics."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def read_summary(path: Path) -> dict[str, Any]:
    """How a run ended, but for how fast it was."""
    summary = RunFolder(path).read_summary() or {}
    return {name: value for name, value in summary.items() if name != "speed"}


def losses_of(rows: Rows) -> list[tuple[int, str, float | None]]:
    """What of the metrics must be the same in a run that was stopped and resumed."""
    names = ("train_loss", "train_grad_norm", "train_learning_rate", "eval_loss")
    return [(row["step"], name, row[name]) for row in rows for name in names if name in row]


def adapter_of(path: Path) -> dict[str, np.ndarray]:
    """The trained adapter of a run that has ended."""
    return load_file(path / "adapter" / "adapter_model.safetensors")


# States and checkpoints

ARCH = replace(
    find_architecture(support.model_config(None, size="tiny")),
    num_layers=2,
    embed_dim=16,
    mlp_dim=16,
    num_heads=4,
    head_dim=4,
)
SPEC = LoraSpec({"attn/q_einsum": (0, 1), "mlp/down_proj": (1,)}, rank=4, alpha=4.0)
RULES = {"adamw": {}, "lion": {}, "adafactor": {}, "sgd": {"momentum": 0.9}}


def make_state(mesh: Mesh, optimizer: str = "adamw", seed: int = 0, *, num_updates: int = 2) -> TrainState:
    """The state of a small model after updates by random gradients, whose moments are thus all at work."""
    config = support.optimizer_config(optimizer, **RULES[optimizer])
    rule, _ = build_optimizer(config, support.cfg.ScheduleConfig("constant", 0, 1.0), num_steps=100)
    rng = np.random.default_rng(seed)
    shapes = adapter_shapes(support.FAMILY, ARCH, SPEC)

    def draw() -> dict[str, jax.Array]:
        hosts = {path: rng.standard_normal(shape, np.float32) for path, (shape, _) in shapes.items()}
        return {path: jax.device_put(a, partition(shapes[path][1], a.shape, mesh)) for path, a in hosts.items()}

    state = init_state(draw(), rule, mesh, seed)

    def update(state: TrainState, grads: Any) -> TrainState:
        updates, moments = rule.update(grads, state.optimizer, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        return replace(state, adapters=adapters, optimizer=moments, step=state.step + 1)

    step = jax.jit(update, donate_argnums=0, out_shardings=jax.tree.map(lambda array: array.sharding, state))
    for _ in range(num_updates):
        state = step(state, draw())
    return state


def arrays_of(state: TrainState) -> dict[str, np.ndarray]:
    """Every array of a state on the host, by path, copied."""
    plain = replace(state, key=jax.random.key_data(state.key))
    leaves = jax.tree_util.tree_leaves_with_path(plain)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def make_saver(folder: RunFolder, state: TrainState, keep: int = 3, **due: Any) -> Saver:
    """Saves what :func:`make_state` makes; the adapters are written as they are. ``due``: keys of when to save."""

    def save_adapter(adapters: Mapping[str, np.ndarray], path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        np.savez(path / "adapters.npz", **{name.replace("/", "."): array for name, array in adapters.items()})

    config = CheckpointConfig(
        **({"every_steps": None, "every_minutes": None} | due), keep=keep, resume="auto", grace_seconds=30.0
    )
    writer = Writer({"name": "test"}, lambda: {"base": "none"}, save_adapter)
    return Saver(folder, config, writer, state)


def save_steps(folder: RunFolder, state: TrainState, *steps: int, keep: int = 3, best: int | None = None) -> list[Path]:
    """Saves the state as each of these steps; the paths of their checkpoints."""
    saver = make_saver(folder, state, keep)
    for step in steps:
        saver.save(step, state, Progress(train_loss=1.0, best_step=best))
    saver.close()
    assert saver.failure is None
    return [folder.checkpoints / name_step(step) for step in steps]
