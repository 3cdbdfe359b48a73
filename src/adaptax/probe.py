"""A step's loss and gradient once more, watched place by place.

Places in the order of the computation: ``embedder``, the two halves of every layer (``layers/3/attn``, then
``layers/3/mlp``), ``final_norm``, ``loss``; the backward pass goes through them from the last to the first. Axes: A
micro-batches, B sequences of each, L layers. Nothing of the size of a hidden state is kept for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptax.lora import Arrays, LoraSpec, merge_model
from adaptax.loss import cross_entropy
from adaptax.mesh import replicated
from adaptax.quantize import Quantized, dequantize, join_scales
from adaptax.step import HEAD, Batch, Program

HALVES = ("attn", "mlp")  # of a layer, in order; modules are named by them
Notes = dict[str, np.ndarray]


@dataclass(frozen=True)
class Weight:
    """One layer's part of a base weight or an adapter."""

    path: str  # layers/3/mlp/down_proj/w
    place: str  # layers/3/mlp
    is_adapter: bool
    counts: tuple[int, int, int]  # values that are NaN, infinite, finite but too large for the compute type
    top: float  # the largest finite |w|

    @property
    def is_damaged(self) -> bool:
        """Whether the compute type holds it with values that are not finite."""
        return any(self.counts)

    def __str__(self) -> str:
        kinds = ("NaN", "inf", "out of the compute type's range")
        holds = " and ".join(f"{n:,} {kind}" for n, kind in zip(self.counts, kinds, strict=True) if n)
        return f"{'adapter' if self.is_adapter else 'base weight'} {self.path} holds {holds}"


@dataclass(frozen=True)
class Evidence:
    """All that was measured, on the host."""

    weights: list[Weight]  # in the order of the computation
    forward: dict[str, Notes]  # place -> of x behind it: top, bad, token (the first that is bad), each [A, B]
    backward: dict[str, Notes]  # place -> of the gradient for x behind it: the same
    bad_grads: dict[str, np.ndarray]  # adapter of a layer -> whether its gradient is not finite, [A]
    norms: dict[str, float]  # adapter of a layer -> norm of its gradient for the whole batch
    unknown_token: int | None  # the largest token, if it is past the vocabulary
    vocab_size: int
    loss: float  # as the step's metrics have it
    grad_norm: float

    @property
    def num_micro(self) -> int:
        """A, the micro-batches of the batch."""
        return len(self.forward["loss"]["bad"])


Measure = Callable[[Arrays, Arrays, Batch, jax.Array | None], Evidence]


def build_measure(program: Program) -> Measure:
    """``(base, adapters, batch, key) -> evidence``: runs a global batch as a step does; compiled once."""
    spec, whole = program.spec, replicated(program.mesh)
    assert spec is not None, "a model without adapters has no training step"
    probe, sum_up = _build_probe(program, spec), jax.jit(_sum_up, out_shardings=whole)
    examine = jax.jit(functools.partial(_examine, limit=float(jnp.finfo(program.dtype).max)), out_shardings=whole)

    def measure(base: Arrays, adapters: Arrays, batch: Batch, key: jax.Array | None) -> Evidence:
        total, seen = None, []
        for a in range(batch["tokens"].shape[0]):
            loss_and_grads, notes = probe(adapters, base, batch, np.int32(a), key)
            total = loss_and_grads if total is None else jax.tree.map(jnp.add, total, loss_and_grads)
            seen.append(jax.device_get(notes))
        loss, grad_norm, norms, max_token = jax.device_get(sum_up(total, batch))
        forward, backward, bad = ([notes[i] for notes in seen] for i in range(3))
        examined = jax.device_get([examine(base), examine(adapters)])
        return Evidence(
            weights=_list_weights(examined[0], examined[1], spec),
            forward=_by_place(forward),
            backward=_by_place(backward, spec.first_layer),
            bad_grads=_by_layer({path: np.stack([m[path] for m in bad], axis=1) for path in norms}, spec),
            norms={path: float(norm) for path, norm in _by_layer(norms, spec).items()},
            unknown_token=int(max_token) if max_token >= base[HEAD].shape[0] else None,
            vocab_size=base[HEAD].shape[0],
            loss=float(loss),
            grad_norm=float(grad_norm),
        )

    return measure


