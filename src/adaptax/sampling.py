"""The next token out of its logits: greedy, or drawn after temperature, top-k, top-p and min-p, in that order.

The order and the meaning of each are those of transformers; tokens that are as likely as the last one taken are all
taken. Thresholds are found by bisection over the bits of a float, in place of a sort of the whole vocabulary, so that
one compiled program serves all settings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from adaptax.answer_config import GenerationConfig


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["temperature", "top_k", "top_p", "min_p"], meta_fields=[]
)
@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: numbers that a compiled program takes as arguments."""

    temperature: float  # 0: the most likely token
    top_k: int  # 0: all
    top_p: float  # 1: all
    min_p: float  # 0: all


GREEDY = Sampling(0.0, 0, 1.0, 0.0)


def read_sampling(config: GenerationConfig) -> Sampling:
    """The settings of ``generation.*``; null is what leaves all tokens in."""
    top_p = 1.0 if config.top_p is None else config.top_p
    return Sampling(config.temperature, config.top_k or 0, top_p, config.min_p or 0.0)


def choose_tokens(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """A token for each row, int32 [B]; its row's key decides, whatever other rows there are."""

    def draw() -> jax.Array:
        return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, sampling)).astype(jnp.int32)

    best_B = logits_BV.argmax(axis=-1).astype(jnp.int32)
    return jax.lax.cond(jnp.asarray(sampling.temperature) > 0, draw, lambda: best_B)


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits over the temperature, float32, and minus infinity for tokens that are not to be drawn."""
    scaled = logits_BV.astype(jnp.float32) / jnp.maximum(sampling.temperature, 1e-6)
    kept = _keep_top_k(scaled, jnp.asarray(sampling.top_k))
    kept = _keep_top_p(kept, jnp.asarray(sampling.top_p))
    least = kept.max(axis=-1, keepdims=True) + jnp.log(jnp.asarray(sampling.min_p))  # p >= min_p * the highest p
    return jnp.where(kept >= least, kept, -jnp.inf)


def _keep_top_k(logits_BV: jax.Array, top_k: jax.Array) -> jax.Array:
    """All but those that are less likely than the k-th."""

    def search() -> jax.Array:
        threshold_B = _highest(logits_BV, lambda is_in_BV: is_in_BV.sum(axis=-1) >= top_k)
        return jnp.where(logits_BV >= threshold_B[:, None], logits_BV, -jnp.inf)

    return jax.lax.cond((top_k > 0) & (top_k < logits_BV.shape[-1]), search, lambda: logits_BV)


def _keep_top_p(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """The most likely tokens whose probabilities first reach ``top_p`` together."""

    def search() -> jax.Array:
        share_BV = jax.nn.softmax(logits_BV, axis=-1)
        threshold_B = _highest(logits_BV, lambda is_in_BV: jnp.where(is_in_BV, share_BV, 0).sum(axis=-1) >= top_p)
        return jnp.where(logits_BV >= threshold_B[:, None], logits_BV, -jnp.inf)

    return jax.lax.cond(top_p < 1, search, lambda: logits_BV)


def _highest(x_BV: jax.Array, is_enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The highest threshold of each row for which ``is_enough`` of ``x >= threshold`` holds, [B].

    Floats are compared as integers that are in the same order, of which one bit after the other is found.
    """
    bits_BV = jax.lax.bitcast_convert_type(x_BV, jnp.int32)
    order_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)  # of negative floats the larger bits are the smaller number
    rank_BV = jax.lax.bitcast_convert_type(order_BV, jnp.uint32) ^ jnp.uint32(1 << 31)

    def find_bit(i: jax.Array, found_B: jax.Array) -> jax.Array:
        tried_B = found_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(is_enough(rank_BV >= tried_B[:, None]), tried_B, found_B)

    rank_B = jax.lax.fori_loop(0, 32, find_bit, jnp.zeros(x_BV.shape[0], jnp.uint32))
    order_B = jax.lax.bitcast_convert_type(rank_B ^ jnp.uint32(1 << 31), jnp.int32)
    return jax.lax.bitcast_convert_type(order_B ^ ((order_B >> 31) & 0x7FFFFFFF), jnp.float32)
