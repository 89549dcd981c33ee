"""Schemathesis against a running application: thousands of requests made from `/openapi.json`, and what the answers
break.

    python -m benchmarks.conformance --url http://127.0.0.1:8000 [--key KEY] [--seed 0] [--examples 300]

Fails on a 5xx, on a status, a content type, a header or a body that `/openapi.json` does not tell of. Writes songs when
the key may: use an application of its own for it. Prints what Schemathesis prints and writes
benchmarks/results/conformance.json.
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
    """Exit status and output."""
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
    """The counts that Schemathesis prints."""
    generated, operations = re.search(r"([\d,]+) generated", output), re.search(r"Tested: (\d+)", output)
    if generated is None or operations is None:
        raise SystemExit("Schemathesis did not run to its end")
    return {
        "requests": int(generated[1].replace(",", "")),
        "operations": int(operations[1]),
        "failures": re.findall(r"❌ (.+: \d+)", output),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Schemathesis against a running application.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", help="API key with scope write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=300, help="of each operation in each phase, at most")
    options = parser.parse_args()
    status, output = schemathesis(options.url, options.key, options.seed, options.examples)
    print(output)
    found = summary(output)
    print(write_result("conformance", {"seed": options.seed, "examples": options.examples, "checks": CHECKS, **found}))
    if status:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
