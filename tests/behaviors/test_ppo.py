import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import optim
from jaxwm.behaviors import ppo
from jaxwm.models.encoders import CodecConfig, encoder, flat_net
from jaxwm.types import Box, Discrete, JaxwmError, Shards, Step, Window, as_dict, zeros

SPACES = {"vector": Box((3,)), "index": Discrete(4)}
ACTIONS = {"jump": Discrete((2, 3), (2,)), "turn": Box((2,)), "wait": Discrete(3)}
SMALL = ppo.PPOConfig(heads=ppo.HeadsConfig((8,)), epochs=2, minibatches=2)
ENVS, LENGTH = 4, 6


def make(config=SMALL, obs=SPACES, action=ACTIONS, encoder=flat_net, **options) -> ppo.Agent:
    return ppo.ppo(config, obs, action, encoder(obs), **options)


def random_rows(seed: int, length: int = LENGTH + 1, envs: int = ENVS, obs=SPACES, action=ACTIONS):
    """Rows (length, envs); environment 0 ends an episode at row 2, environment 1 at row 4."""
    rng = np.random.default_rng(seed)

    def entry(space):
        if isinstance(space, Discrete):
            classes = np.broadcast_to(space.classes, (length, envs, *space.shape))
            return jnp.asarray(rng.integers(0, classes), jnp.int32)
        if space.dtype == "uint8":
            return jnp.asarray(rng.integers(0, 256, (length, envs, *space.shape)), jnp.uint8)
        return jnp.asarray(rng.normal(size=(length, envs, *space.shape)), jnp.float32)

    last = np.zeros((length, envs), bool)
    last[2, 0] = last[4, 1] = True
    first = np.concatenate([np.zeros((1, envs), bool), last[:-1]])
    terminal = last & (np.arange(envs) == 0)
    actions = {name: entry(space) for name, space in as_dict(action).items()}
    return Step(
        action=actions if isinstance(action, dict) else actions["action"],
        obs={name: entry(space) for name, space in obs.items()},
        reward=jnp.asarray(rng.normal(size=(length, envs)), jnp.float32),
        is_first=jnp.asarray(first),
        is_last=jnp.asarray(last),
        is_terminal=jnp.asarray(terminal),
    )


def acted(agent, params, rows, seed: int = 0) -> Window:
    """The window of an agent that has seen these rows: its own actions and memos."""
    length, envs = rows.is_first.shape
    carry, memos, actions = agent.initial(envs), [], [jax.tree.map(lambda x: x[0], rows.action)]
    act = jax.jit(agent.act)
    for t in range(length):
        row = jax.tree.map(lambda x, t=t: x[t], rows)
        key = jax.random.fold_in(jax.random.key(seed), t)
        carry, action, memo = act(params, carry, row, key)
        memos.append(memo)
        actions.append(action)
    stack = lambda *xs: jnp.stack(xs)  # noqa: E731
    steps = rows._replace(action=jax.tree.map(stack, *actions[:-1]))
    index = jnp.zeros((length, envs), jnp.int32)
    return Window(jax.tree.map(stack, *memos), steps, jnp.arange(envs), index)


