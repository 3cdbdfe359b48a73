"""Naming what a layer keeps for its backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def name_kept(x: jax.Array, name: str) -> jax.Array:
    """x, which a remat policy may keep under this name; for what nothing is differentiated through.

    Of bfloat16 the bits are kept, as integers: the CPU backend would make a float32 copy of what all layers keep.
    """
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def keep(x: jax.Array, name: str) -> jax.Array:
    """The same, with x's gradient."""
    return _keep_bits(x, name) if x.dtype == jnp.bfloat16 else checkpoint_name(x, name)


def _forward(x: jax.Array, name: str) -> tuple[jax.Array, None]:
    return name_kept(x, name), None  # not _keep_bits, in which a policy would not see the name


def _backward(_: str, __: None, d_x: jax.Array) -> tuple[jax.Array]:
    return (d_x,)


_keep_bits = jax.custom_vjp(name_kept, nondiff_argnums=(1,))
_keep_bits.defvjp(_forward, _backward)
