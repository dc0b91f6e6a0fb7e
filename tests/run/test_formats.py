"""Checkpoints and configurations of earlier versions: they load, bit for bit, and go on.

`tests/data/format1` and `tests/data/format2` were written by the code of those versions, with the
checksum of every leaf. `format2/next.json` holds the metrics that its code gave when it resumed.
"""

import dataclasses
import inspect
import json
import math
import pathlib
import re
import shutil
import types
import zlib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwm.agent
from jaxwm import config as configs
from jaxwm import train
from jaxwm.behaviors.actor_critic import Draws, action_draws
from jaxwm.evaluate import final
from jaxwm.optim import Schedule, resolve, value_at
from jaxwm.recipes import dreamer_v3
from jaxwm.run import checkpoint, formats
from jaxwm.run.log import read_metrics
from jaxwm.run.loop import resume
from jaxwm.types import JaxwmError

DATA = pathlib.Path(__file__).parents[1] / "data"


def checksums(state) -> dict[str, int]:
    """The checksum of every leaf, by its path."""

    def one(path, x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return plain(jax.tree_util.keystr(path)), zlib.crc32(np.asarray(x).tobytes())

    return dict(one(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(state))


def plain(path: str) -> str:
    """A path like "agent/opt/1/count", from either way to write it."""
    return "/".join(re.findall(r"[^][.'/]+", path))


@pytest.mark.parametrize("form", [1, 2])
def test_every_number_of_an_earlier_checkpoint_comes_back(form):
    folder = DATA / f"format{form}"
    config = checkpoint.read_config(folder)
    (step,) = checkpoint.steps(folder)
    assert checkpoint.faults(folder / "checkpoints" / str(step)) == []
    found = checkpoint.restore(folder, train.build(config).shapes(), config, pytest.fail)
    before = json.loads((folder / "leaves.json").read_text())
    before = {plain(name): x for name, x in before.items()}
    after = checksums(found)
    # The optimiser's count of updates also became the agent's own.
    assert int(found.agent.rest.updates) == int(found.clock.updates) > 0
    del after["agent/rest/updates"]
    assert Counter(after.values()) == Counter(before.values())
    same = before.keys() & after.keys()
    assert len(same) > 50
    assert all(before[name] == after[name] for name in same)
    params, _ = checkpoint.restore_params(folder, train.build(config).shapes().agent.params, config)
    assert checksums(params) == checksums(found.agent.params)
    with pytest.raises(JaxwmError, match=r"seed: 3 here, 0 there"):
        checkpoint.restore(folder, found, dataclasses.replace(config, seed=3))


def test_an_earlier_configuration_says_what_it_said():
    """What an annealed learning rate did, a schedule does; entries without effect are gone."""
    config = checkpoint.read_config(DATA / "format2")
    agent = dreamer_v3.sized("debug")
    optim = dataclasses.replace(
        agent.optim, learning_rate=Schedule(1e-3, 0.1 * 1e-3), warmup_steps=20
    )
    assert config.agent == dataclasses.replace(agent, optim=optim)
    assert (config.env, config.recipe, config.steps) == ("toy/Dials", "dreamer_v3", 400)
    assert (config.replay.prefill, config.replay.train_every, config.replay.pretrain) == (0, 0, 0)
    assert checkpoint.read_config(DATA / "format1").on_divergence == "abort"


def earlier(steps: int, anneal: int, **optim) -> dict:
    """A configuration as format 2 has it: 200 updates in 400 steps."""
    data = configs.read_json(DATA / "format2" / "config.json")
    optim = data["agent"]["optim"] | optim | {"anneal_steps": anneal}
    return data | {"steps": steps, "agent": data["agent"] | {"optim": optim}}


@pytest.mark.parametrize(
    ("steps", "anneal", "warmup", "updates"),
    [
        (400, 200, 20, 0),  # to the end of the run, however long it becomes
        (800, 200, 20, 200),  # a run that had been made longer
        (400, 100, 20, 100),
        (40, 101, 100, 0),  # a run that ends in its warmup
        (400, 0, 20, None),
    ],
)
def test_a_learning_rate_that_fell_still_falls(steps, anneal, warmup, updates):
    """By the formula of that version: linearly to a tenth, from the end of the warmup on."""
    config = formats.configured(earlier(steps, anneal, warmup_steps=warmup))
    rate = config.agent.optim.learning_rate
    assert rate == (1e-3 if updates is None else Schedule(1e-3, 0.1 * 1e-3, updates=updates))
    if updates is None:
        return
    solved = resolve(config.agent, config.updates).optim.learning_rate
    whole = dataclasses.replace(solved, updates=max(solved.updates, warmup + 1), warmup=warmup)
    for count in (0, warmup, (warmup + anneal) // 2, anneal, 10 * anneal):
        fallen = min(max(count - warmup, 0) / (anneal - warmup), 1.0)
        wanted = 1e-3 * min(count / warmup, 1 - 0.9 * fallen)
        assert math.isclose(value_at(whole, count), wanted, rel_tol=1e-6, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"learning_rate": "fast"}, "agent.optim.learning_rate is 'fast'"),
        ({"warmup_steps": None}, "agent.optim.warmup_steps is None"),
        ({"rate": 1.0}, "no configuration entry called 'agent.optim.rate'"),
    ],
)
def test_an_earlier_configuration_that_is_not_valid_is_told(change, told):
    with pytest.raises(JaxwmError, match=re.escape(told)):
        formats.configured(earlier(400, 200, **change))


