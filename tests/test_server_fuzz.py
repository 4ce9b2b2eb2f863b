"""Random requests, which schemathesis makes from /openapi.json: no status 5xx, no hang.

The tiny model answers up to the end of its context in milliseconds. FUZZ_SECONDS makes the run longer.
"""

import os
import subprocess
import sys

import pytest

from serving import is_idle, running, until

SECONDS = int(os.environ.get("FUZZ_SECONDS", "25"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.timeout(SECONDS + 90)
def test_random_requests_neither_fail_nor_hang_the_server(llm, tmp_path):
    pytest.importorskip("schemathesis")
    with running(llm) as server, server.client() as client:
        description = server.url + "/openapi.json"
        options = (
            f"--checks {CHECKS} --max-time {SECONDS} --seed 1 --request-timeout 20 --max-response-time 10"
        )
        command = [sys.executable, "-m", "schemathesis.cli", "run", description, *options.split()]
        # It writes a folder where it runs.
        found = subprocess.run(
            [*command, "--no-shrink", "--warnings", "off"],
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS + 60,
            check=False,
        )
        assert found.returncode == 0, found.stdout
        routes = sum(map(len, client.get("/openapi.json").json()["paths"].values()))
        assert f"Tested: {routes}" in found.stdout
        assert client.get("/health").status_code == 200
        until(lambda: server.state.queue.length == 0 and is_idle(llm))
