import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxwm import optim
from jaxwm.config import from_dict, to_dict, unchecked
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


def test_warmup_starts_at_zero_and_ends_at_the_rate():
    ramp = optim.warmup(2.0, 10)
    rates = [float(ramp(count)) for count in (0, 1, 5, 10, 1000)]
    np.testing.assert_allclose(rates, [0, 0.2, 1, 2, 2], rtol=1e-6)
    assert rates[0] == 0
    assert float(optim.warmup(2.0, 0)(0)) == 2
    with pytest.raises(JaxwmError, match="steps=-1"):
        optim.warmup(2.0, -1)


def test_the_config_spells_the_arguments_of_laprop():
    optimizer = optim.laprop(**vars(optim.OptimConfig(learning_rate=1.0)))
    updates, _ = optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["kernel"], [[0.0, 0.0]])  # warmup is on


@pytest.mark.parametrize("own", [0, 4])
def test_laprop_follows_a_schedule_after_its_warmup(own):
    # 0, 0.25, 0.5, 0.75, 1 of 2.0, half-way down (1 + 0.1) / 2 of it, and a tenth for good.
    rate = optim.Schedule(2.0, 0.2, warmup=own, updates=8)
    optimizer = optim.laprop(rate, warmup_steps=4 - own)
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    sizes = []
    for _ in range(10):
        updates, state = update(GRADS[0], state, PARAMS)
        sizes.append(float(updates["kernel"][0, 1]))
    expected = [0, 0.5, 1, 1.5, 2, 1.55, 1.1, 0.65, 0.2, 0.2]
    np.testing.assert_allclose(sizes, expected, rtol=1e-4, atol=1e-7)


def test_the_state_of_laprop_has_the_same_tree_with_and_without_a_schedule():
    trees = [
        jax.tree.structure(optim.laprop(rate, steps).init(PARAMS))
        for rate in (1.0, optim.Schedule(1.0, 0.1, updates=9))
        for steps in (0, 5)
    ]
    assert all(tree == trees[0] for tree in trees)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(optim.laprop().init(PARAMS))
    ]
    moments = [f"1/{kind}/{name}" for kind in ("square", "momentum") for name in ("bias", "kernel")]
    assert names == ["1/count", *moments, "2/count"]  # as in checkpoints


COUNTS = (0, 1, 5, 10, 15, 20, 30, 99)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        # Up in 10 updates, then 20 more: half-way (2 + 0.2) / 2 at 20.
        (("linear", 10, 30), (0, 0.2, 1, 2, 1.55, 1.1, 0.2, 0.2)),
        (("linear", 0, 20), (2, 1.91, 1.55, 1.1, 0.65, 0.2, 0.2, 0.2)),
        # 1.1 + 0.9 * cos(pi * p) with p = 1/4, 1/2, 1.
        (("cosine", 10, 30), (0, 0.2, 1, 2, 1.1 + 0.9 * np.sqrt(0.5), 1.1, 0.2, 0.2)),
        # Half of the way from 2 to 0.2 in 10 updates: 0.2 + 1.8 / 2^p.
        (
            ("exponential", 0, 10),
            [0.2 + 1.8 * 0.5 ** (count / 10) for count in COUNTS],
        ),
    ],
)
def test_schedules_worked_by_hand(schedule, values):
    number = optim.Schedule(2.0, 0.2, *schedule)
    follow = jax.jit(lambda count: optim.value_at(number, count))
    got = [follow(count) for count in COUNTS]
    np.testing.assert_allclose(got, values, rtol=1e-6, atol=1e-7)
    assert got[3].dtype == jnp.float32


def test_schedules_equal_those_of_optax():
    counts = range(40)
    cosine = optax.warmup_cosine_decay_schedule(0.0, 3.0, 10, 30, end_value=0.3)
    linear = optax.join_schedules(
        [optax.linear_schedule(0, 3.0, 10), optax.linear_schedule(3.0, 0.3, 20)], [10]
    )
    for shape, theirs in (("cosine", cosine), ("linear", linear)):
        number = optim.Schedule(3.0, 0.3, shape, 10, 30)
        ours = [optim.value_at(number, count) for count in counts]
        np.testing.assert_allclose(ours, [theirs(count) for count in counts], rtol=1e-6, atol=1e-7)


