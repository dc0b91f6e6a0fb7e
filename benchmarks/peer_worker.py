"""One implementation of DreamerV3, built and run at a word: a process of `benchmarks.peers`.

    python -P benchmarks/peer_worker.py '{"peer": "sheeprl", "work": "update", ...}'

It runs in the peer's own virtual environment, so it imports nothing at the top but the standard
library. Once an update (or some steps of a whole training loop) has been compiled and run, a line
of JSON says so; then every line that arrives is answered by the seconds that one more took. While
it waits it sleeps. What the peers print goes to stderr.

Every peer gets the same work: B windows of T rows, dreams of 15 steps from all B * T latents, 24
numbers as observation and 6 continuous actions, or 64x64 colour images and 6 choices; the sizes of
the networks are those of DreamerV3's `size1m` and `size12m`.
"""

import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Of each size: deterministic state, hidden units, classes of a latent, depth of convolutions.
SIZES = {"debug": (64, 8, 4, 2), "size1m": (512, 64, 4, 4), "size12m": (2048, 256, 16, 16)}
IMAGINE = 15
Built = tuple[Callable[[], Any], dict[str, Any]]


def jaxwm_update(job: dict[str, Any]) -> Built:
    """An update of this package, divided among shards as in training."""
    import jax

    from benchmarks.loop import training
    from benchmarks.roofline import updating, work
    from jaxwm.backend import compute_dtype
    from jaxwm.recipes import dreamer_v3
    from jaxwm.train import mesh

    batch, length = job["batch"], job["length"]
    config = training(job["size"], batch, ratio=1, batch=batch, length=length)
    agent = dreamer_v3.sized(job["size"], job["variant"])
    config = dataclasses.replace(config, agent=agent, shards=job["shards"])
    mesh.use_cores(config)
    assert compute_dtype(config.agent.dtype) == "float32", "peers are compared in float32"
    learned = work(config.agent, job["obs"], batch, length, shapes=True).state.params
    about = {"parameters": _count(learned), "jax": jax.__version__}
    return updating(config, job["obs"]), about


