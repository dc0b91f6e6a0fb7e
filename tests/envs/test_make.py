"""Environments by name."""

import subprocess
import sys

import pytest

from jaxwm import envs
from jaxwm.types import JaxwmError


def test_importing_does_not_import_the_packages():
    code = (
        "import sys, jaxwm.envs as e; e.make('toy/Memory'); "
        "assert not {'gymnasium', 'gymnax', 'brax', 'mujoco', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_made_and_checked():
    known = envs.names()
    assert {"brax", "gymnasium", "gymnax", "toy"} <= set(known)
    assert "CartPole-v1" in known["gymnax"] and "halfcheetah" in known["brax"]
    assert "MNISTBandit-bsuite" not in known["gymnax"]
    for name in known["toy"]:
        env = envs.make(f"toy/{name}")
        assert env.name == f"toy/{name}"
        envs.validate(env)
    for name in known["gymnax"]:
        envs.validate(envs.make(f"gymnax/{name}"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPole-v1", "no environment called 'CartPole-v1'. Did you mean gymnax/CartPole-v1"),
        ("gymnaks/CartPole-v1", "no environment suite called 'gymnaks'. Did you mean gymnax"),
        ("toy/Memroy", "no toy environment called 'Memroy'. Did you mean Memory"),
        ("gymnax/Cartpole", "no gymnax environment called 'Cartpole'. Did you mean CartPole-v1"),
    ],
)
def test_unknown_names_meet_the_nearest(name, message):
    with pytest.raises(JaxwmError, match=message):
        envs.make(name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(JaxwmError, match=r"needs the package 'gymnax'.*pip install gymnax"):
        envs.make("gymnax/CartPole-v1")
    assert envs.names()["gymnax"] == []
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(
        JaxwmError, match=r"needs the package 'ale_py'.*pip install 'jaxwm\[atari\]'"
    ):
        envs.make("atari/Pong")
