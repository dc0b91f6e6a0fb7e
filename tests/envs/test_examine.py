"""`examine` names each fault of a broken environment, and finds none in a good one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import cli, envs
from jaxwm.envs.examine import examine, report
from jaxwm.types import Box, Discrete, Env, JaxwmError, first, transition

OBS = {"place": Box((1,), "float32", -50.0, 50.0)}
ACTION = Discrete(2)


def walk(reset_row=lambda row: row, step_row=lambda row, place: row, start=None, **spaces) -> Env:
    """A walk from a random place until step 7, but for what is given."""

    def reset(key):
        place = jax.random.uniform(key) if start is None else start()
        row = first(ACTION, {"place": jnp.asarray(place, jnp.float32)[None]})
        return (row.obs["place"], jnp.zeros((), jnp.int32)), reset_row(row)

    def step(state, action, key):
        place, count = state[0] + 2.0 * action - 1.0, state[1] + 1
        row = transition(action, {"place": place}, place[0], count >= 7)
        return (place, count), step_row(row, place[0])

    return Env("walk", spaces.get("obs_space", OBS), ACTION, reset, step)


def flag(**values):
    return lambda row, place=None: row._replace(**{k: jnp.asarray(v) for k, v in values.items()})


def seen(value):
    return lambda row, place: row._replace(obs={"place": value(place)[None]})


def wild() -> float:
    return np.random.uniform()


FAULTS = {
    "no first flag": (walk(flag(is_first=False)), "reset gives a row without is_first"),
    "born dead": (walk(flag(is_last=True, is_terminal=True)), "an episode of no step"),
    "early reward": (walk(flag(reward=1.0)), "reset gives a reward other than 0"),
    "early action": (walk(flag(action=np.int32(1))), "reset gives an action other than 0"),
    "resets itself": (
        walk(step_row=lambda row, place: row._replace(is_first=row.is_last)),
        r"step gives a row with is_first\. It must never reset",
    ),
    "terminal only": (
        walk(step_row=lambda row, place: row._replace(is_terminal=place > 2)),
        "is_terminal without is_last",
    ),
    "nan": (
        walk(step_row=seen(lambda place: jnp.sqrt(place))),
        "Observation 'place' holds NaN or infinity, first in step",
    ),
    "infinite reward": (
        walk(step_row=lambda row, place: row._replace(reward=1.0 / (0.0 * place))),
        "The reward holds NaN or infinity",
    ),
    "bounds": (
        walk(obs_space={"place": Box((1,), "float32", 0.0, 1.0)}),
        r"Observation 'place' holds .*, but its space has the bounds 0.0 and 1.0",
    ),
    "numpy's random numbers": (walk(start=wild), "Compiled twice, it does something else"),
}
NOTES = {
    "one start": (walk(start=lambda: 0.5), "Every episode begins with the same observation"),
    "constant": (
        walk(
            lambda row: row._replace(obs={"place": jnp.full(1, 0.5)}),
            lambda row, place: row._replace(obs={"place": jnp.full(1, 0.5)}),
        ),
        "Observation 'place' never changes",
    ),
    "no reward": (walk(step_row=flag(reward=0.0)), "never earned a reward"),
    "large rewards": (
        walk(step_row=lambda row, place: row._replace(reward=1e6 * place)),
        r"Rewards are as large as .*e\+06",
    ),
    "one step": (walk(step_row=flag(is_last=True)), "Every episode has a single step"),
    "endless": (walk(step_row=flag(is_last=False, is_terminal=False)), "give it a time limit"),
}


def test_a_good_environment_has_no_fault():
    result = examine(walk(), count=4, steps=30)
    assert (result.faults, result.notes) == ((), ())
    # 30 steps and their 3 restarts hold 3 whole episodes of 7 steps: 8 rows each.
    assert (result.episodes, result.mean_length) == (12, 7.0)
    assert np.isfinite(result.mean_return) and result.steps_per_second > 0
    # A place and a counter; an action, a place, a reward and three flags.
    assert (result.state_bytes, result.row_bytes) == (8, 15)
    assert "  good" in report(walk(), result)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name):
    env, message = FAULTS[name]
    result = examine(env, count=4, steps=30)
    assert len(result.faults) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(result.faults[0])
    assert "FAULT" in report(env, result) and "broken" in report(env, result)


@pytest.mark.parametrize("name", NOTES)
def test_what_is_seldom_meant_is_noted(name):
    env, message = NOTES[name]
    result = examine(env, count=4, steps=30)
    assert not result.faults
    with pytest.raises(ValueError, match=message):
        raise ValueError(" ".join(result.notes))


def test_idle_actions_and_wrong_classes():
    idle = examine(envs.make("toy/Prediction"), count=4, steps=30)
    assert any("Other actions lead to the very same" in note for note in idle.notes)
    bit = envs.make("toy/Memory")
    result = examine(bit._replace(obs_space={"cue": Discrete(3)}), count=4, steps=30)
    assert result.faults == ("Observation 'cue' holds 0 to 3, but its classes are 0 to 2.",)


def test_actions_of_every_kind():
    assert not examine(envs.make("toy/Dials"), count=2, steps=10).faults


def test_the_command(capsys, tmp_path, monkeypatch):
    assert cli.main(["envs", "check", "toy/Observe", "--steps", "20"]) == 0
    assert "good" in capsys.readouterr().out
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_to_check.py").write_text(
        "import jaxwm.envs, jax.numpy as jnp\n"
        "def fine(): return jaxwm.envs.make('toy/Memory')\n"
        "def lost(): return 3\n"
        "def broken():\n"
        "    env = fine()\n"
        "    def reset(key):\n"
        "        state, row = env.reset(key)\n"
        "        return state, row._replace(reward=jnp.ones(()))\n"
        "    return env._replace(reset=reset)\n"
    )
    assert cli.main(["envs", "check", "mine_to_check:fine", "--steps", "20"]) == 0
    assert cli.main(["envs", "check", "mine_to_check:broken", "--steps", "20"]) == 1
    assert "FAULT  reset gives a reward" in capsys.readouterr().out
    with pytest.raises(JaxwmError, match="returns int, but a"):
        envs.load("mine_to_check:lost")
    for name in ("mine_to_check:gone", "not_there_at_all:make"):
        assert cli.main(["envs", "check", name]) == 2
        assert "is not there" in capsys.readouterr().err
    assert cli.main(["envs", "check", "toy/Observe", "--steps", "0"]) == 2
