"""`htcl index` as a Ray job.

ray job submit --working-dir . -- python jobs/build_index.py --workspace ABSOLUTE_PATH_OR_URI
"""

from htcl_ray.cli import run_step


def main() -> int:
    """Build the index from the embeddings, and return the exit code."""
    return run_step("index")


if __name__ == "__main__":
    raise SystemExit(main())
