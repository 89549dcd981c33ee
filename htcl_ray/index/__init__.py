"""Nearest-neighbour index of songs, its kinds, and live updates."""
