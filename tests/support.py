"""Short ways for the tests to the product's own parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptax import config as cfg
from adaptax.lora import Arrays, LoraSpec, adapter_shapes, build_model, init_adapters, merge_model
from adaptax.mesh import build_mesh, shard_batch
from adaptax.models import Architecture, Family, find_architecture, find_family, find_source
from adaptax.models.gemma3_weights import LINEARS
from adaptax.optim import build_optimizer
from adaptax.step import Program, build_train_step, init_state
from adaptax.weights import describe_weights, load_weights

FAMILY: Family = find_family("gemma3")
ALL = ".*"


def make_mesh(fsdp: int = 1, tp: int = 1) -> Mesh:
    """The first fsdp x tp simulated devices."""
    return build_mesh([[fsdp, tp], ["fsdp", "tp"]])


def model_config(weights: Path | str | None, size: str = "auto", **changes: Any) -> cfg.ModelConfig:
    """A model section with usual values."""
    values: dict[str, Any] = {
        "model_family": "gemma3",
        "model_size": size,
        "lora_rank": 8,
        "lora_alpha": None,
        "lora_module_path": ALL,
        "mesh_shape": [[1, 1], ["fsdp", "tp"]],
        "lora_dropout": 0.0,
        "use_rslora": False,
        "lora_rank_pattern": {},
        "lora_alpha_pattern": {},
        "weights": None if weights is None else str(weights),
        "tokenizer": None,
        "dtype": "float32",
        "quantization": None,
        "init_adapter": None,
        "attention": "auto",
    }
    return cfg.ModelConfig(**(values | changes))


def load(
    directory: Path | None, arch: Architecture, mesh: Mesh, dtype: Any = jnp.float32, quantization: str | None = None
) -> Arrays:
    """Base weights from a checkpoint, or random ones."""
    described = describe_weights(directory, arch, FAMILY.checkpoint, mesh, dtype, quantization)
    return load_weights(directory, arch, FAMILY.checkpoint, described, seed=0)


def open_checkpoint(directory: Path, mesh: Mesh | None = None) -> tuple[Architecture, Arrays]:
    """(numbers, weights) of a checkpoint directory."""
    arch = find_architecture(model_config(directory))
    return arch, load(directory, arch, mesh or make_mesh())


def full_spec(arch: Architecture, rank: int = 8, alpha: float = 16.0, **changes: Any) -> LoraSpec:
    """Adapters on every module."""
    layers = {kind: tuple(range(arch.num_layers)) for kind in LINEARS}
    return LoraSpec(**({"layers": layers, "rank": rank, "alpha": alpha} | changes))


def mixed_spec(arch: Architecture, **changes: Any) -> LoraSpec:
    """Adapters that differ in layers, ranks and alphas within a kind and between kinds, scaled as rsLoRA does."""
    layers = {"attn/kv_einsum": (2, 5), "attn/q_einsum": (5,), "mlp/down_proj": tuple(range(arch.num_layers))}
    ranks = {"layers/5/attn/kv_einsum": 2, "layers/0/mlp/down_proj": 7, "layers/3/mlp/down_proj": 1}
    alphas = {"layers/5/attn/kv_einsum": 9.0, "layers/3/mlp/down_proj": 5.0}
    values = {"rank": 4, "alpha": 6.0, "use_rslora": True, "ranks": ranks, "alphas": alphas}
    return LoraSpec(**({"layers": layers} | values | changes))


def beyond_ranks(spec: LoraSpec, path: str) -> np.ndarray:
    """Which columns of A or rows of B are beyond the ranks of their modules, [layers, 1, R] or [layers, R, 1]."""
    kind, axis = path.removeprefix("layers/").rpartition("/")[0], 2 if path.endswith("_b") else 1
    ranks = np.array([spec.rank_of(kind, layer) for layer in spec.layers[kind]])
    return np.expand_dims(np.arange(spec.stacked_rank(kind)) >= ranks[:, None], axis)


def make_program(arch: Architecture, spec: LoraSpec | None, mesh: Mesh, *, train: bool = True) -> Program:
    """What the steps close over, in float32."""
    return Program(build_model(FAMILY, arch, spec, mesh, train=train), spec, jnp.dtype(jnp.float32), mesh)


def hidden_states(program: Program, base: Arrays, adapters: Arrays, tokens: np.ndarray, **kwargs: Any) -> jax.Array:
    """Hidden states of plain rows, [B, T, D]."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    model = merge_model(program.graphdef, base, adapters, program.spec, program.adapter_dtype)
    return model(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones(tokens.shape, jnp.int32), **kwargs)


