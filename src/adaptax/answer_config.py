"""Names, types, docs and checks of the keys that tell how answers are generated and scored. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Optional

from adaptax.schema import knob, one_of

METRICS = ("exact_match", "regex", "json", "numeric")


@dataclass
class GenerationConfig:
    """How answers are generated (``conf/generation``)."""

    max_new_tokens: int = knob("An answer is cut after so many tokens.", minimum=1)
    temperature: float = knob("Divides the logits before a token is drawn; 0 takes the most likely one.", minimum=0)
    top_k: Optional[int] = knob("Draw among the so many most likely tokens; null: all.", minimum=1)
    top_p: Optional[float] = knob(
        "Draw among the most likely tokens that together reach this probability; null: all.", above=0, maximum=1
    )
    min_p: Optional[float] = knob(
        "Draw among tokens at least this share as likely as the most likely one; null: all.", minimum=0, maximum=1
    )
    seed: int = knob("Seed of drawing.", minimum=0, maximum=2**32 - 1)
    batch_size: int = knob("Prompts of a file that are answered at once.", minimum=1)


@dataclass
class EvaluationConfig:
    """How answers are scored (``conf/evaluation``); the loss is always told."""

    metric: Any = knob(
        "How generated answers are scored: ``exact_match``, ``regex``, ``json`` (equal as JSON values) or ``numeric`` "
        "(equal last numbers), or a list of these; null: none is generated."
    )
    pattern: Optional[str] = knob("Of ``regex``: a regular expression that a right answer holds.")
    tolerance: float = knob("Of ``numeric``: how far the numbers may be apart, as a share of the expected.", minimum=0)
    num_rows: Optional[int] = knob("Rows that answers are generated for, from the first; null: all.", minimum=1)
    num_samples: int = knob(
        "Held-out rows answered at every evaluation of a training, in the log and in TensorBoard; 0: none.", minimum=0
    )


def metrics_of(evaluation: EvaluationConfig) -> list[str]:
    """How generated answers are scored."""
    metric = evaluation.metric
    return [] if metric is None else [metric] if isinstance(metric, str) else list(metric)


def check_metric(evaluation: EvaluationConfig) -> list[str]:
    """What is wrong with the metrics that are asked for."""
    if not isinstance(evaluation.metric, (str, list, type(None))):
        return [f"evaluation.metric must be one of {', '.join(METRICS)}, or a list of them, not {evaluation.metric!r}"]
    names = metrics_of(evaluation)
    wrong = [f"evaluation.metric={name}: {one_of(str(name), METRICS)}" for name in names if name not in METRICS]
    if "regex" in names and evaluation.pattern is None:
        wrong.append("evaluation.metric=regex needs evaluation.pattern, a regular expression")
    try:
        re.compile(evaluation.pattern if isinstance(evaluation.pattern, str) else "")
    except re.error as error:
        wrong.append(f"evaluation.pattern={evaluation.pattern!r} is not a regular expression: {error}")
    return wrong
