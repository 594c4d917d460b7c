"""An adb that speaks the real one's command line and runs everything on this machine.

Phones are folders of ``$FAKE_ADB``; each has a ``phone.json`` (state, abi, flags, free: kB or absent, old: before
Android 7) and what lies at / there. What was asked is added to ``$FAKE_ADB/log``. Programs for ARM run under qemu.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from arm_program import run_under_qemu

HOME = Path(os.environ["FAKE_ADB"])


def phones() -> dict[str, dict]:
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(HOME.glob("*/phone.json"))}


def fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


def devices() -> int:
    print("* daemon not running; starting now at tcp:5037\n* daemon started successfully", file=sys.stderr)
    print("List of devices attached")
    for number, (serial, phone) in enumerate(phones().items(), 1):
        rest = " product:shiba model:Pixel_8 device:shiba" if phone["state"] == "device" else ""
        print(f"{serial:<22} {phone['state']} usb:1-{number}{rest} transport_id:{number}")
    print()
    return 0


def shell(serial: str, phone: dict, words: list[str]) -> int:
    root = str(HOME / serial)
    script = " ".join(words).replace("/data/local/tmp", f"{root}/data/local/tmp")
    script = script.replace("/proc/cpuinfo", f"{root}/cpuinfo")
    environment = {**os.environ, "PATH": f"{root}/bin{os.pathsep}{os.environ['PATH']}"}
    errors = subprocess.STDOUT if phone.get("old") else None
    done = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, stderr=errors, env=environment)
    output = done.stdout.replace(root.encode(), b"")
    if phone.get("old"):  # a terminal's line ends, and no exit status
        sys.stdout.buffer.write(output.replace(b"\n", b"\r\n"))
        return 0
    sys.stdout.buffer.write(output)
    return done.returncode % 256


def place(serial: str, path: str) -> Path:
    return Path(f"{HOME / serial}{path}")


def push(serial: str, phone: dict, source: str, path: str) -> int:
    target, content = place(serial, path), Path(source).read_bytes()
    if not target.parent.is_dir():
        return fail(
            f"adb: error: failed to copy '{source}' to '{path}': remote couldn't create file: No such file"
        )
    if phone.get("full"):
        return fail(f"adb: error: failed to copy '{source}' to '{path}': remote No space left on device")
    shutil.copy(source, target)
    run_under_qemu(target, phone.get("cpu", "max"))
    print(f"{source}: 1 file pushed, 0 skipped. 30.1 MB/s ({len(content)} bytes in 0.001s)")
    return 0


def pull(serial: str, path: str, target: str) -> int:
    if not place(serial, path).is_file():
        return fail(f"adb: error: failed to stat remote object '{path}': No such file or directory")
    shutil.copy(place(serial, path), target)
    print(f"{path}: 1 file pulled, 0 skipped.")
    return 0


def main(words: list[str]) -> int:
    with open(HOME / "log", "a") as log:
        print(json.dumps(words), file=log)
    if words == ["devices", "-l"]:
        return devices()
    if words[:1] != ["-s"]:
        if len(phones()) != 1:
            return fail("adb: more than one device/emulator")
        words = ["-s", *phones(), *words]
    serial, command, *rest = words[1:]
    phone = phones().get(serial)
    if phone is None:
        return fail(f"adb: device '{serial}' not found")
    if phone["state"] != "device":
        return fail(f"adb: device {phone['state']}.")
    if command == "shell":
        return shell(serial, phone, rest)
    return {"push": lambda: push(serial, phone, *rest), "pull": lambda: pull(serial, *rest)}[command]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
