"""Keys and values of the tokens that have been seen: what generation keeps, so that no token is run twice.

Rows end together: a row that is shorter than the others begins later. A token's time is its place counted from the
beginning of the longest row. Global layers have a slot for every time; local ones a ring of as many slots as their
window, in which a time takes the place of the one that has left the window.

Axes: B batch, T new token, S slot, D width, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from adaptax.models.gemma3_weights import Architecture

Layer = tuple[jax.Array, jax.Array]  # keys and values, [B, K, S, H]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What all layers have stored."""

    layers: tuple[Layer, ...]
    starts_B: jax.Array  # the time of each row's first token
    time: jax.Array  # of the next token

    def positions(self, num_tokens: int) -> jax.Array:
        """The places of the next tokens in their own rows, [B, T]; 0 before a row begins."""
        times_T = self.time + jnp.arange(num_tokens)
        return jnp.maximum(times_T[None] - self.starts_B[:, None], 0)


def cache_shapes(arch: Architecture, num_rows: int, capacity: int) -> list[tuple[int, ...]]:
    """The shape of each layer's keys, and of its values, for rows of up to ``capacity`` tokens."""
    windows = [capacity if is_global else min(arch.sliding_window, capacity) for is_global in arch.global_layers]
    return [(num_rows, arch.num_kv_heads, slots, arch.head_dim) for slots in windows]


def make_cache(
    arch: Architecture, starts_B: jax.Array, capacity: int, dtype: Any, place: Callable[[jax.Array], jax.Array]
) -> Cache:
    """An empty cache; call it under jit. ``place`` lays an array [B, K, S, H] on the mesh."""
    shapes = cache_shapes(arch, starts_B.shape[0], capacity)
    make = functools.partial(jnp.zeros, dtype=dtype)
    layers = tuple((place(make(shape)), place(make(shape))) for shape in shapes)
    return Cache(layers, starts_B, jnp.zeros((), jnp.int32))


class CachedLayer:
    """One layer's part of a cache, in the place of an attention mask: new tokens see what it holds, and are added.

    It is made anew for every call of the layer; :attr:`stored` is what the layer has stored after it.
    """

    def __init__(self, cache: Cache, layer: int, window: int | None):
        self._cache, self._window = cache, window
        self.stored: Layer = cache.layers[layer]

    def extend(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Stores the keys and values of T new tokens; returns those that they see, and which of them, [B, T, S]."""
        time, T, S = self._cache.time, k_BTKH.shape[1], self.stored[0].shape[2]
        old, new = self.stored, (k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))
        times_T, num_kept = time + jnp.arange(T), min(T, S)
        slots = times_T[-num_kept:] % S
        keys, values = (x.at[:, :, slots].set(y[:, :, -num_kept:]) for x, y in zip(old, new, strict=True))
        self.stored = keys, values
        times_S = _times_of(S, time + T - 1)
        if T > 1 and self._window is not None:  # the last of them took the places of some that the first one sees
            times_S = jnp.concatenate([_times_of(S, time - 1), times_T])
            keys, values = (jnp.concatenate(pair, axis=2) for pair in zip(old, new, strict=True))
        distance_TS = times_T[:, None] - times_S
        is_seen_TS = (distance_TS >= 0) & (times_S >= 0)
        if self._window is not None:
            is_seen_TS &= distance_TS < self._window
        has_begun_BS = times_S >= self._cache.starts_B[:, None]
        return keys, values, is_seen_TS & has_begun_BS[:, None]


def _times_of(num_slots: int, last: jax.Array) -> jax.Array:
    """The time that each slot of a ring holds when ``last`` is the latest one; below 0 where it holds none yet."""
    return last - (last - jnp.arange(num_slots)) % num_slots
