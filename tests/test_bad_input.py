"""Bad input: what came, what was expected, what to do; before anything is compiled or allocated."""

import jax
import pytest

from jaxwm import backend, cli, envs
from jaxwm.behaviors.actor_critic import ActorCriticConfig
from jaxwm.models.encoders import CodecConfig
from jaxwm.models.gru import BlockGRUConfig
from jaxwm.models.latents import LatentConfig
from jaxwm.optim import OptimConfig
from jaxwm.recipes import RunConfig
from jaxwm.recipes.dreamer_v3 import Config, LossWeights, ModelConfig
from jaxwm.replay.config import ReplayConfig
from jaxwm.types import Box, Discrete, Env, JaxwmError, first, transition, zeros

TRAIN = "train dreamer_v3 --env toy/Memory --size debug"


@pytest.fixture
def told(monkeypatch, capsys, tmp_path):
    """`told(command)`: the paragraph on standard error, after which nothing was compiled."""

    backend.jit(lambda x: x)  # compiles the probes of options, once for each process

    def compile(*args, **options):
        pytest.fail("something was compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    monkeypatch.chdir(tmp_path)

    def call(command: str) -> str:
        assert cli.main(command.split()) == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "\n\n" not in err and err.startswith("jaxwm: ")
        assert not list(tmp_path.glob("runs/*/checkpoints"))
        return " ".join((out + err).split())

    return call


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trian dreamer_v3", "no command called 'trian'. Did you mean train?"),
        ("train dreamer_v9", "no recipe called 'dreamer_v9'. Did you mean dreamer_v3"),
        ("train dreamer_v3", "give --env NAME (`jaxwm envs` lists them) or --preset NAME"),
        ("train dreamer_v3 --preset cartpol", "called 'cartpol'. Did you mean cartpole"),
        ("train dreamer_v3 --env toy/Memry --size debug", "'Memry'. Did you mean Memory"),
        ("train dreamer_v3 --env tooy/Memory --size debug", "'tooy'. Did you mean toy"),
        ("train dreamer_v3 --env Memory --size debug", "Did you mean toy/Memory"),
        ("train dreamer_v3 --env gymnax/CartPole --size debug", "Did you mean CartPole-v1"),
        ("train dreamer_v3 --env toy/Memory --size debag", "'debag'. Did you mean debug"),
        (f"{TRAIN} --variant haed", "'haed'. Did you mean head"),
        (f"{TRAIN} --stepz 9", "flag called '--stepz'. Did you mean --steps"),
        (f"{TRAIN} --replay.ratio 9", "Did you mean --replay.train-ratio"),
        (f"{TRAIN} extra", "Nothing takes the word 'extra'"),
        (f"{TRAIN} --steps many", "--steps should be a whole number, not 'many'."),
        (f"{TRAIN} --agent.slow-rate x", "--agent.slow-rate should be a number, not 'x'."),
        (f"{TRAIN} --steps", "Missing value for argument '--steps'"),
        (f"{TRAIN} --agent.dtype float16", "Expected one of ('auto', 'float32', 'bfloat16')"),
        (f"{TRAIN} --recipe other", "There is no recipe called 'other'"),
        (f"{TRAIN} --recipe ppo", "agent of the recipe ppo is configured by a jaxwm.recipes.ppo."),
        (f"{TRAIN} --steps -5", "steps is -5; it must be at least 1."),
        (f"{TRAIN} --envs 0", "envs is 0; it must be at least 1."),
        (f"{TRAIN} --seed -1", "seed is -1; it must not be negative."),
        (f"{TRAIN} --agent.model.core.blocks 3", "blocks must divide deter"),
        (
            f"{TRAIN} --env toy/Pixels --agent.model.codec.blocks 16 --replay.capacity 2000",
            "blocks is 16; it must divide the 8 channels",
        ),
        (f"{TRAIN} --replay.capacity 100", "fewer than the 65 rows of one window"),
        (f"{TRAIN} --replay.batch-length 1", "batch_length is 1; it must be at least 2"),
        (f"{TRAIN} --replay.batch-length 0", "batch_length is 0; it must be positive"),
        (f"{TRAIN} --replay.capacity 99999999999999", "GiB. Lower --replay.capacity"),
        (f"{TRAIN} --envs 1 --steps 3000000000", "it must be at most 2,147,483,647, for both are"),
        (
            f"{TRAIN} --envs 8191 --replay.train-ratio 333.333",
            "with 8191 environments the updates that are due cannot be counted in 32 bits. Round",
        ),
        (f"{TRAIN} --time-limit 2147483648", "time_limit is 2147483648; it must be at most 2,147"),
        (f"{TRAIN} --seed 99999999999999999999", "seed is 99999999999999999999; it must be at m"),
        (f"{TRAIN} --seed 4294967295 --seeds 2", "the last seed must be below 2^32"),
        (f"{TRAIN} --replay.train-ratio 1e-4", "at least 0.001, or 0 to collect"),
        (f"{TRAIN} --coordinator here --processes 1 --process 0", "it should be HOST:PORT"),
        (f"{TRAIN} --coordinator a:99999 --processes 1 --process 0", "the port 1 to 65535."),
        (f"{TRAIN} --sweep units=32,64", "fractions, not in agent.model.codec.units or"),
        (f"{TRAIN} --replay.train-ratio 1e300", "train_ratio is 1e+300; it must be at most 1e6"),
        (
            f"{TRAIN} --replay.place host",
            "simulators on the host, and toy/Memory runs on the device",
        ),
        (f"{TRAIN} --steps 500 --log-every 1000", "500 steps, fewer than the 992 of one compiled"),
        (f"{TRAIN} --tensorbord", "Did you mean --tensorboard"),
        ("resume runs/none", "There is no run folder runs/none"),
        ("resume . --stepz 4", "flag called '--stepz'. Did you mean --steps"),
        ("resume", "The following arguments are required: RUN. See jaxwm resume --help."),
        ("resume .", "is not the folder of a run: it has no config.json"),
        ("eval . --episodes 3", "is not the folder of a run: it has no config.json"),
        ("eval . --episodes none", "invalid int value: 'none'"),
        ("eval . --episodes 0", "at least one episode, not 0"),
        ("eval . --episodes 2147483648", "--episodes should be at most 2,147,483,647, not 2,147"),
        ("eval . --seed 4294967296", "--seed should be at most 4,294,967,295, not 4,294,967,296"),
        ("envs check toy/Memory --seed -1", "--seed should be at least 0, not -1"),
        ("plot .", "is not the folder of a run: it has no metrics.jsonl"),
        ("envs tooy", "no environment suite called 'tooy'. Did you mean toy?"),
    ],
)
def test_the_command_line(told, command, words):
    assert words in told(command)


