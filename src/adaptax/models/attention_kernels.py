"""Attention by the kernels of others: cuDNN's for NVIDIA GPUs, splash attention for TPUs.

Both know causality and windows by index, not by position: rows must hold segments one behind the other, with positions
that go up by one within each. Both have two static forms, local and global; a traced flag chooses between them.

Axes: B batch, T position, N query heads, K key/value heads, G = N/K, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128  # splash attention's blocks are multiples of it
_PADDING = -1  # segment of what fills the last block


def attend_cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    is_global: jax.Array,
    window: int,
    scale: float,
    kernel: str = "cudnn",
) -> jax.Array:
    """Softmax attention [B, T, N, H] by ``jax.nn.dot_product_attention``, in bfloat16 or float16.

    A row holds one document from its start on; padding behind it is seen by nothing before it. Several documents in a
    row would need a mask, [B, 1, T, T] in the compute type (2 bytes each), which cuDNN does not take together with a
    window, and of which jax has it compute the gradient as well: so packed rows are refused beforehand.

    Args:
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      is_global: whether all earlier tokens are seen, or the window alone; may be traced.
      window: how many tokens a query sees, itself included.
      scale: of the logits.
      kernel: ``cudnn``, or ``xla`` for the same call on any device.
    """

    def run(local_window: tuple[int, int] | None) -> jax.Array:
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            scale=scale,
            is_causal=True,
            local_window_size=local_window,
            implementation=kernel,  # type: ignore[arg-type]
        )

    if window >= q_BTNH.shape[1]:
        return run(None)
    return jax.lax.cond(is_global, lambda: run(None), lambda: run((window - 1, 0)))


def attend_splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    is_global: jax.Array,
    window: int,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention [B, T, N, H] by splash attention; T is filled up to a multiple of 128 within.

    Args:
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      segments_BT: a token sees only tokens of its own segment.
      is_global: whether all earlier tokens are seen, or the window alone; may be traced.
      window: how many tokens a query sees, itself included.
      scale: of the logits.
      interpret: runs the kernel's source on any device, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # a third of a second

    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)  # the kernel has no scale of its own
    q_BTNH, k_BTKH, v_BTKH = (jnp.pad(x, ((0, 0), (0, -T % LANES), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH))
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, -T % LANES)), constant_values=_PADDING)
    q_BKGTH = q_BTNH.reshape(B, -1, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    length = segments_BT.shape[1]
    sizes = _choose_blocks(length)

    def build(mask: Any) -> Callable[[], Any]:
        kernel = splash.make_splash_mqa_single_device(
            splash.MultiHeadMask([mask] * (N // K)),
            block_sizes=splash.BlockSizes(**sizes),
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
        of_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        segments = splash.SegmentIds(segments_BT, segments_BT)
        return lambda: jax.vmap(of_heads)(q_BKGTH, k_BKTH, v_BKTH, segments)

    full = build(splash.CausalMask((length, length)))
    local = build(splash.LocalMask((length, length), (window - 1, 0), 0))
    out_BKGTH = full() if window >= T else jax.lax.cond(is_global, full, local)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, length, N, H)[:, :T]


def _choose_blocks(length: int) -> dict[str, Any]:
    """Of forward and backward kernels: as large as divides the length, up to 512 tokens."""
    size = next(size for size in (512, 256, LANES) if length % size == 0)
    forward = ("block_q", "block_kv", "block_kv_compute")
    backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    return dict.fromkeys((*forward, *backward), size)
