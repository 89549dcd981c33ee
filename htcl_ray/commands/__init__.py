"""Commands of `htcl` that are not steps of the pipeline, and the output of all commands."""
