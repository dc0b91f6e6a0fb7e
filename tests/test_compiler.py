"""What programs are compiled with."""

import ctypes
import resource

import jax
import jax.numpy as jnp
import pytest

from jaxwm import compiler, heap

OPTIONS = compiler.OPTIONS["cpu"]
LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
pytestmark = pytest.mark.skipif(compiler.options() != OPTIONS, reason="not known to this XLA")
SQUARE = jnp.ones((256, 256))


def product(x):
    return jax.nn.softmax(x @ x)


def test_programs_are_compiled_with_the_options():
    compiled = compiler.jit(product, donate_argnums=0).lower(SQUARE).compile()
    assert "ynn" not in compiled.as_text()
    assert "ynn" in jax.jit(product).lower(SQUARE).compile().as_text()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="it is not glibc")
def test_temporary_memory_is_kept_from_one_run_to_the_next():
    def large(x):  # many arrays of 8 MiB, all of them needed at the end
        wide = [jnp.cumsum(x * index, -1) for index in range(11)]
        return sum(jnp.cumsum(y, 0)[::-1] for y in reversed(wide))

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        jax.block_until_ready(compiled(x))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    x = jnp.ones((2048, 1024))
    compiled = compiler.jit(large).lower(x).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary > 2 * heap.PIECE
    assert min(faults() for _ in range(5)) < temporary / resource.getpagesize() / 10


def test_what_a_user_says_of_an_option_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{LIBRARY}=LIBRARY_FUSION_TYPE_DOT")
    assert LIBRARY not in compiler.options()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    assert compiler.options() == OPTIONS


def test_options_that_this_release_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setitem(compiler.OPTIONS, "cpu", {"xla_cpu_no_such_option": "1", **OPTIONS})
    assert compiler.options() == OPTIONS
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler.options() == {}


def test_an_inner_function_cannot_be_compiled_apart():
    with pytest.raises(Exception, match="compiler_options"):
        jax.jit(lambda x: compiler.jit(product)(x))(SQUARE)
