"""Incremental replay of the update log on one index."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.index.live.update_log import REMOVE, UPSERT, UpdateLog, latest, vectors_of
from htcl_ray.index.song_index import SongIndex
from htcl_ray.schemas import INDEX_SONGS


class Replay:
    """Replay of the update log on `index`, independent of the order in which files appear. Not thread-safe.

    Upserts whose vectors are of other models than the index's are skipped; removals always apply.
    """

    def __init__(self, index: SongIndex, log: UpdateLog) -> None:
        self.index = index
        self._log = log
        self._files: set[str] = set()
        self._newest: dict[str, str] = {}
        """Greatest name of an applicable update of each song."""
        self._skipped: set[str] = set()
        self.applied = 0
        """Number of updates that became the newest of their song."""
        self.last: str | None = None
        """Greatest name of an applied update."""
        self.added: set[str] = set()
        """Songs added since the index was built."""
        self.removed: set[str] = set()
        """Songs of the built index that were removed."""
        self.changed = False
        """Whether the index differs from the built one."""

    @property
    def skipped(self) -> int:
        """Number of updates whose vectors are of other models."""
        return len(self._skipped)

    @property
    def names(self) -> dict[str, str]:
        """Name of the deciding update of each song in the log."""
        return dict(self._newest)

    @property
    def files(self) -> int:
        """Number of files of the log when last listed."""
        return len(self._files)

    def catch_up(self) -> None:
        """Apply all new files of the log. Raises OSError when the storage fails."""
        while True:
            listed = self._log.files()
            new = [name for name in listed if name not in self._files]
            rows, present = self._log.read(new) if new else (None, set())
            if rows is not None:
                self._apply(rows)
            self._files = self._files.intersection(listed) | present
            if len(present) == len(new):
                return

    def written(self, file: str, rows: pa.Table) -> None:
        """Apply an update that this process has just written, without reading it back."""
        self._apply(rows)
        self._files.add(file)

    def _apply(self, rows: pa.Table) -> None:
        rows = self._applicable(rows)
        names, songs = rows["name"].to_pylist(), rows["song_id"].to_pylist()
        chosen = [row for song, row in latest(names, songs).items() if names[row] > self._newest.get(song, "")]
        if not chosen:
            return
        rows = rows.take(sorted(chosen, key=names.__getitem__)).combine_chunks()
        self._newest.update(zip(rows["song_id"].to_pylist(), rows["name"].to_pylist(), strict=True))
        self.applied += rows.num_rows
        self.last = max(self.last or "", rows["name"][-1].as_py())
        removed = rows.filter(pc.equal(rows["op"], REMOVE))["song_id"].to_pylist()
        deleted = [song for song in removed if song in self.index]
        upserts = self._changed(rows.filter(pc.equal(rows["op"], UPSERT)))
        new = [song for song in upserts["song_id"].to_pylist() if song not in self.index]
        self.changed = self.changed or bool(deleted or upserts.num_rows)
        self.index.remove(deleted)
        if upserts.num_rows:
            self.index.upsert(
                upserts["song_id"].to_pylist(), vectors_of(upserts), metadata=upserts.select(INDEX_SONGS.names)
            )
        self.removed |= set(deleted) - self.added
        self.added -= set(deleted)
        self.added |= set(new) - self.removed
        self.removed -= set(new)

    def _applicable(self, rows: pa.Table) -> pa.Table:
        """Removals, and upserts whose vectors fit this index."""
        versions, dim = self.index.model_versions, self.index.dim
        fits = pc.equal(pc.list_value_length(rows["semantic"]), dim)
        for half in ("semantic", "preference"):
            model = versions.get(half)
            same = pc.is_null(rows[f"{half}_model"]) if model is None else pc.equal(rows[f"{half}_model"], model)
            fits = pc.and_(fits, pc.fill_null(same, False))
        if self.index.has_preference:
            fits = pc.and_(fits, pc.fill_null(pc.equal(pc.list_value_length(rows["preference"]), dim), False))
        else:
            fits = pc.and_(fits, pc.is_null(rows["preference"]))
        fits = pc.or_(pc.equal(rows["op"], REMOVE), pc.fill_null(fits, False))
        self._skipped.update(rows.filter(pc.invert(fits))["name"].to_pylist())
        return rows.filter(fits)

    def _changed(self, upserts: pa.Table) -> pa.Table:
        """Upserts that change the index; a compacted index already contains the others."""
        before = self.index.snapshot()
        songs = upserts["song_id"].to_pylist()
        present = [row for row, song in enumerate(songs) if song in before]
        if not present:
            return upserts
        stored, upserted = before.vectors_of([songs[row] for row in present]), vectors_of(upserts.take(present))
        same = (stored.semantic == upserted.semantic).all(axis=1)
        if stored.preference is not None and upserted.preference is not None:
            same &= (stored.preference == upserted.preference).all(axis=1)
        equal = np.array(present)[same]
        index_rows = np.array([before.row_of(songs[row]) for row in equal], dtype=np.int64)
        old_metadata = before.songs.take(index_rows).to_pylist()
        new_metadata = upserts.select(INDEX_SONGS.names).take(equal).to_pylist()
        unchanged = {int(row) for row, old, new in zip(equal, old_metadata, new_metadata, strict=True) if old == new}
        changed = np.array([row for row in range(len(songs)) if row not in unchanged], dtype=np.int64)
        return upserts.take(changed).combine_chunks()
