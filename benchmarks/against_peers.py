"""adaptax and other trainers in turn: the same checkpoint, tokens and settings, each as a process of its own.

    python benchmarks/against_peers.py --size 270m --cases 1x512 4x512 --sides adaptax peft peft-bf16 --rounds 2

adaptax runs as its users run it, through run_training.py, compiling anew; the others as ``benchmarks/peers`` says. A
case BxT is B sequences of T tokens, all trained. BxT-chats is chats of lognormal length (median T/4, at most T), of
which about 30% is trained: adaptax packs them into B sequences a step, the others take B chats a step, padded to the
longest of them; sides with ``-sorted`` behind their names get chats of like length together. Every step is timed from
outside, the first apart. ``--out`` writes a table (.rst), the measurements (.json) and a picture (.png) there. A side
that runs in another environment is given its interpreter: ``--python tunix=/path/to/python``. On a GPU or TPU, memory
is the device's peak. The sides ``peft-liger`` and ``unsloth`` need CUDA. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from peer_report import write_report  # noqa: E402
from processes import time_process  # noqa: E402

from adaptax.data.pipeline import load_data  # noqa: E402
from adaptax.data.tokenizer import Tokenizer, open_tokenizer  # noqa: E402
from adaptax.models import ASSETS  # noqa: E402
from rows import data_config  # noqa: E402
from small_runs import make_config  # noqa: E402

PEFT, TUNIX = "peft_side.py", "tunix_side.py"
SIDES: dict[str, list[str]] = {
    "adaptax": [],
    "adaptax-bf16": ["model.dtype=bfloat16"],
    "peft": [PEFT],
    "peft-eager": [PEFT, "--attention", "eager"],
    "peft-compiled": [PEFT, "--compile"],
    "peft-bf16": [PEFT, "--dtype", "bfloat16"],
    "peft-bf16-compiled": [PEFT, "--dtype", "bfloat16", "--compile"],
    "peft-liger": [PEFT, "--dtype", "bfloat16", "--library", "liger"],
    "unsloth": [PEFT, "--dtype", "bfloat16", "--library", "unsloth"],
    "tunix": [TUNIX],
    "tunix-bf16": [TUNIX, "--dtype", "bfloat16"],
}
SHARE_TRAINED, SIGMA = 0.3, 0.8
MODULES = ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum"


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and rows of a comparison."""

    name: str
    batch: int
    length: int
    is_chats: bool

    @classmethod
    def parse(cls, text: str) -> Case:
        """Of ``4x512`` or ``4x512-chats``."""
        match = re.fullmatch(r"(\d+)x(\d+)(-chats)?", text)
        if not match:
            raise SystemExit(f"--cases {text}: must be like 4x512 or 4x512-chats")
        return cls(text, int(match[1]), int(match[2]), bool(match[3]))


@dataclasses.dataclass
class Measured:
    """What one process took."""

    side: str
    case: str
    rank: int
    trained: list[int] = dataclasses.field(default_factory=list)  # tokens of each step
    seconds: list[float] = dataclasses.field(default_factory=list)  # of each step
    losses: list[float] = dataclasses.field(default_factory=list)
    first_seconds: float = 0.0  # from the start of the process to the end of the first step
    compile_seconds: float | None = None
    peak_gib: float = 0.0  # of the device where it is told, else of the process
    failure: str | None = None


