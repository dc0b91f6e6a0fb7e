"""Weights for exchange come back bit for bit and act the same, or an error says why not."""

import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxwm
from jaxwm import cli
from jaxwm.run import checkpoint, weights
from jaxwm.types import JaxwmError


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    return weights.export(finished, tmp_path_factory.mktemp("exported") / "weights")


def bits(tree):
    """Path, type, shape and bytes of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path, str(x.dtype), x.shape, np.asarray(x).tobytes()) for path, x in leaves]


def test_the_networks_of_a_run_come_back(exported, finished, tiny):
    like = weights.shapes(tiny)[1]
    found = weights.read(exported, like)
    assert bits(found) == bits(checkpoint.restore_params(finished, like, tiny)[0])
    assert jax.tree.structure(found) == jax.tree.structure(like)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


def test_the_files_are_plain(exported, tiny):
    names = {"config.json", weights.ABOUT, weights.TENSORS}
    assert {path.name for path in exported.iterdir()} == names
    about = weights.read_about(exported)
    raw = (exported / weights.TENSORS).read_bytes()
    assert about.sha256 == hashlib.sha256(raw).hexdigest()
    assert (about.step, about.env, about.format) == (200, "toy/Memory", weights.FORMAT)
    assert about.jaxwm == jaxwm.__version__
    assert checkpoint.read_config(exported) == tiny
    # Anybody's reader of safetensors finds the same, by the same names.
    tensors = load_file(exported / weights.TENSORS)
    assert about.tensors == {k: [str(x.dtype), list(x.shape)] for k, x in sorted(tensors.items())}
    assert all(name.count("/") >= 1 for name in tensors)


def test_it_acts_as_the_run_does(exported, finished):
    one, two = jaxwm.load(finished), jaxwm.load(exported)
    state, other = one.initial(8), two.initial(8)
    for cue in (1, 0, 0, 3):
        action, state = one.act(np.full(8, cue), state)
        again, other = two.act(np.full(8, cue), other)
        np.testing.assert_array_equal(action, again)
    assert bits(state.carry) == bits(other.carry)


def test_a_run_is_exported_and_evaluated_from_the_shell(finished, exported, tmp_path, capsys):
    folder = tmp_path / "new" / "weights"
    assert cli.main(["checkpoints", str(finished), "export", str(folder)]) == 0
    assert capsys.readouterr().out.split() == [str(folder)]
    for name in (weights.ABOUT, weights.TENSORS, "config.json"):
        assert (folder / name).read_bytes() == (exported / name).read_bytes()
    assert cli.main(["eval", str(folder), "--episodes", "3"]) == 0
    words = capsys.readouterr().out
    assert cli.main(["eval", str(finished), "--episodes", "3"]) == 0
    assert capsys.readouterr().out == words


def test_the_best_networks_are_exported(finished, tiny, tmp_path):
    (best,) = (finished / "checkpoints").glob("best-*")
    folder = weights.export(finished, tmp_path / "weights", best=True)
    assert weights.read_about(folder).step == int(best.name.removeprefix("best-"))
    like = weights.shapes(tiny)[1]
    there, _ = checkpoint.restore_params(finished, like, tiny, best=True)
    assert bits(weights.read(folder, like)) == bits(there)


ODD = {
    "a": {"b c": jnp.array([0.1, -jnp.inf, 3e38], jnp.bfloat16), "ü": jnp.float32(0.1)},
    "list": [jnp.arange(4, dtype=jnp.uint8), jnp.array([True, False]), jnp.int32(-7)],
    "empty": jnp.zeros((0, 3)),
    "turned": jnp.arange(6.0).reshape(2, 3).T,
    "nan": jnp.array([jnp.nan, -0.0], jnp.float16),
}


def test_every_type_comes_back(tiny, tmp_path):
    folder = weights.write(tmp_path / "weights", ODD, tiny, 7)
    like = jax.eval_shape(lambda: ODD)
    assert bits(weights.read(folder, like)) == bits(ODD)
    about = weights.read_about(folder)
    assert about.tensors["a/b c"] == ["bfloat16", [3]] and about.tensors["list/2"] == ["int32", []]


def test_members_lead_the_axes(tiny, tmp_path):
    two = dataclasses.replace(tiny, seeds=2)
    alone, like = weights.shapes(tiny)[1], weights.shapes(two)[1]
    shapes = [x.shape for x in jax.tree.leaves(like)]
    assert shapes == [(2, *x.shape) for x in jax.tree.leaves(alone)]
    params = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), like)
    folder = weights.write(tmp_path / "weights", params, two, 7)
    policy = jaxwm.load(folder, member=1)
    assert bits(policy.params) == bits(jax.tree.map(lambda x: x[1], params))
    with pytest.raises(JaxwmError, match="member is 2"):
        jaxwm.load(folder, member=2)


def test_what_does_not_fit_is_told_with_its_name(tiny, tmp_path):
    folder = weights.write(tmp_path / "weights", ODD, tiny, 7)
    like = jax.eval_shape(lambda: ODD)
    with pytest.raises(JaxwmError) as error:
        weights.read(
            folder, like | {"nan": jax.ShapeDtypeStruct((3,), jnp.float32), "more": like["nan"]}
        )
    words = str(error.value)
    assert "nan: ['float16', [2]] there, ['float32', [3]] expected" in words
    assert "more: absent there, ['float16', [2]] expected" in words
    with pytest.raises(JaxwmError, match=r"empty: \['float32', \[0, 3\]\] there, absent expected"):
        weights.read(folder, {k: x for k, x in like.items() if k != "empty"})


def test_a_taken_folder_is_left_alone(finished, tiny, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert weights.write(empty, ODD, tiny, 7) == empty
    before = sorted(path.read_bytes() for path in empty.iterdir())
    with pytest.raises(JaxwmError, match="is there already, and is not an empty folder"):
        weights.export(finished, empty)
    assert sorted(path.read_bytes() for path in empty.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(JaxwmError, match="is there already"):
        weights.write(tmp_path / "file", ODD, tiny, 7)
    with pytest.raises(JaxwmError, match=r"cannot be written: .*Give another folder"):
        weights.write(tmp_path / "file" / "below", ODD, tiny, 7)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["empty", "file"]


def test_what_cannot_be_written_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(JaxwmError, match="No space left on device"):
            weights.write(tmp_path / "weights", ODD, tiny, 7)
    assert not list(tmp_path.iterdir())
    with pytest.raises(JaxwmError, match=r"a is float8_e4m3fn, which safetensors cannot hold"):
        weights.write(tmp_path / "weights", {"a": jnp.zeros(2, jnp.float8_e4m3fn)}, tiny, 7)
    with pytest.raises(JaxwmError, match="have the same path"):
        weights.write(tmp_path / "weights", {"a/b": ODD["nan"], "a": {"b": ODD["nan"]}}, tiny, 7)


def test_damage_is_told(exported, tiny, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "weights")
    path = folder / weights.TENSORS
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(JaxwmError, match=r"changed or damaged\. Get it again"):
        jaxwm.load(folder)
    path.write_bytes(raw[:-1])
    with pytest.raises(JaxwmError, match=r"changed or damaged"):
        jaxwm.load(folder)
    about = json.loads((folder / weights.ABOUT).read_text("utf-8"))
    (folder / weights.ABOUT).write_text(json.dumps(about | {"format": 2}), "utf-8")
    with pytest.raises(JaxwmError, match=r"has format 2, and this version of jaxwm reads 1"):
        jaxwm.load(folder)
    (folder / weights.ABOUT).unlink()
    with pytest.raises(JaxwmError, match="no checkpoint"):
        jaxwm.load(folder)
