"""The command line in odd places: no home, plain ASCII, odd names, nothing to write to, no network.

Whole commands in processes of their own; each goes to several odd places at once.
"""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxwm import cli
from jaxwm.run import checkpoint, report
from jaxwm.run.log import read_metrics
from jaxwm.types import JaxwmError
from jaxwm.view import plot

ROOT = Path(__file__).resolve().parents[1]
NAME = "ランス ü %s $x$"
# The run `tiny`, whose programs other tests have compiled.
WORDS = """
    train dreamer_v3 --env toy/Memory --size debug --steps 200 --envs 4 --eval-episodes 3
    --log-every 40 --save-every 100 --replay.capacity 400 --replay.batch-size 2
    --replay.batch-length 6 --replay.train-ratio 2
"""
TRAIN = WORDS.split()

# Told by the environment what to do to a process before anything else happens in it.
SITE = """
import os, socket, time

def refuse(name):
    def call(self, *args, **options):
        if getattr(self, "family", None) == socket.AF_UNIX:
            return kept[name](self, *args, **options)
        with open(os.environ["ODD_LOG"], "a", encoding="utf-8") as file:
            file.write(f"{name} {args}\\n")
        raise OSError("there is no network")
    return call

kept = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "bind", "listen")}
for name in kept:
    setattr(socket.socket, name, refuse(name))
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse(name))

clock, calls = time.time, []

def earlier():
    calls.append(None)
    return clock() - 3600 * len(calls)

time.time = earlier
"""


@pytest.fixture
def odd(tmp_path):
    """`odd(words, **options)`: what a command says in a place with no network and no home."""
    (tmp_path / "file").touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE, "utf-8")
    log = tmp_path / "connections"
    path = [str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH")]
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "ODD_LOG": str(log),
        "HOME": str(tmp_path / "file" / "home"),
        "JAX_COMPILATION_CACHE_DIR": os.path.abspath(os.environ["JAX_COMPILATION_CACHE_DIR"]),
    }

    def call(words, code=0, env=None, **options):
        environment = {k: x for k, x in {**environ, **(env or {})}.items() if x is not None}
        done = subprocess.run(
            [sys.executable, "-m", "jaxwm.cli", *map(str, words)],
            env=environment,
            # Nothing can be written there, whoever one is.
            cwd="/proc" if Path("/proc/self").exists() else tmp_path,
            timeout=300,
            check=False,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )
        err = done.stderr.decode("utf-8", "replace")
        assert "Traceback" not in err and "Exception ignored" not in err, err
        assert done.returncode == code, err
        assert not log.exists(), log.read_text("utf-8")
        return (done.stdout or b"").decode("utf-8", "replace"), err

    return call


def test_a_run_with_an_odd_name_and_nothing_around_it(odd, tmp_path):
    """No HOME, the C locale, a clock that runs backwards, a folder of odd letters."""
    folder = tmp_path / NAME
    out, _ = odd([*TRAIN, "--run", folder], env={"HOME": None, "LC_ALL": "C", "LANG": None})
    assert NAME in out and "evaluation return: " in out
    assert max(checkpoint.steps(folder)) == checkpoint.latest(folder)
    assert checkpoint.latest(folder) == 200
    assert len(checkpoint.steps(folder)) == 2
    times = [line["time"] for line in read_metrics(folder)]
    assert times == sorted(times) and min(times) >= 0 and max(times) < 3600
    assert {"curve.png", "dream.png", "SUMMARY.md"} <= {x.name for x in folder.iterdir()}
    assert f"jaxwm resume '{folder}'" in (folder / "SUMMARY.md").read_text("utf-8")


ASCII = {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_run_goes_on_in_ascii_when_nobody_reads_along(odd, finished, tmp_path):
    """As in `jaxwm resume RUN | head -1`: who has read enough does not end a run."""
    folder = shutil.copytree(finished, tmp_path / "run")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        odd(["resume", folder, "--steps", "240"], env=ASCII, stdout=writer)
    finally:
        os.close(writer)
    assert checkpoint.latest(folder) == 240
    assert (folder / "SUMMARY.md").stat().st_mtime_ns > (finished / "SUMMARY.md").stat().st_mtime_ns


def test_odd_letters_in_ascii(odd, finished, tmp_path):
    """The bytes of a name stay what they are, though the locale has no letters for them."""
    folder = shutil.copytree(finished, tmp_path / NAME)
    out, _ = odd(["checkpoints", folder, "verify"], env=ASCII)
    assert "sound" in out
    odd(["plot", folder, "--out", folder / "again.png"], env=ASCII)
    assert (folder / "again.png").read_bytes().startswith(b"\x89PNG")
    # TensorStore takes no such name, which is told.
    _, err = odd(["eval", folder, "--episodes", "1"], code=2, env=ASCII)
    assert "PYTHONUTF8=1" in err
    # A terminal that takes ASCII only is no reason to fail either.
    env = {"PYTHONIOENCODING": "ascii:strict"}
    out, _ = odd(["plot", folder, "--out", folder / "again.png"], env=env)
    assert "again.png" in out
    odd(["train", "dreamer_v3", "--help"], env={**ASCII, **env})


@pytest.mark.parametrize("words", [["--help"], ["envs", "toy"]], ids=" ".join)
def test_a_reader_that_has_read_enough_is_no_fault(odd, words):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        odd(words, code=128 + signal.SIGPIPE, stdout=writer)
    finally:
        os.close(writer)


def test_a_run_that_cannot_be_written_is_told(odd, tmp_path):
    _, err = odd([*TRAIN, "--run", tmp_path / "file" / "run"], code=2)
    assert err.startswith("jaxwm: ") and "cannot write" in " ".join(err.split())
    assert "--run" in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_that_may_not_be_written_is_told(odd, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o555)
    _, err = odd([*TRAIN, "--run", folder], code=2)
    assert "cannot write" in " ".join(err.split())


def test_who_has_no_home_keeps_no_programs(monkeypatch):
    """A container may run as a user whom its system does not know."""
    import pwd

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    cli._keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_nothing_goes_by_the_clock_on_the_wall():
    """Which is set back now and then: order is that of steps, and time is monotonic."""
    wall = {"time_ns", "utcnow", "now", "today", "st_mtime", "st_mtime_ns", "st_ctime", "getmtime"}
    for path in (ROOT / "jaxwm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in wall, f"{path}:{node.lineno}"
                assert ast.unparse(node) != "time.time", f"{path}:{node.lineno}"


def test_labels_show_names_as_they_are():
    assert plot._plain("a $b$ %s") == r"a \$b\$ %s"
    assert plot._plain("_hidden") == " _hidden"
    assert plot._plain("\udce3") == "?"


def test_a_picture_that_cannot_be_written_is_told(finished, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JaxwmError, match=r"picture .* cannot be written"):
        plot.learning_curve([finished], tmp_path / "file" / "curve.png")


def test_versions_are_ascii(tmp_path):
    report.write_versions(tmp_path)
    assert json.loads((tmp_path / "versions.json").read_bytes().decode("ascii"))
