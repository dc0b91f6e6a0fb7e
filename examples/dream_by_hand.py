"""Watches the start of an episode through a trained world model, and dreams the rest."""

import sys

import jax

import jaxwm
from jaxwm.evaluate.rollout import collect

policy = jaxwm.load(sys.argv[1] if len(sys.argv) > 1 else "runs/small")
model, params = policy.agent.model, policy.params["model"]
key_rows, key_seen, key_dream = jax.random.split(jax.random.key(0), 3)

# An episode of one environment: rows (T, B) with T = 20 and B = 1.
rows = collect(policy.agent, policy.params, policy.env, 20, key_rows)
first, rest = jax.tree.map(lambda x: x[:5], rows), jax.tree.map(lambda x: x[5:], rows)

# The model sees the first five rows.
observed = model.observe(params, model.initial(1), first, model.draws(key_seen, (5, 1)))
carry = observed.carry

# From there it is told nothing but the actions.
for time in range(15):
    action = jax.tree.map(lambda x, time=time: x[time], rest.action)
    draws = model.draws(jax.random.fold_in(key_dream, time), (1,))
    carry, latent = model.step(params, carry, action, draws)
    dreamed = model.predict(params, latent)
    reward, goes_on = float(dreamed["reward"].mean()[0]), float(dreamed["continue"].mean()[0])
    print(f"reward {reward:.2f} (real {float(rest.reward[time, 0]):.2f}), continues {goes_on:.2f}")
    for name in policy.obs_space:
        print(f"  {name}: {dreamed[name].mode()[0]} (real {rest.obs[name][time, 0]})")
