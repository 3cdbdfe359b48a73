"""Hugging Face checkpoints in Google's own layout: converted in plain numpy, written by Orbax's older interfaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors import safe_open

Tree = dict[str, Any]


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Of the text model, names beginning with ``layers.``, ``embed_tokens.`` or ``norm.``."""
    tensors = {}
    with safe_open(directory / "model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118
            if "vision" not in name and "projector" not in name and not name.startswith("lm_head"):
                bare = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
                tensors[bare] = file.get_tensor(name)
    return tensors


def convert(directory: Path, dtype: Any = np.float32) -> Tree:
    """The flat tree that Google publishes: ``{"transformer/layer_0/attn/q_einsum": {"w": array}}``."""
    config = json.loads((directory / "config.json").read_text())
    config = config.get("text_config", config)
    num_heads, num_kv_heads, size = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    tensors = {name: array.astype(dtype) for name, array in read_tensors(directory).items()}
    tree = {"transformer/embedder": {"input_embedding": tensors["embed_tokens.weight"]}}
    tree["transformer/final_norm"] = {"scale": tensors["norm.weight"]}
    norms = {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "post_attention_norm"}
    norms |= {"pre_feedforward_layernorm": "pre_ffw_norm", "post_feedforward_layernorm": "post_ffw_norm"}
    norms |= {"self_attn.q_norm": "attn/_query_norm", "self_attn.k_norm": "attn/_key_norm"}

    def heads(layer: int, name: str, count: int) -> np.ndarray:
        """[N, D, H] of [N * H, D]."""
        return np.stack([part.T for part in np.split(tensors[f"layers.{layer}.self_attn.{name}.weight"], count)])

    for i in range(config["num_hidden_layers"]):
        to = f"transformer/layer_{i}"
        tree |= {f"{to}/{theirs}": {"scale": tensors[f"layers.{i}.{name}.weight"]} for name, theirs in norms.items()}
        tree[f"{to}/attn/q_einsum"] = {"w": heads(i, "q_proj", num_heads)}
        tree[f"{to}/attn/kv_einsum"] = {"w": np.stack([heads(i, f"{x}_proj", num_kv_heads) for x in "kv"])}
        out = tensors[f"layers.{i}.self_attn.o_proj.weight"].T
        tree[f"{to}/attn/attn_vec_einsum"] = {"w": np.ascontiguousarray(out).reshape(num_heads, size, -1)}
        gate, up = (tensors[f"layers.{i}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        tree[f"{to}/mlp/gating_einsum"] = {"w": np.stack([gate, up])}
        tree[f"{to}/mlp/linear"] = {"w": np.ascontiguousarray(tensors[f"layers.{i}.mlp.down_proj.weight"].T)}
    return tree


def nest(tree: Tree, *, whole: bool = True) -> Tree:
    """The same tree with a dictionary per part of the names; not ``whole``: without ``transformer`` and the MLP's w."""
    nested: Tree = {}
    for module, arrays in tree.items():
        *path, last = module.split("/")
        inner = nested
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = arrays["w"] if not whole and path[-1] == "mlp" else dict(arrays)
    return nested if whole else nested["transformer"] | {k: v for k, v in nested.items() if k != "transformer"}


def add_vision(tree: Tree) -> Tree:
    """With a little of what multimodal checkpoints hold beside the text model."""
    rng = np.random.default_rng(1)
    return tree | {
        "transformer/embedder/mm_input_projection": {"w": rng.standard_normal((8, 16), np.float32)},
        "transformer/embedder/mm_soft_embedding_norm": {"scale": np.ones(8, ml_dtypes.bfloat16)},
        "SigLiPFromPatches_0/siglip_encoder": {"pos_embedding": np.ones((1, 4, 8), np.float32)},
        "SigLiPFromPatches_0/siglip_encoder/Transformer/encoder_norm": {"bias": np.ones(8, np.float32)},
    }


def write(directory: Path, tree: Tree, way: str = "standard") -> Path:
    """Writes a tree with ``standard``, ``pytree``, ``files`` (a file per array, no database) or ``v1``."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    if way == "v1":
        from orbax.checkpoint import v1

        v1.save(directory, tree)
    elif way == "standard":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory, tree)
    else:
        with ocp.PyTreeCheckpointer(use_ocdbt=way == "pytree") as checkpointer:
            checkpointer.save(directory, tree)
    return directory