def start(agent: ppo.Agent):
    return jax.jit(agent.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def agent():
    return make()


@pytest.fixture(scope="module")
def state(agent):
    return start(agent)


@pytest.fixture(scope="module")
def window(agent, state):
    return acted(agent, state.params, random_rows(0))


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def batch_like(**given) -> ppo.Batch:
    """A batch of which only the given parts count."""
    count = len(next(iter(given.values())))
    names = ("log_prob", "value", "advantage", "target")
    parts = {name: jnp.zeros(count) for name in names} | {"weight": jnp.ones(count)}
    parts |= {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}
    return ppo.Batch(obs={}, action=jnp.zeros(count, jnp.int32), **parts)


def test_losses_worked_by_hand():
    batch = batch_like(log_prob=[-1, -1, -1, -1, -1], value=[1, 1, 1, 1, 1], target=[3, 3, 3, 0, 0])
    ratio = np.array([1.1, 1.5, 0.5, 1.5, 0.5])
    log_prob = jnp.asarray(np.log(ratio) - 1, jnp.float32)
    value = jnp.asarray([1.1, 2.0, 0.5, 2.0, 0.5])
    advantage = jnp.asarray([2.0, 2.0, 2.0, -2.0, -2.0])
    each = ppo.clipped_losses(log_prob, value, advantage, batch, clip=0.2, value_clip=0.3)
    # A > 0: the gain is A times the smaller of ratio and 1.2. A < 0: of ratio and 0.8 the larger.
    np.testing.assert_allclose(each["policy"], [-2.2, -2.4, -1.0, 3.0, 1.6], rtol=1e-6)
    # Values within 0.3 of 1: 1.1, 1.3, 0.7, 1.3, 0.7. The larger error counts:
    # 1.9^2, max(1, 1.7)^2, max(2.5, 2.3)^2, max(2, 1.3)^2, max(0.5, 0.7)^2, each halved.
    np.testing.assert_allclose(each["value"], [1.805, 1.445, 3.125, 2.0, 0.245], rtol=1e-6)
    np.testing.assert_array_equal(each["clipped"], [0, 1, 1, 1, 1])
    np.testing.assert_allclose(each["kl"], ratio - 1 - np.log(ratio), rtol=1e-4)
    np.testing.assert_allclose(each["kl_old"], -np.log(ratio), rtol=1e-5)
    free = ppo.clipped_losses(log_prob, value, advantage, batch, clip=0.2, value_clip=0.0)
    np.testing.assert_allclose(free["value"], [1.805, 0.5, 3.125, 2.0, 0.125], rtol=1e-6)


def test_what_is_clipped_has_no_gradient():
    batch = batch_like(log_prob=[-1.0, -1.0, -1.0, -1.0], value=[1.0, 1.0, 1.0, 1.0])
    log_prob = jnp.asarray(np.log([1.5, 1.5, 0.5, 0.5]) - 1, jnp.float32)
    advantage = jnp.asarray([1.0, -1.0, 1.0, -1.0])

    def policy_loss(log_prob):
        return ppo.clipped_losses(log_prob, batch.value, advantage, batch)["policy"].sum()

    # d(-A ratio) = -A ratio, where the ratio does not already lie on the side it should move to.
    np.testing.assert_allclose(jax.grad(policy_loss)(log_prob), [0, 1.5, -0.5, 0], rtol=1e-6)

    def value_loss(value):
        target = batch._replace(target=jnp.asarray([2.0, 0.0, 2.0, 0.0]))
        return ppo.clipped_losses(log_prob, value, advantage, target)["value"].sum()

    # Values that have already moved too far towards their target get no gradient.
    slopes = jax.grad(value_loss)(jnp.asarray([1.5, 1.5, 0.5, 0.5]))
    np.testing.assert_allclose(slopes, [0, 1.5, -1.5, 0], rtol=1e-6)


def test_normalized_advantages_worked_by_hand():
    advantage, weight = jnp.asarray([1.0, 9.0, 3.0, 5.0]), jnp.asarray([1.0, 0.0, 1.0, 1.0])
    # Of 1, 3, 5 the mean is 3 and the squares of the deviations sum to 8.
    population = ppo.normalized(advantage, weight)
    np.testing.assert_allclose(
        population[jnp.asarray([0, 2, 3])], np.array([-2, 0, 2]) / 8**0.5 * 3**0.5
    )
    sample = ppo.normalized(advantage, weight, "sample")
    np.testing.assert_allclose(sample[jnp.asarray([0, 2, 3])], np.array([-1, 0, 1]), rtol=1e-6)
    assert ppo.normalized(advantage, weight, "none") is advantage
    # Of one entry there is no deviation.
    for kind in ("population", "sample"):
        alone = ppo.normalized(advantage, jnp.asarray([0.0, 0.0, 1.0, 0.0]), kind)
        assert alone[2] == 0 and np.isfinite(alone).all()


def test_an_update_of_one_minibatch_is_the_step_on_all_rows(agent, state, window):
    config = dataclasses.replace(SMALL, epochs=1, minibatches=1)
    learned, memo, metrics = make(config).update(state, window, jax.random.key(1))
    assert memo is None
    networks = ppo.actor_and_critic(config.heads, SPACES, ACTIONS, flat_net(SPACES))
    batch = ppo.batch_of(config, window)
    count = batch.weight.sum()
    # Two of 24 steps lead from one episode to the next.
    assert count == 22
    advantage = ppo.normalized(batch.advantage, batch.weight)
    loss = functools.partial(ppo.objective, ppo.numbers_at(config, 0), networks)
    slope = jax.jit(jax.grad(loss, has_aux=True))
    gradient, found = slope(state.params, batch, advantage, count)
    norm = optim.global_norm(gradient)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    # Adam's first step is the learning rate times the sign of the gradient, but for its epsilon.
    scaled = jax.tree.map(lambda g: g / jnp.maximum(1.0, norm / 0.5), gradient)
    want = jax.tree.map(lambda x, g: x - 2.5e-4 * g / (jnp.abs(g) + 1e-5), state.params, scaled)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), learned.params, want)
    # The policy has not moved since it acted: every ratio is 1.
    assert abs(found["policy/kl"]) < 1e-6 and found["policy/clipped"] == 0
    np.testing.assert_allclose(metrics["loss/total"], found["loss/total"], rtol=1e-5)
    # With all ratios 1 the policy's loss is minus the mean of normalised advantages: 0.
    assert abs(metrics["loss/policy"]) < 1e-5