def test_a_constant_is_returned_as_it_is():
    assert optim.value_at(0.3, 7) == 0.3
    traced = jax.jit(lambda x, count: optim.value_at(x, count))
    assert traced(jnp.float32(0.3), 7) == np.float32(0.3)


@dataclasses.dataclass(frozen=True)
class Outer:
    optim: optim.OptimConfig
    weight: optim.Number
    size: int = 3


def test_a_schedule_learns_how_long_the_run_is():
    whole, part = optim.Schedule(1.0, 0.1), optim.Schedule(0.0, 1.0, updates=7)
    config = Outer(optim.OptimConfig(whole, warmup_steps=10), part)
    known = optim.resolve(config, 100)
    assert known.optim.learning_rate == optim.Schedule(1.0, 0.1, updates=100)
    assert known.weight == part and known.size == 3 and known.optim.warmup_steps == 10
    assert config.optim.learning_rate.updates == 0  # what is stored stays as it was
    # Two updates are less than this warmup.
    assert optim.resolve(optim.Schedule(1.0, 0.1, warmup=5), 2).updates == 6
    with pytest.raises(JaxwmError, match=r"linear:1.0:0.1:0:0 lasts as long as the run.*resolve"):
        optim.value_at(whole, 3)
    # A run that is over in the warmup of the optimiser has nothing to fall from.
    short = optim.laprop(**vars(optim.resolve(config, 3).optim))
    state = short.init(PARAMS)
    for _ in range(3):
        updates, state = short.update(GRADS[0], state, PARAMS)
    np.testing.assert_allclose(updates["kernel"], [[-0.2, 0.2]], rtol=1e-5)


def test_members_with_schedules_of_their_own_equal_a_loop():
    def rate(start, end, count):
        config = unchecked(optim.Schedule(1.0, 1.0, "cosine", 3), start=start, end=end)
        return optim.value_at(optim.resolve(Outer(optim.OptimConfig(), config), 9).weight, count)

    starts, ends = jnp.asarray([1.0, 2.0]), jnp.asarray([0.5, 0.0])
    together = jax.jit(jax.vmap(rate, (0, 0, None)))(starts, ends, 5)
    alone = [
        optim.value_at(optim.Schedule(s, e, "cosine", 3, 9), 5) for s, e in ((1.0, 0.5), (2.0, 0.0))
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: optim.Schedule(float("nan"), 1.0), "Schedule.start is nan; it must be finite"),
        (lambda: optim.Schedule(1.0, 0.1, warmup=-1), "Schedule.warmup is -1"),
        (
            lambda: optim.Schedule(1.0, 0.1, warmup=10, updates=10),
            "updates is 10.*more than the 10",
        ),
        (
            lambda: optim.Schedule(1.0, 0.1, updates=2**31),
            "updates is 2147483648; it must be below",
        ),
        (
            lambda: optim.OptimConfig(optim.Schedule(1.0, 0.1, updates=5), warmup_steps=10),
            "lasts 5 updates.*more than the 10 of warmup_steps",
        ),
        (lambda: optim.OptimConfig(optim.Schedule(1.0, -0.1)), "learning_rate is linear:1.0:-0.1"),
        (lambda: optim.AdamConfig(optim.Schedule(0.0, 0.0)), "it must be positive"),
        (lambda: optim.AdamConfig(clip=-1.0), "AdamConfig.clip is -1.0; it must be at least 0"),
        (lambda: optim.AdamConfig(weight_decay=1.0), "weight_decay is 1.0; it must be below 1"),
        (lambda: optim.AdamConfig(beta1=1.0), "AdamConfig.beta1 is 1.0; it must lie in 0"),
        (lambda: optim.AdamConfig(eps=0.0), "AdamConfig.eps is 0.0; it must be positive"),
        (
            lambda: optim.numbers_at_least(
                Outer(optim.OptimConfig(), optim.Schedule(0.0, -1.0)), 0, "weight"
            ),
            "Outer.weight is linear:0.0:-1.0:0:0; it must be at least 0",
        ),
    ],
)
def test_senseless_numbers_are_refused(make, told):
    with pytest.raises(JaxwmError, match=told):
        make()


