"""Has a step become slower? The working tree against a commit, in turn, in about a minute.

    python benchmarks/step.py --against HEAD~1

trains the shipped model on the shipped rows for a few steps with the run_training.py of each, compiling anew; prints
medians and the ratio of the two, pair by pair. Further arguments are overrides for both:

    python benchmarks/step.py --against main -- model=gemma3_270m model.weights=random training.micro_batch_size=1

Ends with exit code 1 where the median ratio of the step's seconds is above --limit.
"""

from __future__ import annotations

import argparse
import io
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from processes import time_process

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["model=gemma3_tiny", "data=home", "data.eval=null", "data.eval_fraction=0", "training.micro_batch_size=16"]
KEYS += ["training.compile_cache_gib=0", "checkpoint.every_minutes=null", "logging.plot=false"]
FIGURES = ("step", "compilation", "to the first step", "peak memory")


def unpack(commit: str, folder: Path) -> Path:
    """The tree of a commit."""
    done = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"--against {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def measure(tree: Path, overrides: list[str], num_steps: int, folder: Path) -> tuple[float, ...]:
    """Seconds of a step, to compile, and to the first step; GiB at most."""
    command = [sys.executable, str(tree / "run_training.py"), *KEYS, f"training.num_batches={num_steps}", *overrides]
    timed = time_process([*command, f"hydra.run.dir={folder / 'run'}"], folder, folder / "run" / "metrics.jsonl")
    if timed.status or len(timed.rows) < num_steps:
        raise SystemExit(f"{tree}: {(timed.said.strip().splitlines() or ['the run failed'])[-1]}")
    compiled = re.findall(r"steps compiled in ([\d.]+) s", timed.said)  # of each policy tried
    step = statistics.median(timed.seconds[1:])
    return step, sum(map(float, compiled)), timed.first_seconds, timed.peak_gib


def main() -> None:
    """Both trees in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="HEAD", help="a commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each run, at least 2")
    parser.add_argument("--limit", type=float, default=1.1)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    rounds: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    with tempfile.TemporaryDirectory() as place:
        earlier = unpack(options.against, Path(place, "tree"))
        for _ in range(options.rounds):
            pair = []
            for tree in (earlier, ROOT):
                with tempfile.TemporaryDirectory(dir=place) as folder:
                    pair.append(measure(tree, options.overrides, options.steps, Path(folder)))
            rounds.append((pair[0], pair[1]))
    for k, name in enumerate(FIGURES):
        before, after = (statistics.median(pair[side][k] for pair in rounds) for side in (0, 1))
        ratios = sorted(now[k] / then[k] for then, now in rounds)
        unit = "GiB" if name == "peak memory" else "s"
        spread = f"{statistics.median(ratios):.3f} of it ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{name:18} {options.against} {before:.3f} {unit}, working tree {after:.3f} {unit}: {spread}")
    if statistics.median(now[0] / then[0] for then, now in rounds) > options.limit:
        sys.exit(1)


if __name__ == "__main__":
    main()
