"""Optimizers and learning-rate schedules: one function and one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from adaptax.config import OptimizerConfig, ScheduleConfig, UserError


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    b1, b2, eps = _need(config, "beta1"), _need(config, "beta2"), _need(config, "eps")
    return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=config.weight_decay)


def _lion(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(schedule, b1=_need(config, "beta1"), b2=_need(config, "beta2"), weight_decay=config.weight_decay)


def _adafactor(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    # Without relative step sizes: B starts at zero, and a step relative to its size would never leave it.
    rule = optax.adafactor(None, multiply_by_parameter_scale=False, momentum=config.momentum or None)
    return optax.chain(  # adafactor has turned the sign already
        per_layer(rule), optax.add_decayed_weights(-config.weight_decay), optax.scale_by_schedule(schedule)
    )


def _sgd(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    momentum = optax.trace(config.momentum) if config.momentum else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(momentum, decay, optax.scale_by_learning_rate(schedule))


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "sgd": _sgd,
}

SCHEDULES: dict[str, Callable[[float, float, int], optax.Schedule]] = {  # (peak, final, steps) after warm-up
    "constant": lambda peak, final, steps: optax.constant_schedule(peak),
    "linear": optax.linear_schedule,
    "cosine": lambda peak, final, steps: optax.cosine_decay_schedule(peak, steps, alpha=final / peak),
}


def build_schedule(config: ScheduleConfig, learning_rate: float, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then the named shape down to its final share at the end."""
    if config.warmup_steps >= num_steps and config.warmup_steps > 0:
        raise UserError(f"schedule.warmup_steps={config.warmup_steps} must be less than the run's {num_steps} steps")
    steps = num_steps - config.warmup_steps
    main = SCHEDULES[config.name](learning_rate, learning_rate * config.final_fraction, steps)
    if config.warmup_steps == 0:
        return main
    # Step k of the warm-up runs at (k + 1) / warmup of the peak: no step is spent at a rate of zero.
    warmup = optax.linear_schedule(learning_rate / config.warmup_steps, learning_rate, config.warmup_steps - 1)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def build_optimizer(
    config: OptimizerConfig, schedule_config: ScheduleConfig, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The update rule behind clipping by global norm, and its learning rate by step: that of A, where B has another."""
    schedule = build_schedule(schedule_config, config.learning_rate, num_steps)
    rule = OPTIMIZERS[config.name](config, schedule)
    limit = config.max_grad_norm
    clip = optax.identity() if limit is None else optax.clip_by_global_norm(limit)
    ratio = config.loraplus_lr_ratio or 1.0
    boost = () if ratio == 1.0 else (_scale_b(ratio),)
    return optax.chain(clip, rule, *boost), schedule  # the same state with and without clipping


def _scale_b(ratio: float) -> optax.GradientTransformation:
    """LoRA+ (arXiv 2402.12354): B learns at a multiple of the rate. Updates, decay too, are proportional to it."""

    def scale(updates: Any, params: Any) -> Any:
        return {path: update * ratio if path.endswith("_lora_b") else update for path, update in updates.items()}

    return optax.stateless(scale)


def per_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a rule to every layer of every stacked array by itself, as if they had never been stacked."""

    def init(params: Any) -> Any:
        return jax.tree.map(jax.vmap(rule.init), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(updates)
        states, arrays = tree.flatten_up_to(state), tree.flatten_up_to(params)
        done = [jax.vmap(rule.update)(g, s, p) for g, s, p in zip(leaves, states, arrays, strict=True)]
        return tree.unflatten([u for u, _ in done]), tree.unflatten([s for _, s in done])

    return optax.GradientTransformation(init, update)


def _need(config: OptimizerConfig, key: str) -> float:
    value = getattr(config, key)
    if value is None:
        raise UserError(f"optimizer.{key} must be a number for optimizer.name={config.name}, not null")
    return value
