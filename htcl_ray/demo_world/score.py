"""Compose a song's traits into notes and drum hits.

The genre determines drums, bass line, the style of the chords and their progressions; the mood determines scale,
register, articulation, density of the melody, loudness of the drums, tempo and a part of its own. The lead instrument
plays the melody, the backing instrument accompanies with its own pattern. Every song is in a key on C, so that a small
model can learn from few songs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from htcl_ray.demo_world.world import Artist, SampleSong

STEPS_PER_BEAT = 4

Pitch = Callable[[int, int], float]
"""Function of a scale degree and a base MIDI pitch that returns a MIDI pitch."""


@dataclass(frozen=True)
class GenreStyle:
    """The style of a genre. Patterns span one bar of sixteenths: `x` is a hit, `o` a soft hit, `.` a rest."""

    drums: dict[str, str]
    kit: str
    bass: str
    bass_timbre: str
    bass_line: str
    """`root` (of the chord), `walking` (scale steps from root to root) or `octaves`."""
    rhythm: str
    """Pattern of the chords."""
    rhythm_timbre: str
    rhythm_style: str
    """`block` (all notes at once), `broken` (one after the other) or `power` (root, fifth, octave)."""
    rhythm_steps: float
    """Length of a chord note, in sixteenths."""
    rhythm_base: int
    """Base MIDI pitch of the chords."""
    swing: float
    """Delay of every second eighth, in sixteenths."""
    progressions: tuple[tuple[int, ...], ...]
    """Scale degrees of the chords, one per bar."""


GENRE_STYLES = {
    "ambient": GenreStyle(
        drums={"wind": "x.............................."}, kit="none", bass="x...............", bass_timbre="drone",
        bass_line="root",
        rhythm="x...............", rhythm_timbre="glass", rhythm_style="block", rhythm_steps=17, rhythm_base=76,
        swing=0, progressions=((0, 3), (0, 5), (3, 0)),
    ),
    "house": GenreStyle(
        drums={"kick": "x...x...x...x...", "clap": "....x.......x...", "open_hat": "..x...x...x...x."},
        kit="electronic",
        bass="..x...x...x...x.", bass_timbre="saw bass", bass_line="octaves",
        rhythm="x..x..x...x..x..", rhythm_timbre="stab", rhythm_style="block", rhythm_steps=1.2, rhythm_base=60,
        swing=0, progressions=((0, 5, 3, 4), (0, 3), (5, 3, 0, 4)),
    ),
    "rock": GenreStyle(
        drums={"kick": "x.....x.x.x.....", "snare": "....x.......x...", "crash": "x.x.x.x.x.x.x.x."}, kit="acoustic",
        bass="x.x.x.x.x.x.x.x.", bass_timbre="picked bass", bass_line="root",
        rhythm="x.x.x.x.x.x.x.x.", rhythm_timbre="distorted guitar", rhythm_style="power", rhythm_steps=1.9,
        rhythm_base=45,
        swing=0, progressions=((0, 3, 4, 4), (0, 6, 3, 0), (0, 4, 5, 3)),
    ),
    "jazz": GenreStyle(
        drums={"ride": "x...x.x.x...x.x.", "brush": "....x.......x...", "foot_hat": "....x.......x..."}, kit="brushes",
        bass="x...x...x...x...", bass_timbre="upright bass", bass_line="walking",
        rhythm="..x....x..x.....", rhythm_timbre="comping piano", rhythm_style="block", rhythm_steps=1.5,
        rhythm_base=57,
        swing=0.66, progressions=((1, 4, 0, 5), (0, 5, 1, 4), (3, 6, 2, 5)),
    ),
    "reggae": GenreStyle(
        drums={"kick": "........x.......", "rim": "........x.......", "hat": "o.o.o.o.o.o.o.o."}, kit="acoustic",
        bass="x..x..x.....x.x.", bass_timbre="dub bass", bass_line="root",
        rhythm="....x.......x...", rhythm_timbre="muted guitar", rhythm_style="block", rhythm_steps=0.8, rhythm_base=64,
        swing=0.2, progressions=((0, 3), (0, 4), (0, 1)),
    ),
    "folk": GenreStyle(
        drums={"tambourine": "....o...o..."}, kit="hand", bass="x...........", bass_timbre="upright bass",
        bass_line="root",
        rhythm="x.x.x.x.x.x.", rhythm_timbre="banjo", rhythm_style="broken", rhythm_steps=2, rhythm_base=64,
        swing=0, progressions=((0, 3, 4, 0), (0, 4, 0, 4), (0, 5, 3, 4)),
    ),
    "hip hop": GenreStyle(
        drums={"kick": "x......x..x.....", "snare": "....x.......x...", "hat": "xoxoxoxoxoxoxoxo"}, kit="electronic",
        bass="x......x..x.....", bass_timbre="sub bass", bass_line="root",
        rhythm="x...x.....x.....", rhythm_timbre="muffled keys", rhythm_style="block", rhythm_steps=3, rhythm_base=52,
        swing=0.25, progressions=((0, 0, 5, 5), (0, 3), (0, 0, 6, 5)),
    ),
    "baroque": GenreStyle(
        drums={}, kit="none", bass="x...x...x...x...", bass_timbre="cello", bass_line="walking",
        rhythm="xxxxxxxxxxxxxxxx", rhythm_timbre="harpsichord", rhythm_style="broken", rhythm_steps=1.2, rhythm_base=60,
        swing=0, progressions=((0, 4, 5, 3), (0, 5, 1, 4), (0, 3, 6, 2)),
    ),
}  # fmt: skip


BACKINGS = {
    "strings": ("x.......", 8.5, 52, "block"),
    "electric piano": ("x...x...", 4.0, 60, "block"),
    "choir": ("x...............", 16.5, 72, "block"),
    "harp": ("xxxxxxxx", 2.0, 72, "broken"),
    "accordion": ("..x...x.", 1.8, 64, "block"),
}
"""Backing instrument → pattern, note length in sixteenths, base MIDI pitch, style. Independent of the genre."""


@dataclass(frozen=True)
class MoodStyle:
    """The style of a mood, and the part that only this mood has."""

    beats_per_minute: tuple[float, float]
    scale: tuple[int, ...]
    """Semitones of the seven scale degrees."""
    register: int
    """Transposition of the melody in semitones."""
    note_steps: tuple[int, ...]
    """Lengths of melody notes to sample from, in sixteenths."""
    rest_share: float
    articulation: float
    """Share of a melody note's length that is held."""
    leap: int
    """Largest step between melody notes, in scale degrees."""
    drum_gain: float
    colour: str
    """Pattern of the mood's own part."""
    colour_timbre: str
    colour_steps: float
    colour_base: int
    colour_degrees: tuple[int, ...]
    """Scale degrees above the root, in order."""


