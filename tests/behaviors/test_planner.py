"""The planner: refits by hand, recorded searches, known optima, independence of environments."""

import dataclasses
import itertools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.behaviors.planner import CEMConfig, Normal, cem, planner, predicted_rewards, proposals
from jaxwm.types import Box, Discrete, Dreamer, JaxwmError

DATA = Path(__file__).parents[1] / "data" / "parity" / "planners"
PLAIN = CEMConfig(horizon=3, iterations=2, candidates=6, elites=2)


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(DATA / "planners.npz")), json.loads((DATA / "planners.json").read_text())


class Mean(types.SimpleNamespace):
    """A distribution of which only the mean is known."""

    def mean(self):
        return self.value


def drift(noise=0.0, cont=None) -> Dreamer:
    """A point that moves by its actions and by noise, with reward -|position - 0.5|^2.

    Args:
      noise: standard deviation of the motion's noise.
      cont: predicted continue probability, as a function of the position; None for a model
        without that head.
    """

    def step(carry, action, draws):
        actions = action.values() if isinstance(action, dict) else [action]
        moves = [x.astype(jnp.float32).reshape(x.shape[0], -1).sum(-1) for x in actions]
        carry = carry + 0.2 * sum(moves) + noise * draws
        return carry, {"position": carry}

    def predict(latents, keys=None):
        heads = {"reward": Mean(value=-jnp.square(latents["position"] - 0.5))}
        if cont is not None:
            heads["continue"] = Mean(value=cont(latents["position"]))
        return heads

    def features(latent):
        return latent["position"][..., None]

    return Dreamer(jax.random.normal, None, step, None, features, predict)


def acting(config, space, dreamer):
    """A compiled `positions (B,), key -> action (B)` for each mode."""
    behavior = planner(config, space)

    @jax.jit
    def every_mode(positions, key):
        carry, latent = behavior.carry(positions.shape[0]), {"position": positions}
        acts = {
            mode: behavior.act({}, dreamer, carry, positions, latent, jax.random.clone(key), mode)
            for mode in ("explore", "sample", "greedy")
        }
        assert all(carry == () for carry, _ in acts.values())
        return {mode: action for mode, (_, action) in acts.items()}

    return every_mode


def search(config, space, step, reward, start, key, draws=None):
    """A search in a world that is known exactly."""
    found = proposals(config, space)
    lead = (config.iterations, config.horizon)
    batch = jax.tree.leaves(start)[0].shape[0]
    noise = {
        name: proposal.draws(jax.random.fold_in(key, index), (*lead, batch, config.candidates))
        for index, (name, proposal) in enumerate(found.items())
    }
    if draws is None:
        draws = jnp.zeros((*lead, batch * config.candidates))
    return cem(config, found, step, reward, start, noise, draws)


def test_one_refit_of_continuous_actions_by_hand():
    config = CEMConfig(horizon=1, iterations=1, candidates=4, elites=2)
    noise = jnp.array([-2.0, 0.5, 1.5, 0.1]).reshape(1, 1, 1, 4, 1)
    result = cem(
        config,
        proposals(config, Box((1,))),
        lambda state, actions, draws: (state, actions["action"][:, 0]),
        lambda outcomes: outcomes,
        jnp.zeros((1, 1)),
        {"action": noise},
        jnp.zeros((1, 1, 4)),
    )
    # Clipped first: 1.5 counts as 1, in the return and in the refit.
    np.testing.assert_allclose(result.candidates["action"].ravel(), [-1, 0.5, 1, 0.1])
    np.testing.assert_allclose(result.returns.ravel(), [-1, 0.5, 1, 0.1])
    # The elites 1 and 0.5 have the mean 0.75 and the population variance 0.25^2 = 0.0625.
    plan = result.plan["action"]
    np.testing.assert_allclose(plan.mean.ravel(), [0.75], rtol=1e-6)
    np.testing.assert_allclose(plan.std.ravel(), [np.sqrt(0.0625 + 1e-6)], rtol=1e-6)


