"""What the players play: a song's traits as notes and drum hits.

The genre sets drums, bass line, how chords are broken up and which progressions are used; the mood sets scale, register, articulation,
how many notes the melody has and how hard the drums are hit; the tempo word sets the tempo. Instruments only change how it sounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from htcl_ray.sample.world import Artist, Song

BEATS_PER_MINUTE = {"slow": (64, 76), "medium tempo": (94, 108), "fast": (136, 154)}
STEPS_PER_BEAT = 4

Pitch = Callable[[int, int], float]
"""Scale degree and base MIDI pitch → MIDI pitch."""


@dataclass(frozen=True)
class Genre:
    """Patterns over one bar of sixteenths: `x` is a hit, `o` a soft one, `.` none."""

    drums: dict[str, str]
    kit: str
    bass: str
    bass_sound: str
    bass_line: str
    """root (of the chord), walking (scale steps from root to root) or octaves."""
    chords: str
    chord_style: str
    """block (all notes at once), broken (one after the other) or power (root, fifth, octave)."""
    chord_steps: float
    """Length of a chord note, in sixteenths."""
    voices: int
    """Chord notes: 3 is a triad, 4 a seventh chord."""
    swing: float
    """How late every second eighth comes, in sixteenths."""
    progressions: tuple[tuple[int, ...], ...]
    """Scale degrees of the chords, one a bar."""
    chord_gain: float = 1.0
    drum_gain: float = 1.0


GENRES = {
    "ambient": Genre(
        drums={}, kit="none", bass="x...............", bass_sound="drone", bass_line="root", chords="x...............",
        chord_style="block", chord_steps=17, voices=4, swing=0, progressions=((0, 3), (0, 5), (3, 0)), chord_gain=1.5,
    ),
    "house": Genre(
        drums={"kick": "x...x...x...x...", "clap": "....x.......x...", "open_hat": "..x...x...x...x."}, kit="electronic",
        bass="..x...x...x...x.", bass_sound="saw bass", bass_line="octaves", chords="x..x..x...x..x..", chord_style="block",
        chord_steps=1.2, voices=4, swing=0, progressions=((0, 5, 3, 4), (0, 3), (5, 3, 0, 4)), drum_gain=1.1,
    ),
    "rock": Genre(
        drums={"kick": "x.....x.x.x.....", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."}, kit="acoustic",
        bass="x.x.x.x.x.x.x.x.", bass_sound="picked bass", bass_line="root", chords="x.x.x.x.x.x.x.x.", chord_style="power",
        chord_steps=1.9, voices=3, swing=0, progressions=((0, 3, 4, 4), (0, 6, 3, 0), (0, 4, 5, 3)), chord_gain=1.2,
    ),
    "jazz": Genre(
        drums={"ride": "x...x.x.x...x.x.", "brush": "....o.......o...", "foot_hat": "....x.......x..."}, kit="brushes",
        bass="x...x...x...x...", bass_sound="upright bass", bass_line="walking", chords="..x....x..x.....", chord_style="block",
        chord_steps=1.5, voices=4, swing=0.66, progressions=((1, 4, 0, 5), (0, 5, 1, 4), (3, 6, 2, 5)), chord_gain=0.9,
    ),
    "reggae": Genre(
        drums={"kick": "........x.......", "rim": "........x.......", "hat": "o.o.o.o.o.o.o.o."}, kit="acoustic",
        bass="x..x..x.....x.x.", bass_sound="dub bass", bass_line="root", chords="....x.......x...", chord_style="block",
        chord_steps=0.9, voices=3, swing=0.2, progressions=((0, 3), (0, 4), (0, 1)), chord_gain=1.5, drum_gain=0.8,
    ),
    "folk": Genre(
        drums={"tambourine": "....o...o..."}, kit="hand", bass="x...........", bass_sound="upright bass", bass_line="root",
        chords="....x...x...", chord_style="block", chord_steps=3, voices=3, swing=0,
        progressions=((0, 3, 4, 0), (0, 4, 0, 4), (0, 5, 3, 4)), drum_gain=0.6,
    ),
    "hip hop": Genre(
        drums={"kick": "x......x..x.....", "snare": "....x.......x...", "hat": "xoxoxoxoxoxoxoxo"}, kit="electronic",
        bass="x......x..x.....", bass_sound="sub bass", bass_line="root", chords="x...............", chord_style="broken",
        chord_steps=3, voices=3, swing=0.25, progressions=((0, 0, 5, 5), (0, 3), (0, 0, 6, 5)), chord_gain=0.8, drum_gain=1.2,
    ),
    "baroque": Genre(
        drums={}, kit="none", bass="x...x...x...x...", bass_sound="cello", bass_line="walking", chords="x.x.x.x.x.x.x.x.",
        chord_style="broken", chord_steps=1.6, voices=3, swing=0, progressions=((0, 4, 5, 3), (0, 5, 1, 4), (0, 3, 6, 2)), chord_gain=1.4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Mood:
    """How a piece is played."""

    scale: tuple[int, ...]
    """Semitones of the seven degrees."""
    register: int
    """Semitones that the melody lies higher or lower."""
    note_steps: tuple[int, ...]
    """Lengths of melody notes to draw from, in sixteenths."""
    rest_share: float
    articulation: float
    """Share of a melody note's length that sounds."""
    leap: int
    """Largest step between melody notes, in scale degrees."""
    drum_gain: float
    chord_shift: int
    """Semitones that chords lie higher or lower."""


