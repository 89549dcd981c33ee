"""The `htcl` command. Each step is also a file in `jobs/` that calls `run_step`, so that both read the same flags and
do the same work.

Exit codes: 0 done; 2 the user's input or configuration is wrong (one sentence on stderr); 1 anything else.
"""

from __future__ import annotations

import argparse
import codecs
import errno
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from htcl_ray import __version__, errors
from htcl_ray.config import PRESETS, Config, json_schema, resolve
from htcl_ray.errors import ConfigError, HtclError, InputError
from htcl_ray.workspace.credentials import without_credentials
from htcl_ray.workspace.paths import absolute

if TYPE_CHECKING:
    from htcl_ray.workspace.artifacts import StepResult


@dataclass(frozen=True)
class Command:
    """One subcommand: its help text, what it runs, and the flags that it adds to the common ones."""

    help: str
    run: Callable[[Config, argparse.Namespace], None]
    flags: Callable[[argparse.ArgumentParser], None] = field(default=lambda parser: None)
    on_cluster: bool = True
    """Whether it may run as a job, in a working directory that is temporary."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `htcl` and return its exit code."""
    _write_any_character()
    try:
        try:
            code = _run(arguments)
        finally:
            print(end="", flush=True)
    except OSError as error:  # of standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes there when the interpreter ends
        if error.errno == errno.EPIPE:  # `htcl search … | head`: the reader has what it wanted
            return 128 + signal.SIGPIPE
        print(f"htcl: failed: the output cannot be written ({error.strerror or error})", file=sys.stderr)
        return 1
    return code


