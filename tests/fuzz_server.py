"""A server of the bundled model under requests that schemathesis makes of its OpenAPI document: `make test-fuzz`.

Whatever comes, no answer may be a 5xx, none may be missing, and the server has to stop in good order afterwards.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from dsvl2_jax.apps.bench.serve_process import running

LONGEST = 60  # seconds that an answer may take


def main(schemathesis: str, examples: str) -> int:
    with tempfile.TemporaryDirectory() as folder, running([], Path(folder) / "log") as server:
        command = [schemathesis, "run", f"{server.address}/openapi.json", "--max-examples", examples]
        command += ["--checks", "not_a_server_error", "--request-timeout", str(LONGEST), "--max-redirects", "0"]
        command += ["--continue-on-failure", "--suppress-health-check", "all"]
        return subprocess.run(command, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
