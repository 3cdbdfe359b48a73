"""Gemma 3 in flax nnx: one block, scanned over the layers.

Axes: B batch, T query position, S key position, D width, N query heads, K key/value heads, G = N/K, H head size,
F mlp width, V vocabulary, L layers, C = 2 (keys, values). Parameters of the block carry a leading L; the embedding is
tied to the head, and calling the model gives hidden states: the head is applied by the loss and by generation.
Source: the Gemma 3 report (arXiv 2503.19786) and transformers' ``modeling_gemma3.py``, which it equals in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from adaptax.models.attention import AttentionMask, attend, build_masks
from adaptax.models.cache import Cache, CachedLayer
from adaptax.models.gemma3_weights import Architecture
from adaptax.models.residuals import keep
from adaptax.quantize import dequantize_tree

# What a layer keeps for the backward pass, by ``Gemma3.remat``; ``none`` leaves nothing to be computed anew.
REMAT_POLICIES = {"full": None, "matmul": jax.checkpoint_policies.save_only_these_names("product", "attention")}
_init = nnx.initializers.normal(0.02)
Watch = Callable[[jax.Array, Any], tuple[jax.Array, Any]]  # (x_BTD, tap or None) -> (x_BTD to go on with, note)


class RMSNorm(nnx.Module):
    """x / rms(x) * (1 + scale), in float32."""

    def __init__(self, size: int, eps: float, stack: tuple[int, ...]):
        self.scale = nnx.Param(jnp.zeros((*stack, size)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x_f32 = x.astype(jnp.float32)
        x_f32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + self.eps)
        return (x_f32 * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class Projection(nnx.Module):
    """The last axes of x against the first axes of a weight [in..., out...], in the activation's type.

    A plain ``dot_general``: qwix then puts an adapter's A and B behind x in that order, which needs no transposed copy.
    """

    def __init__(self, shape: tuple[int, ...], num_in: int, stack: tuple[int, ...], rngs: nnx.Rngs):
        self.num_in = num_in
        self.multiply: Callable[..., jax.Array] | None = None  # instead of dot_general, where qwix is not to see it
        self.w = nnx.Param(_init(rngs.params(), (*stack, *shape)))

    def __call__(self, x: jax.Array) -> jax.Array:
        contracted = tuple(range(x.ndim - self.num_in, x.ndim)), tuple(range(self.num_in))
        multiply = self.multiply or jax.lax.dot_general
        product = multiply(x, self.w[...].astype(x.dtype), (contracted, ((), ())))
        return keep(product.astype(x.dtype), "product")  # adapters may be of a wider type


class Attention(nnx.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, arch: Architecture, stack: tuple[int, ...], rngs: nnx.Rngs):
        D, N, K, H = arch.embed_dim, arch.num_heads, arch.num_kv_heads, arch.head_dim
        self.q_einsum = Projection((D, N, H), 1, stack, rngs)
        self.kv_einsum = Projection((D, 2, K, H), 1, stack, rngs)
        self.attn_vec_einsum = Projection((N, H, D), 2, stack, rngs)
        self.query_norm = RMSNorm(H, arch.norm_eps, stack)
        self.key_norm = RMSNorm(H, arch.norm_eps, stack)
        self.scale = arch.query_pre_attn_scalar**-0.5
        self.num_kv_heads = K

    @jax.named_scope("attention")
    def __call__(
        self, x_BTD: jax.Array, rope_BTH: tuple[jax.Array, jax.Array], mask: AttentionMask | CachedLayer
    ) -> jax.Array:
        q_BTNH = apply_rope(self.query_norm(self.q_einsum(x_BTD)), *rope_BTH)
        kv_BSCKH = self.kv_einsum(x_BTD)
        k_BSKH = apply_rope(self.key_norm(kv_BSCKH[:, :, 0]), *rope_BTH)
        v_BSKH = kv_BSCKH[:, :, 1]
        return self.attn_vec_einsum(attend(q_BTNH, k_BSKH, v_BSKH, mask, self.scale))


class MLP(nnx.Module):
    """Gated GELU (tanh form)."""

    def __init__(self, arch: Architecture, stack: tuple[int, ...], rngs: nnx.Rngs):
        D, F = arch.embed_dim, arch.mlp_dim
        self.gate_proj = Projection((D, F), 1, stack, rngs)
        self.up_proj = Projection((D, F), 1, stack, rngs)
        self.down_proj = Projection((F, D), 1, stack, rngs)

    @jax.named_scope("mlp")
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.gelu(self.gate_proj(x_BTD), approximate=True) * self.up_proj(x_BTD))


class Block(nnx.Module):
    """One layer; ``stack`` puts axes (the layers) before every parameter's own."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs, stack: tuple[int, ...] = ()):
        self.attn = Attention(arch, stack, rngs)
        self.mlp = MLP(arch, stack, rngs)
        D, eps = arch.embed_dim, arch.norm_eps
        self.pre_attention_norm, self.post_attention_norm = RMSNorm(D, eps, stack), RMSNorm(D, eps, stack)
        self.pre_ffw_norm, self.post_ffw_norm = RMSNorm(D, eps, stack), RMSNorm(D, eps, stack)

    def __call__(
        self,
        x_BTD: jax.Array,
        rope_BTH: tuple[jax.Array, jax.Array],
        mask: AttentionMask | CachedLayer,
        look: Callable[[str, jax.Array], jax.Array] = lambda half, x_BTD: x_BTD,
    ) -> jax.Array:
        """The layer's output; ``look`` is handed the name and the outcome of each half, and what it gives goes on."""
        x_BTD = x_BTD + self.post_attention_norm(self.attn(self.pre_attention_norm(x_BTD), rope_BTH, mask))
        x_BTD = look("attn", x_BTD)
        return look("mlp", x_BTD + self.post_ffw_norm(self.mlp(self.pre_ffw_norm(x_BTD))))

    @staticmethod
    def example_inputs(arch: Architecture) -> tuple[Any, ...]:
        """Arguments of a call, the smallest there are: for tracing a block outside the model."""
        rope = (jnp.zeros((1, 1, arch.head_dim // 2)), jnp.zeros((1, 1, arch.head_dim // 2)))
        mask, _ = build_masks(jnp.zeros((1, 1), int), jnp.ones((1, 1), int), arch.sliding_window)
        return jnp.zeros((1, 1, arch.embed_dim)), rope, mask


class Embedder(nnx.Module):
    """The tied embedding; rows are scaled by sqrt(D), rounded to the compute type as Gemma was trained."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_init(rngs.params(), (arch.vocab_size, arch.embed_dim)))

    @jax.named_scope("embedding")
    def __call__(self, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
        rows_BTD = take_rows(self.embedding[...], tokens_BT).astype(dtype)
        return rows_BTD * jnp.sqrt(rows_BTD.shape[-1]).astype(dtype)


class Gemma3(nnx.Module):
    """The text model. ``layers`` is one block whose parameters are stacked by layer.

    Adapters (``nnx.LoRAParam``), when there are any, are stacked over the layers from ``first_adapted`` on; the layers
    below it are run apart, so that nothing is kept of them for the backward pass.
    """

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        self.arch = arch
        self.embedder = Embedder(arch, rngs)
        self.layers = Block(arch, rngs=rngs, stack=(arch.num_layers,))
        self.final_norm = RMSNorm(arch.embed_dim, arch.norm_eps, ())
        self.first_adapted = 0
        self.remat = "full"
        self.multiply: Callable[..., jax.Array] | None = None  # of a projection without adapters, if not dot_general
        self.attention = "plain"  # or another implementation of adaptax.models.attention
        self.activation_sharding: NamedSharding | None = None  # of [B, T, D]; None leaves it to the compiler

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        *,
        dtype: Any = jnp.float32,
        dropout_key: jax.Array | None = None,
        watch: Watch | None = None,
        taps: dict[str, Any] | None = None,
    ) -> jax.Array | tuple[jax.Array, dict[str, Any]]:
        """Hidden states after the final norm, [B, T, D]; with ``watch`` also what it noted on the way.

        Args:
          tokens_BT: token ids.
          positions_BT: position of each token in its document.
          segments_BT: documents by number; a token sees only tokens of its own number.
          dtype: compute type; weights are cast to it layer by layer.
          dropout_key: for adapters made with dropout.
          watch: sees x behind the embedding, and behind both halves of every layer. Its notes come back as
            ``embedder``, and stacked by layer as ``attn`` and ``mlp``.
          taps: what else it is given behind a half, by name, stacked by layer from ``first_adapted`` on.
        """
        arch = self.arch
        mesh = None if self.activation_sharding is None else self.activation_sharding.mesh
        kind = {"implementation": self.attention, "mesh": mesh, "dtype": dtype}
        masks = build_masks(positions_BT, segments_BT, arch.sliding_window, **kind)
        ropes = (
            rope_angles(positions_BT, arch.head_dim, arch.rope_theta_local, 1.0),
            rope_angles(positions_BT, arch.head_dim, arch.rope_theta_global, arch.rope_factor),
        )
        graphdef, lora, weights = nnx.split(self.layers, nnx.LoRAParam, ...)
        plain = nnx.graphdef(nnx.eval_shape(functools.partial(_make_plain_block, arch, self.multiply)))
        layer = self._build_layer(weights, masks, ropes, dropout_key, watch)
        notes: dict[str, Any] = {}

        x_BTD = self._shard(self.embedder(tokens_BT, dtype))
        if watch is not None:
            x_BTD, notes["embedder"] = watch(x_BTD, None)
        noted = []
        if self.first_adapted:
            below = jnp.arange(self.first_adapted), nnx.State({}), {}
            x_BTD, notes_L = jax.lax.scan(functools.partial(layer, plain), x_BTD, below)
            noted.append(notes_L)
        adapted = functools.partial(layer, graphdef)
        if self.remat != "none":
            adapted = jax.checkpoint(adapted, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        above = jnp.arange(self.first_adapted, arch.num_layers), lora, taps or {}
        x_BTD, notes_L = jax.lax.scan(adapted, x_BTD, above)
        notes |= jax.tree.map(lambda *parts: jnp.concatenate(parts), *noted, notes_L)
        x_BTD = self.final_norm(x_BTD)
        return x_BTD if watch is None else (x_BTD, notes)

    def extend(self, tokens_BT: jax.Array, cache: Cache, *, dtype: Any = jnp.float32) -> tuple[jax.Array, Cache]:
        """Hidden states after the final norm of the next tokens of every row, [B, T, D], and the cache with them.

        Layer after layer without a scan, so that weights may lie layer by layer too, in tuples: a backend that copies
        what it takes out of a stack would read every weight three times for a token.
        """
        arch, positions_BT = self.arch, cache.positions(tokens_BT.shape[1])
        ropes = (
            rope_angles(positions_BT, arch.head_dim, arch.rope_theta_local, 1.0),
            rope_angles(positions_BT, arch.head_dim, arch.rope_theta_global, arch.rope_factor),
        )
        graphdef, lora, weights = nnx.split(self.layers, nnx.LoRAParam, ...)
        plain = nnx.graphdef(nnx.eval_shape(functools.partial(_make_plain_block, arch, self.multiply)))
        x_BTD, stored = self._shard(self.embedder(tokens_BT, dtype)), []
        for i, is_global in enumerate(arch.global_layers):
            is_adapted = i >= self.first_adapted
            lora_i = _pick_layer(lora, i - self.first_adapted) if is_adapted else nnx.State({})
            weights_i = dequantize_tree(_pick_layer(weights, i), x_BTD.dtype)
            block = nnx.merge(graphdef if is_adapted else plain, lora_i, weights_i)
            layer = CachedLayer(cache, i, None if is_global else arch.sliding_window)
            x_BTD = self._shard(block(x_BTD, ropes[is_global], layer))
            stored.append(layer.stored)
        return self.final_norm(x_BTD), Cache(tuple(stored), cache.starts_B, cache.time + tokens_BT.shape[1])

    def _build_layer(
        self, weights: nnx.State, masks: tuple[Any, Any], ropes: tuple[Any, Any], key: Any, watch: Watch | None
    ) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
        """The body of the scan over layers, for any graph of a block. Masks and ropes are (local, global)."""
        is_global_L = jnp.array(self.arch.global_layers)

        def layer(
            graphdef: Any, x_BTD: jax.Array, scanned: tuple[jax.Array, Any, dict[str, Any]]
        ) -> tuple[jax.Array, dict[str, Any]]:
            i, lora_i, taps_i = scanned
            notes: dict[str, Any] = {}

            def look(half: str, x_BTD: jax.Array) -> jax.Array:
                if watch is not None:
                    x_BTD, notes[half] = watch(x_BTD, taps_i.get(half))
                return x_BTD

            weights_i = jax.tree.map(lambda w: take_layer(w, i), weights)
            block = nnx.merge(graphdef, lora_i, dequantize_tree(weights_i, x_BTD.dtype))
            if key is not None and lora_i:
                block.set_attributes(qwix_rngs=nnx.Rngs(dropout=jax.random.fold_in(key, i)))
            choose = functools.partial(jax.tree.map, lambda local, full: jnp.where(is_global_L[i], full, local))
            return self._shard(block(x_BTD, choose(*ropes), choose(*masks), look)), notes

        return layer

    def _shard(self, x_BTD: jax.Array) -> jax.Array:
        if self.activation_sharding is None:
            return x_BTD
        return jax.lax.with_sharding_constraint(x_BTD, self.activation_sharding)


def _make_plain_block(arch: Architecture, multiply: Callable[..., jax.Array] | None) -> Block:
    """A layer without adapters."""
    block = Block(arch, rngs=nnx.Rngs(0))
    set_multiply(block, multiply)
    return block


def set_multiply(block: Block, multiply: Callable[..., jax.Array] | None) -> None:
    """Has the projections of a block without adapters multiply so, instead of by ``dot_general``."""
    for _, module in nnx.iter_modules(block):
        if isinstance(module, Projection):
            module.multiply = multiply


def _pick_layer(weights: Any, i: int) -> Any:
    """The weights of layer i, out of stacks or tuples."""
    is_tuple = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return jax.tree.map(lambda w: w[i], weights, is_leaf=is_tuple)


def take_layer(w: jax.Array, i: jax.Array) -> jax.Array:
    """The weight of layer i out of a stack.

    Slices of bfloat16 are taken as integers: the CPU backend would slice a float32 copy of the whole stack. A stack may
    be given as such integers too, which spares that backend the copy that it makes of them.
    """
    return _from_bits(jax.lax.dynamic_index_in_dim(_to_bits(w), i, keepdims=False))


def take_rows(w: jax.Array, rows: jax.Array) -> jax.Array:
    """Some rows of a matrix, in the same way."""
    return _from_bits(jnp.take(_to_bits(w), rows, axis=0))


def _to_bits(w: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(w, jnp.uint16) if w.dtype == jnp.bfloat16 else w


def _from_bits(w: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(w, jnp.bfloat16) if w.dtype == jnp.uint16 else w


def rope_angles(positions_BT: jax.Array, head_dim: int, theta: float, factor: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32, [B, T, H/2]."""
    frequencies_H = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim) / factor
    angles_BTH = positions_BT[..., None].astype(jnp.float32) * frequencies_H
    return jnp.cos(angles_BTH), jnp.sin(angles_BTH)


def apply_rope(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotates the two halves of each head against each other, in float32."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
