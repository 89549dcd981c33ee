"""Test a running application with Schemathesis: thousands of requests generated from `/openapi.json`.

    python -m benchmarks.conformance --url http://127.0.0.1:8000 [--key KEY] [--seed 0] [--examples 300]

Fails on a 5xx and on statuses, content types, headers and bodies that `/openapi.json` does not document. With a key of
scope write it also writes songs, so run it against a separate application. Prints the output of Schemathesis and
writes benchmarks/results/conformance.json.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from typing import Any

from benchmarks.environment import write_result

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def schemathesis(url: str, key: str | None, seed: int, examples: int) -> tuple[int, str]:
    """Run Schemathesis and return its exit status and output."""
    command = [
        sys.executable,
        "-c",
        "from schemathesis.cli import schemathesis; schemathesis()",
        "run",
        f"{url}/openapi.json",
    ]
    command += ["--checks", ",".join(CHECKS), "--seed", str(seed), "--max-examples", str(examples)]
    command += ["--no-color", "--continue-on-failure", "--generation-database", "none", "--warnings", "off"]
    command += ["--header", f"Authorization: Bearer {key}"] if key else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def summary(output: str) -> dict[str, Any]:
    """Parse the counts in the output of Schemathesis."""
    generated, operations = re.search(r"([\d,]+) generated", output), re.search(r"Tested: (\d+)", output)
    if generated is None or operations is None:
        raise SystemExit("Schemathesis did not run to its end")
    return {
        "requests": int(generated[1].replace(",", "")),
        "operations": int(operations[1]),
        "failures": re.findall(r"❌ (.+: \d+)", output),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Test a running application with Schemathesis.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", help="API key with scope write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=300, help="maximum for each operation and phase")
    options = parser.parse_args()
    status, output = schemathesis(options.url, options.key, options.seed, options.examples)
    print(output)
    counts = summary(output)
    print(write_result("conformance", {"seed": options.seed, "examples": options.examples, "checks": CHECKS, **counts}))
    if status:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
