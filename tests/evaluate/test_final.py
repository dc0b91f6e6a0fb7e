"""The evaluation at the end of a run, and its pictures."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import envs, train
from jaxwm.evaluate import rollout
from jaxwm.evaluate.final import draw, evaluate, evaluation_lines
from jaxwm.policy import trained
from jaxwm.recipes import agent_of
from jaxwm.types import JaxwmError


def test_evaluation_lines(tiny):
    # (1 + 2) / 2 and (4 + 6) / 2, whose mean is 3.25.
    returns = np.array([[1.0, 2.0], [4.0, 6.0]])
    config = dataclasses.replace(tiny, seed=7, seeds=2)
    assert evaluation_lines(returns, config) == [
        "evaluation return (seed 7): 1.5",
        "evaluation return (seed 8): 5",
        "evaluation return: 3.25",
    ]
    assert evaluation_lines(returns[:1], tiny) == ["evaluation return: 1.5"]


def test_a_broken_evaluation_is_told(tiny, monkeypatch):
    env = envs.make("toy/Memory")
    agent = agent_of(tiny, env.obs_space, env.action_space)
    monkeypatch.setattr(rollout, "evaluate", lambda *args: jnp.full((2,), jnp.nan))
    with pytest.raises(JaxwmError, match=r"toy/Memory gave a NaN .* in the evaluation"):
        evaluate(lambda values: agent, env, [{}], tiny, 2)
    assert evaluate(lambda values: agent, env, [{}, {}], tiny, 0).shape == (2, 0)


@pytest.fixture
def copied(finished, tmp_path):
    """The folder of a finished run, without its pictures."""
    folder = shutil.copytree(finished, tmp_path / "run")
    for path in folder.glob("*.png"):
        path.unlink()
    return folder


def test_an_agent_draws_what_it_can(copied, tiny):
    """No dream without a model, or with one that predicts no observation."""
    env, (params,) = trained(copied, tiny)
    agent = train.agents(tiny, env)({})
    assert set(draw(copied, agent, env, params, tiny)) == {"learning curve", "dream"}
    (copied / "dream.png").unlink()
    assert set(draw(copied, agent._replace(model=None), env, params, tiny)) == {"learning curve"}
    predict = lambda params, latents, keys=None: {}  # noqa: E731
    blind = agent._replace(model=agent.model._replace(predict=predict))
    assert set(draw(copied, blind, env, params, tiny)) == {"learning curve"}
    assert not (copied / "dream.png").exists() and (copied / "curve.png").exists()