MOOD_STYLES = {
    "happy": MoodStyle(
        (112, 124),
        (0, 2, 4, 5, 7, 9, 11),
        5,
        (2, 2, 2, 4),
        0.1,
        0.45,
        3,
        0.9,
        "..x...x...x.x...",
        "whistle",
        1.2,
        88,
        (0, 2, 4, 2),
    ),
    "sad": MoodStyle(
        (64, 74), (0, 2, 3, 5, 7, 8, 10), -3, (6, 8, 8), 0.0, 1.0, 1, 0.7, "x.......", "cello", 8.5, 52, (4, 3, 2, 1)
    ),
    "calm": MoodStyle(
        (74, 84),
        (0, 2, 4, 6, 7, 9, 11),
        0,
        (6, 8, 12),
        0.15,
        1.0,
        2,
        0.45,
        "x...............",
        "soft pad",
        17,
        67,
        (0,),
    ),
    "dark": MoodStyle(
        (88, 100), (0, 1, 3, 5, 7, 8, 10), -7, (3, 3, 6), 0.1, 0.9, 2, 0.9, "x...............", "growl", 16, 33, (0, 1)
    ),
    "energetic": MoodStyle(
        (136, 150),
        (0, 2, 3, 5, 7, 9, 10),
        7,
        (1, 1, 2, 2),
        0.0,
        0.8,
        4,
        1.5,
        "xxxxxxxxxxxxxxxx",
        "sequencer",
        0.6,
        76,
        (0, 4, 7, 4),
    ),
}


@dataclass(frozen=True)
class Note:
    """A note: start and held length in seconds, MIDI pitch, and loudness."""

    start: float
    length: float
    pitch: float
    velocity: float


@dataclass(frozen=True)
class Score:
    """All parts of a clip. Drum hits are (seconds, loudness)."""

    drums: dict[str, list[tuple[float, float]]]
    bass: list[Note]
    rhythm: list[Note]
    backing: list[Note]
    melody: list[Note]
    colour: list[Note]


