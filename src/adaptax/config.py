"""Names, types, docs and checks of every configuration key. Values live in ``conf/``. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from adaptax import schema
from adaptax.answer_config import EvaluationConfig, GenerationConfig, check_metric
from adaptax.schema import UserError, build_group, check_patterns, knob

MESH_AXES = ("fsdp", "tp")


@dataclass
class ModelConfig:
    """Which Gemma 3, from where, and where its adapters go (``conf/model``)."""

    model_family: str = knob("Architecture family, a key of ``adaptax.models.FAMILIES``: ``gemma3``.")
    model_size: str = knob(
        "Size within the family: ``270m``, ``1b``, ``4b``, ``12b``, ``27b``, ``tiny``, or ``auto`` to take the "
        "architecture from the ``config.json`` beside the weights, or from an Orbax checkpoint's arrays."
    )
    lora_rank: int = knob("Rank of the LoRA matrices; 4 to 128 is usual.", minimum=1)
    lora_alpha: Optional[float] = knob(
        "Updates are scaled by ``lora_alpha / lora_rank``; null means the rank, which keeps the scale at 1.", above=0
    )
    use_rslora: bool = knob("Scale updates by ``lora_alpha / sqrt(lora_rank)`` instead (rsLoRA).")
    lora_module_path: str = knob(
        "Regular expression that must match a whole module path such as ``layers/0/attn/q_einsum``."
    )
    lora_rank_pattern: Any = knob(
        'Ranks of some modules: ``{".*attn/.*": 8}``. The first pattern that matches a whole module path counts; '
        "other modules have ``lora_rank``."
    )
    lora_alpha_pattern: Any = knob(
        "Alphas of some modules, in the same way; other modules have ``lora_alpha``, or their own rank where that is "
        "null."
    )
    mesh_shape: Any = knob('``[[fsdp, tp], ["fsdp", "tp"]]``: devices for sharded data and for tensor parallelism.')
    lora_dropout: float = knob("Dropout on the adapters' input, in training only.", minimum=0, maximum=0.99)
    weights: Optional[str] = knob(
        "Base weights: a directory of safetensors or with an Orbax checkpoint, a Hugging Face hub id, or ``random``; "
        "null means the size's own (``google/gemma-3-1b-it`` for ``1b``)."
    )
    tokenizer: Optional[str] = knob("A sentencepiece ``tokenizer.model``; null means the one beside the weights.")
    dtype: str = knob(
        "Compute type; ``auto`` is bfloat16 on GPU and TPU and float32 on CPU.", choices=("auto", "float32", "bfloat16")
    )
    quantization: Optional[str] = knob(
        "Keep the frozen base's matrices in 8 or 4 bits (QLoRA); null keeps them as they are.",
        choices=("int8", "int4", "nf4"),
    )
    init_adapter: Optional[str] = knob(
        "Begin from this adapter in PEFT's format, a folder; rank, scale and modules are then its own."
    )
    attention: str = knob(
        "Implementation of attention; ``auto`` takes the fastest that the device and the model allow.",
        choices=("auto", "plain", "xla", "cudnn", "splash"),
    )


@dataclass
class DataConfig:
    """What is trained on (``conf/data``)."""

    train: Any = knob(
        "Training rows: a file (JSONL, JSON, CSV, Parquet, Arrow), a folder, a glob, "
        "``hub:ORG/NAME[/CONFIG][@SPLIT]``, or a list of these."
    )
    eval: Any = knob("Held-out rows, like ``train``; null holds out ``eval_fraction`` of the training rows.")
    eval_fraction: float = knob("Share of training rows held out when ``eval`` is null.", minimum=0, maximum=0.9)
    mixture: Any = knob(
        "In place of ``train``: a list of ``{path, weight}``, each also with ``format``, ``columns``, ``filter`` or "
        "``max_rows`` of its own. Weights are shares of an epoch's rows."
    )
    format: str = knob("Row format, a key of ``adaptax.data.formats.FORMATS``; ``auto`` finds it by the columns.")
    columns: Any = knob("Names of the format's columns where they differ: ``{prompt: question, completion: answer}``.")
    filter: Any = knob(
        'Rows to take, by column: a value, a list of values, ``">= 0.5"`` (``> < <= != ==``), ``"~regex"`` or '
        '``"!~regex"``; all must hold.'
    )
    max_rows: Optional[int] = knob("At most so many rows of each training source, from its start.", minimum=1)
    on_bad_row: str = knob(
        "A row that cannot be used: ``error`` stops, ``skip`` counts it and lists the first ten.",
        choices=("error", "skip"),
    )
    supervise: str = knob(
        "What is trained of a conversation: every ``assistant`` turn, the ``last_assistant`` turn, or ``all`` of it.",
        choices=("assistant", "last_assistant", "all"),
    )
    allow_special_tokens: bool = knob("Special tokens spelled out in the rows become the tokens, not plain text.")
    min_length: int = knob("Rows of fewer tokens are left out, and counted.", minimum=1)
    max_length: int = knob("Longest sequence in tokens.", minimum=8)
    overlong: str = knob(
        "Rows over ``max_length``: ``truncate`` cuts the end off, ``split`` makes several sequences, ``drop`` leaves "
        "them out. All are counted.",
        choices=("truncate", "split", "drop"),
    )
    packing: bool = knob("Fill sequences of ``max_length`` tokens with several rows, which do not see each other.")
    length_buckets: int = knob("Without packing: how many sequence lengths are compiled.", minimum=1, maximum=16)
    shuffle: bool = knob("A new order, and new company in packed sequences, in every epoch.")
    streaming: bool = knob("Read, encode and pack on the fly, for what does not fit the disk; needs ``num_batches``.")
    cache: bool = knob("Keep the tokens of each file on disk; without it they are made anew, in memory.")
    cache_dir: Optional[str] = knob("Where tokens are kept; null: ``adaptax/tokens`` in the user's cache folder.")
    cache_gib: float = knob("The cache is kept under this size: tokens unused for longest go first.", above=0)
    prefetch_batches: int = knob("Batches prepared ahead of the step.", minimum=1)


@dataclass
class OptimizerConfig:
    """The update rule for the adapters (``conf/optimizer``); keys that a rule does not use are null."""

    name: str = knob("Update rule.", choices=("adamw", "lion", "adafactor", "sgd"))
    learning_rate: float = knob("Peak learning rate.", above=0)
    weight_decay: float = knob("Decoupled weight decay.", minimum=0)
    beta1: Optional[float] = knob("Decay of the first moment.", minimum=0, maximum=1)
    beta2: Optional[float] = knob("Decay of the second moment.", minimum=0, maximum=1)
    eps: Optional[float] = knob("Added to the denominator.", above=0)
    momentum: Optional[float] = knob("Momentum of SGD; null or 0 for none.", minimum=0, maximum=1)
    max_grad_norm: Optional[float] = knob("Clip gradients to this global norm; null for no clipping.", above=0)
    loraplus_lr_ratio: Optional[float] = knob(
        "The learning rate of B is so many times that of A (LoRA+); null or 1: the same.", above=0
    )


@dataclass
class ScheduleConfig:
    """The learning rate over the steps (``conf/schedule``)."""

    name: str = knob("Shape after warm-up.", choices=("constant", "linear", "cosine"))
    warmup_steps: int = knob("Steps of linear warm-up from 0.", minimum=0)
    final_fraction: float = knob("Share of the peak that the rate ends at, after the last step.", minimum=0, maximum=1)


@dataclass
class TrainingConfig:
    """How long and in what batches (``conf/training``)."""

    micro_batch_size: Any = knob(
        "Sequences in one forward pass on one fsdp slice; ``auto`` is the largest that fits the device.",
        minimum=1,
        choices=("auto",),
        kinds=(int, str),
    )
    gradient_accumulation_steps: int = knob("Forward passes added up for one optimizer step.", minimum=1)
    global_batch_size: Optional[int] = knob(
        "Sequences of an optimizer step: sets ``gradient_accumulation_steps``; null takes what the others make.",
        minimum=1,
    )
    remat: str = knob(
        "What the backward pass computes anew instead of keeping it: ``full`` all of a layer, ``matmul`` all but the "
        "outcomes of its matrix products, ``none`` nothing; ``auto`` the fastest that fits the device.",
        choices=("auto", "none", "matmul", "full"),
    )
    num_batches: Optional[int] = knob("Optimizer steps per epoch; null takes the whole dataset.", minimum=1)
    num_epochs: int = knob("Passes over the data.", minimum=1)
    eval_every_steps: Optional[int] = knob("Evaluate every so many steps; null only at the start and end.", minimum=1)
    exact_match_rows: int = knob(
        "Held-out rows answered before and after training and scored by exact match; 0 for none.", minimum=0
    )
    max_nonfinite: int = knob("Stop after so many steps in a row with a non-finite loss or gradient.", minimum=1)
    early_stopping_patience: Optional[int] = knob(
        "Stop after so many evaluations in a row without a better evaluation loss; null never stops early.", minimum=1
    )
    early_stopping_min_delta: float = knob(
        "How much lower an evaluation loss must be to count as better for early stopping, in nats.", minimum=0
    )
    stop_after_steps: Optional[int] = knob(
        "Save and stop after so many steps of this start, to be resumed later; null goes on to the end.", minimum=1
    )
    memory_gib: Optional[float] = knob(
        "Memory of a device that a run may take; null: what the device says it has.", above=0
    )
    compile_cache_gib: float = knob("Compiled programs are kept for later runs, up to this size; 0: none.", minimum=0)
    profile: Optional[str] = knob(
        "``START:STOP``: a trace of the steps from START to STOP - 1 for TensorBoard and Perfetto; null for none."
    )
    seed: int = knob(
        "Seed of adapters, shuffling and dropout; the held-out rows do not depend on it.", minimum=0, maximum=2**32 - 1
    )


@dataclass
class CheckpointConfig:
    """What is saved of a run while it goes on, and how it is resumed (``conf/checkpoint``)."""

    every_steps: Optional[int] = knob("Save every so many steps; null: by time alone.", minimum=1)
    every_minutes: Optional[float] = knob("Save every so many minutes; null: by steps alone.", above=0)
    keep: int = knob("How many of the latest checkpoints are kept, beside the best one.", minimum=1)
    resume: str = knob(
        "``auto`` goes on from the newest good checkpoint in the run's own folder, if there is one; ``never`` refuses "
        "such a folder; else a run's folder, which then goes on with its own configuration, or one of its "
        "``checkpoints/step_N``."
    )
    grace_seconds: float = knob(
        "How long after a signal (SIGTERM, Ctrl-C, SIGHUP, SIGUSR1, SIGUSR2) the run may take to save and end.", above=0
    )


@dataclass
class LoggingConfig:
    """What a run says and draws (``conf/logging``)."""

    every_steps: int = knob("Steps between lines in the log.", minimum=1)
    progress: str = knob(
        "``auto`` draws a bar in a terminal and prints lines elsewhere.", choices=("auto", "bar", "lines", "off")
    )
    tensorboard: bool = knob("Write TensorBoard events.")
    plot: bool = knob("Draw ``loss.png``.")
    peak_tflops: Optional[float] = knob(
        "Floating-point operations that a device can do at best, 10^12 per second; null: by its kind.",
        above=0,
    )


@dataclass
class Config:
    """A whole run."""

    name: str = knob("The run's name, the first folder under ``outputs``.")
    model: ModelConfig = knob("The base model and its adapters.")
    data: DataConfig = knob("The data.")
    optimizer: OptimizerConfig = knob("The optimizer.")
    schedule: ScheduleConfig = knob("The learning-rate schedule.")
    training: TrainingConfig = knob("Batches and epochs.")
    checkpoint: CheckpointConfig = knob("What is saved along the way, and how a run is resumed.")
    logging: LoggingConfig = knob("What is shown.")
    generation: GenerationConfig = knob("How answers are generated.")
    evaluation: EvaluationConfig = knob("How answers are scored.")


def build(values: Mapping[str, Any], *, is_trained: bool = True) -> Config:
    """Turns nested plain values into a checked :class:`Config`; rows to train on are needed where it is trained.

    Raises:
      UserError: naming every wrong key at once, one line.
    """
    problems: list[str] = []
    config = build_group(Config, values, problems)
    if config.model and "mesh_shape" in values["model"]:
        problems += _check_mesh_shape(config.model.mesh_shape)
    if config.model and isinstance(config.model.lora_module_path, str):
        problems += _check_regex(config.model.lora_module_path)
    if config.model:
        problems += check_patterns("model.lora_rank_pattern", config.model.lora_rank_pattern, is_whole=True)
        problems += check_patterns("model.lora_alpha_pattern", config.model.lora_alpha_pattern, is_whole=False)
    if config.model and isinstance(name := config.model.tokenizer, str) and not locate(name).is_file():
        problems.append(f"model.tokenizer={name}: no such file")
    problems += _check_data(config.data, is_trained) if config.data else []
    problems += check_metric(config.evaluation) if config.evaluation else []
    problems += _check_profile(config.training.profile) if config.training else []
    if problems:
        raise UserError("; ".join(problems))
    return replace(config, training=_fill_global_batch(config))


def _fill_global_batch(config: Config) -> TrainingConfig:
    """With as many accumulated micro-batches as ``global_batch_size`` asks for, where their size is known."""
    training, (fsdp, _) = config.training, mesh_sizes(config.model.mesh_shape)
    whole, size = training.global_batch_size, training.micro_batch_size
    if whole is None:
        return training
    at_once = fsdp if size == "auto" else fsdp * micro_batch(training)
    if whole % at_once:
        of = f"fsdp={fsdp}" if size == "auto" else f"micro_batch_size={size} x fsdp={fsdp}"
        raise UserError(f"training.global_batch_size={whole} must be a multiple of {of}")
    num_micro = training.gradient_accumulation_steps
    if num_micro not in (1, whole // at_once) and size != "auto":
        raise UserError(
            f"training.global_batch_size={whole} makes gradient_accumulation_steps {whole // at_once}, not "
            f"{num_micro}: leave one of them out"
        )
    return training if size == "auto" else replace(training, gradient_accumulation_steps=whole // at_once)


def check_training(config: Config) -> None:
    """Refuses keys that do not go together.

    Raises:
      UserError: early stopping without evaluations to stop at.
    """
    if config.training.early_stopping_patience and not config.training.eval_every_steps:
        raise UserError("training.early_stopping_patience needs evaluations to stop at: set training.eval_every_steps")


def key_paths() -> list[str]:
    """Every key as a dotted path, groups included: ``model``, ``model.lora_rank``, ..."""
    return schema.key_paths(Config)


def micro_batch(training: TrainingConfig) -> int:
    """The micro-batch size, which has been chosen by now where the configuration says ``auto``."""
    assert isinstance(training.micro_batch_size, int), training.micro_batch_size
    return training.micro_batch_size


def profiled_steps(training: TrainingConfig) -> range | None:
    """The steps of ``training.profile``, counted from 1; None where it is not set."""
    return range(*map(int, training.profile.split(":"))) if training.profile else None


def mesh_sizes(mesh_shape: Any) -> tuple[int, int]:
    """(fsdp, tp) of ``[[fsdp, tp], ["fsdp", "tp"]]``, whichever order the names stand in."""
    sizes = dict(zip(mesh_shape[1], mesh_shape[0], strict=True))
    return sizes["fsdp"], sizes["tp"]


def check_divisible(sizes: Mapping[str, int], mesh_shape: Any) -> None:
    """Refuses a mesh that does not divide the model's axes. ``sizes``: axis letter -> size."""
    fsdp, tp = mesh_sizes(mesh_shape)
    names = {"N": "query heads", "F": "mlp width", "V": "vocabulary rows", "D": "hidden width"}
    for axis, count, mesh_axis in (("N", tp, "tp"), ("F", tp, "tp"), ("V", tp, "tp"), ("D", fsdp, "fsdp")):
        if sizes[axis] % count:
            fits = [n for n in range(1, count) if sizes[axis] % n == 0]
            raise UserError(
                f"model.mesh_shape: {mesh_axis}={count} does not divide the model's {sizes[axis]} {names[axis]}; "
                f"{mesh_axis}={fits[-1]} does"
            )


