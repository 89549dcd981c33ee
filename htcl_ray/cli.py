"""The `htcl` command: its subcommands, their flags, and the exit code.

Each step is also a file in `jobs/` that calls `run_step`, so that both accept the same flags and do the same work. Exit
codes: 0 success; 2 the user's input or configuration is wrong (one sentence on standard error); 1 anything else.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from htcl_ray import __version__
from htcl_ray.commands import flags
from htcl_ray.commands.terminal import accept_any_character, print_result, report_error
from htcl_ray.config import PRESETS, Config, json_schema, resolve
from htcl_ray.errors import ConfigError
from htcl_ray.workspace.paths import absolute

JOINT_SPACE = "pretrained"
"""Name for `htcl finetune --from` of the joint space of the pretrained audio-text model."""


@dataclass(frozen=True)
class Command:
    """One subcommand: its help text, its function, and the flags that it adds to the common ones."""

    help: str
    run: Callable[[Config, argparse.Namespace], None]
    flags: Callable[[argparse.ArgumentParser], None] = field(default=lambda parser: None)
    on_cluster: bool = True
    """Whether it may run as a job on a remote cluster, where the working directory is temporary."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `htcl` and return its exit code."""
    accept_any_character()
    try:
        try:
            code = _run(arguments)
        finally:
            print(end="", flush=True)
    except OSError as error:  # of standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes the rest of the buffer to it at exit
        if error.errno == errno.EPIPE:  # `htcl search … | head`: the reader needs no more
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
    except Exception as error:  # noqa: BLE001
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
            os.write(1, b"\n")  # raises the same error when standard output is the cause
        return report_error(error, where)
    return 0


