"""The same training in PEFT: equal starts, equal batches, equal losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import checkpoints
import support
from adaptax.export import save_peft_adapter
from adaptax.lora import LoraSpec
from adaptax.models import Architecture
from adaptax.models.gemma3_weights import LINEARS

DECAY = 0.01


def make_spec(arch: Architecture, is_mixed: bool) -> LoraSpec:
    """All kinds but ``kv_einsum``, whose A is shared between keys and values here and is not in PEFT."""
    if not is_mixed:
        layers = {kind: tuple(range(arch.num_layers)) for kind in LINEARS if kind != "attn/kv_einsum"}
        return support.full_spec(arch, rank=8, alpha=16.0, layers=layers)
    mixed = support.mixed_spec(arch)
    return replace(mixed, layers={kind: layers for kind, layers in mixed.layers.items() if kind != "attn/kv_einsum"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_mixed", "ratio", "rate", "num_steps"),
    [(False, None, 1e-2, 50), (True, 4.0, 5e-3, 12)],
    ids=["plain", "rsLoRA, patterns and LoRA+"],
)
def test_steps_of_adamw_have_the_losses_that_peft_has(
    is_mixed: bool, ratio: float | None, rate: float, num_steps: int, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = checkpoints.build_text_model(seed=7)
    directory = checkpoints.save(model, tmp_path / "base")
    arch, base = support.open_checkpoint(directory)
    spec = make_spec(arch, is_mixed)
    optimizer = support.optimizer_config("adamw", rate, weight_decay=DECAY, loraplus_lr_ratio=ratio)
    trainer = support.Trainer(arch, base, spec, support.make_mesh(), optimizer)
    start = {path: np.asarray(array) for path, array in trainer.state.adapters.items()}
    save_peft_adapter(tmp_path / "start", start, spec, support.FAMILY, arch, str(directory))

    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "start"), is_trainable=True)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    beyond = sum(np.broadcast_to(support.beyond_ranks(spec, path), a.shape).sum() for path, a in start.items())
    assert sum(p.numel() for p in trained) == sum(a.size for a in start.values()) - beyond
    settings = {"betas": (0.9, 0.999), "eps": 1e-8}
    if ratio is None:
        rule = torch.optim.AdamW(trained, lr=rate, weight_decay=DECAY, **settings)
    else:
        optimizers = pytest.importorskip("peft.optimizers")
        rule = optimizers.create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio, loraplus_weight_decay=DECAY, **settings
        )
    ours, reference = [], []
    for step in range(num_steps):
        batch = support.random_batch(256, (1, 4, 32), seed=step % 5)
        ours.append(trainer.run(batch)["loss"])
        logits = theirs(input_ids=torch.tensor(batch["tokens"][0])).logits
        labels = torch.tensor(np.where(batch["loss_mask"][0], batch["targets"][0], -100), dtype=torch.long)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        rule.zero_grad()
        loss.backward()
        rule.step()
        reference.append(loss.item())
    assert ours[-1] < ours[0] - 0.5
    np.testing.assert_allclose(ours, reference, rtol=1e-4)