def test_targets_come_from_the_memo_and_the_flags(window):
    batch = ppo.batch_of(SMALL, window)
    value, steps = np.asarray(window.memo["value"]), window.steps
    # Environment 1 is cut at row 4: the action at row 3 has the value of row 4 behind it.
    at = 3 * ENVS + 1
    want = steps.reward[4, 1] + 0.99 * value[4, 1]
    np.testing.assert_allclose(batch.target[at], want, rtol=1e-5)
    np.testing.assert_array_equal(batch.obs["vector"][at], steps.obs["vector"][3, 1])
    np.testing.assert_array_equal(batch.action["turn"][at], steps.action["turn"][4, 1])
    assert batch.log_prob[at] == window.memo["log_prob"][3, 1]
    # Environment 0 ends for good at row 2.
    np.testing.assert_allclose(batch.target[1 * ENVS], steps.reward[2, 0], rtol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(batch.weight == 0), [2 * ENVS, 4 * ENVS + 1])
    ends = dataclasses.replace(SMALL, truncation="terminal")
    target = ppo.batch_of(ends, window).target
    np.testing.assert_allclose(target[at], steps.reward[4, 1], rtol=1e-5)


def test_steps_between_episodes_change_nothing(agent, state, window):
    steps, memo = window.steps, window.memo
    last, first = steps.is_last, steps.is_first

    def spoil(where, x, value):
        return jnp.where(where.reshape(*where.shape, *(1,) * (x.ndim - 2)), value, x)

    worse = window._replace(
        memo=memo | {"log_prob": spoil(last, memo["log_prob"], -1e30)},
        steps=steps._replace(
            obs=steps.obs | {"vector": spoil(last, steps.obs["vector"], 1e3)},
            action=steps.action | {"turn": spoil(first, steps.action["turn"], 1e9)},
            reward=spoil(first, steps.reward, jnp.nan),
        ),
    )
    plain = agent.update(state, window, jax.random.key(1))
    equal(agent.update(state, worse, jax.random.key(1)), plain)
    # The same change of a row that counts is seen.
    other = steps._replace(reward=steps.reward.at[1, 2].add(1.0))
    seen = agent.update(state, window._replace(steps=other), jax.random.key(1))
    assert not np.array_equal(
        seen[0].params["critic"]["0"]["bias"], plain[0].params["critic"]["0"]["bias"]
    )


