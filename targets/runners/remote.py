"""Devices behind a POSIX shell: what adb and ssh have in common."""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
import subprocess
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from tersor.errors import DeviceError
from tersor.targets.registry import size
from tersor.targets.runners.base import Facts, Job, Result, Runner, text

_PATIENCE = 60
"""Seconds that a small command of ours may take there; transfers get `_SLOWEST` bytes a second on top."""

_SLOWEST = 200_000

_LONGEST = 600
"""Seconds that results may take to come back."""

_ASK = """
abis="$(getprop ro.product.cpu.abilist 2>/dev/null)"
[ -n "$abis" ] || abis="$(getprop ro.product.cpu.abi 2>/dev/null)"
echo "tersor-machine ${abis:-$(uname -m)}"
echo "tersor-system $(uname -s 2>/dev/null)"
cat /proc/cpuinfo 2>/dev/null
"""
"""What the device is; old Androids have a property for it and no uname."""

_DAYS = 7
"""How long a kept file stays on the device after its last use."""


class Remote(Runner):
    """A device whose shell we send scripts to.

    Programs run in a new folder below `root`. Kept files lie beside it, under the hash of their contents, so they are
    sent once; those that nobody asked for in a week are removed.

    Every script ends by printing its exit status after a random word: where the word is missing the connection broke,
    whatever the tool's own exit code says (adb passes no exit code on from devices older than Android 7).
    """

    root: str
    """The folder for our files, as the device's shell expands it; quoted already."""

    _facts: Facts | None = None

    @abstractmethod
    def _execute(
        self,
        script: str,
        *,
        timeout: float | None,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a script of a POSIX shell on the device."""

    @abstractmethod
    def _unreachable(self, said: str) -> DeviceError:
        """The error for a command that did not reach the device, from what the tool said."""

    @abstractmethod
    def _push(self, file: Path, path: str, timeout: float) -> None:
        """Sends a file; DeviceError when it does not arrive whole."""

    @abstractmethod
    def _pull(self, path: str, file: Path, timeout: float) -> None:
        """Fetches a file; DeviceError when it does not arrive whole."""

    def shell(self, script: str, timeout: float | None = _PATIENCE) -> tuple[int, str, str]:
        """Exit status, output and errors of a script there. DeviceError when the device cannot be reached."""
        word = secrets.token_hex(8)
        done = self._execute(f"({script}\n); status=$?; echo; echo {word} $status", timeout=timeout)
        output, errors = text(done.stdout), text(done.stderr)
        said, found, status = output.rpartition(f"\n{word} ")
        if not found:
            raise self._unreachable(errors.strip() or output.strip())
        return int(status), said, errors

    def facts(self) -> Facts:
        if self._facts is None:
            _, output, _ = self.shell(_ASK)
            said = dict(re.findall(r"^tersor-(\w+) (.*)$", output, re.MULTILINE))
            self._facts = Facts.read(said.get("machine", ""), said.get("system", ""), output)
        return self._facts

    def run(self, job: Job, folder: Path, timeout: float | None = None) -> Result:
        kept = {name: (file, _digest(file)) for name, file in job.kept.items()}
        new = f"run-{secrets.token_hex(8)}"
        try:
            there, absent, room = self._prepare(
                new, {digest: file.stat().st_size for file, digest in kept.values()}
            )
            files = {"program": job.program, **job.files}
            lacking = {digest: file for file, digest in kept.values() if digest in absent}
            self._check_room([*files.values(), *lacking.values()], room)
            for name, file in files.items():
                self._push(file, f"{there}/{name}", _patience(file))
            for digest, file in lacking.items():
                self._keep(file, digest, there)
            links = {name: digest for name, (_, digest) in kept.items()}
            return self._start(job, links, there, folder, timeout)
        finally:
            self._clear(new)

    def _prepare(self, new: str, sizes: Mapping[str, int]) -> tuple[str, set[str], int | None]:
        """Makes the new folder. Its path, which of the kept files are not there, the free bytes (None if unknown)."""
        script = [
            "umask 077",
            f"mkdir -p {self.root}/kept && cd {self.root} && mkdir {new} || exit",
            f'echo "folder $PWD/{new}"',
            f"find kept -type f -mtime +{_DAYS} -exec rm -f {{}} + 2>/dev/null",
            *(
                f"if [ -f kept/{digest} ] && [ $(wc -c <kept/{digest} 2>/dev/null || echo {count}) -eq {count} ];"
                f" then touch kept/{digest}; else echo absent {digest}; fi"
                for digest, count in sizes.items()
            ),
            "df -k . 2>/dev/null",
            "true",
        ]
        status, output, errors = self.shell("\n".join(script))
        found = re.search(r"^folder (/.*)$", output, re.MULTILINE)
        if status or found is None:
            raise DeviceError(
                f"no folder can be made on {self.name}",
                where=self.root.strip('"'),
                why=errors.strip() or output.strip(),
                fix="make room there, and see that you may write to that folder",
            )
        free = re.search(r"\s\d+\s+\d+\s+(\d+)\s+\d+%", output)  # 1024-byte blocks, used, available, capacity
        absent = set(re.findall(r"^absent (\w+)$", output, re.MULTILINE))
        return found[1], absent, int(free[1]) * 1024 if free else None

    def _check_room(self, files: list[Path], room: int | None) -> None:
        needed = sum(file.stat().st_size for file in files)
        if room is not None and needed > room:
            raise self._full(f"{size(needed)} are to be sent, {size(room)} are free")

    def _full(self, why: str) -> DeviceError:
        return DeviceError(
            f"there is not enough space on {self.name}",
            where=self.root.strip('"'),
            why=why,
            fix="make room there; weights of earlier runs lie in its folder 'kept'",
        )

    def _keep(self, file: Path, digest: str, there: str) -> None:
        """Sends a file to where it stays; it appears there complete or not at all."""
        self._push(file, f"{there}/{digest}", _patience(file))
        words = ["mv", "-f", f"{there}/{digest}", f"{there}/../kept/{digest}"]
        status, _, errors = self.shell(shlex.join(words))
        if status:
            raise DeviceError(f"a file cannot be kept on {self.name}", why=errors.strip())

    def _start(
        self, job: Job, kept: dict[str, str], there: str, folder: Path, timeout: float | None
    ) -> Result:
        links = "".join(
            f"ln -s {shlex.quote(f'../kept/{digest}')} {shlex.quote(name)} || exit\n"
            for name, digest in kept.items()
        )
        # in the background, so that `_clear` can end it
        script = (
            f"cd {shlex.quote(there)} || exit\n{links}chmod 700 program || exit\n"
            f"./program {shlex.join(job.arguments)} & echo $! >pid; wait $!"
        )
        result = self.ended(*self.shell(script, timeout))
        for name in job.results:
            self._pull(f"{there}/{name}", folder / name, _LONGEST)
        return result

    def _clear(self, new: str) -> None:
        # what went wrong before is what the user must hear of, not that the connection is gone now too
        with suppress(DeviceError):
            self.shell(
                f"cd {self.root} || exit; [ -f {new}/pid ] && kill -9 $(cat {new}/pid) 2>/dev/null; rm -rf {new}"
            )


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _patience(file: Path) -> float:
    return _PATIENCE + file.stat().st_size / _SLOWEST