def compose(song: SampleSong, seconds: float, rng: np.random.Generator) -> Score:
    """Compose a score of at least `seconds`.

    The melody has a random generator of its own, so that a cover, composed from the same `rng`, shares it.
    """
    melody_rng = np.random.default_rng(rng.integers(2**63))
    genre, mood, artist = GENRE_STYLES[song.genre], MOOD_STYLES[song.mood], song.artist
    bar_steps = len(genre.bass)
    step = 60 / float(rng.uniform(*mood.beats_per_minute)) / STEPS_PER_BEAT
    steps = int(np.ceil(seconds / step))
    clock = _Clock(step, genre.swing, artist.looseness, rng)
    progression = genre.progressions[artist.progression]
    roots = [progression[(i // bar_steps) % len(progression)] for i in range(steps + bar_steps)]

    def pitch(degree: int, base: int) -> float:
        return base + 12 * (degree // 7) + mood.scale[degree % 7] + artist.detune

    return Score(
        drums=_drums(genre, mood, artist, steps, clock),
        bass=_bass(genre, artist, steps, roots, clock, pitch),
        rhythm=_chords(
            genre.rhythm, genre.rhythm_steps, genre.rhythm_base, genre.rhythm_style, steps, roots, clock, pitch
        ),
        backing=_chords(*BACKINGS[song.backing], steps, roots, clock, pitch),
        melody=_melody(mood, steps, roots, clock, pitch, melody_rng),
        colour=_colour(mood, steps, roots, clock, pitch),
    )


class _Clock:
    """Time of a sixteenth in seconds, with the genre's swing and the artist's random deviation."""

    def __init__(self, step: float, swing: float, looseness: float, rng: np.random.Generator) -> None:
        self.step, self._swing, self._looseness, self._rng = step, swing, looseness, rng

    def __call__(self, position: float) -> float:
        late = self._swing if int(position) % 4 == 2 else 0.0
        return max(0.0, (position + late) * self.step + self._looseness * float(self._rng.standard_normal()))


def _habit(pattern: str, artist: Artist, salt: int) -> str:
    """Vary the genre's pattern by at most one added soft hit, the same in all songs of an artist."""
    rng = np.random.default_rng([artist.habit, salt])
    position = int(rng.integers(len(pattern)))
    if pattern[position] == "." and rng.random() < 0.6:
        return pattern[:position] + "o" + pattern[position + 1 :]
    return pattern


def _hits(pattern: str, steps: int) -> list[tuple[int, float]]:
    return [
        (i, 1.0 if pattern[i % len(pattern)] == "x" else 0.5) for i in range(steps) if pattern[i % len(pattern)] != "."
    ]


def _drums(
    genre: GenreStyle, mood: MoodStyle, artist: Artist, steps: int, clock: _Clock
) -> dict[str, list[tuple[float, float]]]:
    gain = mood.drum_gain * artist.drum_gain
    played = {}
    for salt, (name, pattern) in enumerate(genre.drums.items()):
        played[name] = [(clock(i), gain * loud) for i, loud in _hits(_habit(pattern, artist, salt), steps)]
    return played


def _bass(genre: GenreStyle, artist: Artist, steps: int, roots: list[int], clock: _Clock, pitch: Pitch) -> list[Note]:
    hits = _hits(_habit(genre.bass, artist, 99), steps)
    ends = [i for i, _ in hits[1:]] + [steps]
    notes = []
    for count, ((i, loud), end) in enumerate(zip(hits, ends, strict=True)):
        degree = roots[i]
        if genre.bass_line == "walking":
            degree += (0, 2, 4, 5)[count % 4]
        octave = 12 if genre.bass_line == "octaves" and count % 2 else 0
        length = min(end - i, 16) * clock.step
        notes.append(Note(clock(i), length, pitch(degree, 36) + octave, loud * artist.bass_gain))
    return notes


def _chords(
    pattern: str, length: float, base: int, style: str, steps: int, roots: list[int], clock: _Clock, pitch: Pitch
) -> list[Note]:
    notes = []
    held = length * clock.step
    for count, (i, loud) in enumerate(_hits(pattern, steps)):
        start = clock(i)
        if style == "broken":
            notes.append(Note(start, held, pitch(roots[i] + (0, 2, 4, 7, 4, 2)[count % 6], base), loud))
            continue
        degrees = (0, 4, 7) if style == "power" else (0, 2, 4)
        notes += [Note(start, held, pitch(roots[i] + degree, base), 0.6 * loud) for degree in degrees]
    return notes


def _colour(mood: MoodStyle, steps: int, roots: list[int], clock: _Clock, pitch: Pitch) -> list[Note]:
    held = mood.colour_steps * clock.step
    degrees = mood.colour_degrees
    return [
        Note(clock(i), held, pitch(roots[i] + degrees[count % len(degrees)], mood.colour_base), loud)
        for count, (i, loud) in enumerate(_hits(mood.colour, steps))
    ]


def _melody(
    mood: MoodStyle, steps: int, roots: list[int], clock: _Clock, pitch: Pitch, rng: np.random.Generator
) -> list[Note]:
    notes, i, degree = [], 0, int(rng.integers(0, 5))
    while i < steps:
        held = int(rng.choice(mood.note_steps))
        if i % 8 == 0:  # land on the chord
            degree = min((roots[i] + d for d in (-7, -5, -3, 0, 2, 4, 7)), key=lambda d: abs(d - degree))
        else:
            degree += int(rng.integers(-mood.leap, mood.leap + 1))
            degree = min(max(degree, -4), 9)
        if rng.random() >= mood.rest_share:
            notes.append(
                Note(
                    clock(i),
                    held * clock.step * mood.articulation,
                    pitch(degree, 69) + mood.register,
                    rng.uniform(0.75, 1.0),
                )
            )
        i += held
    return notes
