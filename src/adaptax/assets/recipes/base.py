"""Pretrains the tiny base model that ships with the package, on the synthetic corpus: all parameters, dense loss.

``python -m adaptax.assets.recipes.base`` writes ``gemma3_tiny/model.safetensors`` and ``config.json``. Same seed, same
machine, same file; another processor may round differently.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors.numpy import save as to_bytes

from adaptax.assets.recipes import corpus
from adaptax.data.chat import Example, encode_rows
from adaptax.data.formats import FORMATS, Fields, find_format
from adaptax.data.tokenizer import Tokenizer
from adaptax.lora import Arrays, build_model, merge_model
from adaptax.mesh import build_mesh
from adaptax.models import ASSETS, Architecture, find_family
from adaptax.weights import describe_weights, load_weights, split_linear

FOLDER = ASSETS / "gemma3_tiny"
SEED, BATCH_SIZE, LENGTH, LEARNING_RATE = 0, 48, 128, 3e-3


def packed_batches(tokenizer: Tokenizer, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of [BATCH_SIZE, LENGTH]; documents lie one behind the other, told apart by segment."""
    shape = (BATCH_SIZE, LENGTH)
    rows = corpus.rows(seed, 10**9)
    while True:
        names = ("tokens", "targets", "mask", "segments", "positions")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        for i in range(BATCH_SIZE):
            used, segment = 0, 1
            while True:
                row = next(rows)
                form = find_format(list(row), "auto", "corpus")
                example = encode_rows([FORMATS[form].render(Fields(row), "assistant")], tokenizer)[0]
                assert isinstance(example, Example)
                tokens = example.tokens
                n = len(tokens)
                if used + n > LENGTH:  # this document is left out, and the rest of the line stays padding
                    break
                place = slice(used, used + n)
                batch["tokens"][i, place], batch["segments"][i, place] = tokens, segment
                batch["targets"][i, used : used + n - 1], batch["mask"][i, used : used + n - 1] = tokens[1:], 1
                batch["positions"][i, place] = np.arange(n)
                used, segment = used + n, segment + 1
        yield batch


def pretrain(arch: Architecture, tokenizer: Tokenizer, num_steps: int) -> Arrays:
    """Random weights to trained ones."""
    family, mesh = find_family("gemma3"), build_mesh([[1, 1], ["fsdp", "tp"]])
    described = describe_weights(None, arch, family.checkpoint, mesh, jnp.float32)
    params = load_weights(None, arch, family.checkpoint, described, SEED)
    graphdef = build_model(family, arch, None, mesh, train=True)
    warmup = num_steps // 20
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup, num_steps, LEARNING_RATE / 100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))

    def loss_of(params: Arrays, batch: dict[str, jax.Array]) -> jax.Array:
        model = merge_model(graphdef, params, {}, None, jnp.float32)
        hidden_BTD = model(batch["tokens"], batch["positions"], batch["segments"])
        logits_BTV = hidden_BTD @ params["embedder/embedding"].T
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["targets"])
        return (losses_BT * batch["mask"]).sum() / batch["mask"].sum()

    @jax.jit
    def step(params: Arrays, moments: Any, batch: dict[str, jax.Array]) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    moments, started = optimizer.init(params), time.monotonic()
    for k, batch in zip(range(1, num_steps + 1), packed_batches(tokenizer, SEED), strict=False):
        params, moments, loss = step(params, moments, batch)
        if k % 50 == 0 or k == 1:
            print(f"step {k}/{num_steps} loss {float(loss):.4f} {time.monotonic() - started:.0f} s", flush=True)
    return params


def save(params: Arrays, arch: Architecture, folder: Path) -> None:
    """Writes the Hugging Face layout, in bfloat16."""
    checkpoint = find_family("gemma3").checkpoint
    tensors = {}
    for path, names in ((p, checkpoint.tensor_names(p, arch, "model.")) for p in params):
        array = np.asarray(params[path]).astype(ml_dtypes.bfloat16)
        axes = checkpoint.parameter_axes(arch)[path]
        kind = path.removeprefix("layers/").removesuffix("/w")
        for layer, layer_names in enumerate(names):
            part = array[layer] if axes.startswith("L") else array
            is_linear = kind in checkpoint.LINEARS
            parts = split_linear(part, axes[1:], len(checkpoint.LINEARS[kind].in_axes)) if is_linear else [part]
            tensors |= dict(zip(layer_names, parts, strict=True))
    (folder / "model.safetensors").write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(hf_config(arch), indent=2) + "\n", encoding="utf-8")


def hf_config(arch: Architecture) -> dict[str, Any]:
    """``config.json`` as transformers reads it."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.embed_dim,
        "intermediate_size": arch.mlp_dim,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "sliding_window": arch.sliding_window,
        "query_pre_attn_scalar": arch.query_pre_attn_scalar,
        "layer_types": ["full_attention" if full else "sliding_attention" for full in arch.global_layers],
        "rope_theta": arch.rope_theta_global,
        "rope_local_base_freq": arch.rope_theta_local,
        "rms_norm_eps": arch.norm_eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    """Pretrains and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    arch = find_family("gemma3").checkpoint.SIZES["tiny"]
    params = pretrain(arch, Tokenizer(FOLDER / "tokenizer.model"), options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    save(params, arch, options.out)


if __name__ == "__main__":
    main()