def jaxwm_loop(job: dict[str, Any]) -> Built:
    """Chunks of `jaxwm train` on the device."""
    import jax

    from benchmarks.loop import Run, training
    from jaxwm.train import mesh

    config = training(job["size"], job["envs"], job["ratio"], job["batch"], job["length"])
    config = dataclasses.replace(config, shards=job["shards"])
    mesh.use_cores(config)
    run = Run(config, job["steps"] // job["envs"])
    while run.updates == 0:  # fill the replay
        run()
    return run, {"parameters": _count(run.state.agent.params), "jax": jax.__version__}


def reference_update(job: dict[str, Any]) -> Built:
    """`Agent.train` of the official code: the compiled update and the transfer of its outputs."""
    import jax
    import numpy as np

    _, config = _reference(job)
    import elements
    from dreamerv3.agent import Agent
    from embodied.jax import internal

    observed, action = _elements(job["obs"])
    flags = {name: elements.Space(bool) for name in ("is_first", "is_last", "is_terminal")}
    obs_space = observed | {"reward": elements.Space(np.float32)} | flags
    names = ("seed", "jax", "batch_size", "batch_length", "replay_context", "report_length")
    rest = {name: config[name] for name in names}
    agent = Agent(
        obs_space,
        {"action": action},
        elements.Config(**config.agent, logdir=config.logdir, **rest),
    )
    rng = np.random.default_rng(0)
    shape = (job["batch"], job["length"] + config.replay_context)
    data = {name: _random(rng, shape, space) for name, space in agent.spaces.items()}
    data |= {name: np.zeros(shape, bool) for name in flags}
    data = internal.device_put(data, agent.train_sharded)
    seed = agent._seeds(0, agent.train_mirrored)
    carry = agent.init_train(job["batch"])

    def once() -> None:
        nonlocal carry
        carry, _, _ = agent.train(carry, {**data, "seed": seed})
        jax.block_until_ready(agent.params)

    # Its optimiser keeps two statistics beside each parameter; the slow critic is a copy.
    learned = [x for name, x in agent.params.items() if not name.startswith(("opt/", "slowval/"))]
    return once, {"parameters": _count(learned), "jax": jax.__version__}


def reference_loop(job: dict[str, Any]) -> Built:
    """`embodied.run.train` of the official code in a thread that runs while it is let."""
    import jax
    import numpy as np

    main, config = _reference(job)
    import elements
    import embodied

    class CartPole(embodied.Env):
        """gymnasium's CartPole for its environment processes."""

        def __init__(self):
            import gymnasium

            self.env, self.done = gymnasium.make("CartPole-v1"), True

        @property
        def obs_space(self):
            flags = {x: elements.Space(bool) for x in ("is_first", "is_last", "is_terminal")}
            numbers = {"vector": elements.Space(np.float32, (4,))}
            return numbers | {"reward": elements.Space(np.float32)} | flags

        @property
        def act_space(self):
            return {"action": elements.Space(np.int32, (), 0, 2), "reset": elements.Space(bool)}

        def step(self, action):
            if action["reset"] or self.done:
                seen, reward, self.done, terminal, first = self.env.reset()[0], 0.0, False, False, 1
            else:
                seen, reward, terminal, cut, _ = self.env.step(int(action["action"]))
                self.done, first = terminal or cut, 0
            return {
                "vector": np.float32(seen),
                "reward": np.float32(reward),
                "is_first": bool(first),
                "is_last": bool(self.done),
                "is_terminal": bool(terminal),
            }

    def make_env(config: Any, index: int) -> Any:
        return main.wrap_env(CartPole(), config)

    main.make_env = make_env
    counter, until = elements.Counter(), [math.inf]
    arrived, released, learned = threading.Event(), threading.Event(), threading.Event()

    def make_agent() -> Any:
        agent = main.make_agent(config)
        act, learn = agent.policy, agent.train

        def policy(*args: Any, **kwargs: Any) -> Any:
            if int(counter) >= until[0]:
                # Every update that these steps have earned belongs to the turn that ends here.
                jax.block_until_ready(agent.params)
                arrived.set()
                released.wait()
                released.clear()
            return act(*args, **kwargs)

        def train(*args: Any) -> Any:
            learned.set()
            return learn(*args)

        agent.policy, agent.train = policy, train
        return agent

    args = elements.Config(
        **config.run,
        **{x: config[x] for x in ("logdir", "batch_size", "batch_length", "report_length")},
        **{x: config[x] for x in ("consec_train", "consec_report", "replay_context")},
    )
    parts = (
        make_agent,
        lambda: main.make_replay(config, "replay"),
        lambda index: make_env(config, index),
        lambda replay, mode: main.make_stream(config, replay, mode),
        lambda: elements.Logger(counter, [lambda lines: None]),
    )
    thread = threading.Thread(target=lambda: embodied.run.train(*parts, args), daemon=True)
    thread.start()

    def await_it(event: threading.Event) -> None:
        while not event.wait(1):
            assert thread.is_alive(), "the official training loop has ended"

    def once() -> None:
        until[0] += job["steps"]
        arrived.clear()
        released.set()
        await_it(arrived)

    await_it(learned)
    until[0] = int(counter)
    await_it(arrived)
    return once, {"jax": jax.__version__}


def _reference(job: dict[str, Any]) -> tuple[Any, Any]:
    """The official code's main module, and its configuration for a job."""
    import tempfile

    sys.path.insert(0, job["path"])
    import elements
    import ruamel.yaml
    from dreamerv3 import main

    text = (Path(job["path"]) / "dreamerv3/configs.yaml").read_text()
    named = ruamel.yaml.YAML(typ="safe").load(text)
    config = elements.Config(named["defaults"])
    config = config.update(named["debug" if job["size"] == "debug" else job["size"]])
    config = config.update(
        {
            "logdir": tempfile.mkdtemp(prefix="reference-"),
            "batch_size": job["batch"],
            "batch_length": job["length"],
            "jax": {"platform": "cpu", "compute_dtype": job["dtype"], "prealloc": False},
            # Neither its reports nor its logs and checkpoints are part of the work.
            "agent.report": False,
            "run": {
                **{x: 1e9 for x in ("log_every", "report_every", "save_every")},
                **{"envs": job["envs"], "train_ratio": job["ratio"], "debug": False},
            },
        }
    )
    # Or it would start to write a trace at update 100.
    jax_config = elements.Config({**config.jax, "profiler": False, "debug": False})
    return main, elements.Config({**config, "jax": jax_config})


def _elements(obs: str) -> tuple[dict[str, Any], Any]:
    """Spaces of observations and actions of the official code."""
    import elements
    import numpy as np

    if obs == "image":
        return {"image": elements.Space(np.uint8, (64, 64, 3))}, elements.Space(np.int32, (), 0, 6)
    return {"vector": elements.Space(np.float32, (24,))}, elements.Space(np.float32, (6,), -1, 1)


def _random(rng: Any, shape: tuple[int, ...], space: Any) -> Any:
    """Numbers of a space."""
    import numpy as np

    shape = (*shape, *space.shape)
    if np.issubdtype(space.dtype, np.floating):
        return rng.standard_normal(shape).astype(space.dtype)
    if space.dtype == np.uint8:
        return rng.integers(0, 256, shape, np.uint8)
    return np.zeros(shape, space.dtype)


def dreamerv3_update(job: dict[str, Any]) -> Built:
    """`Agent.train` of the package `dreamerv3`, the authors' code as of the paper's first version.

    Its networks are given the same widths and layers; it has a dense GRU, strided convolutions and
    an optimiser each for model, actor and critic. Continuous actions are learned by REINFORCE, as
    in the later versions, which costs less than its own gradients through the dream.
    """
    import dreamerv3
    import jax
    import numpy as np
    from dreamerv3 import embodied

    deter, units, classes, depth = SIZES[job["size"]]
    image = job["obs"] == "image"
    keys = {"mlp_keys": "$^" if image else "vector", "cnn_keys": "image" if image else "$^"}
    layers = {"mlp_layers": 3, "mlp_units": units, "cnn_depth": depth, **keys}
    config = embodied.Config(dreamerv3.configs["defaults"]).update(
        {
            "jax": {"platform": "cpu", "precision": job["dtype"], "prealloc": False},
            "batch_size": job["batch"],
            "batch_length": job["length"],
            "rssm": {"deter": deter, "units": units, "classes": classes},
            "encoder": layers,
            "decoder": layers,
            **{x: {"layers": 1, "units": units} for x in ("reward_head", "cont_head")},
            **{x: {"layers": 3, "units": units} for x in ("actor", "critic")},
            "actor_grad_cont": "reinforce",
            "imag_horizon": IMAGINE,
        }
    )
    kind = (np.uint8, (64, 64, 3)) if image else (np.float32, (24,))
    flags = ("is_first", "is_last", "is_terminal")
    obs_space = {job["obs"]: embodied.Space(*kind), "reward": embodied.Space(np.float32)}
    obs_space |= {name: embodied.Space(bool) for name in flags}
    # Six choices are one-hot.
    space = embodied.Space(np.float32, (6,), 0, 1) if image else embodied.Space(np.float32, (6,))
    space._discrete = image
    agent = dreamerv3.Agent(obs_space, {"action": space}, embodied.Counter(), config)
    rng, shape = np.random.default_rng(0), (job["batch"], job["length"])
    data = {name: _random(rng, shape, x) for name, x in (obs_space | {"action": space}).items()}
    if image:
        data["action"] = np.eye(6, dtype=np.float32)[rng.integers(0, 6, shape)]
    data = jax.device_put(data, agent.train_devices[0])
    state = None

    def once() -> None:
        nonlocal state
        _, state, _ = agent.train(data, state)
        jax.block_until_ready(agent.varibs)

    names = [x for x in agent.varibs if not any(y in x for y in ("opt/", "/slow", "retnorm"))]
    learned = [agent.varibs[name] for name in names]
    return once, {"parameters": _count(learned), "jax": jax.__version__}


def sheeprl_update(job: dict[str, Any]) -> Built:
    """`train` of sheeprl's DreamerV3 as in Nature, with all cores, and its slow critic's step."""
    import gymnasium
    import hydra
    import numpy as np
    import sheeprl
    import torch
    from omegaconf import OmegaConf
    from sheeprl.algos.dreamer_v3_5 import dreamer_v3_5 as algorithm
    from sheeprl.utils.utils import dotdict

    deter, units, classes, depth = SIZES[job["size"]]
    image = job["obs"] == "image"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = str(Path(sheeprl.__file__).parent / "configs")
    with hydra.initialize_config_dir(folder, version_base="1.3"):
        composed = hydra.compose(
            "config",
            [
                *("exp=dreamer_v3_5", "algo=dreamer_v3_5", "env=dummy"),
                *("algo.total_steps=1", f"algo.per_rank_batch_size={job['batch']}"),
                f"algo.per_rank_sequence_length={job['length']}",
                f"algo.cnn_keys.encoder=[{'rgb' if image else ''}]",
                f"algo.mlp_keys.encoder=[{'' if image else 'state'}]",
                f"algo.dense_units={units}",
                f"algo.cnn_channels_multiplier={depth}",
                f"algo.world_model.discrete_size={classes}",
                f"algo.world_model.recurrent_model.recurrent_state_size={deter}",
                f"algo.world_model.recurrent_model.hidden_size={units}",
                f"algo.compile.enabled={job['compile']}",
                "algo.compile.mode=default",
                f"fabric.precision={'32-true' if job['dtype'] == 'float32' else 'bf16-mixed'}",
            ],
        )
    cfg = dotdict(OmegaConf.to_container(composed, resolve=True))
    fabric = hydra.utils.instantiate({**cfg.fabric, "callbacks": None})
    fabric.launch()
    if image:
        space = {"rgb": gymnasium.spaces.Box(0, 255, (3, 64, 64), np.uint8)}
    else:
        space = {"state": gymnasium.spaces.Box(-20, 20, (24,), np.float32)}
    models = algorithm.build_agent(fabric, (6,), not image, cfg, gymnasium.spaces.Dict(space))
    model, actor, critic, slow, _ = models
    parameters = [*model.parameters(), *actor.parameters(), *critic.parameters()]
    optimizer = hydra.utils.instantiate(cfg.algo.optimizer, params=parameters, _convert_="all")
    optimizer = fabric.setup_optimizers(optimizer)
    scale = cfg.algo.actor.moments
    moments = algorithm.Moments(scale.decay, scale.max, scale.percentile.low, scale.percentile.high)

    shape = (job["length"] + cfg.algo.replay_context, job["batch"])
    stoch = cfg.algo.world_model.stochastic_size
    data = {name: torch.zeros((*shape, 1)) for name in ("terminated", "truncated", "is_first")}
    data |= {
        "rewards": torch.randn((*shape, 1)),
        "deter": torch.randn((*shape, deter)).half(),
        "stoch": torch.randint(0, classes, (*shape, stoch)).to(torch.uint8),
    }
    if image:
        data["rgb"] = torch.randint(0, 256, (*shape, 3, 64, 64)).to(torch.uint8)
        data["actions"] = torch.eye(6)[torch.randint(0, 6, shape)]
    else:
        data["state"], data["actions"] = torch.randn((*shape, 24)), torch.rand((*shape, 6)) * 2 - 1

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        algorithm.train(
            *(fabric, cfg, model, actor, critic, slow, optimizer, moments, data, None, (6,))
        )
        algorithm.update_target_critic(critic, slow, cfg.algo.critic.tau)

    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return once, {"parameters": sum(x.numel() for x in parameters)} | about


def _count(tree: Any) -> int:
    import jax

    return sum(x.size for x in jax.tree_util.tree_leaves(tree))


BUILDERS = {
    ("jaxwm", "update"): jaxwm_update,
    ("jaxwm", "loop"): jaxwm_loop,
    ("reference", "update"): reference_update,
    ("reference", "loop"): reference_loop,
    ("dreamerv3", "update"): dreamerv3_update,
    ("sheeprl", "update"): sheeprl_update,
}


def main() -> None:
    # Lines to the parent go where stdout went; what is printed goes to stderr.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    begun = time.perf_counter()
    once, about = BUILDERS[job["peer"], job["work"]](job)
    for _ in range(job["warmup"]):
        once()
    about["seconds_until_ready"] = time.perf_counter() - begun
    print(json.dumps(about), file=lines, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        once()
        print(json.dumps(time.perf_counter() - start), file=lines, flush=True)
    # Threads and processes of a peer's training loop would keep it alive.
    os._exit(0)


if __name__ == "__main__":
    main()
