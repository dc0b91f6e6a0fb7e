"""What every world model must do: the model of every recipe, and a core that is parallel over time.

A recipe joins by being in `RECIPES`. The parallel core stands in DreamerV3's model twice: under a
posterior that reads it, which is a loop over rows, and under a local one, which is not.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.config import flatten
from jaxwm.models.imagine import dreamer
from jaxwm.recipes import RECIPES, sweep
from jaxwm.types import (
    Box,
    Discrete,
    JaxwmError,
    Observed,
    Params,
    Start,
    Step,
    WorldModel,
    as_dict,
)
from tests.conformance.parallel_core import parallel_core
from tests.models.rows import moved, two_episodes

T, B, SECOND = 7, 3, 4
OBS = {"place": Box((3,)), "kind": Discrete(4)}
# The richest action space that the agent takes.
ACTIONS = ({"push": Box((2,), low=-1, high=1), "turn": Discrete(3)}, Box((2,)), Discrete(3))


class World(NamedTuple):
    """A model with compiled functions, and two episodes that it has observed."""

    model: WorldModel
    action_space: Any
    params: Params
    steps: Step
    draws: Any
    observed: Observed


def made(name: str) -> tuple[WorldModel | None, Any]:
    """The model of a recipe, or of the parallel core, and the actions that it takes."""
    for space in ACTIONS:
        try:
            if name.startswith("parallel"):
                return parallel_core(OBS, space, filters=name == "parallel_filtered").model, space
            recipe = RECIPES[name]
            config = recipe.run("toy/Credit", "debug", None, None).agent
            # Every nat counts, so that every gradient shows.
            free = [path for path in flatten(config) if path.endswith("free_nats")]
            config = sweep.put(config, dict.fromkeys(free, 0.0))
            return recipe.agent(config, OBS, space).model, space
        except JaxwmError:
            if space is ACTIONS[-1]:
                raise
    raise AssertionError


NAMES = (*RECIPES, "parallel_filtered", "parallel_local")
MODELS = [name for name in NAMES if made(name)[0] is not None]


@pytest.fixture(scope="module", params=MODELS)
def world(request: pytest.FixtureRequest) -> World:
    model, space = made(request.param)
    assert model is not None
    model = model._replace(
        init=jax.jit(model.init), observe=jax.jit(model.observe), step=jax.jit(model.step)
    )
    params = moved(model.init(jax.random.key(1)))
    steps = two_episodes(OBS, space, jax.random.key(2), T, B, SECOND)
    draws = model.draws(jax.random.key(3), (T, B))
    return World(
        model, space, params, steps, draws, model.observe(params, model.initial(B), steps, draws)
    )


def at(tree: Any, index: Any) -> Any:
    """Some rows of a tree."""
    return jax.tree.map(lambda x: x[index], tree)


def close(have: Any, want: Any, tolerance: float = 1e-5) -> None:
    chex.assert_trees_all_close(have, want, atol=tolerance, rtol=tolerance)


def test_a_sequence_at_once_equals_row_by_row(world):
    model, _, params, steps, draws, observed = world
    carry = model.initial(B)
    for time in range(T):
        row = slice(time, time + 1)
        found = model.observe(params, carry, at(steps, row), at(draws, row))
        close(found.latents, at(observed.latents, row))
        carry = found.carry
        if observed.carries is not None:
            close(carry, at(observed.carries, time))
    close(observed.carry, carry)


def test_a_dreamed_step_follows_the_recurrence_of_observing(world):
    """What the observation of a row does not change in the memory is the same in a dream."""
    model, space, params, steps, draws, _ = world
    before = model.observe(params, model.initial(B), at(steps, slice(0, 1)), at(draws, slice(0, 1)))
    row, now = at(steps, slice(1, 2)), at(draws, slice(1, 2))
    other = two_episodes(OBS, space, jax.random.key(4), T, B, SECOND).obs
    seen = model.observe(params, before.carry, row, now).carry
    changed = model.observe(params, before.carry, row._replace(obs=at(other, slice(1, 2))), now)
    dreamt, latent = model.step(params, before.carry, at(row.action, 0), at(now, 0))
    leaves = [jax.tree.leaves(tree) for tree in (seen, changed.carry, dreamt)]
    same = [bool((x == y).all()) for x, y in zip(*leaves[:2], strict=True)]
    assert True in same and False in same
    for unaffected, want, have in zip(same, leaves[0], leaves[2], strict=True):
        assert have.shape == want.shape and have.dtype == want.dtype
        if unaffected:
            np.testing.assert_allclose(have, want, atol=1e-5)
    # What it does change is drawn from the prior.
    fresh = model.draws(jax.random.key(5), (B,))
    again = model.step(params, before.carry, at(row.action, 0), fresh)
    features = model.features(latent), model.features(again[1])
    assert (features[0] != features[1]).any()


def test_a_dream_is_a_loop_of_steps_from_where_it_starts(world):
    model, _, params, steps, _, observed = world
    dreams = dreamer(model, params)
    start = dreams.starts(observed, jax.random.key(6))
    count = len(start.index)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), observed.latents)
    chex.assert_trees_all_equal(at(flat, start.index), start.latent)
    if observed.carries is not None:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), observed.carries)
        chex.assert_trees_all_equal(at(flat, start.index), start.carry)
    actions = jax.tree.map(lambda x: jnp.resize(x[:3, :1], (3, count, *x.shape[2:])), steps.action)
    draws = model.draws(jax.random.key(7), (3, count))
    dream = jax.jit(lambda *given: dreams.imagine(given[0], lambda _, a: a, given[1:]))
    found = dream(start, draws, actions)
    chex.assert_trees_all_equal(found.action, actions)
    carry, latent = start.carry, start.latent
    for time in range(3):
        close(at(found.latents, time), latent)
        carry, latent = model.step(params, carry, at(actions, time), at(draws, time))
    close(found.last, latent)


def test_episodes_one_after_the_other_equal_separate_ones(world):
    model, _, params, steps, draws, observed = world
    fresh = at(steps, slice(SECOND, None)), at(draws, slice(SECOND, None))
    alone = model.observe(params, model.initial(B), *fresh)
    close(alone.latents, at(observed.latents, slice(SECOND, None)))
    close(alone.carry, observed.carry)
    # The first row forgets any memory, even NaN, and the action before it.
    wrong = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan if x.dtype.kind == "f" else 1), model.initial(B)
    )
    action = jax.tree.map(lambda x: x.at[0].set(1), fresh[0].action)
    after = model.observe(params, wrong, fresh[0]._replace(action=action), fresh[1])
    chex.assert_trees_all_equal(after, alone)


def test_nothing_flows_backwards_in_time_or_between_environments(world):
    model, space, params, steps, draws, observed = world
    other = two_episodes(OBS, space, jax.random.key(4), T, B, SECOND)

    def latents(mask: np.ndarray) -> Any:
        """Latents with other observations, actions and rewards where the mask (T, B) is set."""
        put = lambda x, y: jnp.where(mask.reshape(T, B, *[1] * (x.ndim - 2)), y, x)  # noqa: E731
        rows = jax.tree.map(put, steps, other)
        return model.observe(params, model.initial(B), rows, draws).latents

    for time in (1, 3, 5):
        mask = np.zeros((T, B), bool)
        mask[time:, 0] = True
        found = latents(mask)
        for have, want in zip(*map(jax.tree.leaves, (found, observed.latents)), strict=True):
            same = np.asarray((have == want).reshape(T, B, -1).all(-1))
            assert same[~mask].all()
            assert not same[time, 0]


def test_seeds_side_by_side_equal_a_loop(world):
    model, _, params, steps, draws, observed = world
    other = jax.tree.map(lambda x: 0.9 * x, params)
    both = jax.tree.map(lambda *x: jnp.stack(x), params, other)
    together = jax.vmap(model.observe, in_axes=(0, None, None, None))(
        both, model.initial(B), steps, draws
    )
    close(at(together, 0), observed)
    close(at(together, 1), model.observe(other, model.initial(B), steps, draws))


def test_the_replay_gives_back_the_memory_that_it_stores(world):
    model, observed = world.model, world.observed
    memo = model.pack(observed.carry)
    want = observed.carry if jax.tree.leaves(memo) else model.initial(B)
    chex.assert_trees_all_equal(model.unpack(memo, B), want)
    assert all(x.shape[0] == B for x in jax.tree.leaves(memo))
    if observed.carries is not None:
        chex.assert_trees_all_equal(at(model.pack(observed.carries), T - 1), memo)


def test_gradients_flow_through_dreams_and_not_into_the_model(world):
    model, space, params, steps, draws, observed = world
    action = {
        name: jax.nn.one_hot(x[0], part.width) if isinstance(part, Discrete) else x[0]
        for (name, part), x in zip(
            as_dict(space).items(), as_dict(steps.action).values(), strict=True
        )
    }
    action = action if isinstance(space, dict) else action["action"]
    weights = jax.random.normal(jax.random.key(8), model.features(observed.latents)[0].shape)

    def dreamt(params: Params, carry: Any, action: Any) -> jax.Array:
        dreams = dreamer(model, params)
        _, latent = dreams.step(carry, action, at(draws, 0))
        return jnp.sum(weights * dreams.features(latent))

    start: Start = model.starts(params, observed, jax.random.key(6))
    carry = at(start.carry, slice(0, B))
    into = jax.jit(jax.grad(dreamt, (0, 1, 2), allow_int=True))(params, carry, action)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(into[0]))
    for leaf in jax.tree.leaves(into[2]):
        assert np.isfinite(leaf).all() and leaf.any()
    # Discrete actions as classes are the same as one-hot vectors.
    found = model.step(params, carry, action, at(draws, 0))
    close(found, model.step(params, carry, at(steps.action, 0), at(draws, 0)))


def test_losses_are_finite_follow_time_and_train_every_parameter(world):
    model, _, params, steps, draws, observed = world

    @jax.jit
    def gradients(params: Params, steps: Step) -> Any:
        def total(params: Params) -> Any:
            losses, found, metrics = model.loss(params, model.initial(B), steps, draws)
            return sum(x.mean() for x in losses.values()), (losses, found, metrics)

        return jax.grad(total, has_aux=True)(params)

    grads, (losses, found, metrics) = gradients(params, steps)
    close(found, observed)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all() and np.asarray(leaf).any(), name
    assert {f"rec/{name}" for name in OBS} | {"reward"} <= losses.keys()
    for leaf in jax.tree.leaves((losses, metrics)):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    assert all(x.shape == () for x in metrics.values())
    _, (after, _, _) = gradients(params, steps._replace(reward=steps.reward.at[5].add(1.0)))
    rows = [name for name, x in losses.items() if x.shape == (T, B)]
    assert "reward" in rows
    for name in rows:
        np.testing.assert_array_equal(after[name][:5], losses[name][:5], err_msg=name)
        np.testing.assert_array_equal(after[name][6:], losses[name][6:], err_msg=name)
    assert (after["reward"][5] != losses["reward"][5]).all()


def test_predictions_are_those_that_were_asked_for(world):
    model, params, steps, latents = world.model, world.params, world.steps, world.observed.latents
    outputs = model.predict(params, latents)
    assert {*OBS, "reward"} <= outputs.keys() <= {*OBS, "reward", "continue"}
    for name, value in steps.obs.items():
        assert outputs[name].mode().shape == value.shape
        assert np.isfinite(outputs[name].log_prob(value)).all()
    assert outputs["reward"].mean().shape == (T, B)
    if "continue" in outputs:
        odds = outputs["continue"].mean()
        assert odds.shape == (T, B) and (odds >= 0).all() and (odds <= 1).all()
    some = model.predict(params, latents, ("reward", "nothing"))
    assert list(some) == ["reward"]
    close(some["reward"].mean(), outputs["reward"].mean())
    features = model.features(latents)
    assert features.shape[:2] == (T, B) and features.dtype == jnp.float32
