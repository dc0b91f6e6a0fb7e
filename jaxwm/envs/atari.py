"""Atari 2600 games, emulated by the Arcade Learning Environment on the host.

A name is a game, such as "Pong", with the protocol of the 57 games at 200 million frames:
96 x 96 greys, all 18 actions, sticky actions. With ":100k" after it come the settings of the
Atari 100k benchmark: 64 x 64 colours, the game's own actions, no sticky actions. In both an
episode begins with up to 30 frames of doing nothing and is cut after 108,000 frames; rewards are
not clipped, and losing a life ends nothing.

A picture is the maximum of the last two frames (some games draw things on every other frame
only), resized by Pillow's bilinear filter, which averages over the pixels that it shrinks, and
then made grey. `ale_py` is licensed under the GPL-2.0: it comes as an extra only.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from jaxwm.spaces import Box, Discrete, HostEnv, JaxwmError, nearest

ACTIONS = ("all", "needed")
# Of red, green and blue. Greys are cut to integers, so the last bit counts: as DreamerV3 has them.
GREY = (0.299, 0.587, 1 - (0.299 + 0.587))


@dataclasses.dataclass(frozen=True)
class AtariConfig:
    """How a game is played and shown.

    Args:
      size: side of the pictures.
      gray: one channel instead of three.
      sticky: probability in every frame that the game sees the previous action once more.
      actions: "all" 18, or those "needed" in the game.
      noops: most frames of doing nothing at the beginning; their number is drawn from 0..noops.
      repeat: frames for which an action is held.
      limit: frames after which an episode is cut, those at the beginning left out; 0 is none.
    """

    size: int = 96
    gray: bool = True
    sticky: float = 0.25
    actions: str = "all"
    noops: int = 30
    repeat: int = 4
    limit: int = 108_000

    def __post_init__(self):
        if self.actions not in ACTIONS:
            raise nearest(str(self.actions), ACTIONS, "set of Atari actions")
        for name, least in (("size", 1), ("repeat", 1), ("noops", 0), ("limit", 0)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise JaxwmError(f"Atari's {name} must be at least {least}, but it is {value}.")
        if not 0 <= self.sticky <= 1:
            raise JaxwmError(f"A probability lies in 0 to 1, but sticky is {self.sticky}.")


PRESETS = {"": AtariConfig(), "100k": AtariConfig(64, gray=False, sticky=0.0, actions="needed")}


def names() -> list[str]:
    """The games of the installed ale_py, then the same with the suffix ":100k"."""
    games = sorted(_games())
    return games + [f"{game}:100k" for game in games]


def make(name: str, **options: Any) -> HostEnv:
    """An Atari game.

    Args:
      name: the game; with ":100k" after it in the settings of Atari 100k.
      options: fields of `AtariConfig`.

    Returns:
      An environment on the host; its observation is "image".

    Raises:
      JaxwmError: if the name or an option is unknown, or a value is out of range.
    """
    game, _, suffix = name.partition(":")
    games = _games()
    if game not in games or suffix not in PRESETS:
        raise nearest(name, names(), "Atari game")
    fields = {field.name for field in dataclasses.fields(AtariConfig)}
    for option in options:
        if option not in fields:
            raise nearest(option, fields, f"option of atari/{name}")
    config = dataclasses.replace(PRESETS[suffix], **options)
    factory = functools.partial(_Simulator, games[game], config)
    shape = (config.size, config.size, 1 if config.gray else 3)
    image = Box(shape, "uint8", 0.0, 255.0)
    return HostEnv(f"atari/{name}", {"image": image}, Discrete(len(factory().actions)), factory)


def _games() -> dict[str, str]:
    """ale_py's identifiers of the games by their names: "space_invaders" of "SpaceInvaders"."""
    from ale_py import roms

    return {rom.title().replace("_", ""): rom for rom in roms.get_all_rom_ids()}


class _Simulator:
    """A game as `types.Simulator`."""

    def __init__(self, rom: str, config: AtariConfig):
        import ale_py
        from ale_py import roms

        self._config = config
        self._path: Any = roms.get_rom_path(rom)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat("repeat_action_probability", config.sticky)
        self._start(None)
        every = config.actions == "all"
        self.actions = self._ale.getLegalActionSet() if every else self._ale.getMinimalActionSet()
        self._noop = ale_py.Action.NOOP
        self._frames = np.zeros((2, *self._ale.getScreenDims(), 3), np.uint8)
        self._elapsed = 0

    def _start(self, seed: int | None) -> None:
        self._random = np.random.default_rng(seed)
        self._ale.setInt("random_seed", int(self._random.integers(2**31)))
        self._ale.loadROM(self._path)  # the emulator takes a seed only here

    def reset(self, seed: int | None) -> dict[str, Any]:
        if seed is not None:
            self._start(seed)
        self._ale.reset_game()
        for _ in range(self._random.integers(self._config.noops + 1)):
            self._ale.act(self._noop)
            if self._ale.game_over():
                self._ale.reset_game()
        self._elapsed = 0
        self._ale.getScreenRGB(self._frames[0])
        self._frames[1] = self._frames[0]
        return self._see()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        reward, button = 0.0, self.actions[int(action)]
        for _ in range(self._config.repeat):
            reward += self._ale.act(button)
            self._elapsed += 1
            # All frames, because the game may end at any of them.
            self._ale.getScreenRGB(self._frames[self._elapsed % 2])
            terminal = self._ale.game_over()
            cut = not terminal and self._elapsed == self._config.limit
            if terminal or cut:
                break
        return self._see(), reward, terminal, cut

    def _see(self) -> dict[str, Any]:
        from PIL import Image

        size = (self._config.size, self._config.size)
        frame = Image.fromarray(np.maximum(*self._frames))
        image = np.asarray(frame.resize(size, Image.Resampling.BILINEAR))
        if self._config.gray:
            red, green, blue = (image[..., [i]] * weight for i, weight in enumerate(GREY))
            image = (red + green + blue).astype(np.uint8)
        return {"image": image}

    def close(self) -> None:
        """The emulator holds nothing but memory."""
