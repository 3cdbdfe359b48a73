"""What a run would take: memory by kind, work and time of a step, before any weight is read."""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.table import Table

from adaptax.choices import choose_micro_batch, compile_fitting, propose
from adaptax.config import Config, micro_batch
from adaptax.data.packing import pad_length
from adaptax.devices import peak_flops
from adaptax.flops import count_documents, split_flops
from adaptax.job import Job, build_job, set_precision
from adaptax.loss import chunk_size
from adaptax.memory import Footprint, describe_base, free_bytes, local_bytes, show_bytes
from adaptax.report import log_table
from adaptax.step import HEAD

log = logging.getLogger(__name__)
PROBE_SECONDS = 0.5
MOST_SEQUENCES = 1 << 20


def plan(config: Config, mesh: Mesh) -> bool:
    """Compiles the steps of a run from shapes alone and tells what they take; nothing is fetched, no row is read.

    Sequences are taken to be full, ``data.max_length`` tokens long, and all of it to be trained.

    Returns:
      Whether the run fits the device; where it does not, the cheapest changes have been told.
    """
    job = build_job(config, mesh)
    set_precision(job)
    path = Path(job.source).expanduser()
    directory = path if path.is_dir() else None
    length, free = pad_length(config.data.max_length), free_bytes(config, mesh)
    if config.training.micro_batch_size == "auto":
        job = choose_micro_batch(job, directory, length, free, MOST_SEQUENCES)
    started = time.monotonic()
    chosen, _, footprint = compile_fitting(job, describe_base(job, directory), length, free, with_eval=True)
    show_footprint(chosen, footprint, length, free, time.monotonic() - started)
    show_work(chosen, directory, length)
    if free is None or footprint.peak_bytes <= free:
        return True
    log.warning("it does not fit; the cheapest changes:")
    for proposal in propose(chosen, directory, length, free):
        peak = proposal.footprint.peak_bytes
        log.warning("  %s: peak %s%s", proposal.overrides, show_bytes(peak), "" if peak <= free else ", still too much")
    return False


def show_footprint(job: Job, footprint: Footprint, length: int, free: int | None, seconds: float) -> None:
    """The table of memory."""
    config, training, device = job.config, job.config.training, job.mesh.devices.flat[0]
    shape = " x ".join(f"{name} {size}" for name, size in job.mesh.shape.items())
    table = Table(title=f"{config.model.model_family} {config.model.model_size} on {shape}, each {device.device_kind}")
    table.add_column("memory of each device")
    table.add_column("", justify="right")
    rows = {
        "base weights": footprint.base_bytes,
        "adapters": footprint.adapter_bytes,
        "optimizer": footprint.optimizer_bytes,
        "batches": footprint.batch_bytes,
        "activations and temporaries, training": footprint.step_bytes,
        "activations and temporaries, evaluation": footprint.eval_bytes,
    }
    for name, size in rows.items():
        table.add_row(name, show_bytes(size))
    table.add_section()
    table.add_row("peak", show_bytes(footprint.peak_bytes))
    table.add_row("the device has", "unknown" if free is None else show_bytes(free))
    table.caption = (
        f"micro_batch_size {training.micro_batch_size} of {length} tokens, accumulated "
        f"{training.gradient_accumulation_steps} times; {job.dtype}, remat {training.remat}; "
        f"compiled in {seconds:.1f} s"
    )
    log_table(table)


def show_work(job: Job, directory: Path | None, length: int) -> None:
    """FLOPs, bytes and time of a step."""
    training = job.config.training
    num_micro, rows = training.gradient_accumulation_steps, micro_batch(training) * job.mesh.shape["fsdp"]
    num_sequences = num_micro * rows
    counts = count_documents(job.family, job.arch, [length] * num_sequences, num_sequences * (length - 1))
    parts = split_flops(job.family, job.arch, job.spec, counts)
    model = sum(parts.values())
    again = 0.0
    if training.remat == "full":  # the forward pass of the adapted layers, once more
        first, num_layers = job.spec.first_layer, job.arch.num_layers
        again = (num_layers - first) / (2 * num_layers - first) * parts["frozen"] + parts["adapters"] / 3
        again += parts["attention"] / 3
    base = describe_base(job, directory)
    head = local_bytes(base[HEAD])
    layers = local_bytes(base) - head
    num_chunks = -(-length * micro_batch(training) // chunk_size(job.arch.vocab_size))
    read = num_micro * ((3 if training.remat == "full" else 2) * layers + 2 * num_chunks * head)
    log.info(
        "a step: %.4g model TFLOP%s; it reads %s of weights on each device",
        model / 1e12,
        f", and {again / 1e12:.4g} TFLOP again for the backward pass" if again else "",
        show_bytes(read),
    )
    rate, words = find_rate(job)
    seconds = (model + again) / (rate * job.mesh.size)
    log.info("at %.4g TFLOP/s a device (%s) a step takes %.3g s or more", rate / 1e12, words, seconds)


def find_rate(job: Job) -> tuple[float, str]:
    """(operations per second of a device, where that is from): what is configured or known of it, or else measured."""
    device = job.mesh.devices.flat[0]
    if job.config.logging.peak_tflops is not None:
        return job.config.logging.peak_tflops * 1e12, "logging.peak_tflops"
    known = peak_flops(device.device_kind, str(job.dtype))
    if known is not None:
        return known, f"the peak of {device.device_kind}"
    sizes = job.family.checkpoint.axis_sizes(job.arch)
    shapes = (1024, sizes["D"]), (sizes["D"], sizes["F"])
    left, right = (jax.device_put(jnp.ones(shape, job.dtype), device) for shape in shapes)
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))  # as a step's largest are
    product(left, right).block_until_ready()
    best, until = 0.0, time.monotonic() + PROBE_SECONDS
    while time.monotonic() < until:
        started = time.monotonic()
        product(left, right).block_until_ready()
        best = max(best, 2 * 1024 * sizes["D"] * sizes["F"] / (time.monotonic() - started))
    return best, "measured with a product of its MLP"
