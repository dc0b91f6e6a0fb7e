"""Seeds and settings of every recipe, side by side in one program."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import train
from jaxwm.config import flatten
from jaxwm.optim import Schedule
from jaxwm.recipes import RunConfig, sweep
from jaxwm.types import JaxwmError
from tests.conformance.cases import NAMES, compilations, small

SEEDS, CHUNKS, ITERATIONS = 2, 3, 7


def numbers(config: Any) -> dict[str, float]:
    """The numbers with fractions of an agent's configuration by path; two for a schedule."""
    found: dict[str, float] = {}
    for path, value in flatten(config).items():
        if isinstance(value, Schedule):
            found |= {f"agent.{path}.start": value.start, f"agent.{path}.end": value.end}
        elif isinstance(value, float):
            found[f"agent.{path}"] = value
    return found


def accepted(run: RunConfig, path: str, value: float) -> str:
    """A word that sweeps a number to another value in its range.

    Raises:
      JaxwmError: if no value is accepted, with the reason.
    """
    error: JaxwmError | None = None
    for other in (0.9 * value, 1.1 * value, 0.05, 0.5):
        word = f"{path}={other!r}"
        try:
            dataclasses.replace(run, sweep=(word,))
        except JaxwmError as refused:
            error = error or refused
        else:
            if other != value:
                return word
    assert error is not None
    raise error


class Members(NamedTuple):
    """A program that sweeps all numbers of a recipe at once, and what it refuses to sweep."""

    run: RunConfig
    refused: dict[str, str]
    program: train.Program
    chunk: train.Chunk


@pytest.fixture(scope="module", params=NAMES)
def members(request: pytest.FixtureRequest) -> Members:
    run = small(request.param)
    words, refused = [], {}
    for path, value in numbers(run.agent).items():
        try:
            words.append(accepted(run, path, value))
        except JaxwmError as error:
            refused[path] = str(error)
    # One number takes two values, so that settings and seeds are told apart.
    path, value = words[0].split("=")
    words[0] = f"{path}={value},{0.9 * float(value)!r}"
    run = dataclasses.replace(run, sweep=tuple(words), seeds=SEEDS)
    with jax.debug_key_reuse(False):
        program = train.build(run, ITERATIONS)
        return Members(run, refused, program, program.compile())


def test_every_number_can_be_swept_or_says_why_not(members):
    run, refused = members.run, members.refused
    swept = sweep.settings(run)[0]
    assert swept.keys() | refused.keys() == numbers(run.agent).keys()
    assert len(swept) > 5
    for path, words in refused.items():
        assert f"{path} cannot be swept: " in words, words


def test_what_is_no_number_with_fractions_says_so(members):
    run = dataclasses.replace(members.run, sweep=())
    for name, value in flatten(run.agent).items():
        if not isinstance(value, float | Schedule):
            with pytest.raises(JaxwmError, match=r"no entry to sweep called|cannot be swept: "):
                sweep.parse((f"agent.{name}=1,2",), run)


@pytest.mark.no_cover
def test_members_are_single_runs_and_a_second_call_compiles_nothing(members, caplog):
    """The last member is a run of its own with its values as constants and its seed."""
    run, _, program, chunk = members
    last = run.members - 1
    alone = sweep.member(run, last)
    assert run.members == 2 * SEEDS and alone.seed == run.seed + 1
    with jax.debug_key_reuse(False):
        state, metrics = chunk(program.init())
        with compilations(caplog) as compiled:
            for _ in range(CHUNKS - 1):
                state, metrics = chunk(state)
        assert not compiled
        own = train.build(alone, ITERATIONS)
        single = own.init()
        for _ in range(CHUNKS):
            single, told = own.chunk(single)
    assert own.chunk.function._cache_size() == 1
    assert int(single.clock.updates) == int(state.clock.updates) >= 3
    mine = jax.tree.map(lambda x: x[last], state._replace(clock=None))
    chex.assert_trees_all_equal(mine.row.is_first, single.row.is_first)
    chex.assert_trees_all_close(mine.agent.params, single.agent.params, atol=1e-4, rtol=1e-4)
    chex.assert_trees_all_close(mine.agent.rest, single.agent.rest, atol=1e-3, rtol=1e-3)
    for name, value in told.items():
        np.testing.assert_allclose(metrics[name][last], value, rtol=1e-3, atol=1e-3, err_msg=name)
    # The members differ from each other, in seed and in setting.
    flat = [
        jnp.concatenate([x[i].ravel() for x in jax.tree.leaves(state.agent.params)])
        for i in range(4)
    ]
    for one, other in ((0, 1), (1, 3), (2, 3)):
        assert (flat[one] != flat[other]).any()
    for leaf in jax.tree.leaves(state.agent):
        assert np.isfinite(leaf).all()
