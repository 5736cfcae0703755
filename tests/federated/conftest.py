import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PEER = Path(__file__).parent / "peer.py"


class Peers:
    """Processes of `peer.py`, or of a script like it, each with its own JAX."""

    def __init__(self, folder: Path, script: Path = PEER) -> None:
        self.folder, self.script = folder, script
        self.running: list[subprocess.Popen[str]] = []

    def start(self, job: str, count: int = 1, devices: int = 4) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        started = []
        for index in range(count):
            joint = [address, str(count), str(index)] if count > 1 else []
            command = [sys.executable, str(self.script), job, str(self.folder / "out.npz"), *joint]
            pipe: Any = subprocess.PIPE
            started.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        self.running += started
        return started

    def finish(self, job: str, count: int = 1, devices: int = 4) -> None:
        started = self.start(job, count, devices)
        outputs = [process.communicate(timeout=300)[0] for process in started]
        for process, output in zip(started, outputs, strict=True):
            assert process.returncode == 0, output

    def stop(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    peers = Peers(tmp_path_factory.mktemp("peers"))
    yield peers
    peers.stop()
