"""Acting: random actions, the step on the device, and the rows of simulators."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm.train import act
from jaxwm.train.act import Scene, advance, explorer, random_action, rows_after
from jaxwm.types import Agent, Box, Discrete, Env, first, transition

SPACES = {
    "push": Box((2,), low=-1.0, high=1.0),
    "pick": Discrete(3),
    "keys": Discrete((2, 4, 3, 1), (2, 2)),
}


def test_random_actions_are_uniform_over_what_exists():
    found = jax.device_get(random_action(SPACES, jax.random.key(0), (600, 20)))
    push = found["push"]
    assert push.shape == (600, 20, 2) and push.dtype == np.float32
    assert -1 <= push.min() < -0.999 and 0.999 < push.max() <= 1
    # 24000 draws of variance 1/3: the mean lies within 4 standard errors, 0.015.
    assert abs(push.mean()) < 0.015 and abs(push.var() - 1 / 3) < 0.01
    pick, keys = found["pick"], found["keys"]
    assert pick.dtype == keys.dtype == np.int32 and keys.shape == (600, 20, 2, 2)
    # 12000 draws: each share within 4 standard errors of its probability, at most 0.018.
    for classes, values in [(3, pick), *zip((2, 4, 3, 1), keys.reshape(-1, 4).T, strict=True)]:
        shares = np.bincount(values.ravel(), minlength=classes) / values.size
        assert len(shares) == classes
        np.testing.assert_allclose(shares, 1 / classes, atol=0.019)
    # Entries and parts are drawn independently.
    assert abs(np.corrcoef(push[..., 0].ravel(), push[..., 1].ravel())[0, 1]) < 0.04
    assert abs(np.corrcoef(push[..., 0].ravel(), pick.ravel())[0, 1]) < 0.04


@pytest.mark.parametrize("space", [*SPACES.values(), SPACES])
def test_random_actions_have_the_form_of_their_space(space):
    found = random_action(space, jax.random.key(1), (5,))
    parts = space if isinstance(space, dict) else {"action": space}
    given = found if isinstance(space, dict) else {"action": found}
    assert {k: (x.shape, x.dtype) for k, x in given.items()} == {
        k: ((5, *x.shape), x.dtype) for k, x in parts.items()
    }


def counter():
    """An agent whose action is 50 plus the rows it has seen, and whose memo is their number."""

    def step(params, carry, row, key, mode="explore"):
        return carry + 1, 50 + carry + params, {"seen": carry}

    return Agent(lambda key: None, lambda batch: jnp.zeros((batch,), jnp.int32), step, None)


def row(count, flag=False):
    flags = jnp.full((count,), flag)
    return first(Discrete(100), {})._replace(
        action=jnp.zeros((count,), jnp.int32), reward=jnp.zeros((count,)),
        is_first=flags, is_last=flags, is_terminal=flags,
    )  # fmt: skip


def test_the_first_iterations_act_at_random_but_remember_as_the_agent_does():
    agent = counter()
    explore = jax.jit(explorer(agent, Discrete(10), random=3))
    carry, key = agent.initial(4), jax.random.key(2)
    for iteration in range(5):
        one, same = (jax.random.fold_in(key, iteration) for _ in range(2))
        carry, action, memo = explore(7, carry, row(4), one, jnp.int32(iteration))
        assert (carry == iteration + 1).all() and (memo["seen"] == iteration).all()
        drawn = random_action(Discrete(10), jax.random.split(same)[1], (4,))
        wanted = drawn if iteration < 3 else np.full(4, 57 + iteration)
        np.testing.assert_array_equal(action, wanted)


def test_without_random_actions_nothing_of_them_is_traced(monkeypatch):
    monkeypatch.setattr(act, "random_action", lambda *args: pytest.fail("traced"))
    agent, key = counter(), jax.random.key(2)
    explore = explorer(agent, Discrete(10))
    jaxprs = [
        jax.make_jaxpr(lambda *x, f=f: f(7, *x))(agent.initial(4), row(4), key)
        for f in (agent.act, lambda *x: explore(*x, jnp.int32(0)))
    ]
    assert str(jaxprs[0]) == str(jaxprs[1])


def test_a_step_acts_on_the_present_rows_and_keeps_their_memo():
    def step(state, action, key):
        one = transition(action, {}, 0.0, False)
        batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (4,)), one._replace(action=action))
        return state + action, batch

    env = Env("adder", {}, Discrete(100), None, step)
    agent, key = counter(), jax.random.key(0)
    scene = Scene(jnp.zeros((4,), jnp.int32), row(4, True), agent.initial(4))
    policy = lambda carry, row, key: agent.act(1, carry, row, key)  # noqa: E731
    for number in range(3):
        scene, memo = advance(policy, env, scene, jax.random.fold_in(key, number))
        assert (memo["seen"] == number).all() and (scene.row.action == 51 + number).all()
        assert (scene.carry == number + 1).all()
    assert (scene.env == 51 + 52 + 53).all()


def test_rows_of_simulators_follow_their_actions():
    told, sent = [], []
    a, *others = (row(2)._replace(reward=x) for x in (0.0, 1.0, 2.0, 3.0))
    given = iter(others)

    def acts(carry, row, time):
        return carry + 1, np.int32(10 * time), (row.reward, carry)

    rows = rows_after(
        acts, lambda x: sent.append(int(x)), lambda: next(given), a, 5,
        lambda row, memo: told.append((row.reward, memo, len(sent))),
    )  # fmt: skip
    found = [(row.reward, carry) for row, carry in itertools.islice(rows, 3)]
    assert found == [(1.0, 6), (2.0, 7), (3.0, 8)]
    # `meanwhile` gets each row with its memo once the actions are under way.
    assert sent == [0, 10, 20]
    assert told == [(0.0, (0.0, 5), 1), (1.0, (1.0, 6), 2), (2.0, (2.0, 7), 3)]
