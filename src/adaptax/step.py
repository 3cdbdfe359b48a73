"""The training and evaluation steps: pure functions over pytrees, compiled once.

The frozen base is an argument beside the state: it is not differentiated, not donated and never copied.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from adaptax.lora import Arrays, LoraSpec, merge_model
from adaptax.loss import cross_entropy
from adaptax.mesh import replicated

Batch = dict[str, jax.Array]  # tokens, targets, loss_mask, segments, positions: each [A, B, T], A accumulated
log = logging.getLogger(__name__)
HEAD = "embedder/embedding"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training changes."""

    adapters: Arrays  # float32, stacked by layer
    optimizer: Any
    step: jax.Array
    key: jax.Array  # of dropout; the key of a step is folded from it
    num_nonfinite: jax.Array  # steps skipped so far
    nonfinite_in_row: jax.Array


@dataclass(frozen=True)
class Program:
    """What the steps close over: all static."""

    graphdef: nnx.GraphDef
    spec: LoraSpec | None
    dtype: Any
    mesh: Mesh
    windows: tuple[int | None, ...] = ()  # of attention, of which visible pairs are counted

    @property
    def adapter_dtype(self) -> Any:
        """The type in which adapters are multiplied: on CPU float32, as thin products of bfloat16 are slow there."""
        return jnp.float32 if self.mesh.devices.flat[0].platform == "cpu" else self.dtype


def describe_state(adapters: Mapping[str, Any], optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state for these adapters, of which it needs no more; moments lie with them."""

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in adapters]
        same_shape = names and leaf.shape == adapters[names[-1]].shape
        sharding = adapters[names[-1]].sharding if same_shape else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(lambda a: TrainState(a, optimizer.init(a), *_counters(0)), dict(adapters))
    return jax.tree_util.tree_map_with_path(place, shapes)


def init_state(adapters: Arrays, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """The state before the first step, laid out as :func:`describe_state` says."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, describe_state(adapters, optimizer, mesh).optimizer)
    moments = jax.jit(optimizer.init, out_shardings=shardings)(adapters)
    counters = jax.jit(functools.partial(_counters, seed), out_shardings=replicated(mesh))
    return TrainState(adapters, moments, *counters())


def _counters(seed: int) -> tuple[jax.Array, ...]:
    zero = jnp.zeros((), jnp.int32)
    return zero, jax.random.key(seed), zero, zero


def build_train_step(
    program: Program, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """``(state, base, batch) -> (state, metrics)``, jitted; the state is donated. Metrics are scalars, but ``pairs``.

    The loss is the sum over the supervised tokens of all accumulated micro-batches and devices over their count. A step
    whose loss, gradient or update is not finite leaves adapters and moments as they were and is counted.
    """

    def train_step(state: TrainState, base: Arrays, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        step_key = jax.random.fold_in(state.key, state.step)
        dropout = program.spec is not None and program.spec.dropout > 0

        def accumulate(total: tuple[jax.Array, Arrays], micro: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            key = jax.random.fold_in(step_key, micro[0]) if dropout else None
            loss, grads = jax.value_and_grad(_sum_loss)(state.adapters, base, micro[1], program, key)
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        zeros = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.adapters)
        (loss, grads), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(batch["tokens"].shape[0]), batch))
        num_tokens = batch["loss_mask"].sum()
        loss, grads = jax.tree.map(lambda x: x / jnp.maximum(num_tokens, 1), (loss, grads))

        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(grads, state.optimizer, state.adapters)
            new = optax.apply_updates(state.adapters, updates), moments
        for array in jax.tree.leaves(new[0]):  # a learning rate may be too large for a gradient that is finite
            is_finite &= jnp.isfinite(array).all()
        adapters, moments = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old), new, (state.adapters, state.optimizer)
        )
        in_row = jnp.where(is_finite, 0, state.nonfinite_in_row + 1)
        num_nonfinite = state.num_nonfinite + jnp.where(is_finite, 0, 1)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step - state.num_nonfinite), jnp.float32),
            "num_supervised": num_tokens,
            "num_tokens": (batch["segments"] > 0).sum(),
            "num_nonfinite": num_nonfinite,
            "nonfinite_in_row": in_row,
        }
        if program.windows:
            metrics["pairs"] = count_visible(batch, program.windows)
        return TrainState(adapters, moments, state.step + 1, state.key, num_nonfinite, in_row), metrics

    return jax.jit(train_step, donate_argnums=0)


def count_visible(batch: Batch, windows: tuple[int | None, ...]) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """(query, key) pairs that see each other, by window: each 256 times the first number plus the second.

    As float32 they would not be exact, and a single integer would overflow.
    """
    seen = jnp.where(batch["segments"] > 0, batch["positions"] + 1, 0).astype(jnp.uint32)
    keys = [seen if window is None else jnp.minimum(seen, window) for window in windows]
    return tuple(((array >> 8).sum(), (array & 255).sum()) for array in keys)


class StepPerLength:
    """A jitted step whose last argument is a batch, compiled once for every length of sequences that it meets."""

    def __init__(self, step: Any):
        self._step = step
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def compile(self, *arguments: Any) -> jax.stages.Compiled:
        """The program for arguments like these, which may be shapes alone."""
        length = arguments[-1]["tokens"].shape[-1]
        if length not in self._compiled:
            if self._compiled:
                log.info("compiling for sequences of %d tokens", length)
            self._compiled[length] = self._step.lower(*arguments).compile()
        return self._compiled[length]

    def __call__(self, *arguments: Any) -> Any:
        return self.compile(*arguments)(*arguments)


def build_eval_step(program: Program) -> Callable[[Arrays, Arrays, Batch], tuple[jax.Array, jax.Array]]:
    """``(adapters, base, batch) -> (summed loss, supervised tokens)``, jitted, without dropout."""

    def eval_step(adapters: Arrays, base: Arrays, batch: Batch) -> tuple[jax.Array, jax.Array]:
        def add(total: jax.Array, micro: Batch) -> tuple[jax.Array, None]:
            return total + _sum_loss(adapters, base, micro, program, None), None

        loss, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), batch)
        return loss, batch["loss_mask"].sum()

    return jax.jit(eval_step)


def _sum_loss(adapters: Arrays, base: Arrays, batch: Batch, program: Program, key: jax.Array | None) -> jax.Array:
    model = merge_model(program.graphdef, base, adapters, program.spec, program.adapter_dtype)
    hidden_BTD = model(batch["tokens"], batch["positions"], batch["segments"], dtype=program.dtype, dropout_key=key)
    return cross_entropy(hidden_BTD, base[HEAD], batch["targets"], batch["loss_mask"], program.mesh)
