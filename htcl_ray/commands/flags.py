"""Flags and positional arguments of the subcommands of `htcl`, apart from those that all of them share."""

from __future__ import annotations

import argparse

IMPORT_SOURCES = ("folder", "jamendo", "fma", "melon", "music4all-onion", "yambda", "listenbrainz")
RUN_STEPS = ("preprocess", "pretrain", "finetune", "embed", "index", "evaluate")
"""The steps of `htcl run`, in their order."""


def run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `htcl run`."""
    parser.add_argument("--until", metavar="STEP", choices=RUN_STEPS, help=f"last step: {', '.join(RUN_STEPS)}")
    gate_flag(parser)


def gate_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--gate`."""
    parser.add_argument(
        "--gate",
        metavar="FILE.yaml",
        help="check the metrics against these bounds and record the verdict; 'default' is the gate of the package",
    )


def model_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--model`."""
    parser.add_argument(
        "--model",
        metavar="VERSION",
        help="model version (default: the one that this configuration trains, else the newest that its gate accepts)",
    )


def pretrain_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `htcl pretrain`."""
    from_flag(parser, "an earlier semantic model, or one of imported weights: every part of it that fits is taken")


def finetune_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `htcl finetune`."""
    model_flag(parser)
    from_flag(
        parser,
        "an earlier preference model, which is continued on newer pairs, with its own pairs mixed in, or 'pretrained': "
        "the joint space of the pretrained audio-text model (pretrain.use_joint_space)",
    )


def from_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--from`, the earlier model of a warm start."""
    parser.add_argument(
        "--from",
        dest="warm_start",
        metavar="MODEL",
        help=f"{what}; a model folder, or a model version of the workspace",
    )


def index_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--index`."""
    parser.add_argument("--index", metavar="VERSION", help="index version (default: the newest that its gate accepts)")


def evaluate_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `htcl evaluate`."""
    model_flag(parser)
    gate_flag(parser)
    alternatives = parser.add_mutually_exclusive_group()
    alternatives.add_argument(
        "--ablate",
        action="store_true",
        help="train and evaluate the method without each of its parts in turn: hours, resumable",
    )
    alternatives.add_argument(
        "--compare",
        nargs=2,
        metavar=("RUN", "RUN"),
        help="two finished reports: paired differences, the second minus the first",
    )


def build_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `htcl index`."""
    model_flag(parser)
    parser.add_argument(
        "--compact",
        action="store_true",
        help="merge the songs that were added and removed over HTTP into a new index version",
    )
    parser.add_argument(
        "--index", metavar="VERSION", help="with --compact: the version to compact (default: the active one)"
    )


def search_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `htcl search`."""
    index_flag(parser)
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="a description such as 'calm piano'")
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
    parser.add_argument("--max-per-artist", type=int, metavar="N", help="maximum number of songs per artist")
    parser.add_argument("--json", action="store_true", help="print JSON")


def config_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `htcl config`."""
    parser.add_argument(
        "what", choices=["show", "schema"], help="the resolved configuration as YAML, or its JSON Schema"
    )


def demo_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `htcl demo`."""
    parser.add_argument(
        "--fresh", action="store_true", help="remove the files of an earlier demo from this workspace first"
    )


def import_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `htcl import`."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        choices=IMPORT_SOURCES,
        help=f"folder: music files, by their tags and paths; or a public data set: {', '.join(IMPORT_SOURCES[1:])}",
    )
    parser.add_argument("path", metavar="DIR", help="the folder; its subfolders are read too")
    parser.add_argument(
        "--out",
        metavar="FILE.parquet",
        default="catalog.parquet",
        help="the catalogue to write (default ./catalog.parquet); rejected.csv, or interactions.parquet of a "
        "data set, is written next to it",
    )


def import_official_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `htcl import-official`."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="state dict that the authors' training scripts saved (model-N.pth), or that of an AudioModel",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help="new model folder; below WORKSPACE/models/semantic (stage 2: preference) every step can use it",
    )
    parser.add_argument(
        "--stage", type=int, choices=[1, 2], required=True, help="the training stage that the weights are from"
    )
    parser.add_argument(
        "--parent", metavar="VERSION", help="for stage 2 in a workspace: the stage-1 model that it was fine-tuned from"
    )
