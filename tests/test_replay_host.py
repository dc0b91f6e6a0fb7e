"""The rings in the host's memory are those on the device, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import bits
from test_replay import BATCH, CAPACITY, LENGTH, D, K, N, S, make, rows

from jaxwm.replay import device as replay
from jaxwm.replay import host as replay_host
from jaxwm.types import JaxwmError, Latent


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_rings_are_the_same_past_their_end(dtype, every):
    memory, fill = make(True, every=every)
    shapes = memory.shapes._replace(deter=jax.ShapeDtypeStruct(memory.shapes.deter.shape, dtype))
    buffer, cursor = memory.init()
    buffer = buffer._replace(deter=buffer.deter.astype(dtype))
    ours = replay_host.empty(shapes)
    choose, write_back = jax.jit(memory.choose), jax.jit(memory.write_back)
    random, twice, written = np.random.default_rng(0), 0, 0
    for number in range(25):
        more = int(random.integers(LENGTH + 2 if number == 0 else 0, 6 + LENGTH))
        buffer, cursor = fill(buffer, cursor, written, written + more)
        for time in range(written, written + more):
            step, latent = jax.device_get(rows(time))
            replay_host.add(ours, time, step, jax.device_get(replay.pack(latent)))
        written += more

        env, start, _ = jax.device_get(choose(cursor, jax.random.key(number)))
        window, cursor = memory.sample(buffer, cursor, jax.random.key(number))
        steps = replay.close_abandoned(replay_host.read(ours, env, start, LENGTH))
        context = replay.unpack(replay_host.context(ours, env, start), K)
        assert bits((context, steps)) == bits((window.context, window.steps))

        places = set(zip(np.tile(env, LENGTH), np.asarray(window.index).ravel(), strict=True))
        twice += len(places) < LENGTH * BATCH
        deter = random.normal(size=(LENGTH, BATCH, D)).astype(dtype)
        stoch = np.eye(K, dtype=dtype)[random.integers(0, K, (LENGTH, BATCH, S))]
        buffer = write_back(buffer, window, Latent(deter, stoch))
        packed = jax.device_get(replay.pack(Latent(jnp.asarray(deter), jnp.asarray(stoch))))
        replay_host.write_back(ours, env, start, packed)
    assert written > 4 * CAPACITY and twice > 5  # a row in two windows: the later one counts
    assert bits(ours) == bits(buffer) and ours.deter.shape == (N, CAPACITY // every, D)


def test_seeds_are_rings_side_by_side():
    shapes = make(True)[0].shapes
    many = replay_host.empty(shapes, (2,))
    apart = [replay_host.empty(shapes) for _ in range(2)]
    random = np.random.default_rng(1)

    def both(x, y):
        return jax.tree.map(lambda *leaves: np.stack(leaves), x, y)

    for time in range(CAPACITY + 7):
        new = [jax.device_get((x, replay.pack(y))) for x, y in (rows(time), rows(time + 500))]
        for ring, (step, latents) in zip(apart, new, strict=True):
            replay_host.add(ring, time, step, latents)
        replay_host.add(many, time, *both(*new))
    env = random.integers(0, N, (2, BATCH))
    start = random.integers(7, CAPACITY + 7 - LENGTH, (2, BATCH))
    deter = random.normal(size=(2, LENGTH, BATCH, D)).astype(np.float32)
    stoch = random.integers(0, K, (2, LENGTH, BATCH, S)).astype(np.uint8)
    replay_host.write_back(many, env, start, replay.Packed(deter, stoch))
    for i, ring in enumerate(apart):
        replay_host.write_back(ring, env[i], start[i], replay.Packed(deter[i], stoch[i]))
    assert bits(many) == bits(both(*apart))
    windows = [replay_host.read(r, env[i], start[i], LENGTH) for i, r in enumerate(apart)]
    assert bits(replay_host.read(many, env, start, LENGTH)) == bits(both(*windows))
    contexts = [replay_host.context(r, env[i], start[i]) for i, r in enumerate(apart)]
    assert bits(replay_host.context(many, env, start)) == bits(both(*contexts))


def test_an_outline_takes_no_memory():
    shapes = make(True)[0].shapes
    outline, empty = (f(shapes, (2,)) for f in (replay_host.outline, replay_host.empty))
    assert bits(outline) == bits(empty) and outline.deter.shape == (2, N, CAPACITY, D)
    assert all(set(x.strides) == {0} for x in jax.tree.leaves(outline))


def test_more_than_the_host_has_is_told(monkeypatch):
    with pytest.raises(JaxwmError, match=r"The replay needs 1048576.0 GiB and this host has"):
        replay.check_fits(2**50, place="host")
    monkeypatch.setattr(replay, "_host_bytes", lambda: 3 * 2**30)
    with pytest.raises(JaxwmError, match=r"needs 4.0 GiB and this host has 3.0 GiB. Lower --repl"):
        replay.check_fits(4 * 2**30, place="host")
    replay.check_fits(2 * 2**30, place="host")