def test_one_refit_of_discrete_actions_by_hand():
    config = dataclasses.replace(PLAIN, unimix=0.2)
    proposal = proposals(config, Discrete(4))["action"]
    # Of four elites three chose class 2 and one class 0: shares 1/4, 0, 3/4, 0; a fifth of the
    # weight is uniform.
    probs = proposal.refit(jnp.array([2, 0, 2, 2]).reshape(1, 1, 4))
    np.testing.assert_allclose(probs[0, 0], [0.25, 0.05, 0.65, 0.05], rtol=1e-6)
    assert proposal.best(probs)[0, 0] == 2


def test_an_action_that_lacks_classes_is_never_given_one_of_them():
    config = dataclasses.replace(PLAIN, explore_discrete=1.0)
    proposal = proposals(config, Discrete((2, 3), (2,)))["action"]
    start = proposal.start((1, 1))
    np.testing.assert_allclose(start[0, 0], [[0.5, 0.5, 0], [1 / 3] * 3], rtol=1e-6)
    sampled = proposal.sample(start, proposal.draws(jax.random.key(0), (1, 1, 300)))
    noise = proposal.draws(jax.random.key(1), (300,))
    explored = proposal.explore(jnp.zeros((300, 2), jnp.int32), noise)
    for actions in (sampled[0, 0], explored):
        counts = [np.bincount(column, minlength=3) for column in np.asarray(actions).T]
        assert counts[0][2] == 0
        assert min(*counts[0][:2], *counts[1]) > 50


def oracle(config, start, noise, draws):
    """CEM for one environment in plain loops and float64: linear motion, quadratic reward.

    Args:
      config: hyperparameters.
      start: the first position.
      noise: (I, H, K, 2) of the actions.
      draws: (I, H, K) of the motion.
    """
    mean, std = np.zeros((config.horizon, 2)), np.ones((config.horizon, 2))
    for i in range(config.iterations):
        plans, returns = [], []
        for k in range(config.candidates):
            plan = np.clip(mean + std * noise[i, :, k], -1, 1)
            position, total = float(start), 0.0
            for t in range(config.horizon):
                position += 0.2 * plan[t].sum() + 0.3 * draws[i, t, k]
                total -= (position - 0.5) ** 2
            plans.append(plan)
            returns.append(total)
        best = np.argsort(returns)[::-1][: config.elites]
        elites = np.stack([plans[k] for k in best])
        mean = elites.mean(0)
        std = np.sqrt(((elites - mean) ** 2).mean(0) + 1e-6)
    return mean, std


def test_searches_of_several_environments_are_those_of_an_oracle():
    config = CEMConfig(horizon=3, iterations=3, candidates=7, elites=3)
    rng = np.random.default_rng(0)
    start = rng.normal(size=4)
    noise, draws = rng.normal(size=(3, 3, 4, 7, 2)), rng.normal(size=(3, 3, 4, 7))
    dreamer = drift(noise=0.3)
    result = cem(
        config,
        proposals(config, Box((2,))),
        lambda state, actions, draws: dreamer.step(state, actions["action"], draws),
        lambda latents: predicted_rewards(dreamer, latents),
        jnp.asarray(start, jnp.float32),
        {"action": jnp.asarray(noise, jnp.float32)},
        jnp.asarray(draws.reshape(3, 3, 28), jnp.float32),
    )
    for b in range(4):
        mean, std = oracle(config, start[b], noise[:, :, b], draws[:, :, b])
        np.testing.assert_allclose(result.plan["action"].mean[:, b], mean, atol=1e-5)
        np.testing.assert_allclose(result.plan["action"].std[:, b], std, atol=1e-5)


def quadratic(problem):
    """Step and score of a linear-quadratic problem; the rewards are minus its costs."""
    a, b, q, r, last = (jnp.asarray(problem[k], jnp.float32) for k in ("A", "B", "Q", "R", "Qf"))

    def form(matrix, x):
        return jnp.einsum("...i,ij,...j->...", x, matrix, x)

    def step(state, actions, draws):
        action = actions["action"]
        after = state @ a.T + action @ b.T
        return after, (state, action, after)

    def score(outcomes):
        before, action, after = outcomes
        cost = form(q, before) + form(r, action)
        return -cost.at[-1].add(form(last, after[-1]))

    return step, score