def _check_mesh_shape(shape: Any) -> list[str]:
    form = 'model.mesh_shape must be [[fsdp, tp], ["fsdp", "tp"]], such as [[2, 4], ["fsdp", "tp"]]'
    is_pair = isinstance(shape, list) and len(shape) == 2 and all(isinstance(part, list) for part in shape)
    if not is_pair or len(shape[0]) != 2 or len(shape[1]) != 2:
        return [f"{form}, not {shape}"]
    if sorted(map(str, shape[1])) != sorted(MESH_AXES):
        return [f"{form}: the axis names are fsdp and tp, not {', '.join(map(str, shape[1]))}"]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape[0]):
        return [f"{form}: the sizes are whole numbers from 1, not {shape[0]}"]
    return []


def _check_regex(pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"model.lora_module_path={pattern!r} is not a regular expression: {error}"]
    return []


def _check_profile(steps: Any) -> list[str]:
    if not isinstance(steps, str):
        return []
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", steps, re.ASCII)
    if match and 1 <= int(match[1]) < int(match[2]):
        return []
    form = 'START:STOP with 1 <= START < STOP: "11:14" traces steps 11, 12 and 13 (in a YAML file, with the quotes)'
    return [f"training.profile={steps} must be {form}"]


def paths_of(value: Any) -> list[str]:
    """The files that ``data.train`` or ``data.eval`` names: none, one, or a list."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def locate(name: str) -> Path:
    """The file of that name; ``embedded:`` names one that ships with the package."""
    is_embedded = name.startswith("embedded:")
    return Path(__file__).parent / "assets" / name[len("embedded:") :] if is_embedded else Path(name).expanduser()


def _check_data(data: DataConfig, is_trained: bool) -> list[str]:
    problems = []
    for key in ("train", "eval"):
        value = getattr(data, key)
        is_list = isinstance(value, list) and value and all(isinstance(p, str) and p for p in value)
        if not (value is None or (isinstance(value, str) and value) or is_list):
            problems.append(f"data.{key} must be a file or a list of files, not {value!r}")
    if is_trained and data.train is None and data.mixture is None:
        problems.append("data.train is not set: data.train=chats.jsonl, or +experiment=quickstart for a first try")
    limits = data.min_length, data.max_length
    if all(isinstance(limit, int) for limit in limits) and limits[0] > limits[1]:
        problems.append(f"data.min_length={data.min_length} is more than data.max_length={data.max_length}")
    return problems
