"""The frozen base in few bits: what is kept of it, and that all that runs on it does so as on plain weights."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

import small_runs
import support
from adaptax.checkpoint import digest_arrays, read_digests
from adaptax.diagnose import build_diagnose
from adaptax.lora import Arrays, adapter_shapes, build_model, init_adapters, merge_model
from adaptax.mesh import partition
from adaptax.models.gemma3_weights import LINEARS, SIZES, Architecture
from adaptax.quantize import NF4, Quantized, dequantize_tree, join_scales, quantize
from adaptax.schema import UserError
from adaptax.weights import describe_weights, load_weights

TINY = SIZES["tiny"]
KINDS = ("int8", "int4", "nf4")
MIXED = dict(zip(LINEARS, 2 * KINDS, strict=True))
SOURCE = Path(support.find_source_of_tiny())
NUM_BYTES = {"int8": 1, "int4": 0.5, "nf4": 0.5}


def plain(base: Arrays) -> Arrays:
    """What a quantised base stands for, as plain float32 weights in its places."""
    return jax.jit(lambda base: dequantize_tree(join_scales(base), jnp.float32))(base)


def load_tiny(fsdp: int = 1, tp: int = 1, kind: str | None = None) -> Arrays:
    """The model that ships with the package."""
    return support.load(SOURCE, TINY, support.make_mesh(fsdp, tp), quantization=kind)


def describe_mixed(arch: Architecture, directory: Path | None, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A base with matrices of all kinds, which takes no longer to compile than one of a single kind."""
    by_kind = {k: describe_weights(directory, arch, support.FAMILY.checkpoint, mesh, jnp.float32, k) for k in KINDS}
    described = {path: leaf for path, leaf in by_kind["int8"].items() if not path.startswith("layers/")}
    for path in (path for path in by_kind["int8"] if path.startswith("layers/") and not path.endswith("_int8")):
        kind = MIXED.get(path.removeprefix("layers/").removesuffix("/w"), "int8")
        described |= {name: leaf for name, leaf in by_kind[kind].items() if name in (path, f"{path}_{kind}")}
    return described


def load_mixed(mesh: Mesh, directory: Path | None = None) -> Arrays:
    """tiny with matrices of all kinds; random weights without a directory."""
    described = describe_mixed(TINY, directory, mesh)
    return load_weights(directory, TINY, support.FAMILY.checkpoint, described, seed=0)


# Values


def as_qwix(weight: jax.Array, num_in: int, kind: str) -> Any:
    """A weight as qwix itself quantises it, eagerly, in blocks of 64."""
    last = num_in - 1
    if kind == "int8":
        return qwix.quantize(weight, jnp.int8, channelwise_axes=range(num_in, weight.ndim))
    axes = [axis for axis in range(weight.ndim) if axis != last]
    return qwix.quantize(weight, "nf4" if kind == "nf4" else jnp.int4, channelwise_axes=axes, tiled_axes={last: 64})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "num_in"), [((256, 96), 1), ((128, 2, 1, 32), 1), ((4, 64, 160), 2)])
def test_a_weight_is_what_qwix_makes_of_it_and_close_to_what_it_was(shape, num_in: int, kind: str) -> None:
    weight = 0.02 * jax.random.normal(jax.random.key(0), shape)
    array, theirs = quantize(weight, num_in, kind), as_qwix(weight, num_in, kind)
    found = np.asarray(dequantize_tree(array, jnp.float32))
    np.testing.assert_array_equal(array.scales, theirs.scale)
    np.testing.assert_array_equal(found, qwix.dequantize(theirs))
    error = np.linalg.norm(found - weight) / np.linalg.norm(weight)
    assert 0 < error < {"int8": 0.01, "int4": 0.12, "nf4": 0.1}[kind]
    assert array.values.nbytes == weight.size * NUM_BYTES[kind]