def test_a_taken_folder(told, finished, tmp_path):
    assert f"`jaxwm resume {finished}`" in told(f"{TRAIN} --run {finished}")
    (tmp_path / "file").touch()
    assert "is a file; a run needs a folder" in told(f"{TRAIN} --run file")


def test_a_run_cannot_be_resumed_into_its_past(told, finished):
    assert "has made 200 steps already" in told(f"resume {finished} --steps 80")


def fixed(obs_space, action_space) -> Env:
    """An environment of any spaces, in which nothing happens."""

    def reset(key):
        return (), first(action_space, zeros(obs_space))

    def step(state, action, key):
        return (), transition(action, zeros(obs_space), 0.0, False)

    return Env("test/Fixed", obs_space, action_space, reset, step)


VECTOR, IMAGE = Box((2,)), Box((16, 16, 3), "uint8", 0, 255)


@pytest.mark.parametrize(
    ("obs_space", "action_space", "words"),
    [
        ({"image": Box((7, 7, 3), "uint8")}, Discrete(2), "7x7 pixels cannot be halved"),
        ({"a": IMAGE, "b": Box((32, 32, 3), "uint8")}, Discrete(2), "resize them to one size"),
        ({"x": Box((2,), "int32")}, Discrete(2), "'x' is a Box of int32. Cast it to float32"),
        ({"x": Box((2,), "uint8")}, Discrete(2), "uint8 means an image"),
        ({"x": Box((1, 2, 2, 2))}, Discrete(2), "Use 0 to 3 axes"),
        ({"reward": VECTOR}, Discrete(2), "a name that rows use themselves. Rename it"),
        ({}, Discrete(2), "the observation space is empty"),
        ({"x": VECTOR}, Box(()), "which the actor-critic cannot take: use Discrete"),
        ({"x": VECTOR}, Box((2,), "uint8"), "is uint8 of shape (2,)"),
        ({"x": VECTOR}, {}, "the action space is an empty dict"),
    ],
)
def test_spaces_that_the_recipe_cannot_take(told, monkeypatch, obs_space, action_space, words):
    monkeypatch.setattr(envs, "make", lambda name: fixed(obs_space, action_space))
    assert words in told(TRAIN)


