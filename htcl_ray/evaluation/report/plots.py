"""The plots of a report as inline SVG in the colours of the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from htcl_ray.evaluation.report.plot_data import BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Placeholder colour that is replaced by the text colour of the page, `currentColor`."""
COLORS = {
    "semantic": "#3b7dd8",
    "preference": "#d9662c",
    "blend_0.5": "#6f9e3f",
    "random": "#8a8f98",
    "share of songs": "#8a8f98",
}
GENRES = 40
"""Limit of the genres in a plot; the most frequent ones are shown."""
PALETTE = ("#3b7dd8", "#d9662c", "#6f9e3f", "#b04fb5", "#c9a227", "#2aa198", "#d64561", "#7a6fd0", "#8c6d46", "#5b8c9e")


def recall_curves(curves: Mapping[str, Sequence[float]], titles: Mapping[str, str]) -> str:
    """Plot recall@k against k, one line for each space."""
    figure, axes = _figure(1)
    for space, values in curves.items():
        style = ":" if space == "random" else "-"
        axes[0].plot(
            range(1, len(values) + 1), values, style, color=COLORS.get(space, INK), label=titles.get(space, space)
        )
    _finish(axes[0], "k", "text → audio recall@k")
    axes[0].set_ylim(0, 1.02)
    return inline_svg(figure, "recall")


def blend_curve(points: Sequence[Mapping[str, Any]], metrics: Sequence[str], labels: Mapping[str, str]) -> str:
    """Plot each metric against the blend, with its interval as a band."""
    figure, axes = _figure(len(metrics))
    blends = [point["blend"] for point in points]
    for axis, name in zip(axes, metrics, strict=True):
        values = [point["cold"][name] for point in points]
        axis.plot(blends, [item["value"] for item in values], "o-", color=COLORS["preference"], markersize=4)
        if all(item["low"] is not None for item in values):
            lows, highs = [item["low"] for item in values], [item["high"] for item in values]
            axis.fill_between(blends, lows, highs, color=COLORS["preference"], alpha=0.15, linewidth=0)
        _finish(axis, "blend: 0 semantic … 1 preference", f"cold songs, {labels.get(name, name)}", legend=False)
    return inline_svg(figure, "blend")


def genre_bars(agreement: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]) -> str:
    """Plot the share of nearest songs of the same genre, for each genre a bar for each space."""
    spaces = list(agreement)
    share = agreement.get("share of songs", agreement[spaces[0]])
    genres = sorted(sorted(share, key=lambda genre: (-share[genre], genre))[:GENRES])
    figure, axes = _figure(1, height=0.5 + 0.16 * len(genres) * len(spaces) if len(genres) > 4 else 3.2)
    thickness = 0.8 / len(spaces)
    for number, space in enumerate(spaces):
        places = np.arange(len(genres)) + number * thickness - 0.4 + thickness / 2
        values = [agreement[space][genre] for genre in genres]
        axes[0].barh(places, values, thickness * 0.9, color=COLORS.get(space, INK), label=titles.get(space, space))
    axes[0].set_yticks(range(len(genres)), [_plain(genre) for genre in genres])
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 1)
    left_out = f" (the {GENRES} most frequent of {len(share)} genres)" if len(share) > GENRES else ""
    _finish(axes[0], f"share of the 10 nearest songs by other artists with the song's genre{left_out}", "")
    return inline_svg(figure, "genres")


def song_map(points: Sequence[Mapping[str, Any]]) -> str:
    """Plot the places of songs, coloured by genre; the ten most frequent genres are in the legend."""
    genres = [point["genre"] or "none" for point in points]
    names, counts = np.unique(genres, return_counts=True)
    common = [str(name) for name in names[np.argsort(-counts, kind="stable")][: len(PALETTE)]]
    figure, axes = _figure(1, height=5.2)
    for name in [*common, None]:
        members = [
            point
            for point, genre in zip(points, genres, strict=True)
            if genre == name or (name is None and genre not in common)
        ]
        color = PALETTE[common.index(name)] if name in common else COLORS["random"]
        if members:
            axes[0].scatter(
                [p["x"] for p in members],
                [p["y"] for p in members],
                s=14,
                color=color,
                label=_plain(name or "other"),
                linewidths=0,
            )
    axes[0].set_xticks([])
    axes[0].set_yticks([])
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, labelcolor=INK)
    return inline_svg(figure, "map")


def similarity_histograms(similarities: Mapping[str, Mapping[str, Sequence[float]]], titles: Mapping[str, str]) -> str:
    """Plot the cosine of songs with their own text and with other texts: separate peaks for a good model."""
    figure, axes = _figure(len(similarities))
    for axis, (space, histograms) in zip(axes, similarities.items(), strict=True):
        for (name, shares), color in zip(histograms.items(), (COLORS["preference"], COLORS["random"]), strict=True):
            axis.stairs(shares, BINS, fill=True, color=color, alpha=0.6, label=name)
        _finish(axis, f"cosine, {titles.get(space, space)}", "share")
    return inline_svg(figure, "similarity")


def inline_svg(figure: Figure, name: str) -> str:
    """Render the SVG element, reproducibly; ids start with `name`, so that one page can hold several."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={key: None for key in ("Date", "Creator", "Format", "Type")})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return (
        re.sub(r'(<svg) [^>]*?(viewBox="[^"]*")[^>]*>', r'\1 \2 role="img">', text, count=1)
        .replace(INK, "currentColor")
        .strip()
    )


def _plain(label: str) -> str:
    """Escape a label for matplotlib: no mathematics, no hidden legend entry."""
    return label.replace("$", r"\$").removeprefix("_")


def _figure(plots: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = [figure.add_subplot(1, plots, number + 1) for number in range(plots)]
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=INK)
        for name, spine in axis.spines.items():
            spine.set_color(INK)
            spine.set_visible(name in ("left", "bottom"))
    return figure, axes


def _finish(axis: Axes, x: str, y: str, legend: bool = True) -> None:
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)
    if legend:
        axis.legend(frameon=False, labelcolor=INK)