def test_the_table_of_nf4_is_qwixs() -> None:
    codes = qwix.QArray(jnp.arange(16).astype(jnp.uint4), jnp.ones(1), None, "nf4")
    np.testing.assert_array_equal(np.array(NF4, np.float32), qwix.dequantize(codes))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_the_largest_of_a_group_keeps_its_sign(kind: str) -> None:
    weight = np.zeros((128, 3), np.float32)
    weight[5, 1], weight[70, 2] = 3.0, -4.0
    found = np.asarray(dequantize_tree(quantize(jnp.asarray(weight), 1, kind), jnp.float32))
    np.testing.assert_array_equal(found == 0, weight == 0)
    np.testing.assert_allclose(found, weight, rtol=0.08)


# Loading


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_matrices_alone_are_quantised_each_layer_for_itself_whatever_the_mesh(kind: str) -> None:
    whole, base = load_tiny(), load_tiny(kind=kind)
    joined = join_scales(base)
    assert {path for path, a in joined.items() if isinstance(a, Quantized)} == {f"layers/{k}/w" for k in LINEARS}
    for path, array in joined.items():
        if not isinstance(array, Quantized):
            np.testing.assert_array_equal(array, whole[path])
            continue
        num_in = len(LINEARS[path.removeprefix("layers/").removesuffix("/w")].in_axes)
        expected = jax.jit(quantize, static_argnums=(1, 2))(whole[path][3], num_in, kind)
        np.testing.assert_array_equal(array.values[3], expected.values)
        np.testing.assert_array_equal(array.scales[3], expected.scales)
    spread = load_tiny(2, 4, kind)
    assert all(np.array_equal(base[path], spread[path]) for path in base)


@pytest.mark.parametrize("directory", [SOURCE, None])
def test_what_is_loaded_or_drawn_is_what_was_described(directory: Path | None) -> None:
    mesh = support.make_mesh(4, 2)
    described, base = describe_mixed(TINY, directory, mesh), load_mixed(mesh, directory)
    assert base.keys() == described.keys()
    for path, array in base.items():
        assert (array.shape, array.dtype) == (described[path].shape, described[path].dtype)
        assert array.sharding.is_equivalent_to(described[path].sharding, array.ndim)
    for path, array in plain(base).items():
        if directory is not None or path.rpartition("/")[2] != "w":
            continue
        weight = np.asarray(array)
        assert np.std(weight) == pytest.approx(0.02, rel=0.03)
        assert len({layer.tobytes() for layer in weight}) == TINY.num_layers


def test_values_and_scales_are_split_alike_and_scales_are_whole_where_they_cannot_be() -> None:
    """tiny has 128 inputs, so two blocks: fsdp=2 splits them, fsdp=4 does not."""
    path = "layers/mlp/up_proj/w"
    for fsdp, tp, scale_spec in ((2, 4, ("fsdp", "tp")), (4, 2, (None, "tp"))):
        base = load_tiny(fsdp, tp, "nf4")
        assert tuple(base[path].sharding.spec) == (None, "fsdp", "tp")
        assert tuple(base[f"{path}_nf4"].sharding.spec) == (None, *scale_spec)
        assert partition("LDF", base[path].shape, support.make_mesh(fsdp, tp)) == base[path].sharding


def test_a_width_that_has_no_blocks_is_refused_in_one_line_but_not_by_int8() -> None:
    odd, mesh = replace(TINY, mlp_dim=516), support.make_mesh()
    words = r"model\.quantization=nf4 needs inputs in multiples of 8, and this model has 516: take int8 or null"
    with pytest.raises(UserError, match=words):
        describe_weights(None, odd, support.FAMILY.checkpoint, mesh, jnp.float32, "nf4")
    assert describe_weights(None, odd, support.FAMILY.checkpoint, mesh, jnp.float32, "int8")


