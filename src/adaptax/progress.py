"""What a run remembers of its losses: windows, the best evaluation, when to stop early. Saved with every checkpoint."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

WINDOW, MIN_WINDOW = 50, 20  # losses that a spike is told from
SPIKE_DEVIATIONS = 8.0  # of the window's median absolute deviation
SPIKE_NATS = 0.5  # what is less above the median is no spike


@dataclass
class Progress:
    """Losses so far. A plain record: ``Progress(**dataclasses.asdict(progress))`` is the same."""

    losses: list[float] = field(default_factory=list)  # the last finite training losses
    train_loss: float | None = None  # of the last step that was finite
    eval_step: int | None = None  # of the last evaluation
    eval_loss: float | None = None
    best_step: int | None = None  # after step 0; the lowest evaluation loss
    best_loss: float | None = None
    reference_loss: float | None = None  # the last loss that was better by early stopping's minimum
    num_worse: int = 0  # evaluations since
    nonfinite_in_row: int = 0  # steps skipped in a row, up to the last one

    def add_loss(self, loss: float) -> float | None:
        """Notes the loss of a step; where it is a spike, returns the median that it stands out from."""
        if not math.isfinite(loss):
            return None
        spike = None
        if len(self.losses) >= MIN_WINDOW:
            median = statistics.median(self.losses)
            deviation = statistics.median(abs(value - median) for value in self.losses)
            if loss - median > max(SPIKE_DEVIATIONS * deviation, SPIKE_NATS):
                spike = median
        self.losses = [*self.losses, loss][-WINDOW:]
        self.train_loss = loss
        return spike

    def add_evaluation(self, step: int, loss: float | None, min_delta: float) -> bool:
        """Notes an evaluation; returns whether it is the best one yet. A loss that is not finite never is."""
        self.eval_step, self.eval_loss = step, loss
        if loss is None or step == 0:
            return False
        if math.isfinite(loss) and (self.reference_loss is None or loss < self.reference_loss - min_delta):
            self.reference_loss, self.num_worse = loss, 0
        else:
            self.num_worse += 1
        is_best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if is_best:
            self.best_step, self.best_loss = step, loss
        return is_best

    def is_exhausted(self, patience: int | None) -> bool:
        """Whether early stopping ends the run."""
        return patience is not None and self.num_worse >= patience

    @property
    def final_loss(self) -> float:
        """What the run is judged by: the last evaluation loss, or training loss where nothing is held out."""
        losses = (loss for loss in (self.eval_loss, self.train_loss) if loss is not None)
        return next(losses, math.nan)

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return dataclasses.asdict(self)
