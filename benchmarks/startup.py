"""From the start of the process to the end of the first step: with nothing compiled before, and again with the cache.

    python benchmarks/startup.py --size 270m

One sequence of 512 tokens, rank 32, random weights in bfloat16 that are written to a checkpoint first; each start is
a process of its own. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path

from against_peers import Case, our_command, write_checkpoint, write_rows
from processes import time_process

CASE = Case.parse("1x512")


def main() -> None:
    """A line for each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270m", choices=("270m", "1b"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--warm", type=int, default=2, help="starts with the cache, behind one without")
    parser.add_argument("--checkpoint", help="written and deleted when absent")
    options = parser.parse_args()
    options.steps, options.pythons = 3, {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if not options.checkpoint:
            options.checkpoint = str(folder / "checkpoint")
            write_checkpoint(options.size, Path(options.checkpoint))
        rows = write_rows(CASE, folder, options.steps)
        for dtype in options.dtypes:
            os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{dtype}")
            extra = [f"model.dtype={dtype}", "training.compile_cache_gib=1"]
            for start in ("cold", *["warm"] * options.warm):
                with tempfile.TemporaryDirectory(dir=place) as out:
                    run = Path(out, "run")
                    command = our_command(options, CASE, 32, rows, run, extra)
                    timed = time_process(command, Path(out), run / "metrics.jsonl")
                if timed.status:
                    raise SystemExit(timed.said)
                compiled = re.findall(r"steps compiled in ([\d.]+) s", timed.said)  # of each policy tried
                seconds = f"{timed.first_seconds:.1f} s, of which {timed.seconds[-1]:.1f} s are the step's"
                print(f"{dtype} {start}: {seconds}; compilation {sum(map(float, compiled)):.1f} s", flush=True)


if __name__ == "__main__":
    main()
