import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxwm import optim
from jaxwm.types import JaxwmError

PARAMS = {"kernel": jnp.asarray([[3.0, 4.0]]), "bias": jnp.zeros(2)}
GRADS = [
    {"kernel": jnp.asarray([[1.0, -2.0]]), "bias": jnp.asarray([1e-6, 0.0])},
    {"kernel": jnp.asarray([[30.0, 40.0]]), "bias": jnp.asarray([3.0, -4.0])},
    {"kernel": jnp.asarray([[0.0, 0.5]]), "bias": jnp.asarray([0.0, 0.0])},
]


def test_global_norm_worked_by_hand():
    # sqrt(3^2 + 4^2 + 12^2) = 13
    assert optim.global_norm({"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([[12.0]])}) == 13
    assert optim.global_norm({}) == 0


def test_clip_worked_by_hand():
    clip = optim.adaptive_grad_clip(0.3, 1e-3)
    got, _ = clip.update(GRADS[1], clip.init(PARAMS), PARAMS)
    # The kernel has norm 5 and its gradient 50: at most 1.5 is left, in the same direction.
    np.testing.assert_allclose(got["kernel"], [[0.9, 1.2]], rtol=1e-6)
    # The bias has norm 0, taken as 1e-3: at most 3e-4 of 5 is left.
    np.testing.assert_allclose(got["bias"], [1.8e-4, -2.4e-4], rtol=1e-6)
    small, _ = clip.update(GRADS[2], clip.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(small["kernel"], GRADS[2]["kernel"])


def _reference(grads, lr, steps, agc=0.3, beta1=0.9, beta2=0.999, eps=1e-20):
    """The whole optimiser in float64, entry by entry; yields parameters."""
    params = {k: np.asarray(v, np.float64) for k, v in PARAMS.items()}
    square, momentum = ({k: 0 * p for k, p in params.items()} for _ in range(2))
    for t, gradient in enumerate(grads, start=1):
        for k, p in params.items():
            g = np.asarray(gradient[k], np.float64)
            g = g / max(1, np.linalg.norm(g) / (agc * max(1e-3, np.linalg.norm(p))))
            square[k] = beta2 * square[k] + (1 - beta2) * g**2
            unit = g / (np.sqrt(square[k] / (1 - beta2**t)) + eps)
            momentum[k] = beta1 * momentum[k] + (1 - beta1) * unit
            rate = lr * min(1, (t - 1) / steps) if steps else lr
            params[k] = p - rate * momentum[k] / (1 - beta1**t)
        yield dict(params)


@pytest.mark.parametrize("steps", [0, 2])
def test_laprop_equals_a_float64_reference(steps):
    optimizer = optim.laprop(learning_rate=0.1, warmup_steps=steps)
    update = jax.jit(optimizer.update)
    params, state = PARAMS, optimizer.init(PARAMS)
    for gradient, expected in zip(GRADS, _reference(GRADS, 0.1, steps), strict=True):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for name, want in expected.items():
            # 1 - 0.999^t in float32 is off by up to 4e-5.
            np.testing.assert_allclose(params[name], want, rtol=1e-5, atol=5e-6)


def test_the_first_step_has_the_size_of_the_learning_rate():
    # m / (1 - b1) = g / |g|, so every entry with a gradient moves by one learning rate.
    optimizer = optim.laprop(learning_rate=0.01, warmup_steps=0)
    updates, _ = optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["kernel"], [[-0.01, 0.01]], rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], [-0.01, 0.0], rtol=1e-5)


def test_annealing_falls_to_a_tenth():
    fall = optim.warmup(2.0, 10, 30)
    # Half-way up, at the top, half-way down (1 + 0.1) / 2 of 2, at the end and beyond it.
    np.testing.assert_allclose([fall(n) for n in (5, 10, 20, 30, 99)], [1, 2, 1.1, 0.2, 0.2])
    assert float(optim.warmup(2.0, 0, 4)(0)) == 2
    with pytest.raises(JaxwmError, match="steps=10, anneal_steps=10"):
        optim.warmup(2.0, 10, 10)
    with pytest.raises(JaxwmError, match=r"anneal_steps is 5.* more than the 10"):
        optim.OptimConfig(warmup_steps=10, anneal_steps=5)


def test_warmup_starts_at_zero_and_ends_at_the_rate():
    ramp = optim.warmup(2.0, 10)
    rates = [float(ramp(count)) for count in (0, 1, 5, 10, 1000)]
    np.testing.assert_allclose(rates, [0, 0.2, 1, 2, 2], rtol=1e-6)
    assert rates[0] == 0
    assert float(optim.warmup(2.0, 0)(0)) == 2
    with pytest.raises(JaxwmError, match="steps=-1"):
        optim.warmup(2.0, -1)


def test_the_config_spells_the_arguments_of_laprop():
    optimizer = optim.laprop(**dataclasses.asdict(optim.OptimConfig(learning_rate=1.0)))
    updates, _ = optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["kernel"], [[0.0, 0.0]])  # warmup is on


def test_a_schedule_is_used_as_it_is():
    optimizer = optim.laprop(lambda count: 0.5 + count)
    state = optimizer.init(PARAMS)
    for size in (0.5, 1.5):
        updates, state = optimizer.update(GRADS[0], state, PARAMS)
        np.testing.assert_allclose(updates["kernel"], [[-size, size]], rtol=1e-5)


def test_seeds_with_their_own_learning_rates_equal_a_loop():
    def train(learning_rate, scale):
        optimizer = optim.laprop(learning_rate, warmup_steps=2)
        params = jax.tree.map(lambda p: scale * p, PARAMS)
        state = optimizer.init(params)
        for gradient in GRADS:
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    rates, scales = jnp.asarray([0.1, 0.2]), jnp.asarray([1.0, 3.0])
    together = jax.jit(jax.vmap(train))(rates, scales)
    for seed in range(2):
        alone = jax.jit(train)(rates[seed], scales[seed])
        for name in PARAMS:
            np.testing.assert_allclose(together[name][seed], alone[name], rtol=1e-6, atol=1e-7)


def test_slow_copy_worked_by_hand():
    copy = optim.slow_copy(rate=0.25)
    state = copy.init({"w": jnp.asarray([4.0])})
    # 0.75 * 4 + 0.25 * 8 = 5, then 0.75 * 5 + 0.25 * 1 = 4
    for fast, slow in ((8.0, 5.0), (1.0, 4.0)):
        state = copy.update(state, {"w": jnp.asarray([fast])})
        np.testing.assert_allclose(state.params["w"], [slow], rtol=1e-6)


def test_slow_copy_moves_at_every_third_update():
    copy = optim.slow_copy(rate=1.0, every=3)
    state = copy.init({"w": jnp.asarray(0.0)})
    seen = []
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        state = copy.update(state, {"w": jnp.asarray(value)})
        seen.append(float(state.params["w"]))
    assert seen == [1, 1, 1, 4, 4]


def test_slow_copy_shares_no_memory_with_the_parameters():
    # Donating a train state that holds one buffer twice is an error.
    params = {"w": jnp.ones(3)}
    state = optim.slow_copy().init(params)
    assert state.params["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()


@pytest.mark.parametrize("wrong", [{"rate": 1.5}, {"rate": -0.1}, {"every": 0}])
def test_slow_copy_refuses_senseless_numbers(wrong):
    with pytest.raises(JaxwmError, match=r"rate in \[0, 1\] and every >= 1"):
        optim.slow_copy(**wrong)
