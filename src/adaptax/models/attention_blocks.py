"""Attention block by block, in plain jax: no [T, S] array is ever made, and blocks that nobody sees are left out.

The online softmax of FlashAttention (arXiv 2205.14135, 2307.08691): kept for the backward pass are queries, keys,
values, output and the logarithm of each query's sum of exponentials; probabilities are computed again there. Queries
and keys are cut into the same blocks; from positions and segments it is known, once per model call, which range of key
blocks a query block can see at all, and loops run over that range alone.

Axes: B batch, R rows that are worked on together, T query position, S key position, N query heads, K key/value heads,
G = N/K, H head size; I blocks of a row, U tokens of a block, M = G * U queries of a block below each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from adaptax.models.residuals import name_kept

UNSEEN = float(jnp.finfo(jnp.float32).min)  # the logit of what a query does not see
LOWEST = UNSEEN / 2  # maximum of no logits at all: above UNSEEN, whose exponential is zero then
ALL = 1 << 30  # a window that holds every position
MULTIPLE = 8  # of a block's tokens
_PADDING = -1  # segment of what fills the last block


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """A batch's positions and segments cut into blocks, and the key blocks that each query block can see."""

    positions_BIU: jax.Array
    segments_BIU: jax.Array
    first_BI: jax.Array
    stop_BI: jax.Array  # not included


def cut_blocks(positions_BT: jax.Array, segments_BT: jax.Array, window: int, size: int) -> Blocks:
    """The blocks of a batch, of at most ``size`` tokens rounded up to a multiple of 8, all alike.

    Ranges are tight where segments lie one behind the other, with positions that go up by one within each, and padding
    (segment 0) at the end, with positions of any kind: so they come out of the pipeline. Other rows get whole ranges.

    Args:
      positions_BT: position of each token in its segment.
      segments_BT: a token sees only tokens of its own segment.
      window: how many positions a token sees, itself included.
      size: the largest block.
    """
    B, T = positions_BT.shape
    num_blocks = -(-T // size)
    block = -(-T // (num_blocks * MULTIPLE)) * MULTIPLE
    num_blocks, short = -(-T // block), -T % block
    positions_BT = jnp.concatenate([positions_BT, jnp.broadcast_to(jnp.arange(short), (B, short))], axis=1)
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, short)), constant_values=_PADDING)

    index_T = jnp.arange(T + short)
    begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start_BT = jax.lax.cummax(jnp.where(begins_BT, index_T, 0), axis=1)  # of the token's segment
    order_BT = jnp.where(segments_BT > 0, segments_BT, ALL - segments_BT)  # padding behind all others
    is_ordered_B1 = (order_BT[:, 1:] >= order_BT[:, :-1]).all(axis=1, keepdims=True)
    is_counted_BT = positions_BT - jnp.take_along_axis(positions_BT, start_BT, axis=1) == index_T - start_BT
    is_padding_BT = segments_BT == 0
    is_usual_B1 = is_ordered_B1 & (is_counted_BT | is_padding_BT).all(axis=1, keepdims=True)
    is_tight_BT = ~is_padding_BT | (is_counted_BT | ~is_padding_BT).all(axis=1, keepdims=True)

    first_BT = jnp.where(is_tight_BT, jnp.maximum(start_BT, index_T - window + 1), start_BT)
    first_BT = jnp.where(is_usual_B1, first_BT, 0)
    stop_BT = jnp.where(is_usual_B1 & is_tight_BT, index_T + 1, T + short)
    positions_BIU, segments_BIU, first_BIU, stop_BIU = (
        x.reshape(B, num_blocks, block) for x in (positions_BT, segments_BT, first_BT, stop_BT)
    )
    return Blocks(positions_BIU, segments_BIU, first_BIU.min(axis=2) // block, -(-stop_BIU.max(axis=2) // block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend_blocks(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    blocks: Blocks,
    window: jax.Array,
    scale: float,
    one_by_one: bool,
) -> jax.Array:
    """Softmax attention [B, T, N, H], logits and softmax in float32, differentiable in queries, keys and values.

    Args:
      q_BTNH: queries.
      k_BSKH: keys, S = T.
      v_BSKH: values.
      blocks: of :func:`cut_blocks`, for this window or a wider one.
      window: how many positions a query sees; may be traced.
      scale: of the logits.
      one_by_one: each row of the batch on its own, with its own ranges; else all together, with the widest ones.
    """
    return _forward(q_BTNH, k_BSKH, v_BSKH, blocks, window, scale, one_by_one)[0]


def _forward(q_BTNH, k_BSKH, v_BSKH, blocks: Blocks, window, scale: float, one_by_one: bool) -> Any:
    run = functools.partial(_forward_rows, window=window, scale=scale)
    return _over_rows(run, one_by_one, (q_BTNH, k_BSKH, v_BSKH, blocks))