def test_losses_reach_what_they_train(agent, state, window):
    spaces = SPACES | {"image": Box((16, 16, 3), "uint8", 0, 255)}
    codec = CodecConfig(units=8, layers=1, depth=2, mults=(1, 2), blocks=2)
    shared = functools.partial(encoder, codec)
    agent = make(obs=spaces, encoder=shared)
    params = start(agent).params
    networks = ppo.actor_and_critic(SMALL.heads, spaces, ACTIONS, shared(spaces))
    batch = ppo.batch_of(SMALL, acted(agent, params, random_rows(1, obs=spaces)))

    def reached(policy: float, value: float, entropy: float) -> set[str]:
        def loss(params):
            config = dataclasses.replace(SMALL, value=value, entropy=entropy)
            advantage = policy * batch.advantage
            return ppo.objective(
                ppo.numbers_at(config, 0), networks, params, batch, advantage, 24.0
            )[0]

        norms = {k: optim.global_norm(g) for k, g in jax.jit(jax.grad(loss))(params).items()}
        return {name for name, norm in norms.items() if norm > 0}

    assert reached(1.0, 0.0, 0.0) == {"encoder", "actor", "log_std"}
    assert reached(0.0, 1.0, 0.0) == {"encoder", "critic"}
    assert reached(0.0, 0.0, 1.0) == {"encoder", "actor", "log_std"}
    _, _, metrics = agent.update(
        start(agent),
        acted(agent, params, random_rows(1, obs=spaces)),
        jax.random.key(2),
    )
    assert all(np.isfinite(x) and x.shape == () for x in metrics.values())


def test_classes_that_do_not_exist(agent, state):
    """The first jump has two classes of three."""
    many = jax.tree.map(lambda x: x.repeat(500, 1), random_rows(0))
    row = jax.tree.map(lambda x: x[1], many)
    _, action, memo = agent.act(state.params, agent.initial(2000), row, jax.random.key(3))
    jump = np.asarray(action["jump"])
    assert set(jump[:, 0].tolist()) == {0, 1} and set(jump[:, 1].tolist()) == {0, 1, 2}
    assert memo["log_prob"].shape == (2000,)
    networks = ppo.actor_and_critic(SMALL.heads, SPACES, ACTIONS, flat_net(SPACES))

    def entropy(params):
        return networks.apply(params, row.obs)[0]["jump"].entropy().sum()

    # Outputs of the actor lie in the order of names: jump (2 x 3), turn (2), wait (3).
    bias = jax.jit(jax.grad(entropy))(state.params)["actor"]["1"]["bias"]
    assert bias.shape == (11,)
    np.testing.assert_array_equal(bias[jnp.asarray([2, 6, 7, 8, 9, 10])], 0.0)
    assert (bias[jnp.asarray([0, 1, 3, 4, 5])] != 0).all()


def test_modes_of_acting(agent, state):
    row = jax.tree.map(lambda x: x[1], random_rows(0))
    act = jax.jit(agent.act, static_argnums=4)
    carry, explored, memo = act(
        state.params, agent.initial(ENVS), row, jax.random.key(0), "explore"
    )
    assert carry == ()
    equal(act(state.params, (), row, jax.random.key(0), "sample")[1], explored)
    other = act(state.params, (), row, jax.random.key(1), "explore")[1]
    assert not np.array_equal(other["turn"], explored["turn"])
    networks = ppo.actor_and_critic(SMALL.heads, SPACES, ACTIONS, flat_net(SPACES))
    policy, value = networks.apply(state.params, row.obs)
    total = sum(policy[name].log_prob(explored[name]) for name in ACTIONS)
    np.testing.assert_allclose(memo["log_prob"], total, rtol=1e-5)
    np.testing.assert_allclose(memo["value"], value, rtol=1e-5)
    _, greedy, _ = act(state.params, (), row, jax.random.key(0), "greedy")
    equal(greedy, {name: dist.mode() for name, dist in policy.items()})


