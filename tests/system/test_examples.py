"""The programs in examples/: each runs as its README says."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.support import ROOT, needs, needs_tun

EXAMPLES = ROOT / "examples"


def example(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with an example; whatever warns has failed."""
    return subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_agent_reaches_what_is_allowed_and_is_told_why_not(tmp_path: Path) -> None:
    needs("curl")
    needs_tun()
    (tmp_path / "page").write_text("the page")

    class Pages(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: object) -> None:
            super().__init__(*given, directory=str(tmp_path))  # type: ignore[arg-type]  # as socketserver gives them

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever).start()
        port = server.server_port
        policy = (EXAMPLES / "agent_sandbox" / "policy.toml").read_text()
        rule = f'\n[[rules]]\naction = "allow"\ntargets = ["host.containers.internal"]\nports = [{port}]\n'
        (tmp_path / "policy.toml").write_text(policy + rule)
        script = f"""
            curl -sS http://host.containers.internal:{port}/page; echo
            curl -sS -o /dev/null -w '%{{http_code}}\\n' http://www.example.com/
            curl -sS http://www.example.com/secret http://192.0.2.1/
            curl -sS https://www.example.com/ 2>&1
            curl -sS http://169.254.169.254/latest
            exit 7
        """
        words = ["policy.toml", "audit.jsonl", "--host-port", str(port), "--", "sh", "-c", script]
        done = example(EXAMPLES / "agent_sandbox" / "sandbox.py", *words, cwd=tmp_path)
        server.shutdown()
    assert done.returncode == 7, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["the page", "403"], done.stdout
    assert "This sandbox does not let you reach www.example.com." in lines
    assert "The network policy of this sandbox does not allow 192.0.2.1:80." in lines
    assert "curl: (35)" in done.stdout
    audit = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [each["request"] for each in audit if "request" in each] == [
        "GET / HTTP/1.1",
        "GET /secret HTTP/1.1",
    ]
    reached, _, refused = done.stderr.partition("refused: ")
    assert "reached: 1\n  1 × tcp host.containers.internal" in reached
    for what in (
        "dns www.example.com (name): default: deny",
        "http www.example.com (GET /secret HTTP/1.1): default: deny",
        "tcp www.example.com (443): default: deny",
        "tcp 192.0.2.1 (80): default: deny",
        "tcp 169.254.169.254 (80): rule 1 (no credentials of the cloud)",
    ):
        assert f"1 × {what}" in refused


def test_the_flaky_network_passes() -> None:
    needs_tun()
    done = example("-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/flaky_network", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 passed" in done.stdout