def _keep(q_BTNH, k_BSKH, v_BSKH, blocks: Blocks, window, scale: float, one_by_one: bool) -> Any:
    out_BTNH, total_BIKM = _forward(q_BTNH, k_BSKH, v_BSKH, blocks, window, scale, one_by_one)
    # The names under which a remat policy may keep them: with both, the forward pass is not run again.
    out_BTNH, total_BIKM = name_kept(out_BTNH, "attention"), name_kept(total_BIKM, "attention")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, out_BTNH, total_BIKM, blocks, window)


def _backward(scale: float, one_by_one: bool, kept: Any, d_out_BTNH: jax.Array) -> Any:
    *arrays, blocks, window = kept
    run = functools.partial(_backward_rows, window=window, scale=scale)
    return *_over_rows(run, one_by_one, (*arrays, d_out_BTNH, blocks)), None, None


attend_blocks.defvjp(_keep, _backward)


def _over_rows(run: Callable[..., Any], one_by_one: bool, batch: tuple[Any, ...]) -> Any:
    """``run`` on all rows of the batch at once, or on one after the other."""
    if not one_by_one or batch[0].shape[0] == 1:
        return run(*batch)
    add, drop = functools.partial(jax.tree.map, lambda x: x[None]), functools.partial(jax.tree.map, lambda x: x[0])
    return jax.lax.map(lambda row: drop(run(*add(row))), batch)


