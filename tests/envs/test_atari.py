"""The adapter of Atari against a plain loop over the emulator, and its filter against numpy."""

import numpy as np
import pytest
from PIL import Image

from jaxwm.envs import atari
from jaxwm.envs.check import validate
from jaxwm.envs.host import HostConfig, Pool
from jaxwm.types import JaxwmError

ale_py = pytest.importorskip("ale_py")


class Plain:
    """Pong with a screen for every frame ever shown, and the settings written out."""

    def __init__(self, sticky):
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", sticky)

    def reset(self, seed):
        if seed is not None:
            self.random = np.random.default_rng(seed)
            self.ale.setInt("random_seed", int(self.random.integers(2**31)))
            self.ale.loadROM(ale_py.roms.get_rom_path("pong"))
        self.ale.reset_game()
        for _ in range(self.random.integers(0, 30, endpoint=True)):
            self.ale.act(0)
        self.screens = [self.ale.getScreenRGB()] * 2

    def step(self, button):
        reward = 0
        for _ in range(4):
            if not self.ale.game_over():
                reward += self.ale.act(button)
                self.screens.append(self.ale.getScreenRGB())
        return reward, self.ale.game_over()

    def picture(self, size, gray):
        screen = Image.fromarray(np.maximum(self.screens[-1], self.screens[-2]))
        image = np.array(screen.resize((size, size), Image.BILINEAR))
        if not gray:
            return image
        red, green, blue = np.moveaxis(image.astype(float), -1, 0)
        grey = 0.299 * red + 0.587 * green + (1 - (0.299 + 0.587)) * blue
        return grey.astype(np.uint8)[..., None]


@pytest.mark.parametrize(
    ("name", "size", "gray", "sticky", "buttons"),
    [
        ("Pong", 96, True, 0.25, range(18)),
        ("Pong:100k", 64, False, 0.0, [0, 1, 3, 4, 11, 12]),
    ],
)
def test_rows_equal_a_plain_loop(name, size, gray, sticky, buttons):
    env = atari.make(name)
    assert env.obs_space["image"].shape == (size, size, 1 if gray else 3)
    assert env.action_space.classes == len(buttons)
    simulator, plain = env.open(), Plain(sticky)
    obs, _ = simulator.reset(7), plain.reset(7)
    np.testing.assert_array_equal(obs["image"], plain.picture(size, gray))
    points = ends = 0
    for action in np.random.default_rng(0).integers(len(buttons), size=1200):
        obs, reward, terminal, cut = simulator.step(action)
        assert (reward, terminal, cut) == (*plain.step(buttons[action]), False)
        np.testing.assert_array_equal(obs["image"], plain.picture(size, gray))
        assert obs["image"].dtype == np.uint8
        points += reward != 0
        if terminal:
            ends += 1
            obs, _ = simulator.reset(None), plain.reset(None)
            np.testing.assert_array_equal(obs["image"], plain.picture(size, gray))
    assert points > 10 and ends


def test_the_filter_averages_over_the_pixels_it_shrinks():
    screen = np.random.default_rng(0).integers(0, 256, (210, 160), np.uint8)

    def weights(many, few):
        # A triangle as wide as two pixels of the small picture, around the middle of each.
        ratio = many / few
        distance = np.arange(many) + 0.5 - ratio * (np.arange(few)[:, None] + 0.5)
        triangle = np.maximum(0, 1 - np.abs(distance) / ratio)
        return triangle / triangle.sum(axis=1, keepdims=True)

    want = weights(210, 96) @ screen @ weights(160, 96).T
    simulator = atari.make("Pong").open()
    simulator._frames[:] = screen[..., None]
    np.testing.assert_allclose(simulator._see()["image"][..., 0], want, atol=2)


def test_the_limit_cuts_and_losing_does_not():
    simulator = atari.make("Breakout", limit=50).open()
    first = simulator.reset(0)["image"]
    rows = [simulator.step(1) for _ in range(13)]  # 12 x 4 frames, and 2 of the last 4
    assert [row[2:] for row in rows] == [(False, t == 12) for t in range(13)]
    assert simulator._ale.getEpisodeFrameNumber() <= 50 + 30
    assert not np.array_equal(rows[-1][0]["image"], first)

    simulator = atari.make("Breakout:100k").open()
    simulator.reset(0)
    lives = [simulator._ale.lives()]
    terminal = False
    while not terminal:
        _, _, terminal, cut = simulator.step(len(lives) % 2)  # FIRE, NOOP, FIRE, ...
        lives.append(simulator._ale.lives())
        assert not cut
    assert lives[0] == 5 and lives[-1] == 0 and terminal


def test_a_seed_determines_the_episodes():
    def episodes(seed):
        simulator = atari.make("SpaceInvaders").open()
        waits = []
        simulator.reset(None)
        for t in range(3):
            simulator.reset(seed if t == 0 else None)
            waits.append(simulator._ale.getEpisodeFrameNumber())
        return [simulator.step(t % 18)[0]["image"].tobytes() for t in range(30)], waits

    rows, waits = episodes(3)
    assert episodes(3) == (rows, waits)
    assert episodes(4)[0] != rows
    assert max(waits) <= 30 and len(set(waits)) > 1


def test_through_a_pool():
    env = atari.make("Pong", limit=8)
    validate(env)
    with Pool(env, 2, HostConfig(workers=1)) as pool:
        rows = [pool.reset()] + [pool.step(np.full(2, 2, np.int32)) for _ in range(4)]
        assert not sum(pool.faults.values())
    assert [row.is_first.tolist() for row in rows] == [[t in (0, 3)] * 2 for t in range(5)]
    assert [row.is_last.tolist() for row in rows] == [[t == 2] * 2 for t in range(5)]
    assert not any(row.is_terminal.any() for row in rows)
    assert rows[0].obs["image"].shape == (2, 96, 96, 1)


def test_errors_name_the_way_out():
    names = atari.names()
    assert len(names) == 2 * 108 and {"MsPacman", "TicTacToe3D", "Qbert:100k"} <= set(names)
    with pytest.raises(JaxwmError, match=r"Did you mean .*SpaceInvaders"):
        atari.make("space_invaders")
    with pytest.raises(JaxwmError, match=r"option of atari/Pong .*sticky"):
        atari.make("Pong", stick=0.0)
    with pytest.raises(JaxwmError, match=r"set of Atari actions .*all"):
        atari.make("Pong", actions="al")
    with pytest.raises(JaxwmError, match="repeat must be at least 1, but it is 0"):
        atari.make("Pong", repeat=0)
    with pytest.raises(JaxwmError, match="0 to 1, but sticky is 25"):
        atari.make("Pong", sticky=25)
