"""Where adapters go, what they start as, and how they meet the frozen base in a step.

qwix applies its rules to one block, abstractly; its shapes are stacked over the layers that a kind is adapted in. The
adapters are float32 masters, a flat dictionary ``layers/attn/q_einsum/w_lora_a -> [layers, ...]``.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptax.mesh import partition
from adaptax.models import Architecture, Family
from adaptax.models.products import multiply_frozen
from adaptax.quantize import join_scales

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class LoraSpec:
    """Which modules are adapted, and how."""

    layers: Mapping[str, tuple[int, ...]]  # module kind -> layers
    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False  # updates are scaled by alpha / sqrt(rank) (arXiv 2312.03732), not by alpha / rank
    ranks: Mapping[str, int] = field(default_factory=dict)  # module path -> its own rank, such as layers/0/mlp/up_proj
    alphas: Mapping[str, float] = field(default_factory=dict)  # module path -> its own alpha

    def rank_of(self, kind: str, layer: int) -> int:
        """The rank of a module."""
        return self.ranks.get(f"layers/{layer}/{kind}", self.rank)

    def alpha_of(self, kind: str, layer: int) -> float:
        """The alpha of a module."""
        return self.alphas.get(f"layers/{layer}/{kind}", self.alpha)

    def scale_of(self, kind: str, layer: int) -> float:
        """What A B is multiplied by in a module."""
        rank = self.rank_of(kind, layer)
        return self.alpha_of(kind, layer) / (math.sqrt(rank) if self.use_rslora else rank)

    def stacked_rank(self, kind: str) -> int:
        """The rank of a kind's stacked arrays: the highest there is; what lower ones leave over is zero."""
        return max(self.rank_of(kind, layer) for layer in self.layers[kind])

    def total_rank(self, kind: str) -> int:
        """The ranks of a kind's modules together: what is trained of each of its inputs and outputs."""
        return sum(self.rank_of(kind, layer) for layer in self.layers[kind])

    def top_scale(self, kind: str) -> float:
        """The highest scale in a kind. The program has one for all its layers; B carries what others lack of it."""
        return max(self.scale_of(kind, layer) for layer in self.layers[kind])

    @property
    def first_layer(self) -> int:
        """The lowest adapted layer; below it nothing is differentiated."""
        return min((min(layers) for layers in self.layers.values()), default=0)


def build_model(
    family: Family,
    arch: Architecture,
    spec: LoraSpec | None,
    mesh: Mesh,
    *,
    train: bool,
    remat: str = "full",
    attention: str = "xla",
) -> nnx.GraphDef:
    """The model's graph, with qwix's adapters in its block; no arrays are made.

    Args:
      family: the model family.
      arch: the model's numbers.
      spec: the adapters; None for the bare base.
      mesh: activations are split over its fsdp axis.
      train: with dropout, if the spec has any.
      remat: what the backward pass computes anew: ``none``, ``matmul`` or ``full``.
      attention: an implementation that ``choose_attention`` gives; ``xla`` runs everywhere.
    """
    module = importlib.import_module(family.module)
    platform = mesh.devices.flat[0].platform

    def make() -> nnx.Module:
        model = getattr(module, family.model_class)(arch, rngs=nnx.Rngs(0))
        model.activation_sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
        model.remat, model.attention = remat, attention
        model.multiply = multiply_frozen if platform == "cpu" else None
        if spec is None:
            module.set_multiply(model.layers, model.multiply)
        else:
            model.first_adapted = spec.first_layer
            model.layers = _wrap_block(module, arch, spec, spec.dropout if train else 0.0, platform)
        return model

    return nnx.graphdef(nnx.eval_shape(make))


def _wrap_block(module: Any, arch: Architecture, spec: LoraSpec, dropout: float, platform: str) -> Any:
    rules = [_make_rule(kind, spec, dropout) for kind in spec.layers]
    block = module.Block(arch, rngs=nnx.Rngs(0))
    rngs = nnx.Rngs(params=0, dropout=0)
    provider = (_CpuProvider if platform == "cpu" else qwix.LoraProvider)(rules)
    block = qwix.apply_lora_to_model(block, provider, *block.example_inputs(arch), rngs=rngs)
    made = {"/".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(block, nnx.LoRAParam))}
    assert made == set(spec.layers), f"qwix adapted {sorted(made)}, not {sorted(spec.layers)}"
    return block


def _make_rule(kind: str, spec: LoraSpec, dropout: float) -> qwix.LoraRule:
    rank, scale = spec.stacked_rank(kind), spec.top_scale(kind)
    alphas = (spec.alpha_of(kind, layer) for layer in spec.layers[kind])
    alpha = next((alpha for alpha in alphas if alpha / rank == scale), scale * rank)
    return qwix.LoraRule(module_path=re.escape(kind), rank=rank, alpha=alpha, dropout=dropout)


class _CpuProducts(qwix.PtqProvider):
    """The products of projections, of which all that a block has, are those with a frozen weight."""

    def dot_general(self, lhs, rhs, dimension_numbers, *args: Any, **kwargs: Any) -> jax.Array:
        if any(dimension_numbers[1]):  # of attention: neither factor is a weight
            return super().dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)
        return multiply_frozen(lhs, rhs, dimension_numbers)


