"""The sample world of `htcl demo`: procedurally made music and simulated listeners, with known truth.

world.py       artists and songs: traits that the text names, and traits that only the sound has
score.py       traits → notes and drum hits
synthesis.py   notes → waveform
listeners.py   users' tastes → interaction log
write.py       all of it → catalog.csv, interactions.csv, audio/*.wav
"""

from htcl_ray.sample.write import SampleTables, write_sample

__all__ = ["SampleTables", "write_sample"]
