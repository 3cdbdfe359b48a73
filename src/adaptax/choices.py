"""What is chosen by memory: the micro-batch, what the backward pass keeps, what to change where a run does not fit."""

from __future__ import annotations

import bisect
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from adaptax.config import TrainingConfig, UserError, check_divisible, micro_batch
from adaptax.job import Job, Steps, with_training
from adaptax.memory import Footprint, Shapes, compile_steps, describe_base, foretell, show_bytes
from adaptax.mesh import build_mesh

log = logging.getLogger(__name__)
# Fastest first, as measured: on CPU, memory traffic makes keeping everything slower than computing some of it anew.
REMAT_ORDER = {"cpu": ("matmul", "full"), "gpu": ("none", "matmul", "full"), "tpu": ("none", "matmul", "full")}
ENOUGH_TOKENS = 8192  # in one forward pass on a device: more make it no faster, so memory is better spent otherwise
SIZES = sorted({1, *(n << k for k in range(11) for n in (2, 3))})  # of micro-batches: 1, 2, 3, 4, 6, 8, 12, ...
NUM_PROPOSALS = 3


def remat_policies(job: Job) -> tuple[str, ...]:
    """What may be taken for ``training.remat``, the fastest first."""
    remat = job.config.training.remat
    return REMAT_ORDER[job.platform] if remat == "auto" else (remat,)


def compile_fitting(
    job: Job, base: Shapes, length: int, free: int | None, *, with_eval: bool
) -> tuple[Job, Steps, Footprint]:
    """Compiles the steps with the fastest remat policy that fits, or else with the last of them.

    Args:
      job: whose micro-batch has been chosen.
      base: shapes of the base weights.
      length: of the longest sequences.
      free: bytes that a device has; None where that is not known.
      with_eval: whether there is an evaluation step.

    Returns:
      The job with that policy, its steps, and what they take.
    """
    for remat in remat_policies(job):
        started, job = time.monotonic(), with_training(job, remat=remat)
        steps, footprint = compile_steps(job, base, length, with_eval=with_eval)
        fits = free is None or footprint.peak_bytes <= free
        words = "training.remat=%s: steps compiled in %.1f s; on each device: %s%s"
        log.info(words, remat, time.monotonic() - started, footprint.describe(), "" if fits else ", which does not fit")
        if fits:
            break
    return job, steps, footprint


def choose_micro_batch(job: Job, directory: Path | None, length: int, free: int | None, most: int) -> Job:
    """The job with the largest micro-batch that fits; with ``training.global_batch_size``, of those that make it up.

    Where ``training.remat`` is auto, keeping more comes before micro-batches of more than ENOUGH_TOKENS.

    Args:
      job: whose ``training.micro_batch_size`` is auto.
      directory: where the weights lie, if they are there.
      length: of the longest sequences.
      free: bytes that a device has.
      most: sequences that there are, for one fsdp slice.

    Raises:
      UserError: not even one sequence fits.
    """
    if free is None:
        raise UserError("training.micro_batch_size=auto: the device does not say what it has; set training.memory_gib")
    training, fsdp = job.config.training, job.mesh.shape["fsdp"]
    whole = training.global_batch_size
    sizes = (
        [n for n in SIZES if n <= most]
        if whole is None
        else [n for n in range(1, whole + 1) if whole % (n * fsdp) == 0]
    )
    base = describe_base(job, directory)
    for remat in remat_policies(job):
        plan = functools.partial(_with_micro_batch, with_training(job, remat=remat))
        size = _find_largest(sizes, lambda n, plan=plan: foretell(plan(n), base, length).peak_bytes, free)
        if size and (size * length >= ENOUGH_TOKENS or size == sizes[-1]):
            break
    if size is None:
        smallest = plan(sizes[0])
        raise UserError(describe_excess(smallest, foretell(smallest, base, length), directory, length, free))
    chosen = plan(size)
    log.info("training.micro_batch_size=%d training.remat=%s: the most that fits %s", size, remat, show_bytes(free))
    return chosen


def _with_micro_batch(job: Job, size: int) -> Job:
    training = job.config.training
    whole, num_micro = training.global_batch_size, training.gradient_accumulation_steps
    num_micro = num_micro if whole is None else whole // (size * job.mesh.shape["fsdp"])
    return with_training(job, micro_batch_size=size, gradient_accumulation_steps=num_micro)


def _find_largest(sizes: list[int], measure: Callable[[int], int], free: int) -> int | None:
    """The largest size whose measure is not over ``free``. It grows nearly in a straight line: few are measured."""
    measured = {0: measure(sizes[0])}
    if measured[0] > free:
        return None
    low, high = 0, len(sizes)  # low fits, high does not
    while high - low > 1:
        guess = low + 1
        if len(measured) > 1:
            (a, bytes_a), (b, bytes_b) = sorted(measured.items())[-2:]
            slope = max((bytes_b - bytes_a) / (sizes[b] - sizes[a]), 1)
            reach = sizes[low] + (free - measured[low]) / slope
            guess = bisect.bisect_right(sizes, reach) - 1
        guess = min(max(guess, low + 1), high - 1)
        measured[guess] = measure(sizes[guess])
        low, high = (guess, high) if measured[guess] <= free else (low, guess)
    return sizes[low]


