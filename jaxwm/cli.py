"""The command line: `jaxwm train`, `resume`, `eval`, `checkpoints`, `plot`, `compare` and `envs`.

Bad input is told in one paragraph, with exit code 2. jax is imported only once a command needs it,
so that the help of commands, their names and their own flags do not wait for it; the entries of a
configuration do.
"""

import argparse
import contextlib
import difflib
import io
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from jaxwm.recipes import RECIPES
from jaxwm.run import lock
from jaxwm.run.stop import at_once
from jaxwm.spaces import JaxwmError

_HELP = """\
usage: jaxwm COMMAND ...

Train and study world models in JAX.

commands:
  train RECIPE      train an agent, evaluate it and write a summary
  resume RUN        go on with a run from its newest checkpoint
  eval RUN          play episodes with a trained agent
  checkpoints RUN   list, verify, prune or export the checkpoints of a run
  plot RUN ...      draw the learning curves of runs
  compare RUN ...   draw and judge runs beside the published curve of their task
  envs [SUITE]      list the environments
  envs check NAME   play random actions in one, and say what is wrong with it

options:
  -h, --help        this text, or that of a command: jaxwm COMMAND --help
  --version         the version of jaxwm

to begin with:
  jaxwm train dreamer_v3 --preset cartpole
"""


