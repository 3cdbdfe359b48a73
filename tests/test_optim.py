"""Update rules and schedules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import support
from adaptax.config import ScheduleConfig, UserError
from adaptax.optim import build_optimizer, build_schedule

CONSTANT = ScheduleConfig("constant", 0, 1.0)
PARAMS = {"a": jnp.linspace(-1, 1, 3 * 4 * 2).reshape(3, 4, 2), "b": jnp.ones((5, 2, 3))}
GRADS = jax.tree.map(lambda p: jnp.cos(3 * p), PARAMS)


def one_update(name: str, **changes: float) -> dict[str, jax.Array]:
    rule, _ = build_optimizer(support.optimizer_config(name, 0.1, **changes), CONSTANT, 10)
    updates, _ = rule.update(GRADS, rule.init(PARAMS), PARAMS)
    return updates


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_a_step_goes_against_the_gradient_and_decay_shrinks_by_rate_times_decay(name: str) -> None:
    plain, decayed = one_update(name, beta2=0.99), one_update(name, beta2=0.99, weight_decay=0.5)
    for path in PARAMS:
        assert (np.sign(plain[path]) == -np.sign(GRADS[path])).all()
        np.testing.assert_allclose(decayed[path] - plain[path], -0.1 * 0.5 * PARAMS[path], atol=1e-6)


def test_adamw_takes_the_textbook_step() -> None:
    update = one_update("adamw")
    np.testing.assert_allclose(update["a"], -0.1 * GRADS["a"] / (jnp.abs(GRADS["a"]) + 1e-8), rtol=1e-5)


def test_adafactor_treats_every_layer_of_a_stack_by_itself() -> None:
    params = jax.random.normal(jax.random.key(0), (3, 256, 160))
    grads = jax.random.normal(jax.random.key(1), params.shape) * jnp.array([1.0, 10.0, 100.0])[:, None, None]
    rule, _ = build_optimizer(support.optimizer_config("adafactor", 0.1), CONSTANT, 10)
    stacked, _ = rule.update({"w": grads}, rule.init({"w": params}), {"w": params})
    for layer in range(3):
        alone, _ = rule.update(
            {"w": grads[layer][None]}, rule.init({"w": params[layer][None]}), {"w": params[layer][None]}
        )
        np.testing.assert_allclose(stacked["w"][layer], alone["w"][0], rtol=1e-5)


ADAPTERS = {"layers/mlp/up_proj/w_lora_a": PARAMS["a"], "layers/mlp/up_proj/w_lora_b": PARAMS["b"]}
ADAPTER_GRADS = dict(zip(ADAPTERS, GRADS.values(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_b_learns_at_a_multiple_of_the_rate_decay_included(name: str) -> None:
    def update(ratio: float | None) -> tuple[dict[str, jax.Array], optax.OptState]:
        config = support.optimizer_config(name, 0.1, weight_decay=0.5, loraplus_lr_ratio=ratio)
        rule, _ = build_optimizer(config, CONSTANT, 10)
        return rule.update(ADAPTER_GRADS, rule.init(ADAPTERS), ADAPTERS)

    plain, state = update(None)
    same, same_state = update(1.0)
    faster, _ = update(16.0)
    assert jax.tree.structure(state) == jax.tree.structure(same_state)
    for path, factor in zip(ADAPTERS, (1.0, 16.0), strict=True):
        np.testing.assert_array_equal(plain[path], same[path])
        np.testing.assert_array_equal(faster[path], factor * plain[path])


@pytest.mark.parametrize("shape", [(2, 8, 4), (2, 160, 256)])  # adafactor factors from 128 on
@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd"])
def test_what_is_zero_and_has_no_gradient_stays_zero(name: str, shape: tuple[int, ...]) -> None:
    """As the rows of B beyond a module's rank."""
    config = support.optimizer_config(name, 0.1, weight_decay=0.5, momentum=0.9, loraplus_lr_ratio=16.0)
    rule, _ = build_optimizer(config, CONSTANT, 10)
    is_used = np.arange(shape[1])[:, None] < np.array([3, shape[1]])[:, None, None]
    params = {"w_lora_b": jnp.zeros(shape)}
    state = rule.init(params)
    for step in range(3):
        grads = {"w_lora_b": jax.random.normal(jax.random.key(step), shape) * is_used * 10.0**step}
        updates, state = rule.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(np.asarray(params["w_lora_b"]) != 0, np.broadcast_to(is_used, shape))


def test_a_multiple_of_the_rate_is_a_parameter_group_of_torch() -> None:
    torch = pytest.importorskip("torch")
    config = support.optimizer_config("adamw", 0.01, weight_decay=0.3, loraplus_lr_ratio=16.0)
    rule, _ = build_optimizer(config, CONSTANT, 10)
    ours, state = ADAPTERS, rule.init(ADAPTERS)
    theirs = [torch.tensor(np.array(array), requires_grad=True) for array in ADAPTERS.values()]
    groups = [{"params": [p], "lr": 0.01 * ratio} for p, ratio in zip(theirs, (1, 16), strict=True)]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.3)
    for step in range(5):
        grads = {path: jnp.sin(grad + step) for path, grad in ADAPTER_GRADS.items()}
        updates, state = rule.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for parameter, grad in zip(theirs, grads.values(), strict=True):
            parameter.grad = torch.tensor(np.array(grad))
        reference.step()
    for array, parameter in zip(ours.values(), theirs, strict=True):
        np.testing.assert_allclose(array, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 24: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 14: 0.55, 24: 0.1}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 14: 0.55, 24: 0.1}),
    ],
)
def test_the_rate_warms_up_and_ends_at_its_final_share(name: str, expected: dict[int, float]) -> None:
    schedule = build_schedule(ScheduleConfig(name, 4, 0.1), 2.0, 24)
    for step, share in expected.items():
        assert float(schedule(step)) == pytest.approx(2.0 * share, rel=1e-5), step


def test_cosine_follows_optax_without_warm_up() -> None:
    schedule = build_schedule(ScheduleConfig("cosine", 0, 0.0), 1.0, 50)
    reference = optax.cosine_decay_schedule(1.0, 50)
    assert [float(schedule(k)) for k in range(51)] == [float(reference(k)) for k in range(51)]


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(UserError, match="warmup_steps=10 must be less than the run's 10 steps"):
        build_schedule(ScheduleConfig("cosine", 10, 0.0), 1.0, 10)


def test_a_rule_that_lacks_its_number_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"optimizer\.beta2 must be a number for optimizer\.name=adamw"):
        build_optimizer(support.optimizer_config(beta2=None), CONSTANT, 10)
