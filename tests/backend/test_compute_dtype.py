"""The compute type that the device has units for."""

import types

import jax
import pytest

from jaxwm.backend import compute_dtype


def test_the_compute_type_follows_the_device():
    assert compute_dtype("bfloat16") == "bfloat16" and compute_dtype("float32") == "float32"
    assert compute_dtype("auto") == ("float32" if jax.default_backend() == "cpu" else "bfloat16")


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "10.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),
    ],
)
def test_the_compute_type_is_bfloat16_where_there_are_units_for_it(
    monkeypatch, platform, capability, dtype
):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert compute_dtype("auto") == dtype
