"""Makes the golden files of the tests: ``python tests/golden.py`` (needs the parity extra).

``golden/text`` and ``golden/multimodal`` hold a tiny checkpoint written by transformers, tokens, and the logits that
transformers computes for them in float32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import checkpoints

FOLDER = Path(__file__).parent / "golden"
SMALL = {"vocab_size": 192, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "query_pre_attn_scalar": 8}
BUILDERS = {
    "text": lambda: checkpoints.build_text_model(**SMALL),
    "multimodal": lambda: checkpoints.build_multimodal_model(**SMALL),
}


def main() -> None:
    """Writes the files; the weights' seed is 0, the tokens' too."""
    import torch

    for name, build in BUILDERS.items():
        model = build()
        checkpoints.save(model, FOLDER / name)
        tokens = np.random.default_rng(0).integers(4, 180, (2, 24))  # three windows long
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(tokens)).logits.numpy()
        np.savez_compressed(FOLDER / name / "logits.npz", tokens=tokens, logits=logits)


if __name__ == "__main__":
    main()