def test_a_single_action_has_no_name():
    for space in (Discrete(3), Box((2,)), Box()):
        agent = make(action=space)
        params = start(agent).params
        window = acted(agent, params, random_rows(0, action=space))
        assert window.steps.action.shape == (LENGTH + 1, ENVS, *space.shape)
        learned, _, metrics = agent.update(start(agent), window, jax.random.key(1))
        assert np.isfinite(metrics["loss/total"])
        assert ("log_std" in learned.params) == isinstance(space, Box)


def test_continuous_actions_have_the_density_of_a_normal():
    agent = make(action=Box((2,)))
    params = start(agent).params
    params |= {"log_std": {"action": jnp.log(jnp.asarray([0.5, 2.0]))}}
    row = jax.tree.map(lambda x: x[1], random_rows(0, action=Box((2,))))
    _, action, memo = agent.act(params, (), row, jax.random.key(0))
    _, mean, _ = agent.act(params, (), row, jax.random.key(0), "greedy")
    error = np.asarray((action - mean) / np.array([[0.5, 2.0]]), np.float64)
    want = -0.5 * (error**2).sum(-1) - np.log(0.5 * 2.0) - np.log(2 * np.pi)
    np.testing.assert_allclose(memo["log_prob"], want, rtol=1e-5)


def test_rows_that_fill_up_a_minibatch_do_not_count(state, window):
    config = dataclasses.replace(SMALL, minibatches=5)
    networks = ppo.actor_and_critic(config.heads, SPACES, ACTIONS, flat_net(SPACES))
    optimizer = optim.clipped_adam(config.max_grad_norm)
    batch = ppo.batch_of(config, window)
    numbers = ppo.numbers_at(config, 0)
    step = jax.jit(ppo.gradient_step(config, numbers, networks, optimizer, batch))
    learner = state.params, optimizer.init(state.params)
    some = step(learner, jnp.asarray([3, 7, 5]), jnp.ones(3, bool))
    filled = step(
        learner, jnp.asarray([3, 7, 5, 0, 0]), jnp.asarray([True, True, True, False, False])
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), some, filled)
    # 24 rows in 5 parts.
    _, _, metrics = make(config).update(state, window, jax.random.key(0))
    assert all(np.isfinite(x) for x in metrics.values())


def test_every_row_is_learned_from_once_an_epoch(state, window):
    config = dataclasses.replace(SMALL, epochs=3, minibatches=5)

    def learn(learner, rows, there):
        return (learner[0].at[rows].add(there.astype(jnp.int32)), learner[1]), {
            "rows": rows.sum() * 1.0
        }

    batch = ppo.batch_of(config, window)
    counts, _, _ = ppo._epochs(
        config, learn, (jnp.zeros(24, jnp.int32), ()), batch, jax.random.key(0)
    )
    np.testing.assert_array_equal(counts, 3)


def test_too_many_minibatches_raise(state, window):
    config = dataclasses.replace(SMALL, minibatches=25)
    with pytest.raises(JaxwmError, match=r"24 rows of an update into 25 minibatches"):
        make(config).update(state, window, jax.random.key(0))


