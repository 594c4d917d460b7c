"""This machine."""

from __future__ import annotations

import platform
import shutil
import tempfile
from pathlib import Path

from tersor.targets.runners.base import Facts, Job, Result, Runner, execute, text


class Local(Runner):
    """Runs programs on this machine, in a folder that goes when they have ended."""

    name = "local"
    static = False

    def facts(self) -> Facts:
        cpuinfo = Path("/proc/cpuinfo")
        described = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
        return Facts.read(platform.machine(), platform.system(), described)

    def command(self, program: Path) -> list[str]:
        """The words that start a program."""
        return [str(program)]

    def run(self, job: Job, folder: Path, timeout: float | None = None) -> Result:
        with tempfile.TemporaryDirectory(prefix="tersor-") as scratch:
            for name, file in {**job.files, **job.kept}.items():
                Path(scratch, name).symlink_to(file.resolve())
            command = [*self.command(job.program.resolve()), *job.arguments]
            done = execute(command, timeout=timeout, cwd=Path(scratch))
            # Popen tells of a signal by a negative number
            status = 128 - done.returncode if done.returncode < 0 else done.returncode
            result = self.ended(status, text(done.stdout), text(done.stderr))
            for name in job.results:
                shutil.move(Path(scratch, name), folder / name)
        return result