@pytest.mark.parametrize(
    "number",
    [3e-4, optim.Schedule(1e-3, 1e-5, "cosine", 10, 500), optim.Schedule(0.1, 0.25)],
)
def test_a_number_survives_text_and_json(number):
    assert optim.parse_number(str(number)) == number
    config = optim.OptimConfig(number, warmup_steps=5)
    assert from_dict(optim.OptimConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    "text", ["fast", "linear:1", "round:1:2", "linear:1:2:3:4:5", "linear:1:x"]
)
def test_a_word_that_is_no_number_is_refused(text):
    with pytest.raises(ValueError):
        optim.parse_number(text)


def test_clipping_by_the_global_norm_worked_by_hand():
    grads = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([[12.0]])}  # norm 13
    for clip, factor in ((6.5, 0.5), (13.0, 1.0), (100.0, 1.0), (0.0, 1.0)):
        clipper = optim.clip_by_global_norm(clip)
        got, _ = clipper.update(grads, clipper.init(grads), grads)
        np.testing.assert_allclose(got["a"], [3 * factor, 4 * factor], rtol=1e-6)
        np.testing.assert_allclose(got["b"], [[12 * factor]], rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, grads)
    clipper = optim.clip_by_global_norm(0.0)
    assert not clipper.update(zero, clipper.init(zero), zero)[0]["a"].any()


def test_clipping_counts_the_parts_that_other_devices_hold():
    # Each tensor's sum of squares is four times that of the part here: the norm is 26.
    clipper = optim.clip_by_global_norm(
        13.0, lambda tree: jax.tree.map(lambda x: 4 * x, optim.square_sums(tree))
    )
    grads = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([[12.0]])}
    got, _ = clipper.update(grads, clipper.init(grads), grads)
    np.testing.assert_allclose(got["b"], [[6.0]], rtol=1e-6)


def test_adam_worked_by_hand():
    # First step: m = 0.1 * g, v = 0.001 * g^2, so the update is
    # sqrt(0.001) / 0.1 * 0.1 * g / (sqrt(0.001) * |g| + eps) = g / (|g| + eps / sqrt(0.001)).
    optimizer = optim.adam_tf(0.5, clip=0.0, weight_decay=0.25, eps=1e-3)
    params = {"w": jnp.asarray([4.0, 8.0])}
    grads = {"w": jnp.asarray([1.0, -0.01])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    hat = 1e-3 / np.sqrt(0.001)
    steps = [1 / (1 + hat), -0.01 / (0.01 + hat)]
    # A quarter of every parameter goes, whatever the learning rate.
    expected = [-0.25 * 4 - 0.5 * steps[0], -0.25 * 8 - 0.5 * steps[1]]
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


def test_adam_is_that_of_optax_with_a_larger_epsilon():
    eps, beta2 = 1e-3, 0.99
    ours = optim.scale_by_adam_tf(0.9, beta2, eps)
    state, moments = ours.init(PARAMS), optax.scale_by_adam().init(PARAMS)
    for t, gradient in enumerate(GRADS, start=1):
        theirs = optax.scale_by_adam(0.9, beta2, eps / np.sqrt(1 - beta2**t))
        got, state = ours.update(gradient, state, PARAMS)
        want, moments = theirs.update(gradient, moments, PARAMS)
        for name in PARAMS:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-7)


def test_adam_follows_a_schedule():
    optimizer = optim.adam_tf(optim.Schedule(1.0, 0.0, updates=2), clip=0.0, eps=1e-30)
    state, sizes = optimizer.init(PARAMS), []
    for _ in range(4):
        updates, state = optimizer.update(GRADS[0], state, PARAMS)
        sizes.append(float(updates["kernel"][0, 1]))
    np.testing.assert_allclose(sizes, [1, 0.5, 0, 0], rtol=1e-4)


TREE = {
    "model": {"core": {"kernel": jnp.asarray([3.0])}, "scale": jnp.asarray([4.0])},
    "behavior": {"policy": {"bias": jnp.asarray([1.0])}, "value": {"bias": jnp.asarray([2.0])}},
}


