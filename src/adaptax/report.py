"""What a run tells of itself: what is adapted, what it costs, what it learned."""

from __future__ import annotations

import io
import itertools
import logging
import math
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaptax.config import ModelConfig
from adaptax.lora import LoraSpec
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
    total = sum(math.prod(sizes[a] for a in axes) for axes in family.checkpoint.parameter_axes(arch).values())
    axes = {kind: family.checkpoint.adapter_axes(arch, kind) for kind in spec.layers}
    trainable = {kind: spec.total_rank(kind) * sum(size for _, size in axes[kind]) for kind in spec.layers}
    table = Table(title=Text(f"{config.model_family} {config.model_size}, adapters at {config.lora_module_path}"))
    for column in ("module kind", "layers", "rank", "scale", "trainable"):
        table.add_column(column, justify="left" if column == "module kind" else "right")
    ranks, alphas, scales = (
        {kind: [number_of(kind, layer) for layer in layers] for kind, layers in spec.layers.items()}
        for number_of in (spec.rank_of, spec.alpha_of, spec.scale_of)
    )
    for kind, layers in spec.layers.items():
        place = f"{len(layers)} of {arch.num_layers}"
        table.add_row(kind, place, _span(ranks[kind]), _span(scales[kind]), f"{trainable[kind]:,}")
    count = sum(trainable.values())
    rank, alpha, scale = (_span(itertools.chain(*numbers.values())) for numbers in (ranks, alphas, scales))
    table.caption = (
        f"rank {rank}, alpha {alpha} (scale {scale}); "
        f"{count:,} trainable beside {total:,} frozen parameters ({count / (count + total):.2%})"
    )
    log_table(table)
    if not all(4 <= number <= 128 for number in itertools.chain(*ranks.values())):
        log.warning("model.lora_rank=%s is outside the usual 4 to 128", rank)
    is_chosen = spec.use_rslora or config.lora_alpha_pattern or config.init_adapter
    if scale != "1" and not is_chosen:
        log.warning(
            "updates are scaled by lora_alpha / lora_rank = %s; model.lora_alpha=null keeps alpha at the rank", scale
        )


def _span(numbers: Iterable[float]) -> str:
    """``8``, or ``4 to 16``."""
    numbers = sorted(numbers)
    return " to ".join(dict.fromkeys(f"{number:g}" for number in (numbers[0], numbers[-1])))


def show_answers(prompts: Sequence[str], expected: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    """A few held-out answers side by side: expected, before and after training."""
    table = Table(title="held-out rows", show_lines=True)
    for column in ("request", "expected", "before", "after"):
        table.add_column(column, overflow="fold")
    for row in zip(prompts, expected, before, after, strict=True):
        table.add_row(*map(Text, row))
    log_table(table)
