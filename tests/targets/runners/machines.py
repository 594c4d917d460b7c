"""An sshd on loopback, with keys and a configuration that are thrown away."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class Machine:
    """address: for ssh, with the port. command: ssh with the options that reach it. home: its home folder."""

    address: str
    command: str
    home: Path


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """Starts sshd; the test is skipped where there is none."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("needs sshd: apt-get install openssh-server")
    home = folder / "home"
    home.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    kind, key = (folder / "host.pub").read_text().split()[:2]
    (folder / "known").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"KbdInteractiveAuthentication no\nSetEnv HOME={home}\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known\n"
        "  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n  LogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it to be there
    server = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", folder / "sshd_config"],
        stderr=open(folder / "log", "wb"),
        stdin=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None:
                pytest.skip(f"sshd does not start: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.05)
        login = [
            "ssh",
            "-F",
            folder / "ssh_config",
            "-o",
            "BatchMode=yes",
            "-p",
            str(port),
            "127.0.0.1",
            "true",
        ]
        if subprocess.run(login, stderr=subprocess.DEVNULL).returncode:
            pytest.skip(f"sshd does not let this user in: {(folder / 'log').read_text()[-500:]}")
        yield Machine(f"{getpass.getuser()}@127.0.0.1:{port}", f"ssh -F {folder}/ssh_config", home)
    finally:
        server.terminate()
        server.wait()
