"""The sample world of `htcl demo`: procedurally made music and simulated listeners, with known truth.

world.py       artists and songs: traits that the text names, and traits that only the sound has
score.py       traits → notes and drum hits
synthesis.py   notes → waveform
listeners.py   users' tastes → interaction log
write.py       all of it → catalog.csv, interactions.csv, audio/*.wav
"""

from htcl_ray.demo_world.write import SampleTables, write_sample

TEXT_COLUMNS = ("genre", "mood", "tags")
"""What a song's text should be made of: titles and names are invented and say nothing about the sound."""

__all__ = ["TEXT_COLUMNS", "SampleTables", "write_sample"]
