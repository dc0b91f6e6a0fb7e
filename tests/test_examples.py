"""The files in `examples/` train and dream at debug size."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest

from jaxwm import train
from jaxwm.recipes import RECIPES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def own_recipes():
    """Recipes that an example adds are gone after the test."""
    before = set(RECIPES)
    yield
    for name in set(RECIPES) - before:
        del RECIPES[name]


@pytest.mark.parametrize(
    ("file", "name"), [("lstm_core", "lstm"), ("curiosity", "dreamer_v3_curious")]
)
def test_a_part_of_ones_own_learns(own_recipes, file, name):
    runpy.run_path(str(EXAMPLES / f"{file}.py"))
    config = RECIPES[name].run("toy/Credit", "debug", None, "cartpole")
    config = dataclasses.replace(
        config, replay=dataclasses.replace(config.replay, capacity=1000, batch_length=8)
    )
    program = train.build(config, iterations=10)
    state = program.init()
    while int(state.clock.updates) < 3:
        state, metrics = program.chunk(state)
    assert metrics["updates/refused"] == 0 and metrics["loss/total"] == metrics["loss/total"]
    if name == "lstm":
        assert set(state.agent.params["model"]["core"]) == {"kernel", "bias"}
        assert state.carry.model.core._fields == ("hidden", "cell")
    else:
        assert metrics["loss/novelty"] > 0


def test_the_lstm_is_one_short_file():
    assert len((EXAMPLES / "lstm_core.py").read_text("utf-8").splitlines()) <= 60


def test_a_trained_run_dreams_by_hand(finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dream_by_hand.py", str(finished)])
    runpy.run_path(str(EXAMPLES / "dream_by_hand.py"))
    printed = capsys.readouterr().out
    assert printed.count("reward ") == 15 and "(real " in printed