def _forward_rows(q_RTNH, k_RSKH, v_RSKH, blocks: Blocks, *, window, scale: float) -> tuple[jax.Array, jax.Array]:
    """(output, logarithm of the sum of exponentials of each query [R, I, K, M])."""
    T, K = q_RTNH.shape[1], k_RSKH.shape[2]
    k_IRKUH, v_IRKUH = _cut_heads(k_RSKH, K, blocks), _cut_heads(v_RSKH, K, blocks)

    def attend(_: None, query: tuple[Any, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q_RKMH, (positions_RU, segments_RU, first, stop) = query

        def see(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top_RKM, sum_RKM, out_RKMH = carry
            logits_RKMU = jnp.einsum("RKMH,RKUH->RKMU", q_RKMH, k_IRKUH[j], preferred_element_type=jnp.float32) * scale
            seen_RKMU = _see(positions_RU, segments_RU, blocks, j, window, q_RKMH.shape[2])
            logits_RKMU = jnp.where(seen_RKMU, logits_RKMU, UNSEEN)
            new_top_RKM = jnp.maximum(top_RKM, logits_RKMU.max(axis=-1))
            weights_RKMU, shrink_RKM = jnp.exp(logits_RKMU - new_top_RKM[..., None]), jnp.exp(top_RKM - new_top_RKM)
            added_RKMH = jnp.einsum(
                "RKMU,RKUH->RKMH", weights_RKMU.astype(v_RSKH.dtype), v_IRKUH[j], preferred_element_type=jnp.float32
            )
            sum_RKM = sum_RKM * shrink_RKM + weights_RKMU.sum(axis=-1)
            return new_top_RKM, sum_RKM, out_RKMH * shrink_RKM[..., None] + added_RKMH

        zero_RKM = jnp.zeros(q_RKMH.shape[:-1], jnp.float32)
        start = zero_RKM + LOWEST, zero_RKM, jnp.zeros(q_RKMH.shape, jnp.float32)
        top_RKM, sum_RKM, out_RKMH = jax.lax.fori_loop(first, stop, see, start)
        # A query sees at least itself, so the sum is not zero.
        return None, ((out_RKMH / sum_RKM[..., None]).astype(q_RKMH.dtype), top_RKM + jnp.log(sum_RKM))

    _, (out_IRKMH, total_IRKM) = jax.lax.scan(attend, None, (_cut_heads(q_RTNH, K, blocks), _by_block(blocks)))
    return _join_heads(out_IRKMH, T, blocks), total_IRKM.swapaxes(0, 1)


def _backward_rows(
    q_RTNH, k_RSKH, v_RSKH, out_RTNH, total_RIKM, d_out_RTNH, blocks: Blocks, *, window, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values."""
    T, K = q_RTNH.shape[1], k_RSKH.shape[2]
    q_IRKMH, d_out_IRKMH, out_IRKMH = (_cut_heads(x, K, blocks) for x in (q_RTNH, d_out_RTNH, out_RTNH))
    k_IRKUH, v_IRKUH = _cut_heads(k_RSKH, K, blocks), _cut_heads(v_RSKH, K, blocks)
    common_IRKM = jnp.einsum("IRKMH,IRKMH->IRKM", out_IRKMH, d_out_IRKMH, preferred_element_type=jnp.float32)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend(d_keys: tuple[jax.Array, jax.Array], query: tuple[Any, ...]) -> tuple[Any, jax.Array]:
        q_RKMH, d_out_RKMH, total_RKM, common_RKM, (positions_RU, segments_RU, first, stop) = query

        def see(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q_RKMH, d_k_IRKUH, d_v_IRKUH = carry
            seen_RKMU = _see(positions_RU, segments_RU, blocks, j, window, q_RKMH.shape[2])
            logits_RKMU = dot("RKMH,RKUH->RKMU", q_RKMH, k_IRKUH[j]) * scale
            weights_RKMU = jnp.where(seen_RKMU, jnp.exp(logits_RKMU - total_RKM[..., None]), 0.0)
            d_weights_RKMU = dot("RKMH,RKUH->RKMU", d_out_RKMH, v_IRKUH[j])
            d_logits_RKMU = (weights_RKMU * (d_weights_RKMU - common_RKM[..., None])).astype(q_RKMH.dtype)
            d_v_RKUH = dot("RKMU,RKMH->RKUH", weights_RKMU.astype(v_RSKH.dtype), d_out_RKMH)
            d_k_RKUH = dot("RKMU,RKMH->RKUH", d_logits_RKMU, q_RKMH)
            d_q_RKMH += dot("RKMU,RKUH->RKMH", d_logits_RKMU, k_IRKUH[j])
            return d_q_RKMH, _add_at(d_k_IRKUH, j, d_k_RKUH), _add_at(d_v_IRKUH, j, d_v_RKUH)

        start = jnp.zeros(q_RKMH.shape, jnp.float32), *d_keys
        d_q_RKMH, *d_keys_IRKUH = jax.lax.fori_loop(first, stop, see, start)
        return tuple(d_keys_IRKUH), (d_q_RKMH * scale).astype(q_RKMH.dtype)

    zeros = jnp.zeros(k_IRKUH.shape, jnp.float32), jnp.zeros(v_IRKUH.shape, jnp.float32)
    queries = q_IRKMH, d_out_IRKMH, total_RIKM.swapaxes(0, 1), common_IRKM, _by_block(blocks)
    (d_k_IRKUH, d_v_IRKUH), d_q_IRKMH = jax.lax.scan(attend, zeros, queries)
    d_k_RSKH, d_v_RSKH = (_join_heads(x, T, blocks) for x in (d_k_IRKUH * scale, d_v_IRKUH))
    return _join_heads(d_q_IRKMH, T, blocks), d_k_RSKH.astype(k_RSKH.dtype), d_v_RSKH.astype(v_RSKH.dtype)


def _see(positions_RU, segments_RU, blocks: Blocks, j: jax.Array, window, num_queries: int) -> jax.Array:
    """Which keys of block j each of the M queries sees, [R, 1, M, U]."""
    distance_RUU = positions_RU[:, :, None] - blocks.positions_BIU[:, j][:, None]
    same_RUU = segments_RU[:, :, None] == blocks.segments_BIU[:, j][:, None]
    seen_RUU = same_RUU & (distance_RUU >= 0) & (distance_RUU < window)
    return jnp.tile(seen_RUU, (1, num_queries // seen_RUU.shape[1], 1))[:, None]


def _by_block(blocks: Blocks) -> tuple[jax.Array, ...]:
    """(positions [I, R, U], segments [I, R, U], first and last key block of all rows [I])."""
    positions_IRU, segments_IRU = blocks.positions_BIU.swapaxes(0, 1), blocks.segments_BIU.swapaxes(0, 1)
    return positions_IRU, segments_IRU, blocks.first_BI.min(axis=0), blocks.stop_BI.max(axis=0)


def _cut_heads(x_RTNH: jax.Array, num_kv_heads: int, blocks: Blocks) -> jax.Array:
    """Blocks of tokens, the heads of a group below each other: [I, R, K, M, H]."""
    R, T, N, H = x_RTNH.shape
    _, I, U = blocks.positions_BIU.shape  # noqa: E741
    x_RTNH = jnp.pad(x_RTNH, ((0, 0), (0, I * U - T), (0, 0), (0, 0)))
    x_RIUKGH = x_RTNH.reshape(R, I, U, num_kv_heads, N // num_kv_heads, H)
    return x_RIUKGH.transpose(1, 0, 3, 4, 2, 5).reshape(I, R, num_kv_heads, -1, H)


def _join_heads(x_IRKMH: jax.Array, num_tokens: int, blocks: Blocks) -> jax.Array:
    """The reverse of :func:`_cut_heads`: [R, T, N, H]."""
    I, R, K, M, H = x_IRKMH.shape  # noqa: E741
    U = blocks.positions_BIU.shape[2]
    x_IRKGUH = x_IRKMH.reshape(I, R, K, M // U, U, H)
    return x_IRKGUH.transpose(1, 0, 4, 2, 3, 5).reshape(R, I * U, -1, H)[:, :num_tokens]


def _add_at(x_IRKUH: jax.Array, j: jax.Array, added_RKUH: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x_IRKUH, x_IRKUH[j] + added_RKUH, j, 0)
