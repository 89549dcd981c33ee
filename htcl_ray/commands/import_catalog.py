"""`htcl import`: a folder of music files, or a public data set → a catalogue table and its log."""

from __future__ import annotations

import csv
import io
import itertools
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from htcl_ray.catalog import public_datasets
from htcl_ray.catalog.music_folder import ImportedFolder, Listing, Rejected, count_reasons, list_music, read_songs
from htcl_ray.errors import TableError, WorkspaceError
from htcl_ray.progress import SECONDS_BETWEEN_LINES, Progress, Throttle
from htcl_ray.workspace.filesystem import explain, is_storage_error, storage_errors
from htcl_ray.workspace.local_copies import write_atomically
from htcl_ray.workspace.paths import is_uri

MADE_BY = b"htcl import"
"""Key of the Parquet metadata that marks a catalogue as one that may be overwritten."""
REJECTED = "rejected.csv"
LOG = "interactions.parquet"
HEADER = ",".join(Rejected._fields).encode()
EXTENSIONS_SHOWN = 5


def import_folder(folder: str, out: str) -> None:
    """Write the catalogue of a music folder to the Parquet file `out`, and rejected.csv next to it.

    Prints what was imported, rejected and skipped, and the next command. Raises TableError for a folder that cannot be
    listed or holds no music, WorkspaceError for an `out` that is not to be overwritten.
    """
    if is_uri(folder) or is_uri(out):
        raise TableError(f"htcl import folder reads and writes local folders, but was given {folder} and {out}")
    target = Path(out)
    _check_target(target)
    listing = list_music(folder)
    with Progress("import", len(listing.files), "files") as progress:
        imported = read_songs(listing, progress.advance)
    if not imported.songs.num_rows:
        reasons = "".join(f"; {number:,} {reason}" for reason, number, _ in count_reasons(imported.rejected))
        raise TableError(
            f"{folder} holds no audio file that can be read{reasons}{_skipped(listing)}; give a folder of music"
        )
    _write(target, imported)
    _print(folder, target, listing, imported)


def import_dataset(name: str, folder: str, out: str) -> None:
    """Write the catalogue of the public data set `name` to the Parquet file `out`, and its log next to it.

    Tables are written piece by piece; both files appear when they are whole. Prints what was imported and left out, and
    the next command. Raises TableError for a folder without the published files, WorkspaceError for an `out` that is
    not to be overwritten.
    """
    if is_uri(folder) or is_uri(out):
        raise TableError(f"htcl import {name} reads and writes local folders, but was given {folder} and {out}")
    if not Path(folder).is_dir():
        raise TableError(f"{folder} is no folder; expected the folder of the unpacked data set")
    target = Path(out)
    log = target.with_name(LOG)
    _check_target(target)
    _check_overwritten(log)
    try:
        dataset = public_datasets.DATASETS[name](Path(folder))
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".import-") as scratch:
            written = Path(scratch, target.name), Path(scratch, LOG)
            songs, columns = _write_stream(written[0], dataset.songs, name, "songs")
            if not songs:
                left_out = "; ".join(f"{count:,} left out: {reason}" for reason, count in dataset.dropped.items())
                raise TableError(
                    f"{folder} holds no song that can be imported ({left_out or 'its table is empty'}); "
                    "unpack the audio below that folder"
                )
            events = 0
            if dataset.events is not None:
                events, _ = _write_stream(written[1], dataset.events, name, "events")
                os.replace(written[1], log)
            os.replace(written[0], target)
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, csv.Error, pa.ArrowException) as error:
        if is_storage_error(error):  # of the disk, and not of a file's content
            raise explain(error, str(getattr(error, "filename", None) or target)) from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise TableError(
            f"{folder} does not have the published layout of {name} ({reason}); see docs/own-data.md"
        ) from error
    print(f"import: {songs:,} songs → {target}")
    if dataset.events is not None:
        print(f"  {events:,} events → {log}")
    for reason, count in dataset.dropped.items():
        print(f"  {count:,} left out: {reason}")
    if dataset.note:
        print(f"  {dataset.note}")
    print(_next(target, columns, log if events else None), flush=True)


