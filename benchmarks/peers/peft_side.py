"""PEFT on transformers in a plain training loop: one side of ``against_peers.py``, which says what it is given.

AdamW, clipping at 1, float32 adapters on the seven projections, no gradient checkpointing: its defaults, without what a
trainer class adds to each step. ``--library liger`` has Liger's kernels in the model, ``unsloth`` has Unsloth make
model and adapters, with its own gradient checkpointing: both need CUDA, and neither has been tried yet. A JSON line is
printed before the first step, as each step ends, and with the peak of the GPU's memory where there is one.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from given import make_parser, read_rows

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read_batch(rows: Any, step: int, size: int) -> dict[str, torch.Tensor]:
    """The rows of a step, padded to the longest of them."""
    ends = np.concatenate([[0], rows["ends"]])
    spans = [slice(ends[k], ends[k + 1]) for k in range(step * size, (step + 1) * size)]
    width = max(span.stop - span.start for span in spans)
    tokens = np.zeros((size, width), np.int64)
    labels, mask = np.full_like(tokens, IGNORED), np.zeros_like(tokens)
    for row, span in enumerate(spans):
        length = span.stop - span.start
        tokens[row, :length] = rows["tokens"][span]
        labels[row, :length] = np.where(rows["mask"][span], rows["tokens"][span], IGNORED)
        mask[row, :length] = 1
    arrays = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    return {name: torch.from_numpy(array).to(DEVICE) for name, array in arrays.items()}


def build_model(options: argparse.Namespace) -> Any:
    """The checkpoint with adapters, in the type and with the attention that are asked for."""
    dtype = getattr(torch, options.dtype)
    if options.library == "unsloth":  # which wants to be imported before transformers
        from unsloth import FastLanguageModel

        kind = {"max_seq_length": options.length, "dtype": dtype, "load_in_4bit": False}
        model, _ = FastLanguageModel.from_pretrained(options.checkpoint, **kind)
        lora = {"r": options.rank, "lora_alpha": options.rank, "target_modules": PROJECTIONS}
        return FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="unsloth", **lora).train()
    import peft

    if options.library == "liger":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as Model
    else:
        from transformers import AutoModelForCausalLM as Model
    model = Model.from_pretrained(options.checkpoint, dtype=dtype, attn_implementation=options.attention)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.rank, target_modules=PROJECTIONS, task_type=peft.TaskType.CAUSAL_LM
    )
    return peft.get_peft_model(model, config).to(DEVICE).train()


def main() -> None:
    """Trains the steps that are asked for."""
    parser = make_parser(__doc__)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--library", choices=("plain", "liger", "unsloth"), default="plain")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = read_rows(options.rows)
    model = build_model(options)
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    print(json.dumps({"ready": True}), flush=True)
    call = torch.compile(model) if options.compile else model
    for step in range(options.steps):
        loss = call(**read_batch(rows, step, options.batch)).loss
        rule.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        rule.step()
        print(json.dumps({"step": step + 1, "loss": loss.item()}), flush=True)
    if DEVICE == "cuda":
        print(json.dumps({"device_gib": torch.cuda.max_memory_allocated() / 2**30}), flush=True)


if __name__ == "__main__":
    main()
