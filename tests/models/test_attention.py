"""Every implementation of attention against the plain one: outputs, gradients, on meshes, under remat policies."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import support
from adaptax.lora import LoraSpec, build_model, merge_model
from adaptax.models.attention import attend, attend_plain, attention_masks, build_masks
from adaptax.models.attention_blocks import ALL, attend_blocks, cut_blocks
from adaptax.models.attention_kernels import attend_cudnn, attend_splash
from adaptax.models.gemma3 import REMAT_POLICIES
from adaptax.models.gemma3_weights import SIZES

Arrays = tuple[jax.Array, ...]
LAYERS = pytest.mark.parametrize("is_global", [False, True], ids=["local", "global"])
WINDOW = 70
EXACT = 2e-6  # of the largest value: what the order of sums changes in float32


# Rows: (positions, segments), each [T]


def one_document(length: int) -> np.ndarray:
    """As without packing, and when answers are generated."""
    return np.stack([np.arange(length), np.ones(length, int)])


def packed(length: int, seed: int = 0, *, is_counted: bool = True) -> np.ndarray:
    """Documents of any length one behind the other, an eighth of padding; its positions count, or are all zero."""
    rng, parts, left = np.random.default_rng(seed), [], length - length // 8
    while left:
        size = min(left, int(rng.integers(2, length // 3)))
        parts.append(np.stack([np.arange(size), np.full(size, len(parts) + 1)]))
        left -= size
    size = length // 8
    return np.concatenate([*parts, np.stack([np.arange(size) * is_counted, np.zeros(size, int)])], axis=1)


def padding(length: int) -> np.ndarray:
    """The rows that a last batch lacks."""
    return np.zeros((2, length), int)


def disordered(length: int) -> np.ndarray:
    """No pipeline makes such a row, but it has a meaning."""
    rng = np.random.default_rng(1)
    return np.stack([rng.integers(0, length, length), rng.integers(0, 4, length)])


def make_rows(length: int) -> tuple[jax.Array, jax.Array]:
    """(positions, segments) of a batch with a row of each kind, [6, T]."""
    rows = [one_document(length), packed(length), packed(length, 2), packed(length, is_counted=False)]
    positions, segments = np.stack([*rows, padding(length), disordered(length)], axis=1).astype(np.int32)
    return jnp.asarray(positions), jnp.asarray(segments)


def make_heads(batch: int, length: int, heads: tuple[int, int, int], dtype: Any = jnp.float32) -> Arrays:
    """(queries, keys, values, gradient of the output) for (query heads, key/value heads, head size)."""
    N, K, H = heads
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((batch, length, n, H), np.float32), dtype) for n in (N, K, K, N))


def with_gradients(attention: Callable[..., jax.Array]) -> Callable[..., list[np.ndarray]]:
    """(queries, keys, values, gradient of the output, more) -> [output, gradients of the first three], jitted."""

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array, *more: Any) -> Any:
        out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, *more), q, k, v)
        return out, *backward(d_out)

    return lambda *arguments: [np.asarray(array, np.float32) for array in both(*arguments)]


@functools.cache
def build(kind: str, shape: tuple[int, int] = (1, 1)) -> Callable[..., list[np.ndarray]]:
    """``attend`` by an implementation on a mesh; which layer it is stays open until it runs."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: Any, segments: Any, flag: Any) -> jax.Array:
        mesh = support.make_mesh(*shape)
        masks = build_masks(positions, segments, WINDOW, implementation=kind, mesh=mesh, dtype=q.dtype)
        assert masks[0].implementation == kind
        mask = jax.tree.map(lambda local, full: jnp.where(flag, full, local), *masks)
        return attend(q, k, v, mask, 0.3)

    return with_gradients(attention)


def assert_close(ours: list[np.ndarray], theirs: list[np.ndarray], tolerance: float = EXACT) -> None:
    """Output and gradients differ by at most this share of the largest value."""
    for name, a, b in zip(("output", "queries", "keys", "values"), ours, theirs, strict=True):
        assert np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


# Block by block


