"""What programs are compiled with."""

import jax
import jax.numpy as jnp
import pytest

from jaxwm import compiler

OPTION = "xla_cpu_experimental_ynn_fusion_type"
pytestmark = pytest.mark.skipif(OPTION not in compiler.options(), reason="not known to this XLA")
SQUARE = jnp.ones((256, 256))


def product(x):
    return jax.nn.softmax(x @ x)


def test_programs_are_compiled_with_the_options():
    assert compiler.options() == {OPTION: ""}
    compiled = compiler.jit(product, donate_argnums=0).lower(SQUARE).compile()
    assert "ynn" not in compiled.as_text()
    assert "ynn" in jax.jit(product).lower(SQUARE).compile().as_text()


def test_what_a_user_says_of_an_option_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{OPTION}=LIBRARY_FUSION_TYPE_DOT")
    assert compiler.options() == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    assert compiler.options() == {OPTION: ""}


def test_options_that_this_release_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setitem(compiler.OPTIONS, "cpu", {"xla_cpu_no_such_option": "1", OPTION: ""})
    assert compiler.options() == {OPTION: ""}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler.options() == {}


def test_an_inner_function_cannot_be_compiled_apart():
    with pytest.raises(Exception, match="compiler_options"):
        jax.jit(lambda x: compiler.jit(product)(x))(SQUARE)
