"""What programs are compiled with."""

import ctypes
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import uuid

import jax
import jax.numpy as jnp
import pytest

from jaxwm import compiler, heap

OPTIONS = compiler.OPTIONS["cpu"]
LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
WRITTEN = {x: value for x, value in OPTIONS.items() if x != compiler.PIECES}
pytestmark = pytest.mark.skipif(compiler.options() != WRITTEN, reason="not known to this XLA")
SQUARE = jnp.ones((256, 256))
ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def no_cache():
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def product(x):
    return jax.nn.softmax(x @ x)


def test_programs_are_compiled_with_the_options():
    compiled = compiler.jit(product, donate_argnums=0).lower(SQUARE).compile()
    assert "ynn" not in compiled.as_text()
    assert "ynn" in jax.jit(product).lower(SQUARE).compile().as_text()


def large(x):  # many arrays of 8 MiB, all of them needed at the end
    wide = [jnp.cumsum(x * index, -1) for index in range(11)]
    return sum(jnp.cumsum(y, 0)[::-1] for y in reversed(wide))


@pytest.fixture
def every_program_is_kept():
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    jax.config.update(least, 0.0)
    yield
    jax.config.update(least, before)


@pytest.mark.filterwarnings("error")
def test_large_programs_are_kept_on_disk_where_programs_are(every_program_is_kept):
    def fresh(x):
        return large(x)

    fresh.__name__ = f"fresh_{uuid.uuid4().hex}"
    folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
    compiled = compiler.jit(fresh).lower(jnp.ones((2048, 1024))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 2 * heap.PIECE
    kept = list(folder.glob(f"jit_{fresh.__name__}-*"))
    assert kept
    for path in kept:
        path.unlink()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="it is not glibc")
def test_temporary_memory_is_kept_from_one_run_to_the_next():
    """In a process of its own: what others left in a thread's heap may take a piece's place."""
    code = "from tests.test_compiler import report_faults; report_faults()"
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert not done.returncode, done.stderr.decode()
    temporary, faults = json.loads(done.stdout)
    assert temporary > 2 * heap.PIECE
    # Every thread that runs programs comes to have heaps, within some runs.
    assert statistics.median(faults) < temporary / resource.getpagesize() / 10


def report_faults() -> None:
    """Prints the temporary memory of a program, and the page faults of each of twenty runs."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        jax.block_until_ready(compiled(x))
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    x = jnp.ones((2048, 1024))
    compiled = compiler.jit(large).lower(x).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps([temporary, [faults() for _ in range(20)]]))


def test_what_a_user_says_of_an_option_stays(monkeypatch, no_cache):
    monkeypatch.setenv("XLA_FLAGS", f"--{LIBRARY}=LIBRARY_FUSION_TYPE_DOT")
    assert LIBRARY not in compiler.options()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=true")
    assert compiler.options() == OPTIONS


def test_options_that_this_release_does_not_know_are_left_out(monkeypatch, no_cache):
    monkeypatch.setitem(compiler.OPTIONS, "cpu", {"xla_cpu_no_such_option": "1", **OPTIONS})
    assert compiler.options() == OPTIONS
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler.options() == {}


@pytest.mark.parametrize(
    ("cpu", "gains"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16 avx512f", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile", True),
        # As many products in a cycle as of float32.
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512_bf16 avx512f", False),
    ],
)
def test_which_cpus_are_faster_with_bfloat16(cpu, gains, tmp_path):
    (tmp_path / "cpuinfo").write_text(cpu, encoding="utf-8")
    assert compiler.has_bfloat16(tmp_path / "cpuinfo") is gains
    assert not compiler.has_bfloat16(tmp_path / "none")


def test_rounded_factors_are_for_who_asks_for_them_and_can_gain_by_them(monkeypatch, no_cache):
    assert not compiler.rounds_factors()
    for asked in ("bfloat16", "BF16_BF16_F32"):
        with jax.default_matmul_precision(asked):
            for can in (True, False):
                monkeypatch.setattr(compiler, "has_bfloat16", lambda can=can: can)
                assert compiler.rounds_factors() is can
                wanted = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT" if can else ""
                assert compiler.options() == OPTIONS | {LIBRARY: wanted}
    monkeypatch.setattr(compiler, "has_bfloat16", lambda: True)
    with jax.default_matmul_precision("float32"):
        assert not compiler.rounds_factors()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_matmul_precision("bfloat16"):
        assert not compiler.rounds_factors()


def test_an_inner_function_cannot_be_compiled_apart():
    with pytest.raises(Exception, match="compiler_options"):
        jax.jit(lambda x: compiler.jit(product)(x))(SQUARE)
