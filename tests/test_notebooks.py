"""Notebooks and documents do what they say: cells, examples, commands, links and numbers."""

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from jaxwm import cli, envs
from jaxwm.recipes import dreamer_v3

pytestmark = pytest.mark.no_cover

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
]


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)


def commands(path: Path) -> list[list[str]]:
    """The words of every command in a document's shell blocks."""
    lines = "".join(blocks(path, "sh")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def outside(monkeypatch, tmp_path) -> Path:
    """An empty folder, and an environment in which other processes find this jaxwm."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("JAXWM_NOTEBOOK_DEBUG", "1")
    # Compiling is most of the time, and the examples are the same program for the most part.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    return tmp_path


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_a_notebook_runs_and_shows_pictures(path, outside):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "stored with outputs"
    resources = {"metadata": {"path": str(outside)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) >= 2
    # Nothing is installed where jaxwm can be imported.
    assert not (outside / "installed.txt").exists()


@pytest.mark.parametrize("path", [x for x in DOCUMENTS if blocks(x, "python")], ids=by_name)
def test_the_examples_of_a_document_run(path, outside):
    script = outside / "example.py"
    script.write_text("\n".join(blocks(path, "python")), "utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=outside,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # for the folder `examples`
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_commands_are_understood(monkeypatch, capsys, tmp_path):
    """Every `jaxwm` command of the documents, with the work that it would do left out."""
    started, known = [], envs.names()
    monkeypatch.chdir(tmp_path)
    (own,) = [x for x in blocks(ROOT / "README.md", "python") if "class Walk" in x]
    (tmp_path / "mine.py").write_text(own, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(envs, "OWN", {})

    def start(*args, **options):
        started.append(args)
        return np.ones((1, 1))

    works = ("run.loop.run", "run.loop.resume", "evaluate.final.evaluate_run", "run.weights.export")
    for name in works:
        monkeypatch.setattr(f"jaxwm.{name}", start)
    monkeypatch.setattr("jaxwm.run.checkpoint.overview", lambda run: start(run).tolist()[1:])
    verdict = SimpleNamespace(verdict=SimpleNamespace(words=""), caveats=(), to_dict=dict)
    monkeypatch.setattr("jaxwm.evaluate.compare.compare", lambda *words: start(*words) and verdict)
    for name in ("jaxwm.view.plot.learning_curve", "jaxwm.view.plot.comparison"):
        monkeypatch.setattr(name, lambda *words: start(*words) if words[0] is not verdict else "")
    monkeypatch.setattr(
        "jaxwm.run.checkpoint.read_config", lambda run: dreamer_v3.config("toy/Credit")
    )
    found = [words[1:] for path in DOCUMENTS for words in commands(path) if words[0] == "jaxwm"]
    assert {words[0] for words in found} == set(cli._COMMANDS)
    known_names = {f"{suite}/{name}" for suite, names in known.items() for name in names}
    for words in found:
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
        if words[0] == "train" and "--env" in words:
            suite, _, name = words[words.index("--env") + 1].partition("/")
            assert f"{suite}/{name}" in known_names or suite == "mine:Walk"
    works = [words for words in found if words[0] != "envs" and "--help" not in words]
    assert len(started) == len(works)


def test_make_targets_and_files_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCUMENTS:
        inline = re.findall(r"`make ([^`]+)`", path.read_text("utf-8"))
        named = [words[1:] for words in commands(path) if words[0] == "make"]
        for words in named + [shlex.split(text) for text in inline]:
            assert words[0] in targets, f"{by_name(path)}: make {words[0]}"
        for words in commands(path):
            files = [word for word in words if word.startswith("tests/")]
            assert all((ROOT / file).exists() for file in files), words


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_links_and_pictures_exist(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))
    here = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [x for x in here if not (path.parent / x.partition("#")[0]).exists()]
    assert not missing


def test_the_table_of_sizes_is_that_of_the_code():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    told = {row[0]: row[1:] for row in rows if re.fullmatch(r"debug|nano|size\d+m", row[0])}
    assert list(told) == ["debug", "nano", *dreamer_v3.DETER]
    worlds = [envs.make(name) for name in ("gymnax/CartPole-v1", "toy/Pixels")]
    for size, (deter, units, latent, depth, *counts) in told.items():
        config = dreamer_v3.sized(size)
        model = config.model
        assert (int(deter), int(units)) == (model.core.deter, model.units)
        assert latent == f"{model.latent.stoch} x {model.latent.classes}"
        assert int(depth) == model.codec.depth
        # Shapes alone take a second for each agent, so that two sizes have to do.
        for world, count in zip(worlds, counts, strict=True):
            if size in ("nano", "size200m"):
                agent = dreamer_v3.agent(config, world.obs_space, world.action_space)
                params = jax.eval_shape(agent.init, jax.random.key(0)).params
                assert f"{sum(math.prod(x.shape) for x in jax.tree.leaves(params)):,}" == count


@pytest.mark.parametrize("path", DOCUMENTS[:2], ids=by_name)
def test_files_named_in_passing_exist(path):
    names = re.findall(r"`((?:\w+/)*\w+\.(?:py|md|txt|toml|ipynb))`", path.read_text("utf-8"))
    made = {"SUMMARY.md", "mine.py"}  # by a run, and by the reader
    homes = (ROOT, ROOT / "jaxwm")
    assert not [x for x in set(names) - made if not any((home / x).exists() for home in homes)]