def logits(program: Program, base: Arrays, adapters: Arrays, tokens: np.ndarray) -> np.ndarray:
    """Logits of plain rows, [B, T, V]."""
    return np.asarray(hidden_states(program, base, adapters, tokens) @ base["embedder/embedding"].T)


def random_adapters(arch: Architecture, spec: LoraSpec, mesh: Mesh, seed: int = 0) -> Arrays:
    """Adapters with a B that is not zero, so that they do something."""
    adapters = init_adapters(FAMILY, arch, spec, mesh, seed)
    keys = dict(zip(adapters, jax.random.split(jax.random.key(seed + 1), len(adapters)), strict=True))
    noise = {p: 0.05 * jax.random.normal(keys[p], a.shape) * p.endswith("_b") for p, a in adapters.items()}
    return {p: a + jnp.where(beyond_ranks(spec, p), 0.0, noise[p]) for p, a in adapters.items()}


def draw_adapters(arch: Architecture, spec: LoraSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """The same on the host, as a run hands them over to be written."""
    rng = np.random.default_rng(seed)
    shapes = {path: shape for path, (shape, _) in adapter_shapes(FAMILY, arch, spec).items()}
    drawn = {path: 0.1 * rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    return {path: np.where(beyond_ranks(spec, path), np.float32(0), array) for path, array in drawn.items()}


def random_batch(
    vocab_size: int, shape: tuple[int, int, int], seed: int = 0, supervised: float = 0.5
) -> dict[str, np.ndarray]:
    """A batch [A, B, T] with some positions supervised, different counts in each row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, vocab_size, shape, dtype=np.int32)
    share = rng.uniform(0.5 * supervised, min(1.0, 1.5 * supervised), (*shape[:2], 1))
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape))
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=2),
        "loss_mask": rng.uniform(size=shape) < share,
        "segments": np.ones(shape, np.int32),
        "positions": positions,
    }


def optimizer_config(name: str = "adamw", learning_rate: float = 1e-3, **changes: Any) -> cfg.OptimizerConfig:
    """An optimizer section with usual values."""
    values: dict[str, Any] = {
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "momentum": None,
        "max_grad_norm": None,
        "loraplus_lr_ratio": None,
    }
    return cfg.OptimizerConfig(name=name, learning_rate=learning_rate, **(values | changes))


class Trainer:
    """A step with its state, over given batches."""

    def __init__(
        self,
        arch: Architecture,
        base: Arrays,
        spec: LoraSpec,
        mesh: Mesh,
        optimizer: cfg.OptimizerConfig | None = None,
        adapters: Arrays | None = None,
    ):
        rule, schedule = build_optimizer(
            optimizer or optimizer_config(), cfg.ScheduleConfig("constant", 0, 1.0), num_steps=100
        )
        adapters = adapters or init_adapters(FAMILY, arch, spec, mesh, 0)
        self.mesh, self.base, self.program = mesh, base, make_program(arch, spec, mesh)
        self.state = init_state(adapters, rule, mesh, 0)
        self.step = build_train_step(self.program, rule, schedule)

    def run(self, batch: dict[str, np.ndarray]) -> dict[str, float]:
        """One step; its metrics as floats."""
        self.state, metrics = self.step(self.state, self.base, shard_batch(batch, self.mesh))
        return {name: float(value) for name, value in metrics.items()}


def find_source_of_tiny() -> str:
    """The directory of the base model that ships with the package."""
    return find_source(model_config(None, size="tiny"))


def adapters_from_peft(tensors: dict[str, np.ndarray], arch: Architecture, spec: LoraSpec) -> Arrays:
    """The stacked adapters behind a written PEFT adapter."""
    adapters = {}
    prefix = f"base_model.model.{FAMILY.checkpoint.peft_module_prefix(arch)}layers."
    for kind, layers in spec.layers.items():
        names = LINEARS[kind].tensors
        a = [tensors[f"{prefix}{layer}.{names[0]}.lora_A.weight"].T for layer in layers]
        b = [
            np.concatenate([tensors[f"{prefix}{layer}.{name}.lora_B.weight"].T for name in names], axis=1)
            for layer in layers
        ]
        adapters[f"layers/{kind}/w_lora_a"] = jnp.asarray(np.stack(a))
        adapters[f"layers/{kind}/w_lora_b"] = jnp.asarray(np.stack(b))
    return adapters


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation of a program, those of the functions within too, and how often it is run by scans."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner_times = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner, inner_times)
