"""What every side of ``against_peers.py`` is given; needs numpy alone, as each runs in an environment of its own."""

from __future__ import annotations

import argparse

import numpy as np


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all sides have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--checkpoint", "--rows"):
        parser.add_argument(name, required=True)
    for name in ("--batch", "--length", "--rank", "--steps"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def read_rows(path: str) -> dict[str, np.ndarray]:
    """``tokens`` of all rows end to end, the ``mask`` of those that are trained, and where each row ``ends``."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
