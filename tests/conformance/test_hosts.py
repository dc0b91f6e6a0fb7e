"""Every recipe with simulators on the host, through the wrapper of Gymnasium."""

import jax
import numpy as np
import pytest

from jaxwm import train
from jaxwm.envs.host import HostConfig
from jaxwm.run import checkpoint, resume, run
from jaxwm.run.log import read_metrics
from tests.conformance.cases import HOST_WORLDS, NAMES, compilations, small

HOST = HostConfig(workers=1)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_resumes_and_a_second_call_compiles_nothing(name, caplog):
    config = small(name, HOST_WORLDS, host=HOST)
    program = train.build(config, 10)
    try:
        chunk, state = program.compile(), program.init()
        for _ in range(3):
            state, metrics = chunk(state)
        before = int(state.clock.updates)
        learned = jax.device_get(state.agent)
        state = program.resume(state)  # simulators begin new episodes, and nothing else changes
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.agent), learned)
        assert int(state.clock.updates) == before > 3
        with compilations(caplog) as compiled:
            for _ in range(2):
                state, metrics = chunk(state)
        assert not compiled
        assert program.fault(state) is None
        assert int(state.clock.updates) > before
        watched = [x for x in metrics if x.startswith(("loss/", "grad_norm"))]
        assert watched and all(np.isfinite(metrics[x]) for x in watched)
        # What acts is what was learned, or what was before the round that runs beside it.
        assert jax.tree.structure(state.env.acting) == jax.tree.structure(state.agent.params)
    finally:
        program.close()


def test_a_whole_run_of_simulators(tmp_path):
    """From training to pictures, and on from where a shorter one ended."""
    folder = tmp_path / "run"
    config = small("dreamer_v3", HOST_WORLDS, host=HOST, steps=160, save_every=160)
    summary = run(config, folder, quiet=True)
    assert np.isfinite(summary.returns).all() and summary.returns.shape == (1, 2)
    assert (folder / "dream.png").exists()
    longer = resume(folder, steps=240, quiet=True)
    assert longer.updates > summary.updates and checkpoint.latest(folder) == 240
    assert [line["step"] for line in read_metrics(folder)] == list(range(40, 241, 40))
