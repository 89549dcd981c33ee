"""Run the unit tests of what changed: `python -m tests.changed`.

Changed is what differs from the last commit, or, when nothing does, what the last commit changed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def changed_files() -> list[str]:
    """Paths of Python files that differ from the last commit, or that the last commit changed."""
    uncommitted = _git("diff", "--name-only", "HEAD") + _git("ls-files", "--others", "--exclude-standard")
    changed = uncommitted or _git("diff", "--name-only", "HEAD~1", "HEAD")
    return sorted({name for name in changed if name.endswith(".py") and (REPOSITORY / name).exists()})


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def unit_tests_of(changed: list[str], sources: dict[str, str]) -> list[str]:
    """Test files that are changed themselves, and for a changed module those in the folder that mirrors its package:
    the ones that import it or have its name, or all of the folder when there is none.

    `sources`: text of each test file by its path.
    """
    chosen = {name for name in changed if name in sources}
    for name in changed:
        if name.startswith("htcl_ray/"):
            path = Path(name)
            folder = f"tests/unit/{path.parent.relative_to('htcl_ray')}/".replace("/./", "/")
            module = re.compile(rf"\b{re.escape('.'.join(path.with_suffix('').parts))}\b(?!\.)")
            mirror = {test: text for test, text in sources.items() if test.startswith(folder)}
            own = {test for test, text in mirror.items() if test.endswith(f"/test_{path.name}") or module.search(text)}
            chosen |= own or mirror.keys()
    return sorted(chosen)


def main() -> int:
    """Exit code of pytest, or 0 when no unit test belongs to what changed."""
    files = sorted((REPOSITORY / "tests/unit").rglob("test_*.py"))
    sources = {file.relative_to(REPOSITORY).as_posix(): file.read_text(encoding="utf-8") for file in files}
    chosen = unit_tests_of(changed_files(), sources)
    if not chosen:
        print("no unit test belongs to what changed")
        return 0
    print(f"{len(chosen)} test file(s): {' '.join(chosen)}")
    return subprocess.call(
        [sys.executable, "-m", "pytest", "--quiet", "--durations=0", "--durations-min=1", *chosen], cwd=REPOSITORY
    )


if __name__ == "__main__":
    sys.exit(main())