def test_threads_that_ask_for_the_same_weights_are_given_the_same(tmp_path: Path) -> None:
    source = shutil.copytree(SOURCE, tmp_path / "model")
    with ThreadPoolExecutor(4) as pool:
        bases = list(pool.map(lambda _: support.load(source, TINY, support.make_mesh(), quantization="nf4"), range(4)))
    assert all(base is bases[0] for base in bases)
    assert support.load(source, TINY, support.make_mesh(), quantization="int4") is not bases[0]


# Running on it

SPEC = support.full_spec(TINY, layers={kind: (1, 2, 4) for kind in LINEARS})


def draw_adapters(mesh: Mesh) -> Arrays:
    """Adapters that do something, drawn without compiling."""
    rng, shapes = np.random.default_rng(0), adapter_shapes(support.FAMILY, TINY, SPEC)
    hosts = {path: 0.05 * rng.standard_normal(shape, np.float32) for path, (shape, _) in shapes.items()}
    return {path: jax.device_put(host, partition(shapes[path][1], host.shape, mesh)) for path, host in hosts.items()}


def test_loss_and_gradients_are_those_of_the_weights_it_stands_for() -> None:
    """With layers that have no adapters below, between and above; matrix products kept for the backward pass."""
    mesh = support.make_mesh(2, 2)
    base, adapters = load_mixed(mesh, SOURCE), draw_adapters(mesh)
    graphdef = build_model(support.FAMILY, TINY, SPEC, mesh, train=True, remat="matmul")
    batch = support.shard_batch(support.random_batch(TINY.vocab_size, (1, 8, 16)), mesh)
    tokens, positions, segments = (batch[name][0] for name in ("tokens", "positions", "segments"))
    directions = jax.random.normal(jax.random.key(0), (8, 16, TINY.embed_dim))

    def lose(adapters: Arrays, base: Arrays) -> jax.Array:
        """Stands for the head, which is as it was, and takes long to compile."""
        model = merge_model(graphdef, base, adapters, SPEC, jnp.float32)
        return jnp.square(model(tokens, positions, segments) - directions).sum()

    run = jax.jit(jax.value_and_grad(lose))
    (loss, grads), (expected, expected_grads) = run(adapters, base), run(adapters, plain(base))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for path, grad in grads.items():
        difference, size = np.linalg.norm(grad - expected_grads[path]), np.linalg.norm(expected_grads[path])
        assert difference <= 1e-6 * size
        assert size > 0


def test_adapters_add_to_it_what_they_add_to_weights() -> None:
    mesh = support.make_mesh()
    base = load_mixed(mesh, SOURCE)
    adapters = draw_adapters(mesh)
    merged = {path: np.array(array) for path, array in plain(base).items()}
    for kind, layers in SPEC.layers.items():
        a, b = (np.asarray(adapters[f"layers/{kind}/w_lora_{x}"]) for x in "ab")
        weight = merged[f"layers/{kind}/w"]
        weight[np.array(layers)] += (a @ b * (SPEC.alpha / SPEC.rank)).reshape(-1, *weight.shape[1:])
    tokens = np.arange(10, 42)[None]
    program, bare = (support.make_program(TINY, spec, mesh, train=False) for spec in (SPEC, None))
    adapted = support.hidden_states(program, base, adapters, tokens)
    expected = support.hidden_states(bare, {path: jnp.asarray(a) for path, a in merged.items()}, {}, tokens)
    np.testing.assert_allclose(adapted, expected, atol=2e-5)


