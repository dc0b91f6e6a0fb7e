"""What a run does and says about updates that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxwm.optim import Schedule
from jaxwm.run.divergence import forgiven, report_rollback, report_stopped
from jaxwm.train import TrainState
from jaxwm.train.state import Health
from jaxwm.types import JaxwmError


def sick(*first: int) -> TrainState:
    """The state of members of which some had an update that was not finite; 0 is none."""
    counts = np.array(first)
    health = Health(counts.clip(max=1), counts, np.ones_like(counts))
    return TrainState(*[None] * len(TrainState._fields))._replace(health=health)


def test_a_diverged_training_is_told(tiny, capsys):
    """By its first bad term and update; it ends the run once no member is left."""
    metrics = dict.fromkeys(["loss/total", "loss/reward", "loss/dyn", "grad_norm"], 0.0)
    three = dataclasses.replace(tiny, sweep=("entropy=0.1,0.2,0.3",))
    none, console = np.zeros(3, bool), Console(soft_wrap=True)
    stopped = report_stopped(sick(0, 7, 0), metrics, none, three, console)
    assert stopped.tolist() == [False, True, False]
    told = "training of entropy=0.2 seed 0 diverged at update 7: loss/reward is NaN or infinite. "
    assert told + "It stops learning; the others continue." in capsys.readouterr().out
    report_stopped(sick(0, 7, 0), metrics, stopped, three, console)
    assert not capsys.readouterr().out
    with pytest.raises(JaxwmError, match=r"entropy=0\.1 .*update 9.*=0\.3 .* 4.* did not take"):
        report_stopped(sick(9, 7, 4), metrics, stopped, three, console)
    skip = dataclasses.replace(three, on_divergence="skip")
    assert not report_stopped(sick(9, 7, 4), metrics, none, skip, console).any()


@pytest.mark.parametrize("policy", ["abort", "skip", "rollback"])
def test_what_was_refused_while_a_run_skipped_ends_it_no_more_once_it_does_not(tiny, policy):
    config = dataclasses.replace(tiny, on_divergence=policy)
    for bad in ((7,), (0, 7)):
        state = sick(*bad)
        state = state._replace(health=jax.tree.map(jnp.asarray, state.health))
        refused = forgiven(state, config).health.refused.tolist()
        # A part of the members may have diverged by themselves.
        keeps = policy == "skip" or (policy == "abort" and len(bad) == 2)
        assert refused == ([int(x > 0) for x in bad] if keeps else [0] * len(bad))


def cured(config, capsys) -> str:
    """What is said to a run whose only member has diverged."""
    metrics = dict.fromkeys(["loss/reward", "grad_norm"], 0.0)
    with pytest.raises(JaxwmError) as error:
        report_stopped(sick(7), metrics, np.zeros(1, bool), config, Console())
    return str(error.value)


def test_every_learning_rate_is_named_with_its_flag(tiny, capsys):
    assert "Lower --agent.optim.learning-rate (now 0.001), look at" in cured(tiny, capsys)
    optim = dataclasses.replace(tiny.agent.optim, learning_rate=Schedule(1e-3, 1e-4))
    falling = dataclasses.replace(tiny, agent=dataclasses.replace(tiny.agent, optim=optim))
    assert "(now linear:0.001:0.0001:0:0), look" in cured(falling, capsys)
    swept = dataclasses.replace(tiny, sweep=("learning_rate=1e-2,1e-5",))
    metrics = dict.fromkeys(["loss/reward", "grad_norm"], 0.0)
    with pytest.raises(JaxwmError, match=r"Lower the learning rates of --sweep \(1e-05, 0\.01\)"):
        report_stopped(sick(7, 8), metrics, np.zeros(2, bool), swept, Console())


def test_rollbacks_are_counted_and_end(tiny, capsys):
    metrics = dict.fromkeys(["loss/reward", "grad_norm"], 0.0)
    console = Console(soft_wrap=True)
    report_rollback(sick(7), metrics, 3, tiny, console)
    assert "with other random numbers (attempt 3 of 3)" in capsys.readouterr().out
    with pytest.raises(JaxwmError, match=r"went back 3 times in vain.* try --on-divergence skip"):
        report_rollback(sick(7), metrics, 4, tiny, console)
