"""The sample world of `htcl demo`: procedurally generated music and simulated listeners with a known ground truth.

world.py       generates artists and songs: traits that the text names, and hidden traits that only the audio has
score.py       composes a song's traits into notes and drum hits
synthesis.py   renders notes to a waveform
listeners.py   simulates users' tastes and their interaction log
write.py       writes catalog.csv, interactions.csv and audio/*.wav
"""

from htcl_ray.demo_world.write import SampleTables, write_sample

TEXT_COLUMNS = ("genre", "mood", "tags")
"""Columns for a song's text. Titles and names are generated and carry no information about the audio."""

__all__ = ["TEXT_COLUMNS", "SampleTables", "write_sample"]