def write_rows(case: Case, folder: Path, num_steps: int) -> Path:
    """Rows of words out of the shipped dataset, as adaptax reads them: more than the steps take."""
    rng, path = random.Random(0), folder / "rows.jsonl"
    source = [json.loads(line) for line in (ASSETS / "home" / "train.jsonl").read_text().splitlines()]
    words = " ".join(message["content"] for row in source for message in row["messages"]).split()
    lines = []
    for _ in range(case.batch * num_steps * (8 if case.is_chats else 1)):
        if not case.is_chats:
            lines.append({"text": " ".join(rng.choices(words, k=case.length))})
            continue
        n = max(4, int(rng.lognormvariate(np.log(case.length / 4 / 1.6), SIGMA)))  # 1.6 tokens a word
        answer = max(1, round(SHARE_TRAINED * n))
        texts = " ".join(rng.choices(words, k=n - answer)), " ".join(rng.choices(words, k=answer))
        lines.append(
            {"messages": [{"role": r, "content": t} for r, t in zip(("user", "assistant"), texts, strict=True)]}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def encode_rows(case: Case, path: Path, tokenizer: Tokenizer, *, is_sorted: bool) -> Path:
    """The same tokens for the others: all rows end to end, where each ends, and which tokens are trained."""
    data, _ = load_data(data_config(str(path), max_length=case.length, cache=False), tokenizer)
    examples = sorted(data.examples, key=lambda e: len(e.tokens)) if is_sorted else list(data.examples)
    if is_sorted:  # batches of like length, in an order of their own
        batches = [examples[k : k + case.batch] for k in range(0, len(examples), case.batch)]
        random.Random(0).shuffle(batches)
        examples = [example for batch in batches for example in batch]
    out = path.with_name("sorted.npz" if is_sorted else "rows.npz")
    lengths = [len(e.tokens) for e in examples]
    mask = np.concatenate([e.is_trained for e in examples])
    mask[np.cumsum([0, *lengths[:-1]])] = False  # nothing stands before the first token
    np.savez(out, tokens=np.concatenate([e.tokens for e in examples]), mask=mask, ends=np.cumsum(lengths))
    return out


def count_trained(rows: Path, case: Case, num_steps: int) -> list[int]:
    """Trained tokens of each step of the others."""
    arrays = np.load(rows, allow_pickle=False)
    ends = np.concatenate([[0], arrays["ends"]])
    return [int(arrays["mask"][ends[k * case.batch] : ends[(k + 1) * case.batch]].sum()) for k in range(num_steps)]


def our_command(
    options: argparse.Namespace, case: Case, rank: int, rows: Path, out: Path, extra: list[str]
) -> list[str]:
    """A run as a user starts it, with nothing to hold out, to save on the way or to keep compiled."""
    keys = [f"model=gemma3_{options.size}", f"model.weights={options.checkpoint}", f"model.lora_rank={rank}"]
    keys += [f"model.lora_alpha={rank}", f"data.train={rows}", "data.eval_fraction=0", f"data.max_length={case.length}"]
    keys += ["data.cache=false", "training.compile_cache_gib=0", f"training.micro_batch_size={case.batch}"]
    keys += [f"training.num_batches={options.steps}", "optimizer.learning_rate=1e-3", "optimizer.weight_decay=0"]
    keys += ["schedule=constant", "schedule.warmup_steps=0", "checkpoint.every_minutes=null", "logging.plot=false"]
    keys += [f"hydra.run.dir={out}", *extra]
    if not case.is_chats:
        keys += ["data.packing=false", "data.shuffle=false", "data.length_buckets=1"]
    return [options.pythons.get("adaptax", sys.executable), str(ROOT / "run_training.py"), *keys]


def build_command(options: argparse.Namespace, case: Case, rank: int, side: str, rows: Path, out: Path) -> list[str]:
    """The process of a side."""
    name = side.partition("-sorted")[0]
    if name.startswith("adaptax"):
        return our_command(options, case, rank, rows, out, SIDES[name])
    script, *extra = SIDES[name]
    values = {"checkpoint": options.checkpoint, "rows": rows, "batch": case.batch, "length": case.length}
    values |= {"rank": rank, "steps": options.steps}
    flags = [text for key, value in values.items() for text in (f"--{key}", str(value))]
    python = options.pythons.get(name, options.pythons.get(name.split("-")[0], sys.executable))
    return [python, str(PEERS / script), *flags, *extra]


def measure(options: argparse.Namespace, case: Case, rank: int, side: str, rows: Path, folder: Path) -> Measured:
    """Runs one side once."""
    ours = side.startswith("adaptax")
    command = build_command(options, case, rank, side, rows, folder / "run")
    timed = time_process(command, folder, folder / "run" / "metrics.jsonl" if ours else None)
    result = Measured(side, case.name, rank, seconds=timed.seconds, peak_gib=timed.peak_gib)
    if timed.status or len(timed.rows) < options.steps:
        last = (timed.said.strip().splitlines() or ["it failed"])[-1]
        is_killed = os.WIFSIGNALED(timed.status) and os.WTERMSIG(timed.status) == signal.SIGKILL
        result.failure = "out of memory" if is_killed or "allocate memory" in last else last
        return result
    result.first_seconds = timed.first_seconds
    result.peak_gib = timed.device_gib or timed.peak_gib
    if ours:
        measured = re.search(r"measured peak ([\d.]+) (G|M)iB on a device", timed.said)
        if measured:
            result.peak_gib = float(measured[1]) / (1 if measured[2] == "G" else 1024)
        result.losses = [row["train_loss"] for row in timed.rows]
        result.trained = [int(row["train_supervised_tokens"]) for row in timed.rows]
        told = re.findall(r"steps compiled in ([\d.]+) s", timed.said)  # of each policy tried
        result.compile_seconds = sum(map(float, told)) or None
    else:
        result.losses = [row["loss"] for row in timed.rows]
        result.trained = count_trained(rows, case, options.steps)
        result.compile_seconds = timed.seconds[0] - statistics.median(timed.seconds[1:])
    return result


def compare(options: argparse.Namespace, folder: Path) -> Iterator[Measured]:
    """Every case and rank: all sides in turn, as often as is asked for."""
    tokenizer = open_tokenizer(
        make_config(folder, {"model.weights": options.checkpoint}), Path(options.checkpoint), 262144
    )
    for case in map(Case.parse, options.cases):
        place = folder / case.name
        place.mkdir()
        rows = write_rows(case, place, options.steps)
        encoded = {is_sorted: encode_rows(case, rows, tokenizer, is_sorted=is_sorted) for is_sorted in (False, True)}
        for rank in options.ranks:
            for _ in range(options.rounds):
                for side in options.sides:
                    given = rows if side.startswith("adaptax") else encoded[side.endswith("-sorted")]
                    with tempfile.TemporaryDirectory(dir=folder) as out:
                        yield measure(options, case, rank, side, given, Path(out))


def write_checkpoint(size: str, directory: Path) -> None:
    """A random checkpoint of a published size in bfloat16, written by transformers, with the shipped tokenizer."""
    import torch

    import checkpoints
    from adaptax.models.gemma3_weights import SIZES

    arch = dataclasses.asdict(SIZES[size])
    names = {"vocab_size": "vocab_size", "hidden_size": "embed_dim", "intermediate_size": "mlp_dim"}
    names |= {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "head_dim": "head_dim"}
    names |= {"num_key_value_heads": "num_kv_heads", "sliding_window": "sliding_window"}
    numbers = {theirs: arch[ours] for theirs, ours in names.items()}
    model = checkpoints.build_text_model(query_pre_attn_scalar=256, **numbers).to(torch.bfloat16)
    checkpoints.save(model, directory)
    shutil.copy(ASSETS / "gemma3_tiny" / "tokenizer.model", directory)


def show_command(options: argparse.Namespace) -> str:
    """The command that measures the same elsewhere: a checkpoint of one's own is the one that is written otherwise."""
    values: dict[str, list[Any]] = {"size": [options.size], "cases": options.cases, "sides": options.sides}
    values |= {"ranks": options.ranks, "steps": [options.steps], "rounds": [options.rounds]}
    words = ["python", "benchmarks/against_peers.py"]
    for name, of_name in values.items():
        words += [f"--{name}", *map(str, of_name)]
    if options.pythons:
        words += ["--python", *(f"{name}=.venv-{name}/bin/python" for name in options.pythons)]
    return shlex.join([*words, "--out", str(options.out)])


def main() -> None:
    """All cases, or a single side's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270m", choices=("270m", "1b"))
    parser.add_argument("--cases", nargs="+", default=["1x512", "4x512", "4x512-chats"])
    parser.add_argument("--sides", nargs="+", default=["adaptax", "peft", "peft-bf16"], help=" ".join(SIDES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[32])
    parser.add_argument("--steps", type=int, default=4, help="of each process, at least 2")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--checkpoint", help="written and deleted when absent")
    parser.add_argument("--python", nargs="*", default=[], metavar="NAME=PATH", help="interpreters of the sides")
    parser.add_argument("--out", type=Path, help="PATH.rst, PATH.json and PATH.png are written")
    options = parser.parse_args()
    options.pythons = dict(pair.split("=", 1) for pair in options.python)
    unknown = [side for side in options.sides if side.partition("-sorted")[0] not in SIDES]
    if unknown or options.steps < 2:
        parser.error(f"--sides {unknown[0]}: not one of {' '.join(SIDES)}" if unknown else "--steps must be at least 2")
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # all compile anew
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        if not options.checkpoint:
            options.checkpoint = str(Path(folder, "checkpoint"))
            write_checkpoint(options.size, Path(options.checkpoint))
        for result in compare(options, Path(folder)):
            measured.append(result)
            print(json.dumps(dataclasses.asdict(result)), flush=True)
            if options.out:  # what is there so far: a long comparison may be cut short
                write_report(options.out, options.size, measured, show_command(options))


if __name__ == "__main__":
    main()