def problem_of(arrays, name):
    prefix = f"lq/{name}/"
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def test_a_recorded_search_step_by_step(recorded):
    arrays, _ = recorded
    noise = np.stack([arrays[f"trace/cem/{i}/noise"] for i in range(4)])  # (I, K, H, A)
    config = CEMConfig(horizon=10, iterations=4, candidates=40, elites=6)
    problem = problem_of(arrays, "random4")
    result = cem(
        config,
        proposals(config, Box((2,))),
        *quadratic(problem),
        jnp.asarray(problem["x0"], jnp.float32)[None],
        {"action": jnp.asarray(noise.swapaxes(1, 2)[:, :, None], jnp.float32)},
        jnp.zeros((4, 10, 40)),
    )
    for i in range(4):
        want = {k: arrays[f"trace/cem/{i}/{k}"] for k in ("actions", "cost", "mean", "std")}
        have = {
            "actions": result.candidates["action"][i, :, 0].swapaxes(0, 1),
            "cost": -result.returns[i, 0],
            "mean": result.refit["action"].mean[i, :, 0],
            "std": result.refit["action"].std[i, :, 0],
        }
        for name, value in want.items():
            error = np.abs(have[name] - value).max() / np.abs(value).max()
            assert error < 1e-4, f"{name} of iteration {i}: {error:.1e}"


@pytest.mark.parametrize("name", ["double_integrator", "random4"])
def test_plans_cost_what_they_should_beside_the_optimum(recorded, name):
    arrays, costs = recorded
    problem, ratios = problem_of(arrays, name), costs["lq"][name]["ratios"]
    step, score = quadratic(problem)
    seeds = 200
    start = jnp.tile(jnp.asarray(problem["x0"], jnp.float32)[None], (seeds, 1))
    optimum, means = costs["lq"][name]["optimal_cost"], {}
    for budget in ("cem_N100_K10_it5", "cem_N100_K10_it10", "cem_N1000_K100_it10"):
        candidates, elites, iterations = (int(x.lstrip("NKit")) for x in budget.split("_")[1:])
        horizon, actions = problem["U"].shape
        config = CEMConfig(horizon, iterations, candidates, elites)
        runs = seeds if candidates == 100 else 60
        run = jax.jit(lambda x, key: search(config, Box((actions,)), step, score, x, key))  # noqa: B023
        plan = run(start[:runs], jax.random.key(0)).plan["action"].mean
        _, outcomes = jax.lax.scan(lambda s, u: step(s, {"action": u}, None), start[:runs], plan)
        ratio = -np.asarray(score(outcomes).sum(0)) / optimum
        assert ratio.min() > 1 - 1e-5
        want = ratios[budget]
        tolerance = 4 * np.hypot(want["se"], ratio.std() / np.sqrt(runs))
        assert abs(ratio.mean() - want["mean"]) < tolerance, (budget, ratio.mean(), want["mean"])
        means[budget] = ratio.mean()
    # More iterations and more candidates are better.
    few, more, most = means.values()
    assert most < more < few


