"""PlaNet's planner on recorded noise: every iteration, the plan and the executed actions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwm.behaviors.planner import CEMConfig, cem, predicted_rewards, proposals
from jaxwm.models.imagine import dreamer
from tests.parity.common import Check, Recorded
from tests.parity.gaussian_world import one_row
from tests.parity.planet_world import world
from tests.parity.world import action_space

# What the README asks for: an elite may be as little apart from the next candidate as `margins`.
TOLERANCE = 1e-4
# The original plans after the second row.
ROWS = 2


def planning(recorded: Recorded) -> None:
    """One planning call for one environment, from the state after the rows that were acted on."""
    case = world(recorded)
    params, carry = jax.tree.map(jnp.asarray, case.tree(case.params)), case.model.initial(1)
    for index in range(ROWS):
        row, images = one_row(case, index, recorded[f"act/{index}/prev_action"], images=True)
        carry, _ = case.filter(carry, row, jnp.asarray(recorded[f"act/{index}/noise_post"]), images)

    candidates, elites, iterations, horizon = map(int, recorded["cem/sizes"])
    config = CEMConfig(horizon, iterations, candidates, elites)
    noise = jnp.asarray(recorded["cem/noise/action"])  # (I, K, H, A)
    ((name, proposal),) = proposals(config, action_space(recorded, one_hot=False)).items()
    dreams = dreamer(case.model, params)

    @jax.jit
    def search(carry: Any, noise: Any, prior: Any) -> Any:
        return cem(
            config,
            {name: proposal},
            lambda state, actions, draws: dreams.step(state, actions[name], case.draws(draws)),
            lambda latents: predicted_rewards(dreams, latents),
            carry,
            {name: noise.swapaxes(1, 2)[:, :, None]},
            prior,
        )

    found = search(carry, noise, jnp.asarray(recorded["cem/noise/prior"]))

    def compare(what: str, ours: Any) -> None:
        recorded.compare(f"cem/{what}", ours, TOLERANCE)

    compare("candidates", np.swapaxes(found.candidates[name][:, :, 0], 1, 2))
    compare("returns", found.returns[:, 0])
    compare("mean", found.refit[name].mean[:, :, 0])
    compare("std", found.refit[name].std[:, :, 0])
    plan = proposal.best(found.plan[name])
    compare("plan", plan[:, 0])
    compare("action", plan[0])
    explore = jnp.asarray(recorded["cem/noise/explore"])
    compare("action_explore", proposal.explore(plan[0], explore))


CHECKS = [Check("planning", r"cem/sizes", planning)]