def _build_probe(program: Program, spec: LoraSpec) -> Any:
    """``(adapters, base, batch, a, key) -> ((summed loss, gradients), notes)`` of micro-batch a, jitted."""
    whole = replicated(program.mesh)

    def probe(adapters: Arrays, base: Arrays, batch: Batch, a: jax.Array, key: jax.Array | None) -> tuple[Any, ...]:
        micro = {name: array[a] for name, array in batch.items()}
        num_layers = next(array.shape[0] for path, array in base.items() if path.startswith("layers/"))
        tap = jnp.zeros((micro["tokens"].shape[0], 2), jnp.float32)
        taps = {half: jnp.zeros((num_layers - spec.first_layer, *tap.shape), jnp.float32) for half in HALVES}
        dropout_key = jax.random.fold_in(key, a) if key is not None and spec.dropout > 0 else None

        def sum_loss(adapters: Arrays, taps: Any, tap: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            model = merge_model(program.graphdef, base, adapters, spec, program.adapter_dtype)
            inputs = micro["tokens"], micro["positions"], micro["segments"]
            options = {"dtype": program.dtype, "dropout_key": dropout_key}
            hidden_BTD, notes = model(*inputs, **options, watch=_watch, taps=taps)
            hidden_BTD, notes["final_norm"] = _watch(hidden_BTD, tap)
            loss = cross_entropy(hidden_BTD, base[HEAD], micro["targets"], micro["loss_mask"], program.mesh)
            return loss, (hidden_BTD, notes)

        run = jax.value_and_grad(sum_loss, argnums=(0, 1, 2), has_aux=True)
        (loss, (hidden_BTD, forward)), (grads, layers, last) = run(adapters, taps, tap)
        forward["loss"] = _note_loss(hidden_BTD, base[HEAD], micro, program)
        backward = {place: {"top": t[..., 0], "bad": t[..., 1] > 0} for place, t in layers.items()}
        backward["final_norm"] = {"top": last[:, 0], "bad": last[:, 1] > 0}
        bad = {path: ~jnp.isfinite(grad).all(axis=(1, 2)) for path, grad in grads.items()}
        return (loss, grads), (forward, backward, bad)

    return jax.jit(probe, out_shardings=((whole, None), whole))


def _watch(x_BTD: jax.Array, tap: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(x as it was, its note), and a note of its gradient where there is a tap."""
    note = _note(jax.lax.stop_gradient(x_BTD))
    return (x_BTD if tap is None else _tap(x_BTD, tap)), note


def _note(x_BTD: jax.Array) -> dict[str, jax.Array]:
    """Of each sequence: the largest finite |x|, whether x is not finite somewhere, and in which token first."""
    size_BTD = jnp.abs(x_BTD.astype(jnp.float32))
    is_finite_BTD = jnp.isfinite(size_BTD)
    bad_BT = ~is_finite_BTD.all(axis=-1)
    top_B = jnp.where(is_finite_BTD, size_BTD, 0.0).max(axis=(1, 2))
    return {"top": top_B, "bad": bad_BT.any(axis=1), "token": bad_BT.argmax(axis=1)}


@jax.custom_vjp
def _tap(x_BTD: jax.Array, tap: jax.Array) -> jax.Array:
    """x as it was. As its own gradient the tap, [B, 2], is given a note of x's gradient: top, and 1 where bad."""
    return x_BTD


def _tap_forward(x_BTD: jax.Array, tap: jax.Array) -> tuple[jax.Array, None]:
    return x_BTD, None


def _tap_backward(_: None, d_x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    note = _note(d_x_BTD)
    return d_x_BTD, jnp.stack([note["top"], note["bad"].astype(jnp.float32)], axis=-1)


_tap.defvjp(_tap_forward, _tap_backward)


def _note_loss(hidden_BTD: jax.Array, head_VD: jax.Array, micro: Batch, program: Program) -> dict[str, jax.Array]:
    """The note of each sequence's loss. The others' hidden states are set to zero, as they are in its chunks too."""
    rows_B = jnp.arange(hidden_BTD.shape[0])

    def lose(b: jax.Array) -> jax.Array:
        is_b = (rows_B == b)[:, None]
        alone_BTD = jnp.where(is_b[..., None], hidden_BTD, 0)
        return cross_entropy(alone_BTD, head_VD, micro["targets"], micro["loss_mask"] & is_b, program.mesh)

    loss_B = jax.lax.map(lose, rows_B)
    bad_B = ~jnp.isfinite(loss_B)
    return {"top": jnp.where(bad_B, 0.0, loss_B), "bad": bad_B, "token": jnp.zeros_like(rows_B)}


def _sum_up(total: tuple[jax.Array, Arrays], batch: Batch) -> tuple[jax.Array, jax.Array, Arrays, jax.Array]:
    """(loss, gradient norm) as the step takes them, each layer's norms without overflowing squares, largest token."""
    loss, grads = jax.tree.map(lambda x: x / jnp.maximum(batch["loss_mask"].sum(), 1), total)

    def norm(grad: jax.Array) -> jax.Array:
        top_L = jnp.abs(grad).max(axis=(1, 2))
        unit = grad / jnp.where(top_L > 0, top_L, 1.0)[:, None, None]
        return top_L * jnp.sqrt(jnp.square(unit).sum(axis=(1, 2)))

    return loss, optax.tree.norm(grads), {path: norm(grad) for path, grad in grads.items()}, batch["tokens"].max()


def _examine(arrays: Arrays, limit: float) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Of every array by layer: how many values are NaN, infinite, beyond the limit, [L, 3]; the largest |w|, [L].

    Quantised arrays by what they stand for, a layer at a time.
    """

    def examine(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes, size, is_finite = tuple(range(1, x.ndim)), jnp.abs(x).astype(jnp.float32), jnp.isfinite(x)
        kinds = jnp.isnan(x), jnp.isinf(x), is_finite & (size > limit)
        return jnp.stack([kind.sum(axis=axes) for kind in kinds], axis=1), jnp.where(is_finite, size, 0.0).max(
            axis=axes
        )

    def examine_layer(x: Quantized) -> tuple[jax.Array, jax.Array]:
        counts, top = examine(dequantize(x, jnp.float32)[None])
        return counts[0], top[0]

    return {
        path: jax.lax.map(examine_layer, x)
        if isinstance(x, Quantized)
        else examine(x if path.startswith("layers/") else x[None])
        for path, x in join_scales(arrays).items()
    }


def _list_weights(base: dict[str, Any], adapters: dict[str, Any], spec: LoraSpec) -> list[Weight]:
    """Every layer's part of every array, base before adapters, in the order of the computation."""
    weights = []
    for examined, is_adapter in ((base, False), (adapters, True)):
        for path, (counts, tops) in examined.items():
            for i, (numbers, top) in enumerate(zip(counts.tolist(), tops.tolist(), strict=True)):
                name = _name(path, i, spec if is_adapter else None)
                weights.append(Weight(name, _place(name), is_adapter, tuple(numbers), top))
    num_layers = next(len(tops) for path, (_, tops) in base.items() if path.startswith("layers/"))
    order = {place: i for i, place in enumerate(_places(num_layers))}
    return sorted(weights, key=lambda weight: (order[weight.place], weight.is_adapter))


def _name(path: str, i: int, spec: LoraSpec | None) -> str:
    """The name of part i of an array: ``layers/attn/q_einsum/w`` -> ``layers/3/attn/q_einsum/w``."""
    if not path.startswith("layers/"):
        return path
    kind = path.removeprefix("layers/")
    return f"layers/{i if spec is None else spec.layers[kind.rpartition('/')[0]][i]}/{kind}"


def _place(name: str) -> str:
    """Where a weight of that name acts; norms before and behind a half belong to it."""
    if not name.startswith("layers/"):
        return name.split("/")[0]
    _, layer, kind = name.split("/", 2)
    return f"layers/{layer}/{'attn' if kind.startswith('attn/') or 'attention' in kind else 'mlp'}"


def _places(num_layers: int) -> list[str]:
    return ["embedder", *(f"layers/{i}/{half}" for i in range(num_layers) for half in HALVES), "final_norm", "loss"]


def _by_layer(arrays: dict[str, np.ndarray], spec: LoraSpec) -> dict[str, np.ndarray]:
    """The parts of stacked arrays by name."""
    return {_name(path, i, spec): part for path, array in arrays.items() for i, part in enumerate(array)}


def _by_place(micros: Sequence[dict[str, Any]], first: int = 0) -> dict[str, Notes]:
    """The notes of all micro-batches, [A, B], by place in order; the stacked ones begin with layer ``first``."""
    notes = {}
    for place in _places(first + len(micros[0]["attn"]["top"])):
        _, _, layer_half = place.partition("layers/")
        layer, _, half = layer_half.partition("/")
        if half and int(layer) >= first:
            notes[place] = {
                key: np.stack([m[half][key][int(layer) - first] for m in micros]) for key in micros[0][half]
            }
        elif place in micros[0]:
            notes[place] = {key: np.stack([m[place][key] for m in micros]) for key in micros[0][place]}
    return notes
