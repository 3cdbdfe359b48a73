"""What ``adaptax plan`` tells of the starting points in docs/config/model.rst, on the devices of this machine.

    python benchmarks/memory.py --out docs/config

runs the command of each and writes ``memory_cpu.rst``, ``memory_gpu.rst`` or ``memory_tpu.rst`` there. Nothing is
downloaded. On CPU, devices are simulated where a mesh needs several.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "config" / "model.rst"
ROWS = ("base weights", "adapters", "optimizer", "activations and temporaries, training", "peak")
MOST_GIB = 1024  # the limit of the plans: what does not fit this machine is told too


def read_points() -> list[list[str]]:
    """The overrides of the page's starting points, but for the rows that they train on."""
    section = PAGE.read_text(encoding="utf-8").split("Starting points by GPU")[1].split("What they take")[0]
    commands = re.findall(r"python run_training.py((?:.*\\\n)*.*)", section)
    return [[word for word in shlex.split(command) if not word.startswith("data.train=")] for command in commands]


def plan(overrides: list[str], num_devices: int) -> tuple[list[str], str]:
    """(the numbers of the table, type and policy) of a configuration."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    command = [sys.executable, "-c", "from adaptax.cli import main; main()", "plan", *overrides]
    environment = os.environ | {"XLA_FLAGS": flags.strip(), "COLUMNS": "160", "PYTHONPATH": str(ROOT / "src")}
    command.append(f"training.memory_gib={MOST_GIB}")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(overrides)}: {done.stderr.strip()}")
    text = done.stdout + done.stderr
    numbers = [re.search(rf"{name} +│ +([\d.]+ [GM]iB)", text) for name in ROWS]
    how = re.search(r"(float32|bfloat16), remat (\w+)", " ".join(text.split()))
    assert all(numbers), text
    assert how, text
    return [number[1] for number in numbers if number], f"{how[1]}, {how[2]}"


def main() -> None:
    """Every starting point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    header = ["``adaptax plan``", "type, remat", "base", "adapters", "optimizer", "activations", "peak"]
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 40 12 10 10 10 10 10", ""]
    kind, versions = jax.devices()[0].device_kind, f"jax {importlib.metadata.version('jax')}"
    table = [header]
    for point in read_points():
        shape = re.search(r"\[\[(\d+),(\d+)\]", " ".join(point))
        numbers, how = plan(point, math.prod(map(int, shape.groups())) if shape else 1)
        table.append([f"``{shlex.join(point)}``", how, *numbers])
        print(*table[-1], sep="  ", flush=True)
    for row in table:
        lines += [f"   {'* -' if k == 0 else '  -'} {text}" for k, text in enumerate(row)]
    command = "   python benchmarks/memory.py --out docs/config"
    head = [
        ".. code-block:: bash",
        "",
        command,
        "",
        f"On each device, {kind}, {versions}; 1,024 tokens a sequence:",
        "",
    ]
    path = options.out / f"memory_{jax.default_backend()}.rst"
    path.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