class UsageError(Exception):
    """A command line that cannot be understood, in words."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words after `jaxwm`; by default those of the process.

    Returns:
      The exit code: 0, 1 if what was checked is broken, 2 after bad input or if the run had to
      end, 130 after an interrupt, 143 after SIGTERM.
    """
    whole = argv is None
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names may have letters that it does not take
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(argv, whole)
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # whoever read along has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("jaxwm: interrupted; `jaxwm resume` goes on from a checkpoint", file=sys.stderr)
        return 130
    except (UsageError, JaxwmError) as error:
        message = str(error)
    except (RuntimeError, ValueError, AssertionError) as error:
        if _is_about_processes(error):
            print(
                f"jaxwm: another process of this training has gone ({_first_line(error)}). Start "
                "all of them again with `jaxwm resume`: it goes on from a checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            if whole:
                os._exit(2)  # any other end would wait for the process that has gone
            return 2
        if not _is_about_devices(error):
            raise
        names = {x for x in os.environ if x.startswith("JAX_")} - {"JAX_COMPILATION_CACHE_DIR"}
        told = [f"{x}={os.environ[x]}" for x in sorted(names)]
        message = (
            f"jax cannot begin ({_first_line(error)}). The environment's variables tell it "
            f"{', '.join(told) or 'nothing'}: change them, or install jax for the device you mean."
        )
    width = min(shutil.get_terminal_size().columns, 100)
    paragraph = textwrap.fill(
        f"jaxwm: {message}", width, break_long_words=False, break_on_hyphens=False
    )
    print(paragraph, file=sys.stderr)
    return 2


def _is_about_devices(error: BaseException) -> bool:
    """Whether jax raised an error as it looked for devices or read its options."""
    frames = traceback.extract_tb(error.__traceback__)
    homes = (Path("jax/_src/xla_bridge.py").parts, Path("jax/_src/config.py").parts)
    return any(Path(frame.filename).parts[-3:] in homes for frame in frames)


def _is_about_processes(error: BaseException) -> bool:
    """Whether another process of the training could not be reached any more."""
    lost = re.search(r"Gloo|NCCL|coordination service|Connection (closed|reset)", str(error))
    return bool(lost) and "jax" in sys.modules and sys.modules["jax"].process_count() > 1


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _dispatch(argv: list[str], whole: bool) -> int:
    """Runs a command, which is the whole of the process or not; gives its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *words = argv
    if name == "--version":
        from jaxwm import __version__

        print(f"jaxwm {__version__}")
        return 0
    if name not in _COMMANDS:
        raise UsageError(_unknown(name, _COMMANDS, "command"))
    _keep_compiled_programs()
    # XLA's warnings: one for each array that is larger than a piece of temporary memory.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with at_once(to_the_end=whole):
            _COMMANDS[name](words)
    except SystemExit as stop:  # after --help, a signal, or a check that found something
        return int(stop.code or 0)
    return 0


def _train(words: list[str]) -> None:
    parser = _Parser("train", "train an agent, evaluate it and write a summary", add_help=False)
    parser.add_argument("--preset")
    parser.add_argument("--env")
    parser.add_argument("--size")
    parser.add_argument("--variant")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--tensorboard", action="store_true")
    _add_processes(parser)
    if not words or words[0] in ("-h", "--help"):
        text = _TRAIN_HELP + "\nrecipes:\n" + "".join(f"  {name}\n" for name in RECIPES)
        print(text, end="", file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    recipe, *words = words
    if recipe not in RECIPES:
        raise UsageError(_unknown(recipe, RECIPES, "recipe"))
    known, words = parser.parse_known_args(words)
    wants_help = "-h" in words or "--help" in words
    if known.env is None and known.preset is None:
        if not wants_help:
            raise UsageError(
                "Training needs an environment: give --env NAME (`jaxwm envs` lists them) or "
                "--preset NAME."
            )
        known.env = "SUITE/NAME"
    if known.run is not None and known.process in (None, 0):
        lock.check(known.run)  # at once: jax takes longer to import
    if not wants_help:
        _join_processes(known)
    _load_own(known.env)
    default = RECIPES[recipe].run(known.env, known.size, known.variant, known.preset)
    config = _configure(recipe, default, words, parser.flags())
    from jaxwm.run.loop import run

    run(config, known.run, tensorboard=known.tensorboard)


_TRAIN_HELP = """\
usage: jaxwm train RECIPE (--env NAME | --preset NAME) [options]

Trains an agent, evaluates it and writes a summary.

options:
  --env NAME        the environment; `jaxwm envs` lists them; or module:function of your own
  --preset NAME     a named configuration of the recipe, environment included
  --size NAME       size of the agent
  --variant NAME    where a paper and its code differ
  --run FOLDER      where the run goes; by default runs/, named after what was given
  --tensorboard     write TensorBoard event files too
  --distributed     be one of several processes, as SLURM, Cloud TPU, ... tell; or as told by
                    --coordinator HOST:PORT --processes COUNT --process NUMBER
  --steps, --seed, --seeds, --replay.train-ratio, ...
                    any entry of the configuration: jaxwm train RECIPE --help
"""


def _resume(words: list[str]) -> None:
    parser = _Parser("resume", "go on with a run from its newest checkpoint")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--steps", type=int, help="environment steps to reach, if not as before")
    accept = "go on with a configuration that was changed since the checkpoint was made"
    parser.add_argument("--accept-changes", action="store_true", help=accept)
    parser.add_argument("--tensorboard", action="store_true", help="write event files too")
    parser.add_argument("--env", help=_OWN_HELP)
    _add_processes(parser)
    known = parser.parse_all(words)
    if known.process in (None, 0):
        lock.check(known.run)
    _join_processes(known)
    _load_own(known.env)
    from jaxwm.run.loop import resume

    resume(known.run, known.steps, accept=known.accept_changes, tensorboard=known.tensorboard)


def _eval(words: list[str]) -> None:
    parser = _Parser("eval", "play episodes with a trained agent")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--episodes", type=int, default=20, help="episodes to play (20)")
    parser.add_argument("--seed", type=int, help="other numbers play other episodes")
    parser.add_argument("--env", help=_OWN_HELP)
    known = parser.parse_all(words)
    _check_range("--episodes", known.episodes, 2**31 - 1)
    _check_range("--seed", known.seed or 0, 2**32 - 1, least=0)
    _load_own(known.env)
    from jaxwm.evaluate.final import evaluate_run, evaluation_lines
    from jaxwm.run.checkpoint import read_config
    from jaxwm.run.divergence import stopped_at_end

    returns = evaluate_run(known.run, known.episodes, known.seed)
    config = read_config(known.run)
    print("\n".join(evaluation_lines(returns, config, stopped_at_end(known.run, config))))


def _checkpoints(words: list[str]) -> None:
    parser = _Parser("checkpoints", "list the checkpoints of a run, and do something with them")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    what = "list them (default); verify: exit with 1 if any is damaged; prune: remove those that "
    what += "are damaged or unfinished; export: write the networks as safetensors and JSON"
    actions = ["list", "verify", "prune", "export"]
    parser.add_argument("action", nargs="?", default="list", choices=actions, help=what)
    parser.add_argument("folder", type=Path, nargs="?", help="where an export goes")
    parser.add_argument("--best", action="store_true", help="export those with the best returns")
    known = parser.parse_all(words)
    if (known.action == "export") != (known.folder is not None):
        raise UsageError(
            "An export, and only that, needs a folder: jaxwm checkpoints RUN export FOLDER."
        )
    from jaxwm.run import checkpoint
    from jaxwm.run.memory import size

    checkpoint.read_config(known.run)
    if known.action == "export":
        from jaxwm.run.weights import export

        print(export(known.run, known.folder, best=known.best))
        return
    if known.action == "prune":
        with lock.hold(known.run):
            gone = checkpoint.prune(known.run)
        print(f"Removed: {', '.join(gone)}." if gone else "There is nothing to remove.")
        return
    lines = checkpoint.overview(known.run)
    for name, count, state in lines:
        print(f"{name:>12}  {size(count):>8}  {state}")
    if not lines:
        print(f"{known.run} has no checkpoint yet.")
    if known.action == "verify" and not all(x[2].startswith("sound") for x in lines):
        raise SystemExit(1)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    """The flags for training in several processes."""
    told = "be one of several processes, as SLURM, Cloud TPU, ... tell"
    parser.add_argument("--distributed", action="store_true", help=told)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached")
    parser.add_argument("--processes", type=int, metavar="COUNT", help="how many there are")
    parser.add_argument("--process", type=int, metavar="NUMBER", help="which this is, from 0")


def _join_processes(known: argparse.Namespace) -> None:
    """Joins the other processes, if there are any, before jax is used."""
    explicit = known.coordinator, known.processes, known.process
    if not known.distributed and explicit == (None, None, None):
        return
    from jaxwm.train.processes import join

    join(*explicit)


_OWN_HELP = "module:function, if the run is in an environment of your own"


def _load_own(name: str | None) -> None:
    """Imports the environment `module:function` that the user has typed, if it is one."""
    if name is None or ":" not in name or "/" in name:
        return
    # As with `python -m`, modules are looked for in the present folder first.
    if "" not in sys.path:
        sys.path.insert(0, "")
    from jaxwm.envs import load

    load(name)


def _plot(words: list[str]) -> None:
    parser = _Parser("plot", "draw the learning curves of runs")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("curve.png"), help="the picture's file")
    parser.add_argument("--metric", default="episode/return", help="what to draw")
    known = parser.parse_all(words)
    from jaxwm.view.plot import learning_curve

    print(learning_curve(known.runs, known.out, known.metric))


def _compare(words: list[str]) -> None:
    parser = _Parser("compare", "draw and judge runs beside the published curve of their task")
    runs = "folders of runs that differ in their seeds"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=runs)
    parser.add_argument("--task", help="the published task, if not that of the environment")
    parser.add_argument("--method", default="dreamerv3", help="the published method (dreamerv3)")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture's file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write numbers and verdict too")
    known = parser.parse_all(words)
    from jaxwm.evaluate.compare import compare
    from jaxwm.view.plot import comparison

    result = compare(known.runs, known.task, known.method)
    picture = comparison(result, known.out)
    if known.json is not None:
        known.json.parent.mkdir(parents=True, exist_ok=True)
        known.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n", "utf-8")
    print("\n".join([result.verdict.words, *result.caveats, str(picture)]))


def _envs(words: list[str]) -> None:
    if words and words[0] == "check":
        return _check(words[1:])
    parser = _Parser("envs", "list the environments; `jaxwm envs check NAME` examines one")
    parser.add_argument("suite", nargs="?", metavar="SUITE", help="only those of this suite")
    known = parser.parse_all(words)
    from jaxwm.envs import names

    suites = names()
    if known.suite is not None and known.suite not in suites:
        raise UsageError(_unknown(known.suite, suites, "environment suite"))
    for suite in suites if known.suite is None else [known.suite]:
        if not suites[suite]:
            print(f"{suite}: its package is not installed", file=sys.stderr)
        for name in suites[suite]:
            print(f"{suite}/{name}")


def _check(words: list[str]) -> None:
    parser = _Parser("envs check", "play random actions in an environment and judge what it does")
    parser.add_argument("name", metavar="NAME", help="its name, or module:function of your own")
    parser.add_argument("--envs", type=int, default=16, help="how many at once (16)")
    parser.add_argument("--steps", type=int, default=500, help="steps of each (500)")
    parser.add_argument("--seed", type=int, default=0, help="other numbers play other actions")
    known = parser.parse_all(words)
    for flag, value in (("--envs", known.envs), ("--steps", known.steps)):
        _check_range(flag, value, 2**31 - 1, least=1)
    _check_range("--seed", known.seed, 2**32 - 1, least=0)
    _load_own(known.name)
    from jaxwm.envs import make
    from jaxwm.envs.examine import examine, report

    env = make(known.name)
    result = examine(env, known.envs, known.steps, known.seed)
    print(report(env, result))
    if result.faults:
        raise SystemExit(1)


def _check_range(flag: str, value: int, most: int, least: int | None = None) -> None:
    if least is not None and value < least:
        raise UsageError(f"{flag} should be at least {least}, not {value}.")
    if value > most:
        raise UsageError(f"{flag} should be at most {most:,}, not {value:,}.")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "resume": _resume,
    "eval": _eval,
    "checkpoints": _checkpoints,
    "plot": _plot,
    "compare": _compare,
    "envs": _envs,
}


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError`, and suggests names for unknown flags."""

    def __init__(self, command: str, description: str, **options: Any):
        super().__init__(f"jaxwm {command}", None, description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        sentence = message[:1].upper() + message[1:]
        raise UsageError(f"{sentence}. See {self.prog} --help.")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]

    def parse_all(self, words: list[str]) -> argparse.Namespace:
        known, rest = self.parse_known_args(words)
        _refuse(rest, self.flags(), self.prog)
        return known


def _configure(recipe: str, default: Any, words: list[str], others: list[str]) -> Any:
    """The configuration `default` with the entries that the flags in `words` change."""
    import tyro

    from jaxwm.config import flatten
    from jaxwm.optim import Number, parse_number

    # A number or a schedule is one word; tyro would make subcommands of the two.
    rules = tyro.constructors.ConstructorRegistry()
    number = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER|SCHEDULE",
        instance_from_str=lambda words: parse_number(words[0]),
        is_instance=lambda value: isinstance(value, Number),
        str_from_instance=lambda value: [str(value)],
    )
    rules.primitive_rule(lambda info: number if info.type == Number else None)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            config, rest = tyro.cli(
                type(default),
                prog=f"jaxwm train {recipe}",
                description=_about(recipe),
                default=default,
                args=words,
                return_unknown_args=True,
                registry=rules,
            )
    except SystemExit as stop:
        if stop.code:
            raise UsageError(_unboxed(told.getvalue())) from None
        raise
    names = [f"--{path.replace('_', '-')}" for path in flatten(default)]
    _refuse(rest, names + others, f"jaxwm train {recipe}")
    if config.recipe != recipe:
        raise UsageError(f"The recipe is {recipe}; --recipe {config.recipe} contradicts it.")
    return config


