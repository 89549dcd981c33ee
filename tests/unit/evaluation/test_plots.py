"""The plots as SVG that a page can hold: well-formed, self-contained, escaped, in the page's colours, and the same
twice."""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import numpy as np
import pytest

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.report import plots
from htcl_ray.evaluation.report.plot_data import BINS, plot_data
from htcl_ray.evaluation.report.report_tree import METHOD_LABELS
from tests.worlds.evaluation_songs import GENRES, encode_genre, made_up, metadata

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def plotted() -> dict:
    return plot_data(made_up(noise=0.15), encode_genre, EvaluateSettings())


def draw_all(plotted: dict) -> dict[str, str]:
    point = {"value": 0.2, "low": 0.1, "high": 0.3}
    curve = [{"blend": blend, "cold": {"ndcg@10": point}} for blend in (0, 0.5, 1)]
    return {
        "recall": plots.recall_curves(plotted["recall_curves"], METHOD_LABELS),
        "blend": plots.blend_curve(curve, ["ndcg@10"], {"ndcg@10": "NDCG@10"}),
        "genres": plots.genre_bars(plotted["genre_agreement"], METHOD_LABELS),
        "map": plots.song_map(plotted["map"]),
        "similarity": plots.similarity_histograms(plotted["similarities"], METHOD_LABELS),
    }


def test_every_plot_is_one_self_contained_svg_element(plotted: dict):
    ids: list[str] = []
    for name, svg in draw_all(plotted).items():
        tree = ElementTree.fromstring(svg)
        assert tree.tag == "svg", name
        assert "http" not in svg
        assert "currentColor" in svg, "axes and words follow the page"
        assert "#000000" not in svg
        references = [element.get("href") for element in tree.iter() if element.get("href")]
        own = [element.get("id") for element in tree.iter() if element.get("id")]
        assert all(reference[0] == "#" and reference[1:] in own for reference in references)
        ids += own
    assert len(ids) == len(set(ids)), "several stand in one page"


def test_plots_are_reproducible(plotted: dict):
    assert draw_all(plotted) == draw_all(plotted)


def test_names_from_the_catalogue_are_escaped():
    points = [{"x": i / 9, "y": 0.5, "genre": genre} for i, genre in enumerate(["<b>&", "_hidden", "r$b$", None] * 2)]
    svg = plots.song_map(points)
    text = "".join(ElementTree.fromstring(svg).itertext())
    assert "<b>&" in text
    assert "r$b$" in text
    assert "hidden" in text
    assert "<b>" not in svg
    agreement = {"semantic": {"<i>": 0.5, "a$b": 0.1}}
    assert "<i>" in "".join(ElementTree.fromstring(plots.genre_bars(agreement, METHOD_LABELS)).itertext())


def test_plot_data_match_the_measurements(plotted: dict):
    songs = made_up(noise=0.15)
    held_out = songs.without(songs.splits != "test")
    curve = plotted["recall_curves"]["semantic"]
    assert curve == sorted(curve)
    texts = sorted(set(held_out.texts))
    queries = encode_genre(texts)["semantic"]
    best = [np.argsort(-(held_out.spaces["semantic"] @ query)) for query in queries]
    first = [
        1 + min(place for place, row in enumerate(order) if held_out.texts[row] == text)
        for order, text in zip(best, texts, strict=True)
    ]
    assert curve[4] == pytest.approx(np.mean(np.array(first) <= 5), abs=0.1)
    agreement = plotted["genre_agreement"]
    assert min(agreement["semantic"].values()) > 0.8, "vectors name the genre"
    assert sum(agreement["share of songs"].values()) == pytest.approx(1)
    similarities = plotted["similarities"]["semantic"]
    centres = (BINS[1:] + BINS[:-1]) / 2
    means = {name: float(np.dot(shares, centres)) for name, shares in similarities.items()}
    assert means["own text"] > 0.7 > 0.5 > means["other texts"]
    assert len(plotted["map"]) == len(held_out.ids)
    assert all(0 <= point["x"] <= 1 and 0 <= point["y"] <= 1 for point in plotted["map"])


def test_genre_agreement_excludes_songs_by_the_same_artist():
    """Every artist has a genre and a corner of the space: with their own songs agreement would be 1, without them it is
    chance."""
    songs = made_up(noise=0.0)
    artist = np.unique(songs.artists, return_inverse=True)[1]
    vectors = np.eye(artist.max() + 1, dtype=np.float32)[artist]
    genres = [[GENRES[number % 4]] for number in artist]
    songs = dataclasses.replace(
        songs, spaces={"semantic": vectors}, metadata=metadata(len(artist), artist=songs.artists, genre=genres)
    )
    data = plot_data(
        songs, lambda texts: {"semantic": np.ones((len(texts), vectors.shape[1]), np.float32)}, EvaluateSettings()
    )
    assert np.mean(list(data["genre_agreement"]["semantic"].values())) < 0.6
