"""Commands of `htcl` that are not steps of the pipeline."""
