"""Tunix's PeftTrainer on its own Gemma 3: one side of ``benchmarks/against_peers.py``, which says what it is given.

Its model presets, safetensors loader, qwix LoRA (keys and values share an A), default loss and rematerialisation (none)
are used as they come, on one device. It differs from what its users run by default in this: weights and adapters are in
the type that is asked for (theirs: bfloat16), there are no checkpoints, evaluation, metrics backends or profiler, and
the host waits for every step (theirs runs up to two ahead). All rows are padded to the full length: one shape to
compile. A JSON line is printed before the first step, as each step ends, and with the
peak of the device's memory where it is told. Tried with google-tunix 0.1.7.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from given import make_parser, read_rows
from tunix.models.gemma3.model import Gemma3, ModelConfig
from tunix.models.gemma3.params_safetensors import create_model_from_safe_tensors
from tunix.rl import reshard
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
from tunix.utils.mesh import create_mesh

MODULES = ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum"
PRESETS = (ModelConfig.gemma3_270m, ModelConfig.gemma3_1b_pt)
SHAPE = {  # theirs: ours in config.json
    "num_layers": "num_hidden_layers",
    "num_embed": "vocab_size",
    "embed_dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "sliding_window_size": "sliding_window",
}


class ReportingTrainer(PeftTrainer):
    """Says of each step when it is done: the hooks of the trainer run a step late."""

    def _post_process_train_step(self, aux: Any) -> None:
        assert self._buffered_train_metrics is not None
        loss = self._buffered_train_metrics.losses[-1]
        jax.block_until_ready((loss, nnx.state(self.model, nnx.LoRAParam)))
        print(json.dumps({"step": self.train_steps + 1, "loss": float(np.asarray(loss))}), flush=True)


def read_batch(rows: dict[str, np.ndarray], step: int, size: int, length: int) -> TrainingInput:
    """The rows of a step, padded to ``length``."""
    ends = np.concatenate([[0], rows["ends"]])
    tokens = np.zeros((size, length), np.int32)
    mask = np.zeros((size, length), bool)
    for row in range(size):
        span = slice(ends[step * size + row], ends[step * size + row + 1])
        tokens[row, : span.stop - span.start] = rows["tokens"][span]
        mask[row, : span.stop - span.start] = rows["mask"][span]
    return TrainingInput(input_tokens=tokens, input_mask=mask)


def make_inputs(batch: TrainingInput) -> dict[str, Any]:
    """What the default loss takes, as Tunix's own entry point makes it."""
    is_token = batch.input_tokens != 0
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(is_token),
        "attention_mask": utils.make_causal_attn_mask(is_token),
    }


def choose_preset(checkpoint: str) -> ModelConfig:
    """The preset whose shape the checkpoint has."""
    found = json.loads(Path(checkpoint, "config.json").read_text())
    for preset in PRESETS:
        config = preset()
        if all(getattr(config, theirs) == found[ours] for theirs, ours in SHAPE.items()):
            return config
    raise SystemExit(f"{checkpoint}: no preset of Tunix has the shape in its config.json")


def build_model(options: argparse.Namespace, mesh: jax.sharding.Mesh) -> Gemma3:
    """The checkpoint with adapters, in the type that is asked for."""
    config = choose_preset(options.checkpoint)
    config.param_dtype = jnp.dtype(options.dtype)
    base = create_model_from_safe_tensors(options.checkpoint, config, mesh, dtype=config.param_dtype)
    provider = qwix.LoraProvider(module_path=MODULES, rank=options.rank, alpha=float(options.rank))
    model = qwix.apply_lora_to_model(base, provider, rngs=nnx.Rngs(0), **base.get_model_input())
    return reshard.reshard_model_to_mesh(model, mesh)


def main() -> None:
    """Trains the steps that are asked for."""
    options = make_parser(__doc__).parse_args()
    rows = read_rows(options.rows)
    mesh = create_mesh((1, 1), ("fsdp", "tp"), devices=jax.devices()[:1])
    model = build_model(options, mesh)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.0))
    config = TrainingConfig(eval_every_n_steps=options.steps + 1, max_steps=options.steps)
    trainer = ReportingTrainer(model, rule, config).with_gen_model_input_fn(make_inputs)
    batches = (read_batch(rows, step, options.batch, options.length) for step in range(options.steps))
    print(json.dumps({"ready": True}), flush=True)
    with mesh:
        trainer.train(batches)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak:
        print(json.dumps({"device_gib": peak / 2**30}), flush=True)


if __name__ == "__main__":
    main()