def _next(target: Path, columns: list[str], log: Path | None) -> str:
    """The next command, as far as the columns allow one."""
    command = f"htcl run --set data.catalog={target}"
    if log is not None:
        command += f" --set data.interactions={log}"
    if "audio_path" in columns:
        return f"next: {command}"
    command += " --set audio.extractor=vectors"
    if "vector" in columns:
        return f"next: {command}"
    return f"next: this data set has no audio; with a table of song_id and vector: {command} --set data.vectors=TABLE"


def _write_stream(target: Path, tables: Iterable[pa.Table], name: str, unit: str) -> tuple[int, list[str]]:
    """Write tables of one schema to a Parquet file; returns the number of rows and the columns."""
    stream = iter(tables)
    first = next(stream, None)
    if first is None:
        raise ValueError(f"no {unit}")
    schema = first.schema.with_metadata({MADE_BY: name.encode()})
    rows, throttle = 0, Throttle(SECONDS_BETWEEN_LINES)
    with pq.ParquetWriter(target, schema) as writer:
        for table in itertools.chain([first], stream):
            writer.write_table(table)
            rows += table.num_rows
            if throttle.is_due():
                throttle.restart()
                print(f"import  {rows:,} {unit}", flush=True)
    return rows, list(schema.names)


def _check_target(target: Path) -> None:
    if target.suffix != ".parquet":
        raise WorkspaceError(f"--out is {target}; expected a file name that ends in .parquet")
    if not target.parent.is_dir():
        raise WorkspaceError(f"the folder {target.parent} of --out does not exist; make it first, or choose another")
    rejected = target.with_name(REJECTED)
    if rejected.exists() and rejected.read_bytes()[: len(HEADER)] != HEADER:
        raise WorkspaceError(f"{rejected} exists and was not made by htcl import; choose another folder for --out")
    _check_overwritten(target)


def _check_overwritten(target: Path) -> None:
    if not target.exists():
        return
    try:
        made_here = MADE_BY in (pq.read_schema(target).metadata or {})
    except (OSError, pa.ArrowException):
        made_here = False
    if not made_here:
        raise WorkspaceError(f"{target} exists and was not made by htcl import; choose another --out")


def _write(target: Path, imported: ImportedFolder) -> None:
    rejected = target.with_name(REJECTED)
    with storage_errors(str(target)):
        if imported.rejected or rejected.exists():  # an earlier import's table would be wrong now
            write_atomically(rejected, _as_csv(imported.rejected))
        sink = pa.BufferOutputStream()
        pq.write_table(imported.songs.replace_schema_metadata({MADE_BY: b"folder"}), sink)
        write_atomically(target, sink.getvalue().to_pybytes())


def _as_csv(rejected: list[Rejected]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Rejected._fields)
    writer.writerows(sorted(rejected))
    return text.getvalue().encode("utf-8", "backslashreplace")  # names of files may be no UTF-8


def _print(folder: str, target: Path, listing: Listing, imported: ImportedFolder) -> None:
    songs = imported.songs
    artists, albums = (len(set(songs[name].to_pylist()) - {None}) for name in ("artist", "album"))
    print(f"import: {songs.num_rows:,} songs, {artists:,} artists, {albums:,} albums → {target}")
    if untagged := songs.num_rows - imported.tagged:
        print(f"  {untagged:,} files have no tags and are named after their paths")
    if imported.rejected:
        print(f"  {len(imported.rejected):,} rows in {target.with_name(REJECTED)}:")
        for reason, number, example in count_reasons(imported.rejected):
            print(f"    {reason} {number:,}, for instance {_printable(example.path)}: {example.detail}")
    if skipped := _skipped(listing):
        print(f"  {skipped.removeprefix('; ')}")
    print(f"next: htcl run --set data.catalog={target}", flush=True)


def _skipped(listing: Listing) -> str:
    parts = []
    if listing.other:
        kinds = ", ".join(
            f"{_printable(extension)} {number:,}" for extension, number in listing.other.most_common(EXTENSIONS_SHOWN)
        )
        parts.append(f"{sum(listing.other.values()):,} files that are no audio ({kinds})")
    if listing.hidden:
        parts.append(f"{listing.hidden:,} hidden files and folders")
    if listing.repeated:
        parts.append(f"{listing.repeated:,} links to what is imported already")
    return f"; skipped: {', '.join(parts)}" if parts else ""


def _printable(name: str) -> str:
    """A file name without characters that a terminal would act on."""
    return "".join(character if character.isprintable() else "?" for character in name)
