"""Machines behind ssh: boards, servers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import IO

from tersor.errors import DeviceError, InputError
from tersor.targets.runners.base import execute, text
from tersor.targets.runners.remote import Remote

_REASONS = {
    r"Host key verification failed|HOST IDENTIFICATION HAS CHANGED": "ssh does not know the host's key, or another "
    "one: connect once by hand and compare it",
    r"Permission denied": "ssh must get in without a password: ssh-copy-id, or a key in ssh-agent or ~/.ssh/config",
    r"Could not resolve": "there is no such host: see its name, or give its address",
    r"Connection refused": "nothing listens there: start sshd on the device, or see the port",
    r"timed out|No route|unreachable": "see that the device is on, and in this network",
}


class Ssh(Remote):
    """A machine by ``[user@]host[:port]``; ~/.ssh/config holds for it, and nothing is asked for.

    ``TERSOR_SSH`` holds another command for ssh, with options: ``ssh -J gateway``.

    Raises:
        InputError: the address cannot be one.
        DeviceError: ssh is not installed.
    """

    root = '"${XDG_CACHE_HOME:-$HOME/.cache}/tersor"'

    def __init__(self, address: str):
        found = re.fullmatch(
            r"((?:[^@\s-][^@\s]*@)?)(\[[^\]\s]+\]|[^:@\[\]\s-][^:@\s]*)(?::(\d{1,5}))?", address
        )
        if found is None:
            raise InputError(f"{address!r} is no address for ssh", fix="give [user@]host[:port]")
        user, host, port = found.groups()
        words = shlex.split(os.environ.get("TERSOR_SSH", "ssh"))
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=15", *(["-p", port] if port else [])]
        self._command = [*words, *options, "--", user + host.strip("[]")]
        self.name = f"ssh:{address}"

    def _execute(
        self,
        script: str,
        *,
        timeout: float | None,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        # the user's login shell may be of another kind
        command = [*self._command, f"exec sh -c {shlex.quote(script)}"]
        return execute(command, timeout=timeout, stdin=stdin, stdout=stdout)

    def _unreachable(self, said: str) -> DeviceError:
        fixes = (fix for reason, fix in _REASONS.items() if re.search(reason, said))
        return DeviceError(f"{self.name} cannot be reached", why=said or None, fix=next(fixes, None))

    def _push(self, file: Path, path: str, timeout: float) -> None:
        place, count = shlex.quote(path), file.stat().st_size
        # a connection that breaks is an end of file to cat
        script = f"cat >{place} && [ $(wc -c <{place}) -eq {count} ]"
        with open(file, "rb") as opened:
            self._transferred(self._execute(script, timeout=timeout, stdin=opened))

    def _pull(self, path: str, file: Path, timeout: float) -> None:
        with open(file, "wb") as opened:
            self._transferred(self._execute(f"cat {shlex.quote(path)}", timeout=timeout, stdout=opened))

    def _transferred(self, done: subprocess.CompletedProcess[bytes]) -> None:
        if done.returncode == 0:
            return
        said = text(done.stderr).strip()
        if done.returncode == 255:  # ssh's own
            raise self._unreachable(said)
        if "No space left" in said:
            raise self._full(said)
        raise DeviceError("a file cannot be copied", where=self.name, why=said)