def test_a_pendulum_swings_up_at_the_recorded_cost(recorded):
    _, costs = recorded
    pendulum = costs["pendulum"]
    want = pendulum["results"]["cem_H15_N200_K20_it5"]

    def step(state, actions, draws):
        angle, speed = state[..., 0], state[..., 1]
        torque = 2.0 * actions["action"][..., 0]
        wrapped = jnp.mod(angle + jnp.pi, 2 * jnp.pi) - jnp.pi
        cost = wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2
        speed = jnp.clip(speed + (15.0 * jnp.sin(angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
        return jnp.stack([angle + 0.05 * speed, speed], -1), -cost

    config = CEMConfig(horizon=15, iterations=5, candidates=200, elites=20)
    seeds = 20

    @jax.jit
    def episode(key):
        def act(state, key):
            plan = search(config, Box((1,)), step, lambda reward: reward, state, key).plan
            return step(state, {"action": plan["action"].mean[0]}, None)

        start = jnp.tile(jnp.asarray(pendulum["start"], jnp.float32), (seeds, 1))
        _, reward = jax.lax.scan(act, start, jax.random.split(key, pendulum["steps"]))
        return -reward.sum(0)

    cost = np.asarray(episode(jax.random.key(0)))
    spread = np.hypot(want["cost"]["se"], cost.std() / np.sqrt(seeds))
    assert abs(cost.mean() - want["cost"]["mean"]) < 4 * spread, (cost.mean(), want["cost"])


def test_a_discrete_plan_is_the_best_of_all_plans():
    # A walk from 2 by steps of -1, 0 or 1. The distance from 5 costs, each step costs a little.
    def reward(position, move):
        return -abs(position - 5) - 0.3 * abs(move)

    def step(state, actions, draws):
        move = actions["action"] - 1
        return state + move, reward(state + move, move)

    def total(plan):
        return sum(reward(2 + sum(plan[: t + 1]) - t - 1, plan[t] - 1) for t in range(5))

    best = max(itertools.product(range(3), repeat=5), key=total)
    assert best == (2, 2, 2, 1, 1)
    config = CEMConfig(horizon=5, iterations=6, candidates=300, elites=30)
    run = jax.jit(lambda key: search(config, Discrete(3), step, lambda x: x, jnp.full(8, 2), key))
    plan = run(jax.random.key(0)).plan["action"]
    np.testing.assert_array_equal(jnp.argmax(plan, -1).T, np.tile(best, (8, 1)))


def test_several_actions_are_planned_together():
    # Only the sum of all actions counts: from -0.1 it should make up 0.6, at 0.2 a unit.
    spaces = {"push": Box((2,)), "turn": Discrete(3), "scalar": Box(())}
    config = CEMConfig(horizon=2, iterations=5, candidates=200, elites=20)
    action = acting(config, spaces, drift())(jnp.full((3,), -0.1), jax.random.key(0))["greedy"]
    assert action["push"].shape == (3, 2)
    assert action["turn"].dtype == jnp.int32
    total = action["push"].sum(-1) + action["turn"] + action["scalar"]
    np.testing.assert_allclose(total, 3.0, atol=0.2)


def test_only_the_exploration_differs_between_modes():
    config = dataclasses.replace(PLAIN, explore=0.5, candidates=40, elites=4)
    space = {"push": Box((2,)), "turn": Discrete(3)}
    act = acting(config, space, drift(noise=0.1))
    positions = jnp.linspace(-1, 1, 400)
    once, again = (act(positions, jax.random.key(0)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    jax.tree.map(np.testing.assert_array_equal, once["greedy"], once["sample"])
    other = act(positions, jax.random.key(1))["greedy"]
    assert np.any(other["push"] != once["greedy"]["push"])
    greedy, explore = once["greedy"]["push"], once["explore"]["push"]
    assert np.abs(explore).max() == 1.0
    inside = np.abs(explore) < 1
    # Where the clip rarely matters, the noise has the standard deviation asked for.
    middle = np.abs(greedy) < 0.25
    noise = (explore - greedy)[middle & inside]
    assert noise.size > 100
    assert 0.35 < np.std(noise) < 0.55
    # A tenth of the choices is replaced, a third of these by the same class.
    changed = np.mean(once["explore"]["turn"] != once["greedy"]["turn"])
    assert 0.03 < changed < 0.11


def test_without_noise_exploration_is_the_plan():
    config = dataclasses.replace(PLAIN, explore=0.0, explore_discrete=0.0)
    act = acting(config, {"push": Box((2,)), "turn": Discrete(3)}, drift())
    found = act(jnp.zeros(5), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, found["explore"], found["greedy"])


def test_environments_are_planned_for_independently():
    act = acting(PLAIN, Box((2,)), drift(noise=0.2))
    positions = jnp.array([0.0, 3.0, -2.0])
    found = act(positions, jax.random.key(0))["greedy"]
    moved = act(positions.at[1].set(-7.0), jax.random.key(0))["greedy"]
    np.testing.assert_array_equal(found[::2], moved[::2])
    assert np.any(found[1] != moved[1])


def test_members_of_a_vmap_plan_as_if_alone():
    act = acting(PLAIN, Box((2,)), drift(noise=0.2))
    positions = jnp.arange(6.0).reshape(3, 2) / 6
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(act)(positions, jax.random.clone(keys))
    for index in range(3):
        alone = act(positions[index], keys[index])
        for mode, action in alone.items():
            np.testing.assert_allclose(together[mode][index], action, rtol=1e-6, atol=1e-6)


def test_equal_candidates_roll_out_with_noise_of_their_own():
    config = CEMConfig(horizon=2, iterations=2, candidates=5, elites=5, start_std=1e-9)
    dreamer = drift(noise=1.0)
    result = search(
        config,
        Box((1,)),
        lambda state, actions, draws: dreamer.step(state, actions["action"], draws),
        lambda latents: predicted_rewards(dreamer, latents),
        jnp.zeros(3),
        jax.random.key(0),
        jax.random.normal(jax.random.key(1), (2, 2, 15)),
    )
    assert len(np.unique(result.returns)) == result.returns.size


def test_a_rollout_that_is_not_a_number_is_never_an_elite():
    config = CEMConfig(horizon=1, iterations=1, candidates=4, elites=2)
    result = cem(
        config,
        proposals(config, Box((1,))),
        lambda state, actions, draws: (state, actions["action"][:, 0]),
        lambda x: jnp.where(x > 0.7, jnp.nan, x),
        jnp.zeros((1, 1)),
        {"action": jnp.array([0.8, 0.5, 0.9, 0.1]).reshape(1, 1, 1, 4, 1)},
        jnp.zeros((1, 1, 4)),
    )
    np.testing.assert_allclose(result.plan["action"].mean.ravel(), [0.3], rtol=1e-6)


def test_rewards_after_a_predicted_end_do_not_count():
    # Positions 1, 2, 3 with rewards -0.25, -2.25, -6.25 and chances to go on of 1/2, 1/3, 1/4.
    dreamer = drift(cont=lambda position: 1 / (1 + position))
    latents = {"position": jnp.array([1.0, 2.0, 3.0])[:, None]}
    plain = predicted_rewards(dreamer, latents)
    np.testing.assert_allclose(plain[:, 0], [-0.25, -2.25, -6.25], rtol=1e-6)
    # Each is reached if the episode went on at the states before it: 1, 1/2, 1/2 * 1/3.
    weighted = predicted_rewards(dreamer, latents, continues=True)
    np.testing.assert_allclose(weighted[:, 0], [-0.25, -2.25 / 2, -6.25 / 6], rtol=1e-6)


def test_a_planner_learns_nothing():
    behavior = planner(PLAIN, Box((2,)))
    params = behavior.init(jax.random.key(0))
    state = behavior.initial(params)
    assert (params, state) == ({}, ())
    draws = behavior.draws(jax.random.key(1), (4, 2))
    assert behavior.loss(params, state, drift(), None, None, draws) == ({}, (), {})
    assert behavior.after(state, params) == ()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"elites": 2000}, "there are only 1000 candidates"),
        ({"horizon": 0}, "horizon is 0; it must be at least 1"),
        ({"start_std": 0.0}, "start_std is 0.0; it must be positive"),
        ({"explore": -0.1}, "explore is -0.1; it must be at least 0"),
        ({"unimix": 1.5}, "unimix is 1.5; it must lie in 0 to 1"),
    ],
)
def test_bad_hyperparameters_are_refused(wrong, words):
    with pytest.raises(JaxwmError, match=words):
        CEMConfig(**wrong)


def test_spaces_without_a_proposal_are_refused():
    with pytest.raises(JaxwmError, match="cannot choose the action 'button'"):
        planner(PLAIN, {"button": Box((2,), "uint8"), "push": Box((2,))})


def test_a_model_without_the_heads_is_refused():
    latents = {"position": jnp.zeros((2, 1))}
    with pytest.raises(JaxwmError, match=r"does not predict continue.*continues to False"):
        predicted_rewards(drift(), latents, continues=True)
    silent = drift()._replace(predict=lambda latents, keys=None: {})
    with pytest.raises(JaxwmError, match="does not predict reward"):
        predicted_rewards(silent, latents)


def test_the_search_starts_where_the_configuration_says():
    start = proposals(dataclasses.replace(PLAIN, start_std=0.5), Box((2,)))["action"].start((3, 1))
    assert isinstance(start, Normal)
    np.testing.assert_array_equal(start.mean, np.zeros((3, 1, 2)))
    np.testing.assert_array_equal(start.std, np.full((3, 1, 2), 0.5))
