"""Read the catalogue: the user's tables of songs, checked, with the text of each song."""
