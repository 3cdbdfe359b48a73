"""Softmax attention in four implementations, which one is taken, and what a token may see.

A query sees the keys of its own segment at its own position and before, in local layers the last ``window`` positions
alone. ``plain`` is the reference: all logits at once. ``xla`` goes block by block and leaves out what nobody sees.
``cudnn`` and ``splash`` are the makers' kernels for NVIDIA GPUs and TPUs. All have float32 logits and softmax.

Axes: B batch, T query position, S key position, N query heads, K key/value heads, G = N/K, H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from adaptax.models.attention_blocks import ALL, Blocks, attend_blocks, cut_blocks
from adaptax.models.attention_kernels import LANES, attend_cudnn, attend_splash
from adaptax.models.cache import CachedLayer
from adaptax.models.gemma3_weights import Architecture
from adaptax.models.residuals import keep
from adaptax.schema import UserError


@dataclass(frozen=True)
class Sizes:
    """How ``xla`` works on a kind of device."""

    block: int  # tokens of a block, at most
    short: int  # sequences up to here are attended to at once, as by plain
    one_by_one: bool  # each row of a batch on its own


# On CPU, as measured: larger blocks compute more that is masked, smaller ones make the matrix products slower; a row
# alone has tighter ranges, and its products are large enough; up to 256 tokens, of which two blocks leave out a
# quarter, plain is as fast. Elsewhere, not measured: a loop's step costs more than its arithmetic, so few steps.
SIZES = {"cpu": Sizes(block=128, short=256, one_by_one=True)}
OTHER_SIZES = Sizes(block=512, short=1024, one_by_one=False)


def choose_attention(name: str, device: Any, arch: Architecture, dtype: Any, *, is_packed: bool) -> str:
    """The implementation that a run takes: ``plain``, ``xla``, ``cudnn`` or ``splash``.

    Args:
      name: ``model.attention``, one of these or ``auto``.
      device: one of those that the model runs on.
      arch: the model's numbers.
      dtype: the compute type.
      is_packed: whether a row holds several documents.

    Raises:
      UserError: the device or the model has what the implementation cannot do.
    """
    if name == "auto":
        # cuDNN's backward pass for heads of more than 128 is sure on Hopper alone: Blackwell has it since cuDNN 9.23.
        is_sure = arch.head_dim <= 128 or int(_compute_capability(device)) == 9
        if is_sure and _why_not_cudnn(device, arch, dtype, is_packed) is None:
            return "cudnn"
        return "splash" if _why_not_splash(device, arch) is None else "xla"
    reason = None
    if name == "cudnn":
        reason = _why_not_cudnn(device, arch, dtype, is_packed)
    elif name == "splash":
        reason = _why_not_splash(device, arch)
    if reason is not None:
        raise UserError(f"model.attention={name} {reason} take auto or xla")
    return name


def _why_not_cudnn(device: Any, arch: Architecture, dtype: Any, is_packed: bool) -> str | None:
    """The limits of jax.nn.dot_product_attention with cuDNN; None where all hold."""
    capability = _compute_capability(device)
    widest = 256 if capability >= 9.0 else 128
    if not capability:
        return f"needs an NVIDIA GPU; this run is on {device.platform}:"
    if capability < 8.0:
        return f"needs an NVIDIA GPU of compute capability 8.0 or more; this one has {capability}:"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16, not {jnp.dtype(dtype)}: set model.dtype=bfloat16, or"
    if arch.head_dim > widest or arch.head_dim % 8:
        return (
            f"takes heads of a multiple of 8 up to {widest} on a GPU of compute capability {capability}, "
            f"the model's are {arch.head_dim}:"
        )
    if is_packed:
        return "sees no border between rows packed into a sequence: set data.packing=false, or"
    return None


def _why_not_splash(device: Any, arch: Architecture) -> str | None:
    """The limits of splash attention; None where all hold."""
    if device.platform != "tpu":
        return f"needs a TPU; this run is on {device.platform}:"
    if arch.head_dim % LANES:
        return f"takes heads of a multiple of {LANES}, the model's are {arch.head_dim}:"
    return None


def _compute_capability(device: Any) -> float:
    """Of an NVIDIA GPU, such as 9.0 for Hopper; 0 for any other device."""
    try:
        return float(device.compute_capability) if device.platform == "gpu" else 0.0
    except (AttributeError, ValueError):  # AMD's are names
        return 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMask:
    """What the tokens of a layer see, in the form that its implementation needs."""

    is_global: jax.Array
    allowed_BTS: jax.Array | None = None  # plain
    blocks: Blocks | None = None  # xla
    segments_BT: jax.Array | None = None  # splash
    window: int = field(default=0, metadata={"static": True})  # of local layers
    implementation: str = field(default="plain", metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})


def build_masks(
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    window: int,
    *,
    implementation: str = "plain",
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
) -> tuple[AttentionMask, AttentionMask]:
    """(local, global) masks of a batch, alike but for their values: a traced flag may choose between the two.

    Args:
      positions_BT: position of each token in its segment.
      segments_BT: a token sees only tokens of its own segment.
      window: how many positions a token sees in local layers, itself included.
      implementation: of :func:`attend`. Where it would gain nothing, or cannot do it, another one is taken: short
        sequences are attended to by ``plain``; float32, which ``replay`` looks at, by ``xla`` where cuDNN has none.
      mesh: where the batch lies; None for a single device.
      dtype: the compute type.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    sizes, length = SIZES.get(platform, OTHER_SIZES), positions_BT.shape[1]
    if implementation == "cudnn" and jnp.dtype(dtype) == jnp.float32:
        implementation = "xla"
    if implementation == "xla" and length <= sizes.short:
        implementation = "plain"
    make = functools.partial(AttentionMask, window=window, implementation=implementation, mesh=mesh)
    flags = jnp.array(False), jnp.array(True)
    if implementation == "plain":
        allowed = attention_masks(positions_BT, segments_BT, window)
        local, full = (make(flag, allowed_BTS=allowed_BTS) for flag, allowed_BTS in zip(flags, allowed, strict=True))
    elif implementation == "xla":
        cut = functools.partial(cut_blocks, positions_BT, segments_BT, size=sizes.block)
        local, full = (make(flag, blocks=cut(window=w)) for flag, w in zip(flags, (window, ALL), strict=True))
    else:
        local, full = (make(flag, segments_BT=segments_BT) for flag in flags)
    return local, full


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask | CachedLayer, scale: float
) -> jax.Array:
    """Softmax attention, grouped heads, logits and softmax in float32. Returns [B, T, N, H].

    What a remat policy is to keep is named ``attention``.
    """
    if isinstance(mask, CachedLayer):
        return attend_heads(q_BTNH, *mask.extend(k_BSKH, v_BSKH), scale)
    if mask.implementation == "plain":
        assert mask.allowed_BTS is not None
        return keep(attend_plain(q_BTNH, k_BSKH, v_BSKH, mask.allowed_BTS, scale), "attention")
    run = functools.partial(_IMPLEMENTATIONS[mask.implementation], scale=scale)
    if mask.mesh is None or mask.mesh.size == 1:
        return run(q_BTNH, k_BSKH, v_BSKH, mask)
    return _on_each_device(run, mask.mesh, q_BTNH, k_BSKH, v_BSKH, mask)


