"""Ground truth of the sample world: artists and songs, with traits that the text names and hidden traits.

`make_world` is a pure function of its arguments. Only audio, names and named traits are written to disk; hidden traits
are available by generating the same world again, and can be learned from the audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

GENRES = ("ambient", "house", "rock", "jazz", "reggae", "folk", "hip hop", "baroque")
MOODS = ("happy", "sad", "calm", "dark", "energetic")
LEADS = ("flute", "violin", "piano", "trumpet", "vibraphone", "organ", "guitar", "synthesizer")
BACKINGS = ("strings", "electric piano", "choir", "harp", "accordion")

HIDDEN_TRAITS = ("sweep", "rate", "shape")
"""Traits of the audio that no text names and that users have tastes for, each in [-1, 1] and independent of all others.

All are temporal and leave the mean and the deviation of every frequency band alone: the direction of a repeated filter
sweep (falling, rising), the rate of a level pulse (slow, fast) and the shape of that pulse (swelling, decaying).
"""
NUISANCE_TRAITS = ("brightness", "presence")
"""Traits of the audio that dominate the mean of every band and that no user cares about, each in [-1, 1].

Spectral tilt, and level of the middle frequencies.
"""

DUPLICATE_SHARE = 0.01
"""Share of songs that are duplicate recordings: a recording of the same artist, published again on a compilation."""
REMASTER_SHARE = 0.02
"""Share of songs that are near-duplicates: a song of the same artist, performed and mastered again."""
COVER_SHARE = 0.03
"""Share of songs that are covers: another artist plays the melody of an earlier song, with hidden traits of its own."""
COLLABORATOR_SHARE = 0.25
"""Share of artists with a collaborator, another artist of the genre."""
COLLABORATION_SHARE = 0.3
"""Share of collaborations among the songs of an artist with a collaborator."""


class TextStyle(StrEnum):
    """How the publisher of an artist writes the catalogue's text; real catalogues mix such habits."""

    FULL = "full"
    BACKING_FIRST = "backing first"
    LEAD_ONLY = "lead only"
    NO_MOOD = "no mood"


TEXT_STYLE_SHARES = (0.6, 0.2, 0.1, 0.1)


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
    text_style: TextStyle


@dataclass(frozen=True)
class SampleSong:
    """A song of the sample world. The catalogue names all fields up to `backing`, as far as `text_style` lets it."""

    song_id: str
    title: str
    artist: Artist
    guest: Artist | None
    album: str
    year: int
    genre: str
    mood: str
    lead: str
    backing: str
    text_style: TextStyle
    hidden: tuple[float, ...]
    """One value in [-1, 1] for each of HIDDEN_TRAITS."""
    nuisance: tuple[float, ...]
    """One value in [-1, 1] for each of NUISANCE_TRAITS."""
    recording: int
    """Index in `World.songs` of the song with the original recording: its own, except for duplicate recordings."""
    work: int
    """Index in `World.songs` of the first song with this composition: its own, except for duplicates, remasters and
    covers."""

    @property
    def credited(self) -> tuple[Artist, ...]:
        """The credited artists."""
        return (self.artist,) if self.guest is None else (self.artist, self.guest)


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
    made = [_make_song(ids[position], roster[owner], position, traits, names) for position, owner in enumerate(owners)]
    _add_collaborations(made, roster, random_stream(seed, "collaborations"))
    _add_versions(made, random_stream(seed, "versions"))
    return World(seed, roster, tuple(made))


def _add_collaborations(songs: list[SampleSong], roster: Sequence[Artist], rng: np.random.Generator) -> None:
    """Credit a second artist on some songs.

    Artists collaborate in fixed pairs, so that groups of artists stay small.
    """
    partner: dict[str, Artist] = {}
    for genre in GENRES:
        members = [artist for artist in roster if artist.genre == genre]
        for one, other in zip(members[::2], members[1::2], strict=False):
            if rng.random() < COLLABORATOR_SHARE:
                partner[one.name], partner[other.name] = other, one
    for position, song in enumerate(songs):
        if song.artist.name in partner and rng.random() < COLLABORATION_SHARE:
            songs[position] = replace(song, guest=partner[song.artist.name])


def _add_versions(songs: list[SampleSong], rng: np.random.Generator) -> None:
    """Turn some songs into duplicates, remasters or covers of songs that stay as they are."""
    shares = ((_duplicate, DUPLICATE_SHARE), (_remaster, REMASTER_SHARE), (_cover, COVER_SHARE))
    kinds = [make for make, share in shares for _ in range(round(share * len(songs)))]
    order = rng.permutation(len(songs)).tolist()
    unchanged = order[len(kinds) :]
    for make, position in zip(kinds, order, strict=False):
        artist = songs[position].artist
        originals = [i for i in unchanged if (songs[i].artist is artist) == (make is not _cover)]
        if originals:
            songs[position] = make(songs[originals[int(rng.integers(len(originals)))]], songs[position])


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
        text_style=list(TextStyle)[int(rng.choice(len(TextStyle), p=TEXT_STYLE_SHARES))],
    )


def _make_song(
    song_id: str, artist: Artist, position: int, traits: np.random.Generator, names: np.random.Generator
) -> SampleSong:
    return SampleSong(
        song_id=song_id,
        title=" ".join(_invent_word(names) for _ in range(names.integers(1, 4))),
        artist=artist,
        guest=None,
        album=_invent_word(names),
        year=int(names.integers(1985, 2026)),
        genre=artist.genre,
        mood=_choice(traits, MOODS),
        lead=_choice(traits, LEADS),
        backing=_choice(traits, BACKINGS),
        text_style=artist.text_style,
        # Two modes away from 0: the side of a song is audible.
        hidden=tuple(
            (traits.choice((-1.0, 1.0), len(HIDDEN_TRAITS)) * traits.uniform(0.5, 1.0, len(HIDDEN_TRAITS))).tolist()
        ),
        nuisance=tuple(traits.uniform(-1.0, 1.0, len(NUISANCE_TRAITS)).tolist()),
        recording=position,
        work=position,
    )


def _duplicate(original: SampleSong, song: SampleSong) -> SampleSong:
    """The recording of `original`, published again."""
    return replace(original, song_id=song.song_id, album=song.album, year=song.year)


def _remaster(original: SampleSong, song: SampleSong) -> SampleSong:
    """`original`, performed and mastered again; its title says so."""
    return replace(
        original,
        song_id=song.song_id,
        title=f"{original.title} (remastered)",
        album=song.album,
        year=song.year,
        nuisance=song.nuisance,
        recording=song.recording,
    )


def _cover(original: SampleSong, song: SampleSong) -> SampleSong:
    """The title, mood and composition of `original`, played by the artist of `song`."""
    return replace(song, title=original.title, mood=original.mood, work=original.work)


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