def test_schedules_count_updates(agent, state, window):
    falling = optim.Schedule(1e-3, 0.0, updates=10)
    config = dataclasses.replace(
        SMALL, learning_rate=falling, clip=optim.Schedule(0.2, 0.1, updates=10)
    )
    half = ppo.numbers_at(config, 5)
    np.testing.assert_allclose((half.learning_rate, half.clip), (5e-4, 0.15), rtol=1e-6)
    update = make(config).update
    late = state._replace(rest=state.rest._replace(updates=jnp.asarray(10)))
    learned, _, _ = update(late, window, jax.random.key(0))
    assert learned.rest.updates == 11
    close = functools.partial(np.testing.assert_allclose, atol=1e-8)
    jax.tree.map(close, learned.params, state.params)
    learned, _, _ = update(state, window, jax.random.key(0))
    assert learned.rest.updates == 1
    assert not np.array_equal(
        learned.params["actor"]["0"]["kernel"], state.params["actor"]["0"]["kernel"]
    )


def test_rewards_are_divided_by_the_deviation_of_their_sums():
    config = dataclasses.replace(SMALL, normalize_reward=True, discount=0.5)
    agent = make(config)
    state = start(agent)
    window = acted(agent, state.params, random_rows(0))
    steps = window.steps
    total, sums = np.zeros(ENVS), []
    for t in range(LENGTH + 1):
        total = np.where(steps.is_first[t], 0, 0.5 * total) + np.asarray(steps.reward[t])
        sums.append(total)
    np.testing.assert_allclose(window.memo["return"], sums, rtol=1e-5, atol=1e-6)
    learned, _, _ = agent.update(state, window, jax.random.key(0))
    counted = np.stack(sums)[1:][~np.asarray(steps.is_first[1:])]
    assert learned.rest.rewards.count == len(counted) == 22
    np.testing.assert_allclose(learned.rest.rewards.variance, counted.var(), rtol=1e-5)
    scaled = steps._replace(reward=steps.reward / counted.std())
    want = ppo.batch_of(config, window._replace(steps=scaled))
    got = ppo.batch_of(config, window, learned.rest.rewards)
    np.testing.assert_allclose(got.advantage, want.advantage, rtol=1e-4, atol=1e-5)


def test_observed_numbers_are_normalised_by_what_was_seen_before():
    agent = make(dataclasses.replace(SMALL, normalize_obs=True))
    state = start(agent)
    assert set(state.params["observations"]) == {"vector"}
    rows = random_rows(0)
    rows = rows._replace(obs=rows.obs | {"vector": 5 * rows.obs["vector"] + 3})
    window = acted(agent, state.params, rows)
    learned, _, _ = agent.update(state, window, jax.random.key(0))
    seen = np.asarray(rows.obs["vector"])[1:].reshape(-1, 3)
    statistics = learned.params["observations"]["vector"]
    np.testing.assert_allclose(statistics.mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.variance, seen.var(0), rtol=1e-4)
    # Acting with them is acting on normalised numbers without.
    row = jax.tree.map(lambda x: x[1], rows)
    normal = (row.obs["vector"] - seen.mean(0)[None]) / seen.std(0)[None]
    same = row._replace(obs=row.obs | {"vector": normal})
    fresh = learned.params | {"observations": state.params["observations"]}
    want = agent.act(fresh, (), same, jax.random.key(1))
    got = agent.act(learned.params, (), row, jax.random.key(1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), got, want)


@pytest.mark.parametrize("normalize", [False, True])
def test_two_shards_learn_what_one_learns(normalize):
    config = dataclasses.replace(
        SMALL, epochs=1, minibatches=1, normalize_obs=normalize, normalize_reward=normalize
    )
    shards = Shards(
        mean=lambda tree: jax.lax.pmean(tree, "shards"),
        total=lambda tree: jax.lax.psum(tree, "shards"),
    )
    alone, divided = make(config), make(config, shards=shards)
    state = start(alone)
    window = acted(alone, state.params, random_rows(0))

    def half(x):
        return jnp.stack(jnp.split(x, 2, 1))

    parts = window._replace(
        memo=jax.tree.map(half, window.memo),
        steps=jax.tree.map(half, window.steps),
        env=window.env.reshape(2, -1),
        index=half(window.index),
    )
    want = alone.update(state, window, jax.random.key(0))
    update = jax.vmap(divided.update, in_axes=(None, 0, None), axis_name="shards")
    got = update(state, parts, jax.random.key(0))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[1]), got)
    # Row counts of the shards differ: 12 and 10.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(lambda x, y: close(x[0], y), got, want)