def test_no_more_than_a_layer_of_plain_weights_is_there_in_a_step() -> None:
    """Temporaries of hidden states and the gradient of adapters, compiled for 4 and for 16 layers."""
    mesh, sizes, width = support.make_mesh(), [], 64 * 4096
    tokens, adapter = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1, 64, 1), jnp.float32)
    for num_layers in (4, 16):
        arch = replace(TINY, num_layers=num_layers, global_layers=(False,) * num_layers, embed_dim=64, mlp_dim=4096)
        spec = support.full_spec(arch, rank=1, layers={"attn/q_einsum": (0,)})
        graphdef = build_model(support.FAMILY, arch, spec, mesh, train=True)

        def add_up(adapters: Arrays, base: Arrays, tokens: jax.Array, graphdef=graphdef, spec=spec) -> jax.Array:
            return merge_model(graphdef, base, adapters, spec, jnp.float32)(tokens, tokens, tokens + 1).sum()

        adapters = {f"layers/attn/q_einsum/w_lora_{x}": adapter for x in "a"}
        adapters |= {"layers/attn/q_einsum/w_lora_b": jax.ShapeDtypeStruct((1, 1, 128), jnp.float32)}
        lowered = jax.jit(jax.grad(add_up)).lower(adapters, describe_mixed(arch, None, mesh), tokens)
        sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert sizes[0] < 3 * 4 * 2 * width  # the three of the MLP in float32, and as much again
    assert sizes[1] - sizes[0] < 12 * 3 * width / 16  # of 12 layers more, not even their packed values


def test_damage_in_the_checkpoint_is_named_by_layer_and_matrix(tmp_path: Path) -> None:
    tensors = load_file(SOURCE / "model.safetensors")
    for layer, name in enumerate(("gate", "up", "down")):
        damaged = tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"].copy()
        damaged[7, 5] = np.inf
        tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = damaged
    save_file(tensors, tmp_path / "model.safetensors")
    mesh, spec = support.make_mesh(), support.full_spec(TINY, rank=2, layers={"attn/q_einsum": (4,)})
    program, adapters = support.make_program(TINY, spec, mesh), init_adapters(support.FAMILY, TINY, spec, mesh, 0)
    run, batch = build_diagnose(program), support.shard_batch(support.random_batch(2048, (1, 2, 8)), mesh)
    assert run(load_mixed(mesh, SOURCE), adapters, batch).damaged == ()
    damaged = run(load_mixed(mesh, tmp_path), adapters, batch).damaged
    assert {str(weight).split(" holds ")[0] for weight in damaged} == {
        f"base weight layers/{layer}/mlp/{name}_proj/w" for layer, name in enumerate(("gate", "up", "down"))
    }


def test_a_changed_value_or_scale_changes_the_digest_on_every_mesh() -> None:
    base, spread = load_tiny(kind="nf4"), load_tiny(2, 4, "nf4")
    digests = read_digests(digest_arrays(base))
    assert digests == read_digests(digest_arrays(spread))
    for path in ("layers/mlp/up_proj/w", "layers/mlp/up_proj/w_nf4"):
        changed = base | {path: base[path].at[1, 1, 1].add(1)}
        assert {p for p, d in read_digests(digest_arrays(changed)).items() if d != digests[p]} == {f"['{path}']"}


# Whole runs


def test_a_run_is_stopped_and_resumed_to_the_same_bits_and_writes_an_adapter_of_the_usual_form(tmp_path: Path) -> None:
    home = small_runs.write_home(tmp_path)
    config = small_runs.make_config(home, {"model.quantization": "nf4", "training.num_batches": 4})
    rows = small_runs.train(home / "straight", config)
    small_runs.train(home / "resumed", small_runs.change(config, {"training.stop_after_steps": 2}))
    assert small_runs.losses_of(rows) == small_runs.losses_of(small_runs.train(home / "resumed", config))
    one, other = (small_runs.adapter_of(home / name) for name in ("straight", "resumed"))
    layer = "base_model.model.model.layers.0."
    assert {name.removeprefix(layer): array.shape for name, array in one.items()} == {
        "self_attn.q_proj.lora_A.weight": (4, 32),
        "self_attn.q_proj.lora_B.weight": (32, 4),
        "mlp.down_proj.lora_A.weight": (4, 64),
        "mlp.down_proj.lora_B.weight": (32, 4),
    }
    assert all(array.dtype == np.float32 and array.tobytes() == other[name].tobytes() for name, array in one.items())
