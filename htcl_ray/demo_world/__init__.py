"""The sample world of `htcl demo`: procedurally generated music and simulated listeners with a known ground truth.

world.py       generates artists and songs: traits that the text names, and hidden traits that only the audio has
score.py       composes a song's traits into notes and drum hits
synthesis.py   renders notes to a waveform
listeners.py   simulates users' tastes and their interaction log
write.py       writes catalog.csv, interactions.csv and audio/*.wav
truth.py       the true traits as vectors, an upper bound for evaluations
"""

from htcl_ray.demo_world.truth import write_true_vectors
from htcl_ray.demo_world.world import make_world
from htcl_ray.demo_world.write import ARTISTS, SEED, SONGS, SampleTables, write_sample

TEXT_COLUMNS = ("genre", "mood", "tags")
"""Columns for a song's text. Titles and names are generated and carry no information about the audio."""

__all__ = [
    "ARTISTS",
    "SEED",
    "SONGS",
    "TEXT_COLUMNS",
    "SampleTables",
    "make_world",
    "write_sample",
    "write_true_vectors",
]