@pytest.fixture
def earlier_draws(monkeypatch):
    """The random numbers of DreamerV3 as version 0.2's development drew them: three keys an update.

    The numbers behind them are the same; only how a key is split has changed.
    """

    def split(key, count=2):
        caller = inspect.currentframe().f_back.f_code.co_name
        if caller != "update":
            return jax.random.split(key, count)
        keys = jax.random.split(key, 3)
        return keys[0], keys[1:]

    random = types.SimpleNamespace(split=split)
    names = {name: getattr(jax, name) for name in ("grad", "jit", "tree")}
    monkeypatch.setattr(jaxwm.agent, "jax", types.SimpleNamespace(random=random, **names))
    make = dreamer_v3.actor_critic

    def actor_critic(config, action_space, model, *others):
        behavior = make(config, action_space, model, *others)

        def draws(keys, lead):
            dream = (config.imagine, math.prod(lead))
            return Draws(model.draws(keys[0], dream), action_draws(action_space, keys[1], dream))

        return behavior._replace(draws=draws)

    monkeypatch.setattr(dreamer_v3, "actor_critic", actor_critic)


def test_an_earlier_run_goes_on_as_it_would_have(earlier_draws, tmp_path, monkeypatch):
    """All metrics of ten updates are those of the earlier code to 1e-5, of ten more to 1e-4."""
    folder = tmp_path / "run"
    shutil.copytree(DATA / "format2", folder)
    config = dataclasses.replace(checkpoint.read_config(folder), log_every=4, eval_episodes=0)
    configs.write(config, folder / "config.json")
    monkeypatch.setattr(final, "draw", lambda *args: {})
    with jax.debug_key_reuse(False):  # one key stands for two
        resume(folder, quiet=True)
    wanted = json.loads((DATA / "format2" / "next.json").read_text())
    found = [line for line in read_metrics(folder) if line["step"] > 360]
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for line, before in zip(found, wanted, strict=True):
        assert before.keys() <= line.keys()
        for name, value in before.items():
            # Rounding grows from update to update.
            tolerance = 1e-5 if line["step"] <= 380 else 1e-4
            same = math.isclose(line[name], value, rel_tol=tolerance, abs_tol=1e-6)
            assert same, (line["step"], name, line[name], value)
    # What it saved has the present format, and rows of the earlier checkpoint.
    assert checkpoint.steps(folder) == [360, 400]
    like = train.build(config).shapes()
    assert int(checkpoint.restore(folder, like, config, pytest.fail).clock.updates) == 184
