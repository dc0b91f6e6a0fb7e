"""Training: the whole experiment is one pytree, and two drivers take it through time.

    program = train.build(config)
    state = program.init()
    state, metrics = program.chunk(state)

- `state`: the pytree and the accounts of its metrics;
- `act` and `learn`: the two halves of an iteration;
- `device`: a chunk of iterations is one compiled program, environments included;
- `host`: simulators step in worker processes while the device learns, from a replay in the
  memory of either (`stores`);
- `mesh` and `processes`: shards, devices, and several processes that train together;
- `program` and `build`: what a driver returns, and how it is made from a configuration.
"""

from jaxwm.train.build import agents, build, make_env
from jaxwm.train.program import Chunk, Program
from jaxwm.train.state import TrainState

__all__ = ["Chunk", "Program", "TrainState", "agents", "build", "make_env"]