class _CpuProvider(qwix.LoraProvider, _CpuProducts):
    """qwix's adapters beside such products."""


def adapter_shapes(family: Family, arch: Architecture, spec: LoraSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Every adapter array: path -> shape, axis letters. R is the highest rank in the kind."""
    shapes = {}
    for kind, layers in spec.layers.items():
        (in_axis, num_in), (out_axis, num_out) = family.checkpoint.adapter_axes(arch, kind)
        rank = spec.stacked_rank(kind)
        shapes[f"layers/{kind}/w_lora_a"] = (len(layers), num_in, rank), f"L{in_axis}R"
        shapes[f"layers/{kind}/w_lora_b"] = (len(layers), rank, num_out), f"LR{out_axis}"
    return shapes


def describe_adapters(
    family: Family, arch: Architecture, spec: LoraSpec, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """What :func:`init_adapters` makes: path -> shape, type and sharding."""
    shapes = adapter_shapes(family, arch, spec)
    return {
        path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=partition(axes, shape, mesh))
        for path, (shape, axes) in shapes.items()
    }


def init_adapters(family: Family, arch: Architecture, spec: LoraSpec, mesh: Mesh, seed: int) -> Arrays:
    """Fresh float32 adapters on the mesh: A uniform within 1/sqrt(in), B zero.

    That is PEFT's initialisation (kaiming uniform, a = sqrt 5), so that its learning rates carry over. A module's
    values depend on the seed, its own path and rank only: not on the mesh, nor on which others are adapted and how. The
    columns of A beyond a module's rank are zero; as those rows of B are too, neither has a gradient.
    """
    shapes = adapter_shapes(family, arch, spec)

    def make() -> Arrays:
        adapters = {}
        for path, (shape, _) in shapes.items():
            if path.endswith("_b"):
                adapters[path] = jnp.zeros(shape, jnp.float32)
                continue
            kind = path.removeprefix("layers/").rpartition("/")[0]
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
            ranks = [spec.rank_of(kind, layer) for layer in spec.layers[kind]]
            adapters[path] = _draw_a(key, spec.layers[kind], ranks, shape[1])
        return adapters

    shardings = {path: leaf.sharding for path, leaf in describe_adapters(family, arch, spec, mesh).items()}
    return jax.jit(make, out_shardings=shardings)()


def place_adapters(
    family: Family, arch: Architecture, spec: LoraSpec, mesh: Mesh, arrays: Mapping[str, np.ndarray]
) -> Arrays:
    """Adapters from the host on the mesh, laid out as :func:`init_adapters` does; each process passes them whole."""
    described = describe_adapters(family, arch, spec, mesh)
    assert {path: a.shape for path, a in arrays.items()} == {path: leaf.shape for path, leaf in described.items()}
    return {
        path: jax.make_array_from_callback(leaf.shape, leaf.sharding, arrays[path].__getitem__)
        for path, leaf in described.items()
    }


def _draw_a(key: jax.Array, layers: Sequence[int], ranks: Sequence[int], num_in: int) -> jax.Array:
    """A of some layers, [layers, in, highest rank], from a key of their kind."""
    limit = 1.0 / math.sqrt(num_in)
    a = jnp.zeros((len(layers), num_in, max(ranks)), jnp.float32)
    for rank in sorted(set(ranks)):
        places = [i for i in range(len(layers)) if ranks[i] == rank]
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.array([layers[i] for i in places]))
        draw = functools.partial(
            jax.random.uniform, shape=(num_in, rank), dtype=jnp.float32, minval=-limit, maxval=limit
        )
        drawn = jax.vmap(draw)(keys)
        if len(places) == len(layers):
            return drawn
        a = a.at[jnp.array(places), :, :rank].set(drawn)
    return a


def merge_model(graphdef: nnx.GraphDef, base: Arrays, adapters: Arrays, spec: LoraSpec | None, dtype: Any) -> Any:
    """The callable model: frozen base and adapters (cast to a type) put into the graph."""
    leaves = [(tuple(path.split("/")), nnx.Param(array)) for path, array in join_scales(base).items()]
    if spec is not None:
        num_layers = next(len(stack) for path, stack in base.items() if path.startswith("layers/"))
        for path, array in adapters.items():
            kind = path.removeprefix("layers/").rpartition("/")[0]
            if path.endswith("_b"):
                array = _fold_scales(array, kind, spec)
            array = _spread(array.astype(dtype), spec.layers[kind], spec.first_layer, num_layers)
            leaves.append((tuple(path.split("/")), nnx.LoRAParam(array)))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _fold_scales(b: jax.Array, kind: str, spec: LoraSpec) -> jax.Array:
    """B of a kind with what its layers lack of the kind's scale."""
    top = spec.top_scale(kind)
    shares = [spec.scale_of(kind, layer) / top for layer in spec.layers[kind]]
    return b if set(shares) == {1.0} else b * jnp.array(shares, b.dtype)[:, None, None]


def _spread(array: jax.Array, layers: tuple[int, ...], first: int, num_layers: int) -> jax.Array:
    """Adapters of some layers as a stack of all from ``first`` on: layers without one get zeros, which add nothing."""
    if len(layers) == num_layers - first:
        return array
    places = jnp.array(layers) - first
    return jnp.zeros((num_layers - first, *array.shape[1:]), array.dtype).at[places].set(array)
