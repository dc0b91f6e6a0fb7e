"""The whole experiment comes back bit for bit, or an error says why not."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxwm import train
from jaxwm.config import write
from jaxwm.replay.device import Buffer, Cursor
from jaxwm.run import arrays, checkpoint
from jaxwm.run.log import read_metrics
from jaxwm.run.saver import Saver
from jaxwm.train.state import Clock
from jaxwm.types import AgentState, JaxwmError, Step


class State(NamedTuple):
    key: Any
    agent: AgentState
    odd: Any
    buffer: Buffer
    clock: Clock


CAPACITY, ENVS = 8, 2


def state(scale: int = 1, written: int = 3, xp: Any = jnp) -> State:
    """Every kind of leaf that a `TrainState` may hold, and a replay with so many rows written."""
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
    # Row r of environment e is 100 e + r + 1, and lies at r % CAPACITY.
    rows = np.zeros((ENVS, CAPACITY), np.float32)
    for r in range(written):
        rows[:, r % CAPACITY] = 100 * np.arange(ENVS) + r + 1
    rows = xp.asarray(rows)
    flags = rows > 2
    step = Step(
        rows * 2, {"o": xp.stack([rows] * 3, -1)}, rows * 0.5, flags, ~flags & (rows > 0), flags
    )
    memo = {"a": rows[..., None] * scale, "b": [(rows * scale).astype(np.uint8)]}
    buffer = Buffer(step, memo)
    number = jnp.int32(written)
    clock = Clock(number, number, number, Cursor(number, number))
    return State(jax.random.key(1), AgentState(params, (jnp.int32(scale), ())), odd, buffer, clock)


def bits(tree: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Path, type, shape and bytes of every leaf."""

    def one(path, x):
        name = jax.tree_util.keystr(path)
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return name, str(x.dtype), x.shape, np.asarray(x).tobytes()

    return [one(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def files(folder: pathlib.Path) -> dict[str, int]:
    """Every file of a folder, by its inode."""
    return {str(x.relative_to(folder)): x.stat().st_ino for x in folder.rglob("*") if x.is_file()}


@pytest.fixture(scope="module")
def saved_once(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    write(tiny, folder / "config.json")
    with Saver(folder, tiny, pytest.fail) as saver:
        for step in (1, 2, 3):
            saver.save(step, state(step, written=step + 1), score=[0.5, 2.0, 1.0][step - 1])
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """A run folder with checkpoints of `state`, the newest at step 3."""
    return pathlib.Path(shutil.copytree(saved_once, tmp_path / "run"))


def test_every_leaf_comes_back_and_two_checkpoints_are_kept(saved, tiny):
    found = checkpoint.restore(saved, jax.eval_shape(state), tiny, pytest.fail)
    assert bits(found) == bits(state(3, 4))
    assert jax.tree.structure(found) == jax.tree.structure(state())
    assert sorted(x.name for x in (saved / "checkpoints").iterdir()) == ["2", "3", "best-2"]
    assert checkpoint.latest(saved) == 3 and checkpoint.steps(saved) == [2, 3]
    assert checkpoint.read_config(saved) == tiny


@pytest.mark.parametrize("xp", [jnp, np], ids=["device", "host"])
def test_only_new_rows_are_written_and_the_ring_comes_back(tiny, tmp_path, xp):
    """A checkpoint takes rows over from the one before the last, and shares no file with the last.

    Rows that all have been replaced are left out: of 8, after 30 those before 22.
    """
    written = {1: 3, 2: 5, 3: 9, 4: 14, 5: 14, 6: 30}
    rows = {
        1: ["0-3"],
        2: ["0-5"],
        3: ["0-3", "3-9"],
        4: ["6-14"],
        5: ["3-9", "9-14"],
        6: ["22-30"],
    }
    like = jax.eval_shape(state)
    if xp is np:
        like = like._replace(buffer=state(xp=np).buffer)
    with Saver(tmp_path, tiny, pytest.fail) as saver:
        for step, count in written.items():
            saver.save(step, state(step, count, xp))
            saver.wait()
            folder = tmp_path / "checkpoints" / str(step)
            assert sorted(x.name for x in folder.glob("rows-*")) == sorted(
                f"rows-{x}" for x in rows[step]
            )
            found = checkpoint.restore(tmp_path, like, tiny, pytest.fail)
            assert bits(found) == bits(state(step, count, xp))
            assert isinstance(found.buffer.memo["a"], np.ndarray if xp is np else jax.Array)
            if step > 1:
                before = files(tmp_path / "checkpoints" / str(step - 1))
                assert not set(before.values()) & set(files(folder).values())


@pytest.mark.parametrize("xp", [jnp, np], ids=["device", "host"])
@pytest.mark.parametrize(("limit", "stored"), [(0, "01"), (20, ["0", "small"]), (25, ["small"])])
def test_small_leaves_are_stored_as_one_array(tiny, tmp_path, monkeypatch, limit, stored, xp):
    """The parameters are arrays of 24 and 4 bytes; whatever the limit was, all comes back."""
    monkeypatch.setattr(arrays, "_SMALL", limit)
    with Saver(tmp_path, tiny, pytest.fail) as saver:
        saver.save(1, state(1, 3, xp))
    monkeypatch.undo()
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        there = checkpointer.metadata(tmp_path / "checkpoints" / "1" / "params")
    assert sorted(there.item_metadata.tree) == sorted(stored)
    like = jax.eval_shape(state)
    like = like._replace(buffer=state(1, 3, xp).buffer) if xp is np else like
    found = checkpoint.restore(tmp_path, like, tiny, pytest.fail)
    assert bits(found) == bits(state(1, 3, xp))
    assert isinstance(found.buffer.rows.reward, xp.ndarray)


@pytest.mark.parametrize("written", [0, 1, 7, 9])
def test_memos_are_stored_in_blocks(tiny, tmp_path, written):
    """Of a ring of 7 memos a block is 1, of 20 it is 3: the last one starts again at the front."""
    for capacity in (7, 20):
        run = tmp_path / str(capacity)
        ring = jax.random.normal(jax.random.key(0), (ENVS, capacity, 3))
        # Where nothing was written there are zeros.
        ring = jnp.where(jnp.arange(capacity)[:, None] < written, ring, 0)
        flags = jnp.zeros((ENVS, capacity), bool)
        step = Step(flags, {}, ring[..., 0], flags, flags, flags)
        whole = state(1, written)
        memo = (ring, jnp.round(ring[..., :2] * 9).astype(jnp.uint8))
        whole = whole._replace(buffer=Buffer(step, memo))
        with Saver(run, tiny, pytest.fail) as saver:
            saver.save(1, whole)
        found = checkpoint.restore(run, jax.eval_shape(lambda x=whole: x), tiny, pytest.fail)
        assert bits(found.buffer) == bits(whole.buffer)


@pytest.mark.parametrize("xp", [jnp, np], ids=["device", "host"])
def test_a_replay_without_memos_comes_back(tiny, tmp_path, xp):
    whole = state(1, 4, xp)
    whole = whole._replace(buffer=whole.buffer._replace(memo=()))
    with Saver(tmp_path, tiny, pytest.fail) as saver:
        saver.save(1, whole)
    assert not (tmp_path / "checkpoints" / "1" / "memo").exists()
    like = jax.eval_shape(lambda: whole)
    like = like._replace(buffer=whole.buffer) if xp is np else like
    assert bits(checkpoint.restore(tmp_path, like, tiny, pytest.fail)) == bits(whole)


def test_a_state_may_be_overwritten_as_soon_as_saving_has_begun(tiny, tmp_path):
    overwrite = jax.jit(lambda x: jax.tree.map(jnp.zeros_like, x), donate_argnums=0)
    moved = state(1, 4)
    with Saver(tmp_path, tiny, pytest.fail) as saver:
        saver.save(1, moved)
        plain = (moved.agent, moved.buffer, moved.clock)
        jax.block_until_ready(overwrite(plain))
    found = checkpoint.restore(tmp_path, jax.eval_shape(state), tiny)
    assert bits(found) == bits(state(1, 4))


def test_parameters_are_read_without_the_rest(saved, tiny):
    shutil.rmtree(saved / "checkpoints" / "3" / "rest")
    like = jax.eval_shape(state).agent.params
    found, step = checkpoint.restore_params(saved, like, tiny, tell=pytest.fail)
    assert step == 3
    assert bits(found) == bits(state(3).agent.params)
    best, step = checkpoint.restore_params(saved, like, tiny, best=True, tell=pytest.fail)
    assert step == 2
    assert bits(best) == bits(state(2).agent.params)
    shutil.rmtree(saved / "checkpoints" / "best-2")
    with pytest.raises(JaxwmError, match="has no best checkpoint"):
        checkpoint.restore_params(saved, like, tiny, best=True)


def test_a_run_may_be_made_longer_but_not_another(saved, tiny):
    like = jax.eval_shape(state)
    longer = dataclasses.replace(tiny, steps=9000, save_every=7)
    assert bits(checkpoint.restore(saved, like, longer)) == bits(state(3, 4))
    optim = dataclasses.replace(tiny.agent.optim, learning_rate=0.5)
    other = dataclasses.replace(
        tiny, seed=8, agent=dataclasses.replace(tiny.agent, optim=optim, slow_rate=0.7)
    )
    with pytest.raises(JaxwmError) as error:
        checkpoint.restore(saved, like, other)
    assert "another configuration" in str(error.value)
    assert "seed: 8 here, 0 there" in str(error.value)
    assert "agent.optim.learning_rate: 0.5 here, 0.001 there" in str(error.value)
    assert "use --accept-changes if the changes are meant" in str(error.value)
    assert bits(checkpoint.restore(saved, like, other, accept=True)) == bits(state(3, 4))


def test_other_shapes_are_told_with_their_paths(saved, tiny):
    like = jax.eval_shape(state)
    odd = like.odd | {"uint8": jax.ShapeDtypeStruct((5,), jnp.int8)}
    with pytest.raises(JaxwmError) as error:
        checkpoint.restore(saved, like._replace(odd=odd), tiny)
    assert "odd/uint8: int8 (5,) here, uint8 (4,) there" in str(error.value)
    assert "start a new run" in str(error.value)
    assert "--accept-changes" not in str(error.value)
    del odd["uint8"]
    with pytest.raises(JaxwmError, match="odd/uint8: absent here, uint8"):
        checkpoint.restore(saved, like._replace(odd=odd), tiny, accept=True)


def flip(path: pathlib.Path) -> None:
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "linked": lambda path: (
        path.rename(path.with_suffix(".x")),
        path.symlink_to(path.with_suffix(".x")),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_found_and_passed_over(saved, tiny, tmp_path, damage):
    folder, whole = saved / "checkpoints" / "3", tmp_path / "whole"
    shutil.copytree(folder, whole)
    for name in files(whole):
        DAMAGE[damage](folder / name)
        assert len(checkpoint.faults(folder)) == 1, name
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
    assert checkpoint.faults(folder) == []
    DAMAGE[damage](folder / "rest" / "manifest.ocdbt")
    told = []
    found = checkpoint.restore(saved, jax.eval_shape(state), tiny, told.append)
    assert bits(found) == bits(state(2, 3))
    assert len(told) == 1 and "checkpoints/3 is damaged: " in told[0]
    assert checkpoint.latest(saved) == 2
    DAMAGE[damage](saved / "checkpoints" / "2" / "params" / "manifest.ocdbt")
    with pytest.raises(JaxwmError, match=r"None of the checkpoints .* is sound"):
        checkpoint.restore(saved, jax.eval_shape(state), tiny, told.append)
    with pytest.raises(JaxwmError, match=r"None of the checkpoints .* is sound"):
        checkpoint.latest(saved)


def test_checkpoints_that_have_changed_places_or_grown_are_found(saved):
    folder = saved / "checkpoints"
    (folder / "3" / "more").write_text("")
    assert checkpoint.faults(folder / "3") == ["more does not belong to it"]
    (folder / "3").rename(folder / "4")
    (folder / "4" / "more").unlink()
    assert checkpoint.faults(folder / "4") == ["it is the checkpoint of step 3"]


def test_what_was_damaged_is_set_aside_where_a_run_goes_on(saved, tiny):
    """The checkpoint after it takes over no rows that are damaged."""
    folder = saved / "checkpoints"
    flip(folder / "3" / "params" / "manifest.ocdbt")
    (folder / ".9.saving").mkdir()
    with Saver(saved, tiny, pytest.fail, start=2) as saver:
        assert sorted(x.name for x in folder.iterdir()) == ["2", "3.damaged", "best-2"]
        saver.save(3, state(3, 4))
    assert checkpoint.steps(saved) == [2, 3] and checkpoint.latest(saved) == 3
    names = {name: state for name, _, state in checkpoint.overview(saved)}
    assert names["2"] == names["3"] == names["best-2"] == "sound"
    assert "has changed" in names["3.damaged"]
    assert checkpoint.prune(saved) == ["3.damaged"]
    assert sorted(x.name for x in folder.iterdir()) == ["2", "3", "best-2"]


def test_a_run_that_goes_back_past_a_damaged_checkpoint_saves_that_step_anew(saved, tiny):
    with Saver(saved, tiny, pytest.fail, start=3) as saver:
        flip(saved / "checkpoints" / "3" / "params" / "manifest.ocdbt")
        saver.rewind(2)
        saver.save(3, state(7, 8))
        saver.save(4, state(4, 5))
    assert checkpoint.steps(saved) == [3, 4]
    names = {name: state for name, _, state in checkpoint.overview(saved)}
    assert names["3"] == names["4"] == "sound" and "has changed" in names["3.damaged"]


def test_rows_that_were_damaged_meanwhile_are_written_anew(saved, tiny):
    told = []
    rows = next((saved / "checkpoints" / "2").glob("rows-*/d/*"))
    flip(rows)
    with Saver(saved, tiny, told.append, start=3) as saver:
        saver.save(4, state(4, 5))
        saver.wait()
        assert saver.failed and "has changed" in told[0] and "that of step 3 stays" in told[0]
        assert checkpoint.steps(saved) == [2, 3]
        saver.save(5, state(5, 6))
    assert not saver.failed
    assert checkpoint.steps(saved) == [3, 5]
    found = checkpoint.restore(saved, jax.eval_shape(state), tiny, pytest.fail)
    assert bits(found) == bits(state(5, 6))


def test_a_full_disk_is_told_and_leaves_no_trace(saved, tiny, monkeypatch):
    told = []
    usage = shutil.disk_usage(saved)._replace(free=1000)
    with Saver(saved, tiny, told.append, start=3) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            saver.save(4, state(4, 5))
            saver.wait()
        assert saver.failed
        assert "step 4 could not be written" in told[0] and "no space left" in told[0]
        assert sorted(x.name for x in (saved / "checkpoints").iterdir()) == ["2", "3", "best-2"]
        saver.save(4, state(4, 5))
    assert not saver.failed and checkpoint.steps(saved) == [3, 4] and len(told) == 1


def test_a_folder_that_is_no_run_is_told(tiny, tmp_path):
    with pytest.raises(JaxwmError, match=r"no run folder .*nowhere"):
        checkpoint.read_config(tmp_path / "nowhere")
    with pytest.raises(JaxwmError, match=r"not the folder of a run: it has no config\.json"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(JaxwmError, match="not JSON"):
        checkpoint.read_config(tmp_path)
    write(tiny, tmp_path / "config.json")
    with pytest.raises(JaxwmError, match="has no checkpoint yet"):
        checkpoint.latest(tmp_path)


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
