"""`htcl preprocess` as a Ray job.

ray job submit --working-dir . -- python jobs/preprocess.py --workspace ABSOLUTE_PATH_OR_URI
"""

from htcl_ray.cli import run_step


def main() -> int:
    """Compute features, events and preference pairs, and return the exit code."""
    return run_step("preprocess")


if __name__ == "__main__":
    raise SystemExit(main())