def _run(arguments: Sequence[str] | None) -> int:
    where = "the workspace"
    try:
        options = build_parser().parse_args(arguments)
        config = _config(options)
        where = f"the workspace {config.workspace}"
        COMMANDS[options.command].run(config, options)
    except KeyboardInterrupt:
        print("htcl: stopped; the same command continues where it can", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
            os.write(1, b"\n")  # raises the same error when it is of standard output
        return _report(error, where)
    return 0


def _write_any_character() -> None:
    """Let both streams of this process write what their encoding lacks: an arrow on a terminal without UTF-8 must not
    end a step.
    """
    codecs.register_error("htcl-ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="htcl-ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(
        ASCII.get(character) or f"\\u{ord(character):04x}" for character in error.object[error.start : error.end]
    ), error.end


ASCII = {
    "→": "->",
    "↔": "<->",
    "–": "-",
    "—": "-",
    "×": "x",
    "…": "...",
    "·": ".",
    "≥": ">=",
    "≤": "<=",
    "±": "+-",
    "−": "-",
    "’": "'",
}


def run_step(step: str) -> int:
    """Run one step with this process's arguments: what every file of `jobs/` does."""
    return main([step, *sys.argv[1:]])


def _report(error: BaseException, where: str = "the workspace") -> int:
    from htcl_ray.workspace.filesystem import storage_failure

    ours = _ours(error) or storage_failure(error, where)
    if isinstance(ours, InputError):
        print(f"htcl: error: {ours}", file=sys.stderr)
        return ours.exit_code
    if ours is not None:
        print(f"htcl: failed: {ours}", file=sys.stderr)
        return ours.exit_code
    print(without_credentials("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return 1


def _ours(error: BaseException) -> HtclError | None:
    """The error that we raised on purpose, also when Ray carried it here inside errors of its own."""
    cause: BaseException | None = error
    for _ in range(10):
        carried = getattr(
            cause, "cause", None
        )  # Ray's error of a task is also of the class of its cause, with a traceback for a message
        if isinstance(cause, HtclError) and not isinstance(carried, BaseException):
            return cause
        cause = carried or (cause and cause.__cause__)
    if found := RAISED_IN_A_TASK.search(str(error)):  # Ray Data loses the error itself and keeps its traceback
        return getattr(errors, found[1])(found[2])
    return None


RAISED_IN_A_TASK = re.compile(r"^htcl_ray\.errors\.((?!AudioError|RequestError)\w+): (.+)$", re.MULTILINE)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; '{self.prog} --help' lists what there is")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `htcl` with all subcommands; errors are raised as ConfigError."""
    parser = _Parser(prog="htcl", description="Music representations learned from sound, words and taste, on Ray.")
    parser.add_argument("--version", action="version", version=f"htcl-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        sub.add_argument("--preset", help=f"shipped configuration: {', '.join(PRESETS)}")
        sub.add_argument("--config", metavar="FILE.yaml", help="configuration file, over the preset")
        sub.add_argument(
            "--set",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            dest="assignments",
            help="one key, over both; repeatable",
        )
        sub.add_argument(
            "--workspace", metavar="DIR_OR_URI", help="where everything that is written lies (default ./workspace)"
        )
        command.flags(sub)
    return parser


def _config(options: argparse.Namespace) -> Config:
    preset = options.preset or ("demo" if options.command == "demo" and not options.config else None)
    config = resolve(preset, options.config, options.assignments)
    if options.workspace:
        config = config.with_overrides({"workspace": options.workspace})
    if COMMANDS[options.command].on_cluster:
        from htcl_ray.cluster.connection import refuse_relative_paths

        refuse_relative_paths(config)
    return config.with_absolute_paths()


def _model_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="VERSION",
        help="model version (default: the one that this configuration trains, else the newest accepted)",
    )


def _index_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", metavar="VERSION", help="index version (default: the newest accepted)")


def _evaluate_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    parser.add_argument(
        "--gate",
        metavar="FILE.yaml",
        help="judge the model by these bounds and record the verdict; 'default' is the shipped gate",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--ablate",
        action="store_true",
        help="train and evaluate the method without each of its parts: hours, resumable",
    )
    instead.add_argument(
        "--compare",
        nargs=2,
        metavar=("RUN", "RUN"),
        help="two finished reports: paired differences, the second minus the first",
    )


def _build_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    parser.add_argument(
        "--compact",
        action="store_true",
        help="fold the songs that were put in and taken out while it was served into a new index version",
    )
    parser.add_argument(
        "--index", metavar="VERSION", help="with --compact: the index to start from (default: the active one)"
    )


def _search_flags(parser: argparse.ArgumentParser) -> None:
    _index_flag(parser)
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="words")
    query.add_argument("--audio", metavar="FILE", help="an audio file: a path, or an s3:// or gs:// URI")
    query.add_argument("--song-id", metavar="ID", help="a song of the index")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="number of songs (default 10)")
    parser.add_argument(
        "--blend", type=float, metavar="X", help="0 semantic … 1 preference (default 0.5, or 0 without stage 2)"
    )
    parser.add_argument(
        "--filter",
        metavar="JSON",
        help="""conditions on metadata, such as '{"genre": ["rock"], "year": {"gte": 1990}}'""",
    )
    parser.add_argument("--max-per-artist", type=int, metavar="N", help="at most so many songs of one artist")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _config_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=["show", "schema"], help="the resolved configuration as YAML, or its JSON Schema"
    )


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fresh", action="store_true", help="remove what an earlier demo made in this workspace, and start over"
    )


def _step(module: str, function: str, *, argument: str | None = None) -> Callable[[Config, argparse.Namespace], None]:
    def run(config: Config, options: argparse.Namespace) -> None:
        import importlib

        from htcl_ray.workspace.storage import Workspace

        Workspace(config.workspace).check_writable()
        step = getattr(importlib.import_module(module), function)
        _say(step(config, getattr(options, argument)) if argument else step(config))

    return run


def _say(result: StepResult) -> None:
    state = "already done" if result.skipped else f"done in {result.seconds:.0f} s"
    print(f"{result.step}: {state}: {result.summary} → {result.location}", flush=True)


def _evaluate(config: Config, options: argparse.Namespace) -> None:
    if options.gate and (options.ablate or options.compare):
        raise ConfigError("--gate judges one model and goes with neither --ablate nor --compare; give one of them")
    if options.ablate:
        _step("htcl_ray.pipelines.ablate", "ablate")(config, options)
    elif options.compare:
        from htcl_ray.pipelines.compare import compare

        first, second = options.compare
        _say(compare(config, first, second))
    elif options.gate:
        from htcl_ray.pipelines.apply_gate import evaluate_and_judge

        _say(evaluate_and_judge(config, options.model, options.gate))
    else:
        _step("htcl_ray.pipelines.evaluate", "evaluate", argument="model")(config, options)


