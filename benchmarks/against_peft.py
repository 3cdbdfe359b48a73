"""One training step of adaptax and of PEFT in turn: the same checkpoint, tokens and settings, each in its own process.

    python benchmarks/against_peft.py --size 270m --batch 4 --length 512 --rank 32 --steps 3

writes a random checkpoint of that size with transformers, runs both sides on it, and prints one JSON line per side:
peak memory of the process, seconds to compile (for PEFT: none), seconds of each step, losses. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]


def make_batch(options: argparse.Namespace) -> np.ndarray:
    """Token ids [batch, length]; every next token is supervised."""
    return np.random.default_rng(0).integers(107, 200_000, (options.batch, options.length), dtype=np.int32)


def run_ours(options: argparse.Namespace) -> dict[str, object]:
    """Our step, compiled ahead of time."""
    import support

    mesh = support.make_mesh()
    arch, base = support.open_checkpoint(Path(options.checkpoint), mesh)
    optimizer = support.optimizer_config(max_grad_norm=1.0)
    trainer = support.Trainer(arch, base, support.full_spec(arch, options.rank, options.rank), mesh, optimizer)
    tokens = make_batch(options)[None]
    mask = np.ones(tokens.shape, bool)
    mask[..., -1] = False
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(options.length, dtype=np.int32), tokens.shape))
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, -1), "loss_mask": mask, "positions": positions}
    batch = support.shard_batch(batch | {"segments": np.ones_like(tokens)}, mesh)
    started = time.monotonic()
    step = trainer.step.lower(trainer.state, trainer.base, batch).compile()
    compile_seconds, seconds, losses, state = time.monotonic() - started, [], [], trainer.state
    for _ in range(options.steps):
        started = time.monotonic()
        state, metrics = step(state, trainer.base, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.monotonic() - started)
    return {"compile_seconds": compile_seconds, "step_seconds": seconds, "losses": losses}


def run_peft(options: argparse.Namespace) -> dict[str, object]:
    """PEFT on transformers with sdpa attention, AdamW, clipping at 1."""
    import peft
    import torch
    from transformers import Gemma3ForCausalLM

    torch.manual_seed(0)
    model = Gemma3ForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32, attn_implementation="sdpa")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=names, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    tokens = torch.tensor(make_batch(options), dtype=torch.long)
    seconds, losses = [], []
    for _ in range(options.steps):
        started = time.monotonic()
        loss = model(input_ids=tokens, labels=tokens).loss
        rule.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        rule.step()
        losses.append(loss.item())
        seconds.append(time.monotonic() - started)
    return {"compile_seconds": None, "step_seconds": seconds, "losses": losses}


def write_checkpoint(size: str, directory: Path) -> None:
    """A random float32 checkpoint of a published size, written by transformers."""
    import checkpoints
    from adaptax.models.gemma3_weights import SIZES

    arch = asdict(SIZES[size])
    names = {"vocab_size": "vocab_size", "hidden_size": "embed_dim", "intermediate_size": "mlp_dim"}
    names |= {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "head_dim": "head_dim"}
    names |= {"num_key_value_heads": "num_kv_heads", "sliding_window": "sliding_window"}
    numbers = {theirs: arch[ours] for theirs, ours in names.items()}
    checkpoints.save(checkpoints.build_text_model(query_pre_attn_scalar=256, **numbers), directory)


def main() -> None:
    """Both sides in turn, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpoint", help="written and deleted when absent")
    parser.add_argument("--side", choices=("ours", "peft"), help="only this one, in this process")
    options = parser.parse_args()
    if options.side:
        result = run_ours(options) if options.side == "ours" else run_peft(options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"side": options.side, "peak_gib": round(peak, 2)} | result))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.checkpoint:
            write_checkpoint(options.size, Path(folder))
        arguments = [a for a in sys.argv[1:] if not a.startswith("--checkpoint")]
        for side in ("ours", "peft"):
            command = [sys.executable, __file__, *arguments, "--side", side]
            subprocess.run([*command, "--checkpoint", options.checkpoint or folder], check=True)


if __name__ == "__main__":
    main()