def attention_masks(positions_BT: jax.Array, segments_BT: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """(local, global) masks, [B, T, S]: causal, within a segment, and local to the last ``window`` keys."""
    distance_BTS = positions_BT[:, :, None] - positions_BT[:, None, :]
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    causal_BTS = same_BTS & (distance_BTS >= 0)
    return causal_BTS & (distance_BTS < window), causal_BTS


def attend_plain(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, allowed_BTS: jax.Array, scale: float
) -> jax.Array:
    """The reference: all logits, [B, K, G * T, S], at once."""
    return attend_heads(q_BTNH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), allowed_BTS, scale)


def attend_heads(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, allowed_BTS: jax.Array, scale: float
) -> jax.Array:
    """The same with keys and values head by head, as caches hold them."""
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    G = N // K
    # The queries of a group stand below each other, M = G * T: one plain matrix product per key/value head.
    q_BKMH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    logits_BKMS = jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32) * scale
    mask_BKMS = jnp.tile(allowed_BTS, (1, G, 1))[:, None]
    weights_BKMS = jax.nn.softmax(jnp.where(mask_BKMS, logits_BKMS, jnp.finfo(jnp.float32).min), axis=-1)
    out_BKMH = jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS.astype(v_BKSH.dtype), v_BKSH)
    return out_BKMH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_blocks(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, *, scale: float) -> jax.Array:
    assert mask.blocks is not None
    platform = jax.default_backend() if mask.mesh is None else mask.mesh.devices.flat[0].platform
    window = jnp.where(mask.is_global, ALL, mask.window)
    one_by_one = SIZES.get(platform, OTHER_SIZES).one_by_one
    return attend_blocks(q_BTNH, k_BSKH, v_BSKH, mask.blocks, window, scale, one_by_one)


def _attend_cudnn(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, *, scale: float) -> jax.Array:
    return attend_cudnn(q_BTNH, k_BSKH, v_BSKH, mask.is_global, mask.window, scale)


def _attend_splash(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, *, scale: float) -> jax.Array:
    assert mask.segments_BT is not None
    return attend_splash(q_BTNH, k_BSKH, v_BSKH, mask.segments_BT, mask.is_global, mask.window, scale)


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": _attend_blocks,
    "cudnn": _attend_cudnn,
    "splash": _attend_splash,
}


def _on_each_device(
    run: Callable[..., jax.Array], mesh: Mesh, q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask
) -> jax.Array:
    """``run`` on the rows and query heads that each device holds: no array is gathered, no loop waits for another."""
    N, K, tp = q_BTNH.shape[2], k_BSKH.shape[2], mesh.shape["tp"]
    batch, heads = PartitionSpec("fsdp"), PartitionSpec("fsdp", None, "tp")
    is_split = K % tp == 0

    def run_local(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask) -> jax.Array:
        if not is_split:
            k_BSKH, v_BSKH = (_own_heads(x, q_BTNH.shape[2], N // K) for x in (k_BSKH, v_BSKH))
        return run(q_BTNH, k_BSKH, v_BSKH, mask)

    of_keys = heads if is_split else batch
    of_mask = jax.tree.map(lambda x: batch if x.ndim else PartitionSpec(), mask)
    specs = heads, of_keys, of_keys, of_mask
    return jax.shard_map(run_local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
        q_BTNH, k_BSKH, v_BSKH, mask
    )


def _own_heads(x_BSKH: jax.Array, num_queries: int, group: int) -> jax.Array:
    """Of key/value heads that are whole on every device, those of the device's own query heads."""
    first = jax.lax.axis_index("tp") * num_queries
    if group % num_queries == 0:  # all its query heads are of one group
        return jax.lax.dynamic_slice_in_dim(x_BSKH, first // group, 1, axis=2)
    return jnp.take(x_BSKH, (first + jnp.arange(num_queries)) // group, axis=2)
