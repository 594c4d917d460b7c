"""An ssh and an scp that speak the real ones' command lines to a board that is the folder ``$FAKE_BOARD``.

``home`` in it is the user's, ``bin`` has the programs that differ, ``cpuinfo`` is /proc/cpuinfo. Programs for ARM run
under qemu as on a Cortex-A76.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from arm_program import run_under_qemu

BOARD = Path(os.environ["FAKE_BOARD"])
HOME = BOARD / "home"


def ssh(words: list[str]) -> int:
    while words[0] in ("-o", "-p"):
        del words[:2]
    host, *command = words[words[0] == "--" :]
    if host != "pi@raspberrypi":
        print(f"ssh: Could not resolve hostname {host}: Name or service not known", file=sys.stderr)
        return 255
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    environment |= {"HOME": str(HOME), "PATH": f"{BOARD}/bin{os.pathsep}{os.environ['PATH']}"}
    script = " ".join(command).replace("/proc/cpuinfo", str(BOARD / "cpuinfo"))
    done = subprocess.run(["sh", "-c", script], cwd=HOME, env=environment)
    adapt()
    return done.returncode % 256


def scp(words: list[str]) -> int:
    *files, target = words
    host, _, path = target.partition(":")
    if host != "pi@raspberrypi":
        return 255
    for file in files:
        shutil.copy(file, HOME / path)
    adapt()
    return 0


def adapt() -> None:
    for file in list(HOME.rglob("*")):
        if file.is_file():
            run_under_qemu(file, "cortex-a76")


if __name__ == "__main__":
    sys.exit({"ssh": ssh, "scp": scp}[sys.argv[1]](sys.argv[2:]))
