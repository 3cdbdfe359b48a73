"""Generation against transformers (and PEFT) in one process, the two sides in turn: greedy tokens per second.

    python benchmarks/generation.py --size 270m --out docs/advanced/benchmarks

Random weights in bfloat16, prompts of the same length, every answer as long as asked for; the time of the prompt is in
it. Both sides answer once before, which compiles what is to be compiled. Rates are of the median round, ratios those of
the rounds. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from against_peers import write_checkpoint
from peer_report import describe_machine

from adaptax.config import ModelConfig
from adaptax.export import save_peft_adapter
from adaptax.generate import Generator
from adaptax.lora import LoraSpec, build_model, init_adapters
from adaptax.mesh import build_mesh
from adaptax.models import find_architecture, find_family
from adaptax.step import Program
from adaptax.weights import describe_weights, load_weights, take_apart

RANK = 32
HEADER = ["dtype", "adapter", "rows", "adaptax (tokens/s)", "transformers (tokens/s)", "ratio"]
Answer = Callable[[list[list[int]], int], Any]


def build_ours(directory: Path, adapter: Path, dtype: str, *, is_adapted: bool) -> Answer:
    """adaptax; writes the adapter too, which has a B that is not zero."""
    family, mesh = find_family("gemma3"), build_mesh([[1, 1], ["fsdp", "tp"]])
    config = ModelConfig(**(dict.fromkeys(ModelConfig.__dataclass_fields__) | {"model_family": "gemma3"}))  # type: ignore[arg-type]
    config.model_size, config.weights = "auto", str(directory)
    arch = find_architecture(config, directory)
    spec = LoraSpec({kind: tuple(range(arch.num_layers)) for kind in family.checkpoint.LINEARS}, RANK, float(RANK))
    adapters = init_adapters(family, arch, spec, mesh, 0)
    keys = jax.random.split(jax.random.key(1), len(adapters))
    for key, path in zip(keys, adapters, strict=True):
        if path.endswith("_b"):
            adapters[path] = 0.01 * jax.random.normal(key, adapters[path].shape)
    host = {path: np.asarray(array) for path, array in adapters.items()}
    save_peft_adapter(adapter, host, spec, family, arch, str(directory))
    kind = jnp.dtype(dtype)
    described = describe_weights(directory, arch, family.checkpoint, mesh, kind)
    base = dict(load_weights(directory, arch, family.checkpoint, described, seed=0))
    base = take_apart(base, kind)
    used = spec if is_adapted else None
    program = Program(build_model(family, arch, used, mesh, train=False, remat="none"), used, kind, mesh)
    generator, given = Generator(program, arch), adapters if is_adapted else {}
    return lambda prompts, count: generator.answer(base, given, prompts, count)


def build_theirs(directory: Path, adapter: Path, dtype: str, *, is_adapted: bool) -> Answer:
    """transformers, with the adapter by PEFT, which is not merged on either side."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    if is_adapted:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    model.generation_config.eos_token_id = None

    def answer(prompts: list[list[int]], count: int) -> Any:
        with torch.no_grad():
            tokens = torch.tensor(prompts)
            return model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False
            )

    return answer


def measure(sides: Sequence[Answer], prompts: list[list[int]], count: int, rounds: int) -> list[list[float]]:
    """Seconds of each side, round by round; each has answered once before."""
    seconds = []
    for side in sides:
        side(prompts, count)
    for _ in range(rounds):
        row = []
        for side in sides:
            started = time.monotonic()
            side(prompts, count)
            row.append(time.monotonic() - started)
        seconds.append(row)
    return seconds


def main() -> None:
    """A row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270m", choices=("270m", "1b"))
    parser.add_argument("--checkpoint", help="written and deleted when absent")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=200, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the table")
    options = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as place:
        directory = Path(options.checkpoint or Path(place, "checkpoint"))
        if not options.checkpoint:
            write_checkpoint(options.size, directory)
        for dtype in options.dtypes:
            for is_adapted in (False, True):
                builders = (build_ours, build_theirs)
                sides = [build(directory, Path(place, "adapter"), dtype, is_adapted=is_adapted) for build in builders]
                for num_rows in options.rows:
                    what = [dtype, f"rank {RANK}" if is_adapted else "none", str(num_rows)]
                    table.append([*what, *compare(sides, num_rows, options)])
                    print(dict(zip(HEADER, table[-1], strict=True)), flush=True)
    if options.out:
        write_table(options, table)


def compare(sides: Sequence[Answer], num_rows: int, options: argparse.Namespace) -> list[str]:
    """The cells of a row: both rates, their ratio, and the first answers."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(300, 200_000, (num_rows, options.prompt)).tolist()
    assert all(len(answer) == options.new for answer in sides[0](prompts, options.new)), "an answer ended early"
    seconds = measure(sides, prompts, options.new, options.rounds)
    tokens = num_rows * options.new
    rates = [f"{tokens / statistics.median(column):.1f}" for column in zip(*seconds, strict=True)]
    ratios = sorted(theirs / ours for ours, theirs in seconds)
    return [*rates, f"{ratios[0]:.2f} to {ratios[-1]:.2f}"]


def write_table(options: argparse.Namespace, table: list[list[str]]) -> None:
    """As reStructuredText, with the command and the machine."""
    command = f"python benchmarks/generation.py --size {options.size} --prompt {options.prompt} --new {options.new}"
    command += (
        f" --rows {' '.join(map(str, options.rows))} --dtypes {' '.join(options.dtypes)} --rounds {options.rounds}"
    )
    lines = [".. code-block:: bash", "", f"   {command} --out docs/advanced/benchmarks", "", describe_machine(), ""]
    lines += [".. list-table::", "   :header-rows: 1", ""]
    for row in (HEADER, *table):
        lines += [f"   {'-' if i else '* -'} {cell}".replace("   - ", "     - ", 1) for i, cell in enumerate(row)]
    (options.out / f"generation_{options.size}.rst").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