def _index(config: Config, options: argparse.Namespace) -> None:
    if options.index and not options.compact:
        raise ConfigError("--index says which index --compact starts from; give --compact too")
    if options.compact and options.model:
        raise ConfigError(
            "--compact keeps the models of the index that it starts from; leave out --model, or choose with --index"
        )
    if options.compact:
        _step("htcl_ray.pipelines.compact", "compact", argument="index")(config, options)
    else:
        _step("htcl_ray.pipelines.index", "build_index", argument="model")(config, options)


def _demo(config: Config, options: argparse.Namespace) -> None:
    from htcl_ray.commands.demo import demo

    demo(config, fresh=options.fresh)


def _serve(config: Config, options: argparse.Namespace) -> None:
    from htcl_ray.serving.front import haproxy_front

    with haproxy_front(config):
        from htcl_ray.serving.application import (
            serve_until_stopped,
        )  # imports Ray Serve, which reads what the front sets

        serve_until_stopped(config, options.index)


def _search(config: Config, options: argparse.Namespace) -> None:
    from htcl_ray.commands.search import search

    query = {
        "text": options.text,
        "audio": absolute(options.audio) if options.audio else None,
        "song_id": options.song_id,
    }
    how = {"k": options.k, "blend": options.blend, "max_per_artist": options.max_per_artist}
    search(config, options.index, **query, conditions=options.filter, as_json=options.json, **how)


def _import_official_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE",
        help="state dict that their training scripts saved (model-N.pth), or that of an AudioModel",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help="folder to make; WORKSPACE/models/semantic/NAME (stage 2: preference) serves every step",
    )
    parser.add_argument(
        "--stage", type=int, choices=[1, 2], required=True, help="which of their two training scripts saved it"
    )
    parser.add_argument(
        "--parent", metavar="VERSION", help="stage 2 in a workspace: the stage-1 model there that it grew from"
    )


def _import_official(config: Config, options: argparse.Namespace) -> None:
    from htcl_ray.commands.import_official import import_official

    import_official(config, Path(absolute(options.file)), absolute(options.out), options.stage, options.parent)


def _show_config(config: Config, options: argparse.Namespace) -> None:
    print(config.as_yaml().rstrip() if options.what == "show" else json.dumps(json_schema(), indent=2))


COMMANDS: dict[str, Command] = {
    "demo": Command("the whole path on a sample catalogue: every step, the service, three queries", _demo, _demo_flags),
    "preprocess": Command(
        "catalogue → log-mel features; logs → preference pairs", _step("htcl_ray.pipelines.preprocess", "preprocess")
    ),
    "pretrain": Command("stage 1: audio ↔ text", _step("htcl_ray.pipelines.train", "pretrain")),
    "finetune": Command(
        "stage 2: preference pairs, from a stage-1 model",
        _step("htcl_ray.pipelines.train", "finetune", argument="model"),
        _model_flag,
    ),
    "tune": Command(
        "search over configuration keys: temperature, batch size, …",
        _step("htcl_ray.pipelines.tuning.tune", "tune", argument="model"),
        _model_flag,
    ),
    "embed": Command(
        "every song of the catalogue → vectors",
        _step("htcl_ray.pipelines.embed", "embed", argument="model"),
        _model_flag,
    ),
    "index": Command("vectors → FAISS index", _index, _build_flags),
    "evaluate": Command("held-out songs and users → report.json, report.html", _evaluate, _evaluate_flags),
    "serve": Command("start the HTTP application", _serve, _index_flag),
    "search": Command("one query from the shell, no server needed", _search, _search_flags, on_cluster=False),
    "import-official": Command(
        "the authors' weights → a model folder", _import_official, _import_official_flags, on_cluster=False
    ),
    "config": Command("print the configuration", _show_config, _config_flags, on_cluster=False),
}


if __name__ == "__main__":
    raise SystemExit(main())
