"""Processes that are measured: started in an environment, talked with by lines of JSON, watched for memory.

What they write to standard error is dropped, unless BENCH_STDERR is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any


class Watched:
    """A process, when it was started, and the most memory that it held."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.peak_bytes = 0
        self.started = time.time()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_STDERR") else subprocess.DEVNULL,
            env={**os.environ, **environment},
            text=True,
        )
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        status = Path(f"/proc/{self.process.pid}/status")
        while self.process.poll() is None:
            try:
                found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            except OSError:
                return
            if found:
                self.peak_bytes = max(self.peak_bytes, int(found[0].split()[1]) * 1024)
            time.sleep(0.02)

    def line(self) -> dict[str, Any]:
        """The next line of its answers, as JSON."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            raise RuntimeError(f"{self.process.args}: ended with {self.process.wait()}, see BENCH_STDERR=1")
        found: dict[str, Any] = json.loads(text)
        return found

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.line()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def output(command: list[str]) -> str:
    """What a program prints, run to its end."""
    quiet = None if os.environ.get("BENCH_STDERR") else subprocess.DEVNULL
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=quiet, text=True, check=True).stdout
