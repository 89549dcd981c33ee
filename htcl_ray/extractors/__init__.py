"""Pretrained audio encoders, frozen, whose vectors of windows of a song are its features. Without Ray."""
