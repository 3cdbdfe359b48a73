"""The same training in PEFT: equal starts, equal batches, equal losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import checkpoints
import support
from adaptax.export import save_peft_adapter
from adaptax.models.gemma3_weights import LINEARS

NUM_STEPS, RATE, DECAY = 50, 1e-2, 0.01


@pytest.mark.slow
def test_fifty_steps_of_adamw_have_the_losses_that_peft_has(tmp_path: Path) -> None:
    """All kinds but ``kv_einsum``, whose A is shared between keys and values here and is not in PEFT."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = checkpoints.build_text_model(seed=7)
    directory = checkpoints.save(model, tmp_path / "base")
    arch, base = support.open_checkpoint(directory)
    layers = {kind: tuple(range(arch.num_layers)) for kind in LINEARS if kind != "attn/kv_einsum"}
    spec = support.full_spec(arch, rank=8, alpha=16.0, layers=layers)
    optimizer = support.optimizer_config("adamw", RATE, weight_decay=DECAY)
    trainer = support.Trainer(arch, base, spec, support.make_mesh(), optimizer)
    start = {path: np.asarray(array) for path, array in trainer.state.adapters.items()}
    save_peft_adapter(tmp_path / "start", start, spec, support.FAMILY, arch, str(directory))

    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "start"), is_trainable=True)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(a.size for a in start.values())
    rule = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    ours, reference = [], []
    for step in range(NUM_STEPS):
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
