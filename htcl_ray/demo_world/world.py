"""Ground truth of the sample world: artists and songs, with traits that the text names and hidden traits.

`make_world` is a pure function of its arguments. Only audio, names and named traits are written to disk; hidden traits
are available by generating the same world again, and can be learned from the audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GENRES = ("ambient", "house", "rock", "jazz", "reggae", "folk", "hip hop", "baroque")
MOODS = ("happy", "sad", "calm", "dark", "energetic")
LEADS = ("flute", "violin", "piano", "trumpet", "vibraphone", "organ", "guitar", "synthesizer")
BACKINGS = ("strings", "electric piano", "choir", "harp", "accordion")

HIDDEN_TRAITS = ("brightness", "sweep", "pulse", "presence")
"""Traits of the audio that no text names, each in [-1, 1] and independent of other traits and of the artist.

Spectral tilt, depth of a slow filter sweep, depth of a faster level modulation, and level of the middle frequencies.
"""

DUPLICATE_SHARE = 0.01
"""Share of songs that are duplicate recordings: a recording of the same artist, published again on a compilation."""


@dataclass(frozen=True)
class Artist:
    """An artist: the variation within a genre that the artist's songs share."""

    name: str
    genre: str
    progression: int
    """Index of one of the genre's chord progressions."""
    habit: int
    """Seed of variations of the genre's drum and bass patterns."""
    detune: float
    """Semitones."""
    looseness: float
    """Standard deviation of note onsets, in seconds."""
    drum_gain: float
    bass_gain: float
    lead_gain: float


@dataclass(frozen=True)
class SampleSong:
    """A song of the sample world. The catalogue names all fields except `hidden` and `recording`."""

    song_id: str
    title: str
    artist: Artist
    album: str
    year: int
    genre: str
    mood: str
    lead: str
    backing: str
    hidden: tuple[float, ...]
    """One value in [-1, 1] for each of HIDDEN_TRAITS."""
    recording: int
    """Index in `World.songs` of the song with the original recording: its own, except for duplicate recordings."""


@dataclass(frozen=True)
class World:
    """Artists, songs in random order, and the seed from which everything else is drawn."""

    seed: int
    artists: tuple[Artist, ...]
    songs: tuple[SampleSong, ...]

    @property
    def hidden(self) -> np.ndarray:
        """Hidden traits, float64 [songs, traits]."""
        return np.array([song.hidden for song in self.songs])


def make_world(*, songs: int, artists: int, seed: int) -> World:
    """Generate the world of a seed. Raises ValueError for fewer songs than artists."""
    if not 1 <= artists <= songs:
        raise ValueError(f"{artists} artists for {songs} songs; expected at least one artist and a song for each")
    traits, names = random_stream(seed, "traits"), random_stream(seed, "names")
    invented = _invent_names(names, artists)
    roster = tuple(_make_artist(name, GENRES[i % len(GENRES)], traits) for i, name in enumerate(invented))
    owners = traits.permutation(np.resize(np.arange(artists), songs))
    ids = _song_ids(names, songs)
    made: list[SampleSong] = []
    first_of_artist: dict[int, int] = {}
    duplicates = set(traits.permutation(songs)[: round(DUPLICATE_SHARE * songs)].tolist())
    for position, owner in enumerate(owners.tolist()):
        song = _make_song(ids[position], roster[owner], position, traits, names)
        if position in duplicates and owner in first_of_artist:
            song = _published_again(made[first_of_artist[owner]], song)
        else:
            first_of_artist.setdefault(owner, position)
        made.append(song)
    return World(seed, roster, tuple(made))


def random_stream(seed: int, purpose: str, position: int = 0) -> np.random.Generator:
    """Create an independent generator for each purpose and position.

    A change to one part of the world then leaves the others unchanged.
    """
    return np.random.default_rng([seed, position, *purpose.encode()])


def _make_artist(name: str, genre: str, rng: np.random.Generator) -> Artist:
    return Artist(
        name=name,
        genre=genre,
        progression=int(rng.integers(0, 3)),
        habit=int(rng.integers(0, 2**31)),
        detune=float(rng.normal(0, 0.12)),
        looseness=float(rng.uniform(0.0, 0.012)),
        drum_gain=float(10 ** rng.normal(0, 0.08)),
        bass_gain=float(10 ** rng.normal(0, 0.08)),
        lead_gain=float(10 ** rng.normal(0, 0.06)),
    )


def _make_song(
    song_id: str, artist: Artist, position: int, traits: np.random.Generator, names: np.random.Generator
) -> SampleSong:
    return SampleSong(
        song_id=song_id,
        title=" ".join(_invent_word(names) for _ in range(names.integers(1, 4))),
        artist=artist,
        album=_invent_word(names),
        year=int(names.integers(1985, 2026)),
        genre=artist.genre,
        mood=_choice(traits, MOODS),
        lead=_choice(traits, LEADS),
        backing=_choice(traits, BACKINGS),
        # Two modes away from 0: the side of a song is audible.
        hidden=tuple(
            (traits.choice((-1.0, 1.0), len(HIDDEN_TRAITS)) * traits.uniform(0.5, 1.0, len(HIDDEN_TRAITS))).tolist()
        ),
        recording=position,
    )


def _published_again(original: SampleSong, compilation: SampleSong) -> SampleSong:
    return SampleSong(
        song_id=compilation.song_id,
        title=original.title,
        artist=original.artist,
        album=compilation.album,
        year=compilation.year,
        genre=original.genre,
        mood=original.mood,
        lead=original.lead,
        backing=original.backing,
        hidden=original.hidden,
        recording=original.recording,
    )


def _choice(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _song_ids(rng: np.random.Generator, count: int) -> list[str]:
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids[rng.bytes(6).hex()] = None
    return list(ids)


def _invent_names(rng: np.random.Generator, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names[f"{_invent_word(rng)} {_invent_word(rng)}"] = None
    return list(names)


def _invent_word(rng: np.random.Generator) -> str:
    syllables = [_choice(rng, _ONSETS) + _choice(rng, _VOWELS) for _ in range(rng.integers(2, 4))]
    return ("".join(syllables) + _choice(rng, _CODAS)).capitalize()


_ONSETS = ("b", "br", "d", "f", "g", "h", "k", "kl", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ei", "ou")
_CODAS = ("", "", "n", "l", "r", "s", "m")