@LAYERS
@pytest.mark.parametrize(("length", "heads"), [(264, (4, 1, 16)), (517, (4, 2, 24))])
def test_blocks_give_what_all_at_once_gives(length: int, heads: tuple[int, int, int], is_global: bool) -> None:
    arguments = *make_heads(6, length, heads), *make_rows(length), jnp.array(is_global)
    assert_close(build("xla")(*arguments), build("plain")(*arguments))


def test_in_bfloat16_blocks_are_exact_to_its_rounding() -> None:
    rows, rounded = (*make_rows(264), jnp.array(False)), make_heads(6, 264, (4, 1, 16), jnp.bfloat16)
    exact = tuple(array.astype(jnp.float32) for array in rounded)
    for ours, theirs in zip(build("xla")(*rounded, *rows), build("plain")(*exact, *rows), strict=True):
        assert np.linalg.norm(ours - theirs) <= 2**-8 * np.linalg.norm(theirs)


def test_rows_together_are_what_they_are_one_by_one() -> None:
    rows, arrays = make_rows(264), make_heads(6, 264, (4, 1, 16))

    def together(q: jax.Array, k: jax.Array, v: jax.Array, *rows: jax.Array) -> jax.Array:
        return attend_blocks(q, k, v, cut_blocks(*rows, window=WINDOW, size=96), jnp.int32(WINDOW), 0.3, False)

    assert_close(with_gradients(together)(*arrays, *rows), build("plain")(*arrays, *rows, jnp.array(False)))