MOODS = {
    "happy": Mood((0, 2, 4, 5, 7, 9, 11), 5, (2, 2, 2, 4), 0.1, 0.5, 3, 1.0, 5),
    "sad": Mood((0, 2, 3, 5, 7, 8, 10), -4, (6, 8, 8), 0.0, 1.0, 1, 0.5, -3),
    "calm": Mood((0, 2, 4, 6, 7, 9, 11), 2, (8, 12, 16), 0.35, 1.0, 2, 0.22, 2),
    "dark": Mood((0, 1, 3, 5, 7, 8, 10), -12, (3, 3, 6), 0.1, 0.9, 2, 0.9, -10),
    "energetic": Mood((0, 2, 3, 5, 7, 9, 10), 12, (1, 1, 2, 2), 0.0, 0.8, 4, 1.7, 0),
}


@dataclass(frozen=True)
class Note:
    """One tone: seconds from the start, seconds that it is held, MIDI pitch, loudness in [0, 1]."""

    start: float
    length: float
    pitch: float
    velocity: float


@dataclass(frozen=True)
class Score:
    """Everything that is played in a clip. Drum hits are (seconds, loudness)."""

    drums: dict[str, list[tuple[float, float]]]
    bass: list[Note]
    chords: list[Note]
    melody: list[Note]


