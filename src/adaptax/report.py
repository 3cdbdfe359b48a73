"""What a run tells of itself: what is adapted, what it costs, what it learned."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaptax.config import ModelConfig
from adaptax.lora import LoraSpec, adapter_shapes
from adaptax.models import Architecture, Family

log = logging.getLogger(__name__)


def log_table(table: Table) -> None:
    """Logs a table, so that it stands in the terminal and in the log file alike."""
    out = io.StringIO()
    Console(file=out, width=110).print(table)
    log.info("\n%s", out.getvalue().rstrip())


def show_adapters(config: ModelConfig, family: Family, arch: Architecture, spec: LoraSpec) -> None:
    """The start-up table: pattern, matched modules by kind, trainable and total parameters."""
    sizes = family.checkpoint.axis_sizes(arch)
    shapes = adapter_shapes(family, arch, spec)
    total = sum(math.prod(sizes[a] for a in axes) for axes in family.checkpoint.parameter_axes(arch).values())
    trainable = {kind: 0 for kind in spec.layers}
    for path, (shape, _) in shapes.items():
        trainable[path.removeprefix("layers/").rpartition("/")[0]] += math.prod(shape)
    table = Table(title=Text(f"{config.model_family} {config.model_size}, adapters at {config.lora_module_path}"))
    for column in ("module kind", "layers", "trainable"):
        table.add_column(column, justify="left" if column == "module kind" else "right")
    for kind, layers in spec.layers.items():
        table.add_row(kind, f"{len(layers)} of {arch.num_layers}", f"{trainable[kind]:,}")
    count = sum(trainable.values())
    table.caption = (
        f"rank {spec.rank}, alpha {spec.alpha:g} (scale {spec.alpha / spec.rank:g}); "
        f"{count:,} trainable beside {total:,} frozen parameters ({count / (count + total):.2%})"
    )
    log_table(table)
    if not 4 <= spec.rank <= 128:
        log.warning("model.lora_rank=%d is outside the usual 4 to 128", spec.rank)
    if spec.alpha != spec.rank:
        log.warning(
            "updates are scaled by lora_alpha / lora_rank = %g; model.lora_alpha=null keeps alpha at the rank",
            spec.alpha / spec.rank,
        )


def show_answers(prompts: Sequence[str], expected: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    """A few held-out answers side by side: expected, before and after training."""
    table = Table(title="held-out rows", show_lines=True)
    for column in ("request", "expected", "before", "after"):
        table.add_column(column, overflow="fold")
    for row in zip(prompts, expected, before, after, strict=True):
        table.add_row(*map(Text, row))
    log_table(table)
