"""The catalogue: the user's tables → checked songs with their text."""