def _about(recipe: str) -> str:
    """What `jaxwm train RECIPE --help` says before it lists the configuration."""
    text, presets = _TRAIN_HELP.partition("\n\n")[2], RECIPES[recipe].presets
    return f"{text}\npresets:\n" + "".join(f"  {k:<16}  {v}\n" for k, v in presets.items())


def _unboxed(text: str) -> str:
    """The message in the box that tyro draws, as a sentence."""
    lines = [line.strip("│╭╮╰╯ ") for line in text.splitlines()]
    rules = [set(line) <= set("─-") for line in lines]
    # A title, perhaps a rule, the message, a rule, and where to find help.
    start = 2 if rules[1:2] == [True] else 1
    end = rules.index(True, start) if True in rules[start:] else len(lines)
    words = " ".join(lines[start:end])
    words = re.sub(r"^Error parsing [\w.]+: ", "", words)
    number = re.search(r"^Error parsing (--\S+): .*(int\(\)|float).*: ('.*')$", words)
    if number:
        kind = "whole number" if number[2] == "int()" else "number"
        return f"{number[1]} should be a {kind}, not {number[3]}."
    return words if words.endswith((".", "?")) else f"{words}."


def _refuse(words: list[str], flags: Iterable[str], prog: str) -> None:
    """Raises an error at the first word that nothing took."""
    if not words:
        return
    if words[0].startswith("-"):
        flag = words[0].partition("=")[0].replace("_", "-")
        raise UsageError(f"{_unknown(flag, flags, 'flag')} See {prog} --help.")
    raise UsageError(
        f"Nothing takes the word {words[0]!r}. Settings are flags, such as --seed 1. "
        f"See {prog} --help."
    )


def _unknown(name: str, known: Iterable[str], what: str) -> str:
    """The message for an unknown name, with the nearest known ones."""
    close = difflib.get_close_matches(name, known := list(known), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else ""
    if not close and len(known) < 12:
        hint = f"Known: {', '.join(known)}."
    return f"There is no {what} called {name!r}. {hint}".rstrip()


def _keep_compiled_programs() -> None:
    """Lets jax keep compiled programs from one process to the next, where that is possible."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        folder = Path.home() / ".cache" / "jaxwm" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: nobody knows where home is
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


if __name__ == "__main__":
    sys.exit(main())
