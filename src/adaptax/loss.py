"""Cross entropy against the frozen head, over supervised positions only.

No gradient is due for the head, so d(hidden) is made in the forward pass, chunk by chunk, and a [tokens, vocabulary]
array never exists. Each fsdp slice packs its own supervised positions together and runs as many chunks as they fill;
under tp every device holds a part of the vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

CHUNK_BYTES = 256 << 20  # of one chunk's float32 logits


def chunk_size(vocab_size: int) -> int:
    """Tokens per chunk: as many as fit CHUNK_BYTES, between 128 and 4096."""
    return min(max(CHUNK_BYTES // (4 * vocab_size), 128), 4096)


def cross_entropy(
    hidden_BTD: jax.Array, embedding_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, mesh: Mesh
) -> jax.Array:
    """The summed negative log likelihood of the targets where the mask is set, float32.

    Differentiable in ``hidden_BTD`` alone.

    Args:
      hidden_BTD: hidden states after the final norm, B split over fsdp.
      embedding_VD: the tied head, V split over tp.
      targets_BT: the token that follows each position.
      mask_BT: True where it is supervised.
      mesh: the mesh they lie on.
    """
    return _cross_entropy(hidden_BTD, embedding_VD, targets_BT, mask_BT, mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden_BTD, embedding_VD, targets_BT, mask_BT, mesh: Mesh) -> jax.Array:
    return _sharded(hidden_BTD, embedding_VD, targets_BT, mask_BT, mesh, with_gradient=False)[0]


def _forward(hidden_BTD, embedding_VD, targets_BT, mask_BT, mesh: Mesh):
    return _sharded(hidden_BTD, embedding_VD, targets_BT, mask_BT, mesh, with_gradient=True)


def _backward(mesh: Mesh, d_hidden_BTD: jax.Array, d_loss: jax.Array):
    return (d_loss * d_hidden_BTD).astype(d_hidden_BTD.dtype), None, None, None


_cross_entropy.defvjp(_forward, _backward)


@jax.named_scope("head")
def _sharded(hidden_BTD, embedding_VD, targets_BT, mask_BT, mesh: Mesh, *, with_gradient: bool):
    rows, batch = PartitionSpec("tp", None), PartitionSpec("fsdp")
    run = jax.shard_map(
        functools.partial(_local, with_gradient=with_gradient),
        mesh=mesh,
        in_specs=(batch, rows, batch, batch),
        out_specs=(PartitionSpec(), batch),
        check_vma=False,
    )
    return run(hidden_BTD, embedding_VD, targets_BT, mask_BT)


def _local(hidden_BTD, embedding_VD, targets_BT, mask_BT, *, with_gradient: bool) -> tuple[jax.Array, jax.Array]:
    """One device's part: (loss summed over the mesh, d(hidden) of its rows)."""
    D = hidden_BTD.shape[-1]
    hidden_MD, targets_M, mask_M = hidden_BTD.reshape(-1, D), targets_BT.reshape(-1), mask_BT.reshape(-1)
    M, C = mask_M.size, min(chunk_size(embedding_VD.shape[0] * jax.lax.axis_size("tp")), mask_BT.size)
    order_M = jnp.argsort(~mask_M, stable=True)  # supervised positions first
    order_M = jnp.pad(order_M, (0, -M % C), constant_values=M)  # M: past the end, read as zero and never written
    num_supervised = mask_M.sum()

    def chunk(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        loss, d_hidden_MD = carry
        index_C = jax.lax.dynamic_slice_in_dim(order_M, i * C, C)
        valid_C = i * C + jnp.arange(C) < num_supervised
        hidden_CD = hidden_MD.at[index_C].get(mode="fill", fill_value=0)
        targets_C = targets_M.at[index_C].get(mode="fill", fill_value=0)
        loss_C, d_hidden_CD = _chunk_loss(hidden_CD, embedding_VD, targets_C, valid_C, with_gradient)
        if d_hidden_CD is not None:
            index_C = jnp.where(valid_C, index_C, M)
            d_hidden_MD = d_hidden_MD.at[index_C].set(d_hidden_CD.astype(hidden_MD.dtype), mode="drop")
        return loss + jnp.sum(loss_C * valid_C), d_hidden_MD

    start = jnp.zeros((), jnp.float32), jnp.zeros_like(hidden_MD) if with_gradient else jnp.zeros((0, D))
    loss, d_hidden_MD = jax.lax.fori_loop(0, (num_supervised + C - 1) // C, chunk, start)
    d_hidden = d_hidden_MD.reshape(hidden_BTD.shape) if with_gradient else jnp.zeros((hidden_BTD.shape[0],))
    return jax.lax.psum(loss, "fsdp"), d_hidden


def _chunk_loss(hidden_CD, embedding_VD, targets_C, valid_C, with_gradient: bool):
    """Loss of each row and d(loss)/d(hidden), the vocabulary split over tp."""
    V = embedding_VD.shape[0]
    embedding_VD = embedding_VD.astype(hidden_CD.dtype)
    logits_CV = jnp.einsum("CD,VD->CV", hidden_CD, embedding_VD, preferred_element_type=jnp.float32)
    top_C = jax.lax.pmax(jax.lax.stop_gradient(logits_CV.max(axis=-1)), "tp")
    exp_CV = jnp.exp(logits_CV - top_C[:, None])
    total_C = jax.lax.psum(exp_CV.sum(axis=-1), "tp")
    local_C = targets_C - jax.lax.axis_index("tp") * V
    is_here_C = (local_C >= 0) & (local_C < V)
    target_logits_C = jnp.take_along_axis(logits_CV, jnp.clip(local_C, 0, V - 1)[:, None], axis=-1)[:, 0]
    target_logits_C = jax.lax.psum(jnp.where(is_here_C, target_logits_C, 0.0), "tp")
    loss_C = jnp.log(total_C) + top_C - target_logits_C
    if not with_gradient:
        return loss_C, None
    hit_CV = (jnp.arange(V) == local_C[:, None]).astype(jnp.float32)
    d_logits_CV = ((exp_CV / total_C[:, None] - hit_CV) * valid_C[:, None]).astype(hidden_CD.dtype)
    d_hidden_CD = jnp.einsum("CV,VD->CD", d_logits_CV, embedding_VD, preferred_element_type=jnp.float32)
    return loss_C, jax.lax.psum(d_hidden_CD, "tp")
