"""`htcl run` as a Ray job.

ray job submit --working-dir . -- python jobs/run.py --workspace ABSOLUTE_PATH_OR_URI
"""

from htcl_ray.cli import run_step


def main() -> int:
    """Run all steps, and return the exit code."""
    return run_step("run")


if __name__ == "__main__":
    raise SystemExit(main())
