"""Products of bfloat16 with a frozen weight, for backends that are fast at them only with a float32 outcome."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

# Taken here once: qwix puts its own in the place of jax.lax.dot_general while it traces.
_dot_general = jax.lax.dot_general


def multiply_frozen(x: jax.Array, w: jax.Array, dimension_numbers: Any) -> jax.Array:
    """``dot_general`` of x with a frozen weight of its type, by :func:`frozen_product` in bfloat16."""
    return (frozen_product if x.dtype == jnp.bfloat16 else _dot_general)(x, w, dimension_numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def frozen_product(x: jax.Array, w: jax.Array, dimension_numbers: Any) -> jax.Array:
    """``dot_general`` with a weight that gets no gradient, in x's type, summed in float32 and rounded once.

    XLA's CPU backend multiplies bfloat16 natively only into float32, at about twice the speed. What jax derives for
    the backward pass would multiply a float32 gradient with the weight: here the gradient stays in x's type.

    Args:
      x: bfloat16.
      w: bfloat16, without batch axes.
      dimension_numbers: as of ``dot_general``; contracted are the last axes of x and the first of w.
    """
    rows = two_rows(x, x.ndim - len(dimension_numbers[0][0]))
    product = _dot_general(rows, w, dimension_numbers, preferred_element_type=jnp.float32)
    return product[: x.shape[0]].astype(x.dtype)


def two_rows(x: jax.Array, num_axes: int = 1) -> jax.Array:
    """x, with a row of zeros behind it where it is a single one: the CPU backend multiplies that ten times slower.

    Args:
      x: what is multiplied.
      num_axes: its first axes are those of rows, one at least.
    """
    is_single = x.dtype == jnp.bfloat16 and num_axes > 0 and math.prod(x.shape[:num_axes]) == 1
    return jnp.pad(x, ((0, 1), *((0, 0) for _ in x.shape[1:]))) if is_single else x


def _keep(x: jax.Array, w: jax.Array, dimension_numbers: Any) -> tuple[jax.Array, jax.Array]:
    return frozen_product(x, w, dimension_numbers), w


def _backward(dimension_numbers: Any, w: jax.Array, d_out: jax.Array) -> tuple[jax.Array, None]:
    (_, contracted), _ = dimension_numbers
    outputs = w.ndim - len(contracted)
    last = tuple(range(d_out.ndim - outputs, d_out.ndim)), tuple(range(len(contracted), w.ndim))
    return frozen_product(d_out, w, (last, ((), ()))), None


frozen_product.defvjp(_keep, _backward)