def test_seeds_side_by_side_learn_what_each_learns_alone(agent, state, window):
    states = jax.jit(jax.vmap(agent.init))(jax.random.split(jax.random.key(0), 2))
    keys = jax.random.split(jax.random.key(1), 2)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    both = jax.jit(jax.vmap(agent.update, in_axes=(0, None, 0)))(states, window, keys)
    for index in range(2):
        own = jax.tree.map(lambda x, i=index: x[i], states)
        alone = agent.update(own, window, keys[index])
        jax.tree.map(lambda x, y, i=index: close(x[i], y), both, alone)


def test_spaces_and_numbers_that_do_not_fit_raise():
    with pytest.raises(JaxwmError, match=r"'action'.*int32.*cannot take"):
        make(action=Box((2,), "int32", 0, 3))
    with pytest.raises(JaxwmError, match=r"HeadsConfig.hidden is \(8, 0\)"):
        ppo.HeadsConfig((8, 0))
    with pytest.raises(JaxwmError, match=r"PPOConfig.epochs is 0"):
        ppo.PPOConfig(epochs=0)
    with pytest.raises(JaxwmError, match=r"PPOConfig.entropy is -1"):
        ppo.PPOConfig(entropy=-1.0)


def test_a_bandit_is_solved():
    """Row t shows a number, and the action that is that number pays 1."""
    spaces, action = {"index": Discrete(4)}, Discrete(4)
    config = ppo.PPOConfig(heads=ppo.HeadsConfig((16,)), learning_rate=1e-2, discount=0.0)
    agent = make(config, spaces, action)
    envs, length = 16, 8
    no = jnp.zeros((length + 1, envs), bool)

    @jax.jit
    def iteration(state, key):
        key_index, key_act, key_update = jax.random.split(key, 3)
        index = jax.random.randint(key_index, (length + 1, envs), 0, 4)
        blank = zeros(action, (length + 1, envs))
        rows = Step(blank, {"index": index}, jnp.zeros(no.shape), no, no, no)
        act = jax.vmap(lambda row, key: agent.act(state.params, (), row, key)[1:])
        chosen, memo = act(rows, jax.random.split(key_act, length + 1))
        reward = (chosen == index)[:-1].astype(jnp.float32)
        shift = lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x])  # noqa: E731
        rows = rows._replace(action=shift(chosen[:-1]), reward=shift(reward))
        window = Window(memo, rows, jnp.arange(envs), jnp.zeros(no.shape, jnp.int32))
        return agent.update(state, window, key_update)[0], reward.mean()

    state = start(agent)
    for step in range(40):
        state, paid = iteration(state, jax.random.fold_in(jax.random.key(1), step))
    assert paid > 0.95
    row = Step(
        jnp.zeros(4, jnp.int32), {"index": jnp.arange(4)}, jnp.zeros(4), *[jnp.zeros(4, bool)] * 3
    )
    _, best, memo = agent.act(state.params, (), row, jax.random.key(0), "greedy")
    np.testing.assert_array_equal(best, jnp.arange(4))
    # What is expected of each is the reward of 1 to come.
    np.testing.assert_allclose(memo["value"], 1.0, atol=0.15)


def test_a_second_update_compiles_nothing(agent, state, window):
    agent.update(state, window, jax.random.key(0))
    before = agent.update._cache_size()
    agent.update(state, window, jax.random.key(1))
    assert agent.update._cache_size() == before


def test_it_learns_from_the_newest_rows(agent):
    assert agent.data == "newest" and agent.model is None and agent.behavior is None