def compose(song: Song, seconds: float, rng: np.random.Generator) -> Score:
    """A score that lasts at least `seconds`."""
    genre, mood, artist = GENRES[song.genre], MOODS[song.mood], song.artist
    bar_steps = len(genre.bass)
    step = 60 / float(rng.uniform(*BEATS_PER_MINUTE[song.tempo])) / STEPS_PER_BEAT
    steps = int(np.ceil(seconds / step))
    clock = _Clock(step, genre.swing, artist.looseness, rng)
    key = artist.key + int(rng.integers(-2, 3))
    progression = genre.progressions[artist.progression]
    roots = [progression[(i // bar_steps) % len(progression)] for i in range(steps + bar_steps)]

    def pitch(degree: int, base: int) -> float:
        return base + key + 12 * (degree // 7) + mood.scale[degree % 7] + artist.detune

    return Score(
        drums=_drums(genre, mood, artist, steps, clock),
        bass=_bass(genre, artist, steps, roots, clock, pitch),
        chords=_chords(genre, mood, steps, roots, clock, pitch),
        melody=_melody(mood, steps, roots, clock, pitch, rng),
    )


class _Clock:
    """Seconds of a sixteenth: swung, and as loose as the artist plays."""

    def __init__(self, step: float, swing: float, looseness: float, rng: np.random.Generator) -> None:
        self.step, self._swing, self._looseness, self._rng = step, swing, looseness, rng

    def __call__(self, position: float) -> float:
        late = self._swing if int(position) % 4 == 2 else 0.0
        return max(0.0, (position + late) * self.step + self._looseness * float(self._rng.standard_normal()))


def _habit(pattern: str, artist: Artist, salt: int) -> str:
    """The genre's pattern with one soft hit added or none, the same in all songs of an artist."""
    rng = np.random.default_rng([artist.habit, salt])
    position = int(rng.integers(len(pattern)))
    if pattern[position] == "." and rng.random() < 0.6:
        return pattern[:position] + "o" + pattern[position + 1 :]
    return pattern


def _hits(pattern: str, steps: int) -> list[tuple[int, float]]:
    return [(i, 1.0 if pattern[i % len(pattern)] == "x" else 0.5) for i in range(steps) if pattern[i % len(pattern)] != "."]


def _drums(genre: Genre, mood: Mood, artist: Artist, steps: int, clock: _Clock) -> dict[str, list[tuple[float, float]]]:
    gain = genre.drum_gain * mood.drum_gain * artist.drum_gain
    played = {}
    for salt, (name, pattern) in enumerate(genre.drums.items()):
        played[name] = [(clock(i), gain * loud) for i, loud in _hits(_habit(pattern, artist, salt), steps)]
    return played


def _bass(genre: Genre, artist: Artist, steps: int, roots: list[int], clock: _Clock, pitch: Pitch) -> list[Note]:
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


def _chords(genre: Genre, mood: Mood, steps: int, roots: list[int], clock: _Clock, pitch: Pitch) -> list[Note]:
    notes = []
    for count, (i, loud) in enumerate(_hits(genre.chords, steps)):
        degrees = [roots[i] + 2 * voice for voice in range(genre.voices)]
        if genre.chord_style == "power":
            degrees = [roots[i], roots[i] + 4, roots[i] + 7]
        held = genre.chord_steps * clock.step
        base = 57 + mood.chord_shift
        if genre.chord_style == "broken" and len(_hits(genre.chords, len(genre.chords))) > 4:
            order = (0, 2, 1, 2)  # Alberti bass
            notes.append(Note(clock(i), held, pitch(degrees[order[count % 4]], base), loud * genre.chord_gain))
        elif genre.chord_style == "broken":
            for voice, degree in enumerate(degrees):
                start = i + 2 * voice
                notes.append(Note(clock(start), held, pitch(degree, base), loud * genre.chord_gain))
        else:
            start_seconds = clock(i)
            notes += [Note(start_seconds, held, pitch(degree, base), 0.7 * loud * genre.chord_gain) for degree in degrees]
    return notes


def _melody(mood: Mood, steps: int, roots: list[int], clock: _Clock, pitch: Pitch, rng: np.random.Generator) -> list[Note]:
    notes, i, degree = [], 0, int(rng.integers(0, 5))
    while i < steps:
        held = int(rng.choice(mood.note_steps))
        if i % 8 == 0:  # land on the chord
            degree = min((roots[i] + d for d in (-7, -5, -3, 0, 2, 4, 7)), key=lambda d: abs(d - degree))
        else:
            degree += int(rng.integers(-mood.leap, mood.leap + 1))
            degree = min(max(degree, -4), 9)
        if rng.random() >= mood.rest_share:
            notes.append(Note(clock(i), held * clock.step * mood.articulation, pitch(degree, 69) + mood.register, rng.uniform(0.75, 1.0)))
        i += held
    return notes