@pytest.mark.parametrize("window", [1, 40, ALL])
@pytest.mark.parametrize("size", [16, 64])
def test_ranges_of_blocks_hold_every_pair_that_sees_each_other(window: int, size: int) -> None:
    rows = make_rows(203)
    blocks = jax.jit(functools.partial(cut_blocks, window=window, size=size))(*rows)
    allowed = np.asarray(jax.jit(functools.partial(attention_masks, window=window))(*rows)[0])
    _, _, block = blocks.positions_BIU.shape
    row, query, key = np.nonzero(allowed)
    assert (np.asarray(blocks.first_BI)[row, query // block] <= key // block).all()
    assert (key // block < np.asarray(blocks.stop_BI)[row, query // block]).all()


def count_blocks(row: np.ndarray, window: int, size: int = 128) -> int:
    """Pairs of blocks that are computed for a row."""
    blocks = jax.jit(functools.partial(cut_blocks, window=window, size=size))(*jnp.asarray(row[:, None]))
    return int((np.asarray(blocks.stop_BI) - np.asarray(blocks.first_BI)).sum())


def test_local_layers_cost_what_the_length_is_and_documents_what_they_are_alone() -> None:
    assert count_blocks(one_document(8192), ALL) == 64 * 65 // 2
    assert count_blocks(one_document(8192), 512) <= 64 * 5
    assert count_blocks(one_document(16384), 512) <= 128 * 5
    documents = np.concatenate([one_document(256) * [[1], [n]] for n in range(1, 33)], axis=1)
    assert count_blocks(documents, ALL) == 32 * 3
    for is_counted in (True, False):  # padding does not spoil the row
        filler = np.stack([np.arange(1024) * is_counted, np.zeros(1024, int)])
        assert count_blocks(np.concatenate([one_document(7168), filler], axis=1), 512) <= 56 * 5 + 8 * 8


def test_no_array_of_all_pairs_is_made() -> None:
    length = 2048
    shapes = [jax.ShapeDtypeStruct((1, length, n, 64), jnp.float32) for n in (2, 1, 1, 2)]
    rows = [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2
    taken = {}
    for kind in ("plain", "xla"):

        def both(q: Any, k: Any, v: Any, d_out: Any, *rows: Any, kind: str = kind) -> Any:
            mask = build_masks(*rows, 512, implementation=kind)[1]
            return jax.vjp(lambda q, k, v: attend(q, k, v, mask, 1.0), q, k, v)[1](d_out)

        taken[kind] = jax.jit(both).lower(*shapes, *rows).compile().memory_analysis().temp_size_in_bytes
    assert taken["plain"] > 2 * 4 * length**2 > 4 * taken["xla"]


# Under a remat policy, in the model, on a mesh


def products_in_loops(jaxpr: Any, inside: bool = False) -> Iterator[Any]:
    """Every matrix product within a loop of unknown length: two of the forward pass, five of the backward pass."""
    for eqn in jaxpr.eqns:
        if inside and eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products_in_loops(inner, inside or eqn.primitive.name == "while")


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
@pytest.mark.parametrize(("remat", "count"), [("matmul", 2 + 5), ("full", 2 + 2 + 5)])
def test_keeping_products_spares_the_second_forward_pass(remat: str, count: int, shape: tuple[int, int]) -> None:
    mesh, rows = support.make_mesh(*shape), [jnp.ones((2, 320), jnp.int32)] * 2
    q, k, v, _ = make_heads(2, 320, (2, 1, 8))

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES[remat])
    def layer(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mask = build_masks(*rows, 70, implementation="xla", mesh=mesh)[0]
        return jnp.sin(attend(jnp.sin(q), k, v, mask, 1.0))

    gradient = jax.make_jaxpr(jax.grad(lambda *arrays: layer(*arrays).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert len(list(products_in_loops(gradient.jaxpr))) == count


@pytest.mark.parametrize(
    ("shape", "heads"),
    [((2, 2), (4, 2, 8)), ((2, 2), (4, 1, 16)), ((1, 6), (12, 4, 8))],
    ids=["key heads split too", "key heads of one group on each device", "of two groups"],
)
def test_on_a_mesh_every_device_works_with_its_own_heads(shape: tuple[int, int], heads: tuple[int, int, int]) -> None:
    arguments = *make_heads(6, 264, heads), *make_rows(264), jnp.array(False)
    assert_close(build("xla", shape)(*arguments), build("plain")(*arguments))


@pytest.mark.slow
def test_on_a_mesh_the_model_communicates_as_with_plain_attention() -> None:
    plain, ours = (
        sorted(re.findall(r"= (\w+\[[\d,]*\])\S* (all-[\w-]+|collective-permute)\(", text))
        for text in (run_model(kind)[0] for kind in ("plain", "xla"))
    )
    assert ours == plain
    assert len(plain) > 10


@functools.cache
def run_model(attention: str) -> tuple[str, float, dict[str, np.ndarray]]:
    """(compiled text, loss, gradient of the adapters) of a small model with both kinds of layers, T = 264."""
    small = {"num_layers": 2, "embed_dim": 32, "mlp_dim": 64, "vocab_size": 64, "sliding_window": 40}
    arch = replace(SIZES["tiny"], global_layers=(False, True), **small)
    mesh, spec = support.make_mesh(2, 2), LoraSpec({"attn/kv_einsum": (0, 1)}, 4, 4.0)
    graphdef = build_model(support.FAMILY, arch, spec, mesh, train=True, remat="matmul", attention=attention)
    base, adapters = support.load(None, arch, mesh), support.random_adapters(arch, spec, mesh)
    batch = support.shard_batch(support.random_batch(64, (1, 2, 264)), mesh)

    def lose(adapters: Any, base: Any, batch: Any) -> jax.Array:
        model = merge_model(graphdef, base, adapters, spec, jnp.float32)
        return jnp.sin(model(*(batch[name][0] for name in ("tokens", "positions", "segments")))).sum()

    compiled = jax.jit(jax.value_and_grad(lose)).lower(adapters, base, batch).compile()
    loss, gradient = compiled(adapters, base, batch)
    return compiled.as_text(), float(loss), {path: np.asarray(array) for path, array in gradient.items()}


@pytest.mark.slow
def test_the_model_learns_the_same_with_blocks() -> None:
    (_, loss, ours), (_, expected, theirs) = run_model("xla"), run_model("plain")
    assert loss == pytest.approx(expected, rel=1e-5)
    for path in theirs:
        assert np.linalg.norm(ours[path] - theirs[path]) <= 1e-5 * np.linalg.norm(theirs[path]), path


# The makers' kernels

plain_with_gradients = with_gradients(attend_plain)


@LAYERS
def test_the_call_of_cudnn_means_what_plain_attention_means(is_global: bool) -> None:
    """The same call with jax's own implementation in place of cuDNN's."""
    arrays, positions = make_heads(2, 100, (4, 2, 16)), jnp.arange(100)[None].repeat(2, axis=0)
    mask = attention_masks(positions, jnp.ones_like(positions), 30)[is_global]
    ours = with_gradients(lambda q, k, v, flag: attend_cudnn(q, k, v, flag, 30, 0.25, kernel="xla"))
    assert_close(ours(*arrays, jnp.array(is_global)), plain_with_gradients(*arrays, mask, 0.25))


def lower_layer(implementation: str, platform: str) -> str:
    """A layer's attention forward and backward, products kept, on a 2 x 2 mesh, as it is lowered for devices of a kind.

    A value is asked for with the gradient, or the first forward pass would be left out.
    """
    arrays = [jax.ShapeDtypeStruct((2, 1000, n, 256), jnp.bfloat16) for n in (4, 1, 1)]
    rows = [jax.ShapeDtypeStruct((2, 1000), jnp.int32)] * 2
    build = functools.partial(build_masks, implementation=implementation, mesh=support.make_mesh(2, 2))

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES["matmul"])
    def layer(q: Any, k: Any, v: Any, positions: Any, segments: Any, is_global: Any) -> jax.Array:
        masks = build(positions, segments, 512, dtype=q.dtype)
        mask = jax.tree.map(lambda local, full: jnp.where(is_global, full, local), *masks)
        return jnp.sin(attend(jnp.sin(q), k, v, mask, 0.0625).astype(jnp.float32)).sum()

    gradient = jax.jit(jax.value_and_grad(layer, argnums=(0, 1, 2)))
    traced = gradient.trace(*arrays, *rows, jax.ShapeDtypeStruct((), bool))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_cudnn_is_told_causality_window_and_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU that is not there: jax's checks of the machine are answered for it."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    calls = [line for line in lower_layer("cudnn", "cuda").splitlines() if "__cudnn$" in line]
    told = {
        (
            re.findall(r"__cudnn\$(\w+)", call)[0],
            *(re.findall(rf"{key}\\22: (?:\\22)?([\w.]+)", call)[0] for key in ("mask_type", "fmha_scale")),
            re.findall(r"sliding_window_length\\22: (\d+)", call)[0],
        )
        for call in calls
    }
    kinds = ("fmhaSoftmax", "fmhaSoftmaxBackward")
    assert told == {(kind, "CAUSAL", "0.0625", window) for kind in kinds for window in ("0", "512")}


@pytest.mark.gpu
@LAYERS
def test_cudnn_itself_gives_what_plain_attention_gives(is_global: bool) -> None:
    """``JAX_PLATFORMS=cuda python -m pytest -m gpu`` on a machine with a GPU of compute capability 9.0 or more."""
    arrays, positions = make_heads(2, 1000, (4, 1, 256), jnp.bfloat16), jnp.arange(1000)[None].repeat(2, axis=0)
    mask = attention_masks(positions, jnp.ones_like(positions), 512)[is_global]
    ours = with_gradients(lambda q, k, v, flag: attend_cudnn(q, k, v, flag, 512, 0.0625))
    assert_close(ours(*arrays, jnp.array(is_global)), plain_with_gradients(*arrays, mask, 0.0625), 0.02)


@pytest.mark.slow
@LAYERS
def test_splash_attention_gives_what_plain_attention_gives(is_global: bool) -> None:
    row, arrays = jnp.asarray(packed(200)), make_heads(1, 200, (2, 1, 128))
    mask = attention_masks(row[:1], row[1:], 60)[is_global]
    ours = with_gradients(functools.partial(attend_splash, window=60, scale=0.1, interpret=True))
    assert_close(ours(*arrays, row[1:], jnp.array(is_global)), plain_with_gradients(*arrays, mask, 0.1))


def test_splash_attention_is_lowered_for_a_tpu_and_runs_forward_once() -> None:
    kernels = re.findall(r'kernel_name = "splash_mqa_(\w+?)_segmented', lower_layer("splash", "tpu"))
    assert sorted(kernels) == ["dkv", "dkv", "dq", "dq", "fwd", "fwd"]  # local and global