def run_step(step: str) -> int:
    """Run one step with the arguments of this process, and return its exit code; the body of every file in `jobs/`."""
    return main([step, *sys.argv[1:]])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; '{self.prog} --help' lists the options")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `htcl`, with one subparser per command; errors are raised as ConfigError."""
    parser = _Parser(prog="htcl", description="Music representations learned from audio, text and listening, on Ray.")
    parser.add_argument("--version", action="version", version=f"htcl-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        sub.add_argument("--preset", help=f"preset configuration: {', '.join(PRESETS)}")
        sub.add_argument("--config", metavar="FILE.yaml", help="configuration file; its keys override the preset")
        sub.add_argument(
            "--set",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            dest="assignments",
            help="one configuration key; overrides the preset and the file; repeatable",
        )
        sub.add_argument(
            "--workspace", metavar="DIR_OR_URI", help="folder or URI for all data and artifacts (default ./workspace)"
        )
        command.flags(sub)
    return parser


def _config(options: argparse.Namespace) -> Config:
    preset = options.preset or ("demo" if options.command == "demo" and not options.config else None)
    config = resolve(preset, options.config, options.assignments)
    if getattr(options, "warm_start", None) == JOINT_SPACE and options.command == "finetune":
        config = config.with_overrides({"pretrain.use_joint_space": True})
    elif getattr(options, "warm_start", None):
        config = config.with_overrides({f"{options.command}.warm_start": options.warm_start})
    if options.workspace:
        config = config.with_overrides({"workspace": options.workspace})
    if COMMANDS[options.command].on_cluster:
        from htcl_ray.cluster.connection import refuse_relative_paths

        refuse_relative_paths(config)
    return config.with_absolute_paths()


def _step(module: str, function: str, *, argument: str | None = None) -> Callable[[Config, argparse.Namespace], None]:
    def run(config: Config, options: argparse.Namespace) -> None:
        import importlib

        from htcl_ray.workspace.storage import Workspace

        Workspace(config.workspace).check_writable()
        step = getattr(importlib.import_module(module), function)
        print_result(step(config, getattr(options, argument)) if argument else step(config))

    return run


def _run_all(config: Config, options: argparse.Namespace) -> None:
    from htcl_ray.pipelines.run import run
    from htcl_ray.workspace.storage import Workspace

    Workspace(config.workspace).check_writable()
    result = run(config, until=options.until or flags.RUN_STEPS[-1], gate=options.gate, report=print_result)
    print()
    print_result(result)


def _evaluate(config: Config, options: argparse.Namespace) -> None:
    if options.gate and (options.ablate or options.compare):
        raise ConfigError("--gate judges one model and cannot be combined with --ablate or --compare; give one of them")
    if options.ablate:
        _step("htcl_ray.pipelines.ablate", "ablate")(config, options)
    elif options.compare:
        from htcl_ray.pipelines.compare import compare

        first, second = options.compare
        print_result(compare(config, first, second))
    elif options.gate:
        from htcl_ray.pipelines.apply_gate import evaluate_and_judge

        print_result(evaluate_and_judge(config, options.model, options.gate))
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
        # Imported here, because it imports Ray Serve, which reads the environment variables that the front sets.
        from htcl_ray.serving.application import serve_until_stopped

        serve_until_stopped(config, options.index)


def _search(config: Config, options: argparse.Namespace) -> None:
    from htcl_ray.commands.search import search

    query = {
        "text": options.text,
        "audio": absolute(options.audio) if options.audio else None,
        "song_id": options.song_id,
    }
    limits = {"k": options.k, "blend": options.blend, "max_per_artist": options.max_per_artist}
    search(config, options.index, **query, conditions=options.filter, as_json=options.json, **limits)


def _import(config: Config, options: argparse.Namespace) -> None:
    from htcl_ray.commands.import_catalog import import_dataset, import_folder

    if options.source == "folder":
        import_folder(absolute(options.path), absolute(options.out))
    else:
        import_dataset(options.source, absolute(options.path), absolute(options.out))


def _import_official(config: Config, options: argparse.Namespace) -> None:
    from htcl_ray.commands.import_official import import_official

    import_official(config, Path(absolute(options.file)), absolute(options.out), options.stage, options.parent)


def _show_config(config: Config, options: argparse.Namespace) -> None:
    print(config.as_yaml().rstrip() if options.what == "show" else json.dumps(json_schema(), indent=2))


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "run every step on a sample catalogue, start the service and send three queries", _demo, flags.demo_flags
    ),
    "run": Command(
        "run every step from the catalogue to the report, each only where its result does not exist yet",
        _run_all,
        flags.run_flags,
    ),
    "import": Command(
        "make a catalogue from a folder of music files, or a catalogue and a log from a public data set",
        _import,
        flags.import_flags,
        on_cluster=False,
    ),
    "preprocess": Command(
        "compute log-mel features from the catalogue and preference pairs from the logs",
        _step("htcl_ray.pipelines.preprocess", "preprocess"),
    ),
    "pretrain": Command(
        "train stage 1: contrastive pre-training on audio and text",
        _step("htcl_ray.pipelines.train", "pretrain"),
        flags.pretrain_flags,
    ),
    "finetune": Command(
        "train stage 2: contrastive fine-tuning of a stage-1 model on preference pairs",
        _step("htcl_ray.pipelines.train", "finetune", argument="model"),
        flags.finetune_flags,
    ),
    "tune": Command(
        "search over configuration keys, by default temperature, batch size and learning rate",
        _step("htcl_ray.pipelines.tuning.tune", "tune", argument="model"),
        flags.model_flag,
    ),
    "embed": Command(
        "compute the embeddings of every song of the catalogue",
        _step("htcl_ray.pipelines.embed", "embed", argument="model"),
        flags.model_flag,
    ),
    "index": Command("build a FAISS index from the embeddings", _index, flags.build_flags),
    "evaluate": Command(
        "evaluate on held-out songs and users; writes report.json and report.html", _evaluate, flags.evaluate_flags
    ),
    "serve": Command("start the HTTP application", _serve, flags.index_flag),
    "search": Command("run one query in this process, without a server", _search, flags.search_flags, on_cluster=False),
    "import-official": Command(
        "convert the authors' weights into a model folder",
        _import_official,
        flags.import_official_flags,
        on_cluster=False,
    ),
    "config": Command("print the configuration or its JSON Schema", _show_config, flags.config_flags, on_cluster=False),
}


if __name__ == "__main__":
    raise SystemExit(main())