def run_config(**entries) -> RunConfig:
    return RunConfig("x", "dreamer_v3", agent=Config(), **entries)


@pytest.mark.parametrize(
    ("config", "entries", "words"),
    [
        (run_config, {"seeds": 0}, "seeds is 0; it must be at least 1"),
        (run_config, {"save_every": 0}, "save_every is 0"),
        (run_config, {"eval_episodes": -1}, "eval_episodes is -1"),
        (ReplayConfig, {"train_ratio": -1.0}, "train_ratio is -1.0; it must be positive"),
        (BlockGRUConfig, {"hidden": 0}, "hidden=0"),
        (BlockGRUConfig, {"deter": 100, "blocks": 3}, "blocks must divide deter"),
        (LatentConfig, {"stoch": 0}, "stoch is 0"),
        (LatentConfig, {"classes": 1}, "classes is 1"),
        (LatentConfig, {"unimix": 1.5}, "unimix is 1.5"),
        (LatentConfig, {"free_nats": -1.0}, "free_nats is -1.0"),
        (CodecConfig, {"units": 0}, "units is 0"),
        (CodecConfig, {"layers": -1}, "layers is -1"),
        (CodecConfig, {"depth": 0}, "depth is 0"),
        (CodecConfig, {"mults": ()}, "mults"),
        (CodecConfig, {"mults": (1, 0)}, "mults"),
        (CodecConfig, {"blocks": 0}, "blocks is 0"),
        (ModelConfig, {"core": BlockGRUConfig(12, 1, 3)}, "must divide the deterministic"),
        (ModelConfig, {"units": 0}, "units is 0"),
        (ModelConfig, {"bins": 2}, "bins is 2"),
        (ModelConfig, {"horizon": 0}, "horizon is 0"),
        (ActorCriticConfig, {"units": 0}, "units is 0"),
        (ActorCriticConfig, {"layers": 0}, "layers is 0"),
        (ActorCriticConfig, {"bins": 1}, "bins is 1"),
        (ActorCriticConfig, {"imagine": 0}, "imagine is 0"),
        (ActorCriticConfig, {"horizon": 0}, "horizon is 0"),
        (ActorCriticConfig, {"lambda_": 1.1}, "lambda_ is 1.1"),
        (ActorCriticConfig, {"unimix": -0.1}, "unimix is -0.1"),
        (ActorCriticConfig, {"entropy": -1.0}, "entropy is -1.0"),
        (ActorCriticConfig, {"return_rate": 0.0}, "return_rate is 0.0"),
        (Config, {"slow_rate": 2.0}, "slow_rate is 2.0"),
        (LossWeights, {"rep": -0.1}, "rep is -0.1"),
        (OptimConfig, {"learning_rate": -1e-3}, "learning_rate is -0.001"),
        (OptimConfig, {"learning_rate": float("nan")}, "learning_rate is nan"),
        (OptimConfig, {"warmup_steps": -1}, "warmup_steps is -1"),
        (OptimConfig, {"agc": 0.0}, "agc is 0.0"),
        (OptimConfig, {"beta1": 1.0}, "beta1 is 1.0"),
        (OptimConfig, {"beta2": -0.1}, "beta2 is -0.1"),
        (OptimConfig, {"eps": -1.0}, "eps is -1.0"),
    ],
)
def test_numbers_out_of_range(config, entries, words):
    with pytest.raises(JaxwmError) as error:
        config(**entries)
    assert words in str(error.value)
    assert "must" in str(error.value)
