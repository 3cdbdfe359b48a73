"""Moments in a run at which a test kills it. Each waits until its moment has come, or the run has ended."""

from __future__ import annotations

import random
import time

from adaptax.manifest import name_step
from adaptax.run_folder import RunFolder
from started import EVERY, NUM_STEPS, Started, newest_step


def in_start_up(run: Started, folder: RunFolder, rng: random.Random) -> None:
    time.sleep(rng.uniform(0, 2))


def in_compilation(run: Started, folder: RunFolder, rng: random.Random) -> None:
    run.see("rows to train")
    time.sleep(rng.uniform(0, 1))


def in_restoring(run: Started, folder: RunFolder, rng: random.Random) -> None:
    run.see("resumed from|start-up took")
    time.sleep(rng.uniform(0, 0.3))


def in_evaluation(run: Started, folder: RunFolder, rng: random.Random) -> None:
    step = next_step(folder, rng)
    run.see(rf"\nstep {min(step + -step % EVERY, NUM_STEPS)}/")
    time.sleep(rng.uniform(0, 0.03))


def in_training(run: Started, folder: RunFolder, rng: random.Random) -> None:
    run.see(rf"\nstep {next_step(folder, rng)}/")
    time.sleep(rng.uniform(0, 0.05))


def in_save(run: Started, folder: RunFolder, rng: random.Random) -> None:
    step = next_step(folder, rng)
    run.wait_until(lambda: any(path.stem >= name_step(step) for path in folder.checkpoints.glob("*.partial")))
    time.sleep(rng.choice([0, rng.uniform(0, 0.1)]))


def in_last_save(run: Started, folder: RunFolder, rng: random.Random) -> None:
    run.see(f"evaluation loss after {NUM_STEPS} steps")
    time.sleep(rng.uniform(0, 0.1))


def behind_last_save(run: Started, folder: RunFolder, rng: random.Random) -> None:
    run.wait_until((folder.checkpoints / name_step(NUM_STEPS)).exists)


def next_step(folder: RunFolder, rng: random.Random) -> int:
    """A step that is still to come, a little behind the newest checkpoint."""
    return min(newest_step(folder) + rng.randint(3, 9), NUM_STEPS)


MOMENTS = [in_start_up] * 5 + [in_compilation] * 3 + [in_restoring] * 2
MOMENTS += [in_evaluation] * 3 + [in_training] * 4 + [in_save] * 4
LAST_MOMENTS = [in_last_save, behind_last_save]
random.Random(0).shuffle(MOMENTS)
HALVES = [MOMENTS[k::2] + LAST_MOMENTS for k in range(2)]
assert sum(map(len, HALVES)) == 25

# Of two processes, and which of them are killed.
TOGETHER = [(in_start_up, [0, 1]), (in_training, [1]), (in_training, [0])]
TOGETHER += [(in_save, [0, 1]), (in_start_up, [1]), (in_evaluation, [1, 0])]
