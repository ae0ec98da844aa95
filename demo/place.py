"""The demo's environment: an embedded Hub in its own process, its users, and the commands they run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hubfusion.errors import FusionError, HubError
from hubfusion.hub import Hub, connect

BASE, ORG, BOT, TEXTS = "ibm/ColD-Fusion", "ibm", "recycling-bot", "demo"
HONEST = ("alice", "bob", "carol", "dave", "erin", "faythe", "grace", "heidi")
ROGUES = ("mallory", "victor", "petra", "frank", "sybil", "oscar")
START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the demo runs: a folder, the Hub's address, and an environment that knows no token."""

    folder: Path
    endpoint: str
    environment: dict[str, str]

    def hub(self, user: str | None = None) -> Hub:
        """The Hub as ``user`` (or as anybody) sees it."""
        return connect(self.endpoint, token_of(user) if user else None)

    def run(self, *command: str, user: str | None = None, **environment: str) -> str:
        """Run ``python -m <command>`` as ``user`` and return its standard output; the bot's log lines are shown."""
        env = self.environment | ({"HF_TOKEN": token_of(user)} if user else {}) | environment
        shown = None if command[0] == "bot" else subprocess.PIPE
        arguments = [sys.executable, "-m", *command]
        done = subprocess.run(arguments, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=shown, text=True)
        if done.returncode:
            last = (done.stderr or done.stdout or "").strip()[-300:]
            raise FusionError(f"{' '.join(command)}: exit code {done.returncode}: {last}")
        return done.stdout


def token_of(user: str) -> str:
    """The token of a user of the demo's Hub."""
    return f"hf_demo_{user.replace('-', '_')}"


@contextmanager
def open_place(folder: Path) -> Iterator[Place]:
    """Start the embedded Hub on a free port of the loopback interface; stop it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    users = (BOT, TEXTS, *HONEST, *ROGUES)
    options = [option for user in users for option in ("--user", f"{user}:{token_of(user)}")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str((folder / "hf").absolute()),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "DATASETS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = ["hubfusion", "hub", "serve", "--dir", str((folder / "hub").absolute()), "--port", str(port)]
    with open(folder / "hub.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, *options, "--org", f"{ORG}:{BOT}"], env=environment, stdout=log, stderr=log
        )
        place = Place(folder, environment["HF_ENDPOINT"], environment)
        try:
            _wait_until_up(place, server)
            yield place
        finally:
            server.terminate()
            server.wait()


def _wait_until_up(place: Place, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if server.poll() is not None:
            raise FusionError(f"the embedded Hub ended with exit code {server.returncode}; see {place.folder}/hub.log")
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", int(place.endpoint.rsplit(":", 1)[1]))) == 0:
                break
        if time.monotonic() > deadline:
            raise HubError(f"{place.endpoint}: no answer after {START_SECONDS:.0f} s; see {place.folder}/hub.log")
        time.sleep(0.1)
