"""`htcl embed` as a Ray job.

ray job submit --working-dir . -- python jobs/embed.py --workspace ABSOLUTE_PATH_OR_URI
"""

from htcl_ray.cli import run_step


def main() -> int:
    """Embed every song of the catalogue, and return the exit code."""
    return run_step("embed")


if __name__ == "__main__":
    raise SystemExit(main())
