"""Frozen matrices in 8 or 4 bits: the quantised half of QLoRA (arXiv 2305.14314), with qwix's arithmetic.

``int8`` has a scale for every output. ``int4`` and ``nf4`` have one for every block of inputs of an output: 64 of them,
or as many as divide the last input axis; their values are packed, two neighbours on that axis in a byte. In a flat base
such a matrix is two arrays: its values at its own path, and its float32 scales at that path with the kind behind it
(``layers/mlp/up_proj/w`` and ``layers/mlp/up_proj/w_nf4``).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from adaptax.schema import UserError

KINDS: dict[str, Any] = {"int8": jnp.int8, "int4": jnp.uint8, "nf4": jnp.uint8}  # and the type that holds the values
BLOCK, SMALLEST_BLOCK = 64, 8
# What the sixteen values of nf4 stand for: quantiles of a normal distribution (QLoRA, appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
NF4 += (-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
NF4 += (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["kind"])
@dataclass(frozen=True)
class Quantized:
    """A weight [in..., out...] in few bits, or a stack of them."""

    values: jax.Array  # int8 of the weight's shape, or uint8 of half of it on the last input axis
    scales: jax.Array  # float32, with as many axes
    kind: str


def quantized_shapes(shape: tuple[int, ...], num_in_axes: int, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the values and the scales of a weight [in..., out...].

    Raises:
      UserError: blocks would be of fewer than 8 inputs, and their scales would take as much as the values.
    """
    before, last, outputs = shape[: num_in_axes - 1], shape[num_in_axes - 1], shape[num_in_axes:]
    if kind == "int8":
        return shape, (*(1 for _ in before), 1, *outputs)
    if _block(last) < SMALLEST_BLOCK:
        raise UserError(
            f"model.quantization={kind} needs inputs in multiples of {SMALLEST_BLOCK}, and this model has {last}: "
            "take int8 or null"
        )
    return (*before, last // 2, *outputs), (*before, last // _block(last), *outputs)


def quantize(weight: jax.Array, num_in_axes: int, kind: str) -> Quantized:
    """A weight [in..., out...] as the values that are nearest to it; scales are taken in float32."""
    weight, last = weight.astype(jnp.float32), num_in_axes - 1
    if kind == "int8":
        array = qwix.quantize(weight, jnp.int8, channelwise_axes=range(num_in_axes, weight.ndim))
        return Quantized(array.qvalue, array.scale, kind)
    others = [axis for axis in range(weight.ndim) if axis != last]
    tiles = {last: _block(weight.shape[last])}
    array = qwix.quantize(weight, kind if kind == "nf4" else jnp.int4, channelwise_axes=others, tiled_axes=tiles)
    codes = _encode(weight, array.scale) if kind == "nf4" else array.qvalue.astype(jnp.int8)
    return Quantized(_pack(codes, last), array.scale, kind)


def dequantize(array: Quantized, dtype: Any) -> jax.Array:
    """The weight that an array stands for: multiplied in float32, then cast."""
    if array.kind == "int8":
        values = array.values.astype(jnp.float32)
    elif array.kind == "int4":
        packed = array.values.view(jnp.int8)
        values = _interleave(packed << 4 >> 4, packed >> 4, array).astype(jnp.float32)
    else:
        packed, table = array.values, jnp.array(NF4, jnp.float32)
        values = table.at[_interleave(packed & 15, packed >> 4, array)].get(mode="promise_in_bounds")
    return (values * _spread(array.scales, values.shape)).astype(dtype)


def dequantize_tree(tree: Any, dtype: Any) -> Any:
    """The tree with plain arrays where it has quantised ones."""
    is_quantized = lambda leaf: isinstance(leaf, Quantized)  # noqa: E731
    return jax.tree.map(lambda x: dequantize(x, dtype) if is_quantized(x) else x, tree, is_leaf=is_quantized)


def join_scales(base: Mapping[str, Any]) -> dict[str, Any]:
    """The flat base with every quantised matrix as one :class:`Quantized`, at the path of its values."""
    kinds = {path: kind for path in base if (kind := find_kind(base, path)) is not None}
    scales = {f"{path}_{kind}" for path, kind in kinds.items()}
    joined = {path: array for path, array in base.items() if path not in scales}
    return joined | {path: Quantized(base[path], base[f"{path}_{kind}"], kind) for path, kind in kinds.items()}


def find_kind(base: Mapping[str, Any], path: str) -> str | None:
    """How an array of a flat base is quantised; None if it is not."""
    return next((kind for kind in KINDS if f"{path}_{kind}" in base), None)


def _block(num_inputs: int) -> int:
    """How many neighbours share a scale."""
    return math.gcd(num_inputs, BLOCK)


def _spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scales, each as often as it is shared on a blocked axis; other axes are left to be broadcast."""
    for axis, (size, num_scales) in enumerate(zip(shape, scales.shape, strict=True)):
        if num_scales not in (1, size):
            scales = jnp.repeat(scales, size // num_scales, axis)
    return scales


def _pack(codes: jax.Array, axis: int) -> jax.Array:
    """Codes of four bits, two neighbours on an axis in a byte: the first one low."""
    first, second = (jax.lax.slice_in_dim(codes.view(jnp.uint8), i, None, 2, axis) for i in (0, 1))
    return first & 15 | second << 4


def _interleave(first: jax.Array, second: jax.Array, array: Quantized) -> jax.Array:
    """The inverse of :func:`_pack`, on the axis on which neighbours share a scale."""
    axis = next(i for i, (n, m) in enumerate(zip(first.shape, array.scales.shape, strict=True)) if n != m)
    return jnp.stack((first, second), axis + 1).reshape(*first.shape[:axis], -1, *first.shape[axis + 1 :])


def _encode(weight: jax.Array, scales: jax.Array) -> jax.Array:
    """The codes of nf4 that qwix finds by an argmin over sixteen distances, found by comparing neighbours: faster."""
    scaled = weight / _spread(scales, weight.shape)
    distances = [jnp.abs(value - scaled) for value in NF4]
    is_nearer = [far < near for near, far in itertools.pairwise(distances)]
    return functools.reduce(jnp.add, [bits.astype(jnp.uint8) for bits in is_nearer])
