"""The whole experiment comes back bit for bit, or an error says why not."""

import dataclasses
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import checkpoint, train
from jaxwm.config import write
from jaxwm.log import read_metrics
from jaxwm.run import resume
from jaxwm.types import JaxwmError


class Agent(NamedTuple):
    params: Any
    opt: Any


class State(NamedTuple):
    key: Any
    agent: Agent
    odd: Any


def state(scale: int = 1) -> State:
    """Every kind of leaf that a `TrainState` may hold."""
    params = {"a/b": jnp.arange(6.0).reshape(2, 3) * scale, "c": jnp.float32(0.1)}
    odd = {
        "bfloat16": jnp.array([0.1, -jnp.inf, 3e38], jnp.bfloat16),
        "uint8": jnp.arange(4, dtype=jnp.uint8),
        "bool": jnp.array([True, False]),
        "int32": jnp.int32(-7),
        "empty": jnp.zeros((0, 3)),
        "nan": jnp.array([jnp.nan, -0.0]),
        "keys": jax.random.split(jax.random.key(3), 2),
        "none": None,
    }
    return State(jax.random.key(1), Agent(params, (jnp.int32(scale), ())), odd)


def bits(tree: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Path, type, shape and bytes of every leaf."""

    def one(path, x):
        name = jax.tree_util.keystr(path)
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return name, str(x.dtype), x.shape, np.asarray(x).tobytes()

    return [one(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.fixture
def saved(tiny, tmp_path):
    """A run folder with checkpoints of `state`, the newest at step 3."""
    write(tiny, tmp_path / "config.json")
    with checkpoint.manager(tmp_path) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, step, state(step), tiny)
    return tmp_path


def test_every_leaf_comes_back_and_two_checkpoints_are_kept(saved, tiny):
    found = checkpoint.restore(saved, jax.eval_shape(state), tiny)
    assert bits(found) == bits(state(3))
    assert jax.tree.structure(found) == jax.tree.structure(state())
    assert sorted(x.name for x in (saved / "checkpoints").iterdir()) == ["2", "3"]
    assert checkpoint.latest(saved) == 3
    assert checkpoint.read_config(saved) == tiny


def test_parameters_are_read_without_the_rest(saved, tiny):
    shutil.rmtree(saved / "checkpoints" / "3" / "rest")
    like = jax.eval_shape(state).agent.params
    found = checkpoint.restore_params(saved, like, tiny)
    assert bits(found) == bits(state(3).agent.params)


def test_a_run_may_be_made_longer_but_not_another(saved, tiny):
    like = jax.eval_shape(state)
    longer = dataclasses.replace(tiny, steps=9000, save_every=7)
    assert bits(checkpoint.restore(saved, like, longer)) == bits(state(3))
    optim = dataclasses.replace(tiny.agent.optim, learning_rate=0.5)
    other = dataclasses.replace(
        tiny, seed=8, agent=dataclasses.replace(tiny.agent, optim=optim, slow_rate=0.7)
    )
    with pytest.raises(JaxwmError) as error:
        checkpoint.restore(saved, like, other)
    assert "another configuration" in str(error.value)
    assert "seed: 8 here, 0 there" in str(error.value)
    assert "agent.optim.learning_rate: 0.5 here, 0.001 there" in str(error.value)


def test_other_shapes_are_told_with_their_paths(saved, tiny):
    like = jax.eval_shape(state)
    odd = like.odd | {"uint8": jax.ShapeDtypeStruct((5,), jnp.int8)}
    with pytest.raises(JaxwmError) as error:
        checkpoint.restore(saved, like._replace(odd=odd), tiny)
    assert "odd/uint8: int8 (5,) here, uint8 (4,) there" in str(error.value)
    assert "start a new run" in str(error.value)
    del odd["uint8"]
    with pytest.raises(JaxwmError, match="odd/uint8: absent here, uint8"):
        checkpoint.restore(saved, like._replace(odd=odd), tiny)


def test_a_damaged_checkpoint_is_told(saved, tiny):
    shutil.rmtree(saved / "checkpoints" / "3" / "rest")
    with pytest.raises(JaxwmError, match=r"checkpoints/3 cannot be read .*Delete that folder"):
        checkpoint.restore(saved, jax.eval_shape(state), tiny)
    shutil.rmtree(saved / "checkpoints" / "3")
    assert bits(checkpoint.restore(saved, jax.eval_shape(state), tiny)) == bits(state(2))


def test_a_folder_that_is_no_run_is_told(tiny, tmp_path):
    with pytest.raises(JaxwmError, match=r"no run folder .*nowhere"):
        checkpoint.read_config(tmp_path / "nowhere")
    with pytest.raises(JaxwmError, match=r"not the folder of a run: it has no config\.json"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(JaxwmError, match="not JSON"):
        checkpoint.read_config(tmp_path)
    write(tiny, tmp_path / "config.json")
    with pytest.raises(JaxwmError, match="has no checkpoint"):
        resume(tmp_path)


def test_a_resumed_run_is_the_uninterrupted_one(tiny, finished, tmp_path):
    """From the checkpoint at 120 to 200 in a fresh process: every bit as in one go."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "200")
    write(dataclasses.replace(tiny, steps=120), folder / "config.json")
    words = ["-m", "jaxwm.cli", "resume", str(folder), "--steps", "200"]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "evaluation return: " in done.stdout
    assert checkpoint.latest(folder) == checkpoint.latest(finished) == 200

    like = jax.eval_shape(train.build(tiny).init)
    one, two = (checkpoint.restore(x, like, tiny) for x in (finished, folder))
    assert bits(one) == bits(two)
    assert int(one.clock.updates) > 0
    # What the compiled program is given: arrays on the device, as it returns them itself.
    for leaf in jax.tree.leaves(two):
        assert isinstance(leaf, jax.Array) and leaf.committed
        assert not getattr(leaf, "weak_type", False)

    def lines(x):
        varying = {"time", "memory/process"}
        return [{k: v for k, v in line.items() if k not in varying} for line in read_metrics(x)]

    assert lines(folder) == lines(finished)
    assert checkpoint.read_config(folder) == tiny
