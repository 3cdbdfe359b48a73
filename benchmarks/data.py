"""How fast rows become tokens and tokens batches, beside sentencepiece alone; and what a large file costs to open.

    python benchmarks/data.py --rows 60000 --large-gib 5

writes synthetic chats of lognormal length to a temporary folder and prints a JSON line for each measurement.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import grain  # noqa: E402, F401  (importing it is not what is measured)
import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402

from adaptax.data.pipeline import BatchSource, Dataset, choose_lengths, load_data  # noqa: E402
from adaptax.data.sources import open_rows  # noqa: E402
from adaptax.data.tokenizer import Tokenizer  # noqa: E402
from adaptax.models import ASSETS  # noqa: E402
from rows import data_config  # noqa: E402

LENGTH, BATCH = 1024, 8


def write_chats(path: Path, num_rows: int) -> None:
    """Rows of words out of the shipped dataset; their number is lognormal (mu 4.2, sigma 0.8), at most 600."""
    rng = random.Random(0)
    rows = [json.loads(line) for line in (ASSETS / "home" / "train.jsonl").open()]
    words = " ".join(message["content"] for row in rows for message in row["messages"]).split()
    with path.open("w") as file:
        for _ in range(num_rows):
            n = min(600, int(rng.lognormvariate(4.2, 0.8)) + 2)
            texts = (" ".join(rng.choices(words, k=n // 3 + 1)), " ".join(rng.choices(words, k=n - n // 3)))
            roles = ("user", "assistant")
            row = {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}
            file.write(json.dumps(row) + "\n")


def tell(name: str, **values: Any) -> None:
    """One measurement."""
    print(json.dumps({"what": name} | {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}))


def measure_encoding(path: Path, cache: Path, tokenizer: Tokenizer) -> Dataset:
    """Rows to tokens, from nothing and from the cache; and sentencepiece on the bare texts, on all cores."""
    config = data_config(str(path), max_length=LENGTH, cache=True, cache_dir=str(cache))
    for name in ("encode", "open from the cache"):
        started = time.perf_counter()
        data, _ = load_data(config, tokenizer)
        seconds = time.perf_counter() - started
        tell(name, seconds=seconds, mtok_per_second=data.num_tokens / seconds / 1e6)
    texts = [message["content"] for line in path.open() for message in json.loads(line)["messages"]]
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    started = time.perf_counter()
    num_tokens = sum(map(len, model.encode(texts, num_threads=os.cpu_count())))
    seconds = time.perf_counter() - started
    tell("sentencepiece alone", seconds=seconds, mtok_per_second=num_tokens / seconds / 1e6)
    return data


def make_source(data: Dataset, packing: bool) -> BatchSource:
    """Batches as a run would have them."""
    config = data_config(None, max_length=LENGTH, packing=packing, length_buckets=4)
    buckets = choose_lengths(config, data)
    return BatchSource(
        data, num_micro=1, batch_size=BATCH, buckets=buckets, packing=packing, shuffle=config.shuffle, seed=0
    )


def measure_serving(data: Dataset, packing: bool) -> None:
    """A pass over the data, and restarts at random places."""
    started = time.perf_counter()
    source = make_source(data, packing)
    planned = time.perf_counter() - started
    started = time.perf_counter()
    num_tokens = sum(int((b["segments"] > 0).sum()) for b in source.iterate(0, source.steps_per_epoch, prefetch=2))
    seconds = time.perf_counter() - started
    restarts = []
    for k in random.Random(0).sample(range(source.steps_per_epoch), 20):
        digest = hashlib.sha256(b"".join(array.tobytes() for array in source[k].values())).hexdigest()
        started = time.perf_counter()
        batch = next(make_source(data, packing).iterate(k, k + 1, prefetch=2))
        restarts.append(time.perf_counter() - started)
        assert hashlib.sha256(b"".join(array.tobytes() for array in batch.values())).hexdigest() == digest
    tell(
        "serve packed" if packing else "serve in buckets",
        mtok_per_second=num_tokens / seconds / 1e6,
        full=source.efficiency,
        lengths=source.lengths,
        plan_seconds=planned,
        slowest_of_20_restarts_seconds=max(restarts),
    )


def measure_large(path: Path, gib: float, source: Path) -> None:
    """Opens a file of so many GiB, and reads 2,000 rows of it at random."""
    lines = source.read_bytes()
    with path.open("wb") as file:
        while file.tell() < gib * 2**30:
            file.write(lines)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    rows = open_rows(str(path))
    opened = time.perf_counter() - started
    started = time.perf_counter()
    for i in np.random.default_rng(0).integers(0, len(rows), 2000).tolist():
        assert "messages" in rows[i]
    tell(
        "large JSONL",
        gib=path.stat().st_size / 2**30,
        rows=len(rows),
        open_seconds=opened,
        rows_per_second=2000 / (time.perf_counter() - started),
        peak_growth_mib=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    )


def main() -> None:
    """Every measurement, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--large-gib", type=float, default=0.0, help="0 leaves this measurement out")
    options = parser.parse_args()
    tokenizer = Tokenizer(ASSETS / "gemma3_tiny" / "tokenizer.model")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chats.jsonl"
        write_chats(path, options.rows)
        if options.large_gib:
            measure_large(Path(folder) / "large.jsonl", options.large_gib, path)
        data = measure_encoding(path, Path(folder) / "cache", tokenizer)
        for packing in (True, False):
            measure_serving(data, packing)


if __name__ == "__main__":
    main()