def test_groups_have_optimisers_of_their_own():
    optimizer = optim.grouped(
        {
            "model": optax.chain(optim.clip_by_global_norm(1.0), optax.scale(-1.0)),
            "behavior/policy": optax.trace(0.5),
            "behavior/value": optim.decay_weights(0.5),
        }
    )
    state = optimizer.init(TREE)
    assert state.keys() == {"model", "behavior/policy", "behavior/value"}
    update = jax.jit(optimizer.update)
    for policy in (1.0, 1.5, 1.75):
        updates, state = update(TREE, state, TREE)
        # The norm of the model alone is 5.
        np.testing.assert_allclose(updates["model"]["core"]["kernel"], [-0.6], rtol=1e-6)
        np.testing.assert_allclose(updates["model"]["scale"], [-0.8], rtol=1e-6)
        np.testing.assert_allclose(updates["behavior"]["policy"]["bias"], [policy])
        np.testing.assert_allclose(updates["behavior"]["value"]["bias"], [1.0])
    assert jax.tree.structure(updates) == jax.tree.structure(TREE)


def test_norms_of_a_group_ask_for_its_tensors_by_their_paths():
    asked = []

    def squares(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        asked.extend(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
        return optim.square_sums(tree)

    optimizer = optim.grouped(
        {"model": optim.adam_tf(square_sums=squares), "behavior": optax.scale(1.0)}
    )
    optimizer.update(TREE, optimizer.init(TREE), TREE)
    assert sorted(asked) == ["model/core/kernel", "model/scale"]


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        (("model", "behavior/policy"), r"behavior/value/bias belongs to no group; every parameter"),
        (("model", "behavior", "behavior/value"), "belongs to behavior and behavior/value"),
        (("model", "behavior", "critic"), "No parameter belongs to the group critic"),
        (("mode", "behavior"), "model/core/kernel belongs to no group"),  # whole names only
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, told):
    optimizer = optim.grouped(dict.fromkeys(groups, optax.scale(1.0)))
    with pytest.raises(JaxwmError, match=told):
        optimizer.init(TREE)


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


def test_the_first_move_of_a_slow_copy_can_be_a_copy():
    copy = optim.slow_copy(rate=0.5, every=2, first=1.0)
    state = copy.init({"w": jnp.asarray(0.0)})
    seen = []
    for value in (4.0, 6.0, 8.0):
        state = copy.update(state, {"w": jnp.asarray(value)})
        seen.append(float(state.params["w"]))
    assert seen == [4, 4, 6]


def test_slow_copy_shares_no_memory_with_the_parameters():
    # Donating a train state that holds one buffer twice is an error.
    params = {"w": jnp.ones(3)}
    state = optim.slow_copy().init(params)
    assert state.params["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()


@pytest.mark.parametrize("wrong", [{"rate": 1.5}, {"rate": -0.1}, {"every": 0}])
def test_slow_copy_refuses_senseless_numbers(wrong):
    with pytest.raises(JaxwmError, match=r"rate in \[0, 1\] and every >= 1"):
        optim.slow_copy(**wrong)


def test_clipped_adam_is_that_of_optax():
    theirs = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-5))
    ours = optim.clipped_adam(0.5)
    grads = {"a": jnp.asarray([3.0, -4.0]), "b": jnp.asarray([[1e-3]])}
    state, other = ours.init(grads), theirs.init(grads)
    for scale in (1.0, 1e-2, -3.0):
        scaled = jax.tree.map(lambda g, s=scale: s * g, grads)
        change, state = ours.update(scaled, state)
        want, other = theirs.update(scaled, other)
        got = jax.tree.map(lambda x: -1e-2 * x, change)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), got, want)


def test_annealed_optimisers_end_at_a_tenth_and_the_others_stay():
    pair = optim.AdamConfig(2e-3), optim.AdamConfig(1e-3)
    Both = dataclasses.make_dataclass("Both", ["one", "other"], frozen=True)
    got = optim.annealed(Both(*pair), "one")
    assert got.one.learning_rate == optim.Schedule(2e-3, 0.1 * 2e-3) and got.other == pair[1]
    assert optim.annealed(Both(*pair)) == Both(*pair)
