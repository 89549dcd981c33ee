"""Training both stages on any number of workers. Runs without Ray, in a debugger too: see `loop.train`."""
