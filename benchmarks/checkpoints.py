"""What a checkpoint costs the training: seconds that a step waits for it, and steps that run while it is written.

    python benchmarks/checkpoints.py --size 270m --batch 1 --length 512 --rank 32

trains a published size with random weights, every other step followed by a save, and prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import support  # noqa: E402
from adaptax.checkpoint import Saver, Writer  # noqa: E402
from adaptax.config import CheckpointConfig  # noqa: E402
from adaptax.export import save_peft_adapter  # noqa: E402
from adaptax.manifest import read_checkpoint  # noqa: E402
from adaptax.models.gemma3_weights import SIZES  # noqa: E402
from adaptax.progress import Progress  # noqa: E402
from adaptax.run_folder import RunFolder  # noqa: E402

DEFAULT_SECONDS = 600.0  # checkpoint.every_minutes


def measure(options: argparse.Namespace, folder: RunFolder) -> dict[str, float]:
    """Medians over the saves, in seconds; the first save and the first step are left out."""
    arch, mesh = SIZES[options.size], support.make_mesh()
    base, spec = support.load(None, arch, mesh), support.full_spec(arch, options.rank, options.rank)
    trainer = support.Trainer(arch, base, spec, mesh)
    batch = support.random_batch(1000, (1, options.batch, options.length))

    def save_adapter(adapters: dict[str, np.ndarray], directory: Path) -> None:
        save_peft_adapter(directory, adapters, spec, support.FAMILY, arch, "random")

    config = CheckpointConfig(every_steps=2, every_minutes=None, keep=2, resume="auto", grace_seconds=30.0)
    saver = Saver(folder, config, Writer({}, dict, save_adapter), trainer.state)
    stalls, quiet, beside, writes = [], [], [], []
    for step in range(2 * options.saves + 2):
        started = time.monotonic()
        trainer.run(batch)
        (quiet if step % 2 else beside).append(time.monotonic() - started)
        if step % 2 == 0:
            saver.wait()  # the next step is a quiet one
            continue
        stalls.append(saver.save(step + 1, trainer.state, Progress()))
        if step == 2 * options.saves + 1:
            started = time.monotonic()
            saver.wait()
            writes.append(time.monotonic() - started)
    saver.close()
    path = folder.checkpoints / f"step_{2 * options.saves + 2:08d}"
    assert saver.failure is None
    assert read_checkpoint(path).step == 2 * options.saves + 2
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    step_seconds, stall = statistics.median(quiet[1:]), statistics.median(stalls[1:])
    return {
        "step_seconds": step_seconds,
        "step_seconds_while_writing": statistics.median(beside[1:]),
        "stall_seconds": stall,
        "stall_share_of_a_step": stall / step_seconds,
        "stall_share_every_ten_minutes": stall / DEFAULT_SECONDS,
        "write_seconds": writes[0],
        "checkpoint_mib": size / 2**20,
    }


def main() -> None:
    """Reads the options, prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270m", choices=sorted(SIZES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--saves", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = measure(options, RunFolder(Path(place)))
    print(json.dumps({"size": options.size, "jax": jax.__version__} | {k: round(v, 4) for k, v in result.items()}))


if __name__ == "__main__":
    main()
