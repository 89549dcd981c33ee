"""Artist credits and groups of songs by artist, compared with a naive flood fill."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.catalog.artists import artist_groups, artist_key, credited_keys, credits_of, is_placeholder
from htcl_ray.interactions.splits import group_splits

pytestmark = pytest.mark.unit


def groups(*cells: str | None, duplicates: list[str] | None = None) -> list[str | None]:
    column = pa.chunked_array([pa.array(cells, pa.string())])
    return artist_groups(column, None if duplicates is None else pa.chunked_array([duplicates])).to_pylist()


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("Queen", ["Queen"]),
        ("Queen; David Bowie", ["Queen", "David Bowie"]),
        ("Drake feat. Rihanna", ["Drake", "Rihanna"]),
        ("Drake (feat. Rihanna)", ["Drake", "Rihanna"]),
        ("Drake [Ft. Rihanna]", ["Drake", "Rihanna"]),
        ("Drake FEATURING  Rihanna", ["Drake", "Rihanna"]),
        ("Drake ft Rihanna", ["Drake", "Rihanna"]),
        ("Drake feat.Rihanna", ["Drake", "Rihanna"]),
        ("Daft Punk", ["Daft Punk"]),
        ("Ft. Worth Band", ["Worth Band"]),
        ("Little Feat", ["Little Feat"]),
        ("Simon & Garfunkel", ["Simon & Garfunkel"]),
        ("Earth, Wind & Fire", ["Earth, Wind & Fire"]),
        ("AC/DC", ["AC/DC"]),
        ("Sunn O)))", ["Sunn O)))"]),
        ("  ", []),
        (None, []),
    ],
)
def test_credits_of_splits_certain_separators(cell: str | None, names: list[str]) -> None:
    assert credits_of(cell) == names


@pytest.mark.parametrize(
    "spellings",
    [
        ("Beyoncé", "BEYONCE", " beyonce\u0301 "),
        ("Motörhead", "motorhead"),
        ("Mø", "MO"),
        ("Guns N’ Roses", "Guns N' Roses", "guns n roses"),
        ("Jay-Z", "JAY Z"),
        ("Sigur  Rós", "sigur ros"),
        ("Ｑueen", "Queen"),
        ("Großstadt", "GROSSSTADT"),
    ],
)
def test_artist_key_is_equal_for_spellings_of_one_name(spellings: tuple[str, ...]) -> None:
    assert len({artist_key(name) for name in spellings}) == 1


def test_artist_key_differs_for_different_names() -> None:
    """Japanese voicing marks and Hindi vowel signs are not diacritics."""
    names = ["ガガ", "カカ", "की", "का", "AC/DC", "ACDC", "!!!", "???", "P!nk", "Pink", "Bush (UK)", "Bush (CA)"]
    assert len({artist_key(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "name",
    ["Various Artists", "VARIOUS", "V.A.", "V/A", "va", "[unknown]", "Unknown Artist", "N/A", "-", "Varios Artistas"],
)
def test_placeholders_have_no_group(name: str) -> None:
    assert is_placeholder(artist_key(name))
    assert groups(name, name) == [None, None]
    assert groups(f"{name}; Queen", name, "Queen")[1] is None


@pytest.mark.parametrize("name", ["!!!", "The Various", "Vanilla", "X", "Unknown Mortal Orchestra"])
def test_artists_with_names_similar_to_placeholders_have_a_group(name: str) -> None:
    assert groups(name) == [f"artist:{artist_key(name)}"]


def test_songs_that_share_an_artist_directly_or_indirectly_are_one_group() -> None:
    actual = groups("Queen", "Queen; Guest 1", "Guest 1 feat. Guest 2", "GUEST 2", "Somebody", None)
    assert actual == ["artist:guest 1"] * 4 + ["artist:somebody", None]


def test_joint_credits_are_split_only_if_all_parts_are_credited_alone() -> None:
    assert credited_keys(["Simon & Garfunkel", "Simon", "Earth, Wind & Fire", "Earth", "Fire"])[::2] == [
        ["simon garfunkel"],
        ["earth wind fire"],
        ["fire"],
    ]
    assert len(set(groups("Simon & Garfunkel", "Simon", "Earth, Wind & Fire", "Earth", "Fire"))) == 5
    assert len(set(groups("Queen & David Bowie", "Queen", "David Bowie"))) == 1
    assert len(set(groups("A, B and C", "B", "A", "c"))) == 1
    assert len(set(groups("A x B", "A vs. B", "A + B", "A with B", "A", "B"))) == 1
    assert len(set(groups("Drake feat. Rihanna & Jay", "Rihanna", "Jay", "Drake"))) == 1


def test_duplicate_recordings_connect_artists() -> None:
    assert groups("Alias", "Real Name", "Real Name", None, None, duplicates=["r1", "r1", "r2", "r3", "r3"]) == [
        *["artist:alias"] * 3,
        *["recording:r3"] * 2,
    ]


def flood_fill(cells: list[set[str]]) -> list[int]:
    """Smallest index of a song that each song reaches through shared labels."""
    smallest = list(range(len(cells)))
    while True:
        before = list(smallest)
        for i, a in enumerate(cells):
            for j, b in enumerate(cells):
                if a & b:
                    smallest[i] = smallest[j] = min(smallest[i], smallest[j])
        if smallest == before:
            return smallest


@pytest.mark.parametrize("seed", range(8))
def test_groups_equal_a_flood_fill(seed: int) -> None:
    random = np.random.default_rng(seed)
    songs = [
        ([f"Name {n}" for n in random.choice(40, random.integers(0, 3), replace=False)], f"r{random.integers(45)}")
        for _ in range(40)
    ]
    actual = groups(*("; ".join(names) or None for names, _ in songs), duplicates=[recording for _, recording in songs])
    expected = flood_fill([{*names, recording} for names, recording in songs])
    assert len(set(expected)) > 3
    assert [actual.index(group) for group in actual] == expected


def test_group_splits_follow_the_shares() -> None:
    of_groups = pa.array([f"artist:{i}" for i in range(3000)] * 2)
    splits = group_splits(of_groups, (0.8, 0.1, 0.1)).to_pylist()
    assert splits[:3000] == splits[3000:]
    assert [splits.count(name) / 6000 for name in ("train", "validation", "test")] == pytest.approx(
        [0.8, 0.1, 0.1], abs=0.02
    )
    for name in range(30):  # a group of most songs is for training, for any hash
        assert set(group_splits(pa.array([f"artist:{name}"] * 3 + [None, "x"]), (0.1, 0.1, 0.8)).to_pylist()[:3]) == {
            "train"
        }
    assert group_splits(pa.array([None, "a"], pa.string()), (1, 0, 0)).to_pylist() == [None, "train"]