@dataclass(frozen=True)
class Proposal:
    """A change of the configuration that makes a run smaller."""

    overrides: str  # as they are typed
    footprint: Footprint


def propose(job: Job, directory: Path | None, length: int, free: int) -> list[Proposal]:
    """The cheapest changes after which a run fits; where fewer do, also those that come nearest.

    Cheapest first: what costs time alone, then what needs devices, then what changes results.
    """
    fitting: list[Proposal] = []
    others: list[Proposal] = []
    for changes in _changes(job, length):
        tried: list[Proposal] = []
        for overrides, changed, shorter in [changes[-1], *changes[:-1]]:  # if the largest is too little, so is each
            log.info("compiling with %s", overrides)
            tried.append(Proposal(overrides, foretell(changed, describe_base(changed, directory), shorter)))
            if tried[0].footprint.peak_bytes > free or (tried[1:] and tried[-1].footprint.peak_bytes <= free):
                break
        best = next((p for p in [*tried[1:], tried[0]] if p.footprint.peak_bytes <= free), None)
        fitting += [best] if best else []
        others += [] if best else tried
        if len(fitting) == NUM_PROPOSALS:
            break
    return [*fitting, *sorted(others, key=lambda p: p.footprint.peak_bytes)][:NUM_PROPOSALS]


def _changes(job: Job, length: int) -> Iterator[list[tuple[str, Job, int]]]:
    """(overrides, the job with them, the length of its sequences): lists of one kind, the least of it first."""
    model, training, data = job.config.model, job.config.training, job.config.data
    policies = ("none", "matmul", "full")
    stronger = policies[policies.index(training.remat) + 1 :]
    if stronger:
        yield [(f"training.remat={remat}", with_training(job, remat=remat), length) for remat in stronger]
    job, same = with_training(job, remat="full"), "training.remat=full " if stronger else ""  # with all that follow
    size, num_micro, smaller = micro_batch(training), training.gradient_accumulation_steps, []
    while size % 2 == 0:
        size, num_micro = size // 2, num_micro * 2
        values = {"micro_batch_size": size, "gradient_accumulation_steps": num_micro}
        text = " ".join(f"training.{key}={value}" for key, value in values.items())
        smaller.append((same + text, with_training(job, **values), length))
    if smaller:
        yield smaller
    for shape, half in _larger_meshes(job):
        config = replace(job.config, model=replace(model, mesh_shape=shape), training=half)
        text = f"'model.mesh_shape={shape}'".replace(" ", "")
        text += f" training.micro_batch_size={half.micro_batch_size}"
        text += f" training.gradient_accumulation_steps={half.gradient_accumulation_steps}"
        yield [(same + text, replace(job, config=config, mesh=build_mesh(shape)), length)]
    if model.quantization is None:
        kinds = [(kind, replace(job.config, model=replace(model, quantization=kind))) for kind in ("int8", "nf4")]
        yield [(f"{same}model.quantization={k}", replace(job, config=config), length) for k, config in kinds]
    shorter = [length >> k for k in range(1, 10) if length >> k >= 256]
    configs = [replace(job.config, data=replace(data, max_length=n)) for n in shorter]
    if shorter:
        pairs = zip(shorter, configs, strict=True)
        yield [(f"{same}data.max_length={n}", replace(job, config=config), n) for n, config in pairs]


def _larger_meshes(job: Job) -> Iterator[tuple[Any, TrainingConfig]]:
    """Meshes of twice as many devices, with the same global batch."""
    fsdp, tp = job.mesh.shape["fsdp"], job.mesh.shape["tp"]
    training, sizes = job.config.training, job.family.checkpoint.axis_sizes(job.arch)
    size, num_micro = micro_batch(training), training.gradient_accumulation_steps
    half = {"gradient_accumulation_steps": num_micro // 2} if num_micro % 2 == 0 else {"micro_batch_size": size // 2}
    for axes, values in (([2 * fsdp, tp], half), ([fsdp, 2 * tp], {})):
        shape = [axes, ["fsdp", "tp"]]
        if 2 * fsdp * tp > jax.device_count() or 0 in values.values() or size % 2 and "micro_batch_size" in values:
            continue
        with contextlib.suppress(UserError):
            check_divisible(sizes, shape)
            yield shape, replace(training, **values)


def describe_excess(job: Job, footprint: Footprint, directory: Path | None, length: int, free: int) -> str:
    """One line: that a run does not fit, and what to change."""
    changes = [f"{p.overrides} ({show_bytes(p.footprint.peak_bytes)})" for p in propose(job, directory, length, free)]
    hint = f"try {'; or '.join(changes)}" if changes else "choose a smaller model"
    return (
        f"the run needs {show_bytes(footprint.peak_bytes)} on each device, which has {show_bytes(free)} for it "
        f"(training.memory_gib sets another limit); {hint}"
    )
