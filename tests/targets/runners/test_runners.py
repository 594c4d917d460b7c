"""Runners: files there, output and results back, nothing left; errors that say what to do.

The programs here are shell scripts, which need no compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

from tersor.errors import DeviceError, InputError, TargetError
from tersor.targets import resolve
from tersor.targets.runners import Job, Local, Qemu, Runner, connect
from tersor.targets.runners.base import Facts
from tersor.targets.runners.ssh import Ssh
from tests.targets.runners.machines import machine
from tests.targets.runners.phones import FLAGS, Phones

ARM = resolve("armv8.2-dotprod")
NASTY = 'it\'s; touch OOPS $(touch OOPS) `touch OOPS` "&" * \\ é\n-x'
"""An argument that any shell would take apart."""


@pytest.fixture
def phones(tmp_path, monkeypatch):
    return Phones(tmp_path / "adb", monkeypatch)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    with machine(tmp_path_factory.mktemp("board")) as found:
        yield found


@pytest.fixture(params=["local", "adb", "adb before Android 7", "ssh"])
def device(request, tmp_path, monkeypatch) -> tuple[Runner, Path]:
    """A device and the folder in which it keeps our files."""
    if request.param == "local":
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        monkeypatch.setattr("tempfile.tempdir", None)
        return Local(), tmp_path / "temporary"
    if request.param.startswith("adb"):
        place = Phones(tmp_path / "adb", monkeypatch).connect("A1", old="before" in request.param)
        return connect("adb", ARM)[0], place / "tersor"
    found = request.getfixturevalue("board")
    monkeypatch.setenv("TERSOR_SSH", found.command)
    return connect(f"ssh:{found.address}", ARM)[0], found.home / ".cache/tersor"


def job(folder: Path, text: str, *arguments: str, weights: bytes | None = None, **more) -> Job:
    program = folder / "program of mine"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    kept = {}
    if weights is not None:
        kept["weights.bin"] = folder / "some weights"
        kept["weights.bin"].write_bytes(weights)
    return Job(program, arguments, kept=kept, **more)


def left(folder: Path) -> list[str]:
    """What lies on a device, but for the kept files."""
    return [p.name for p in folder.iterdir() if p.name != "kept"] if folder.exists() else []


def test_files_go_there_and_come_back(device, tmp_path):
    runner, place = device
    (tmp_path / "x").write_bytes(bytes(range(256)))
    text = 'cat in weights.bin >"out file"; printf "%s|" "$@"; echo said >&2'
    wanted = job(
        tmp_path,
        text,
        NASTY,
        "",
        "two",
        weights=b"W" * 3000,
        files={"in": tmp_path / "x"},
        results=["out file"],
    )
    for _ in range(2):
        result = runner.run(wanted, tmp_path, timeout=60)
        assert result.output.strip() == f"{NASTY}||two|" or "said" in result.output
        assert f"{NASTY}||two|" in result.output and "said" in result.output + result.errors
        assert (tmp_path / "out file").read_bytes() == bytes(range(256)) + b"W" * 3000
        (tmp_path / "out file").unlink()
        assert left(place) == []
    assert not list(tmp_path.rglob("OOPS"))


def test_weights_are_sent_once(phones, tmp_path):
    place = phones.connect("A1")
    runner = connect("adb", ARM)[0]
    for weights, pushed in ((b"1" * 99, 2), (b"1" * 99, 1), (b"2" * 99, 2), (b"1" * 99, 1)):
        phones.asked("push")
        runner.run(job(tmp_path, "true", weights=weights), tmp_path)
        assert len(phones.asked("push")) == pushed
    kept = list((place / "tersor/kept").iterdir())
    assert len(kept) == 2
    os.truncate(place / "tersor/kept" / sha256(b"2" * 99).hexdigest(), 5)
    phones.asked("push")
    runner.run(job(tmp_path, "true", weights=b"2" * 99), tmp_path)
    assert len(phones.asked("push")) == 2
    os.utime(kept[0], (0, 0))
    os.utime(kept[1], (0, 0))
    runner.run(job(tmp_path, "true", weights=b"3"), tmp_path)
    assert len(list((place / "tersor/kept").iterdir())) == 1  # nobody had asked for the others in a week


def test_a_program_that_fails(device, tmp_path):
    runner, place = device
    with pytest.raises(DeviceError, match=r"(?s)exit status 3.*wrong size"):
        runner.run(job(tmp_path, "echo wrong size >&2; exit 3"), tmp_path)
    with pytest.raises(DeviceError, match="SIGILL") as killed:
        runner.run(job(tmp_path, "kill -ILL $$"), tmp_path)
    assert "--target" in killed.value.fix
    assert left(place) == []


def test_a_program_that_takes_too_long_is_ended(device, tmp_path):
    runner, place = device
    marker = tmp_path / "late"
    with pytest.raises(DeviceError, match=r"within 0\.7 seconds"):
        runner.run(job(tmp_path, f"sleep 1.5; touch '{marker}'"), tmp_path, timeout=0.7)
    assert left(place) == []
    time.sleep(1.2)
    assert not marker.exists()


def test_interrupted(phones, tmp_path):
    place = phones.connect("A1")
    code = (
        "import signal, sys; from pathlib import Path\n"
        # a shell's background jobs ignore it
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tersor.targets import resolve; from tersor.targets.runners import Job, connect\n"
        "connect('adb', resolve('armv8-a'))[0].run(Job(Path(sys.argv[1])), Path('.'))"
    )
    wanted = job(tmp_path, f"touch '{tmp_path}/started'; sleep 20")
    process = subprocess.Popen([sys.executable, "-c", code, wanted.program], stderr=subprocess.PIPE)
    while not (tmp_path / "started").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(2)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert left(place / "tersor") == []


def test_no_room(phones, tmp_path):
    place = phones.connect("A1", free=20)
    with pytest.raises(DeviceError, match=r"(?s)not enough space.*29.* KiB are to be sent, 20 KiB are free"):
        connect("adb", ARM)[0].run(job(tmp_path, "true", weights=b"1" * 30_000), tmp_path)
    assert not phones.asked("push") and left(place / "tersor") == []
    phones.connect("B2", full=True)
    with pytest.raises(DeviceError, match=r"(?s)not enough space.*No space left"):
        connect("adb:B2", ARM)[0].run(job(tmp_path, "true"), tmp_path)


def test_no_folder_can_be_made(phones, tmp_path):
    place = phones.connect("A1")
    (place / "tersor").write_text("in the way")
    with pytest.raises(DeviceError, match="no folder can be made on adb:A1"):
        connect("adb", ARM)[0].run(job(tmp_path, "true"), tmp_path)


def test_which_phone(phones, monkeypatch):
    with pytest.raises(DeviceError, match="no phone is connected"):
        connect("adb", ARM)
    phones.connect("A1", state="unauthorized")
    with pytest.raises(DeviceError, match=r"(?s)A1 is unauthorized.*allow"):
        connect("adb", ARM)
    phones.connect("192.168.1.7:5555")
    assert connect("adb", ARM)[0].name == "adb:192.168.1.7:5555"  # the one that is ready
    phones.connect("B2")
    with pytest.raises(DeviceError, match="more than one phone") as several:
        connect("adb", ARM)
    assert "adb:192.168.1.7:5555,adb:B2" in several.value.fix and "A1 (unauthorized)" in several.value.why
    assert [d.name for d in connect("adb:B2, adb:192.168.1.7:5555", ARM)] == [
        "adb:B2",
        "adb:192.168.1.7:5555",
    ]
    with pytest.raises(DeviceError, match="there is no phone C3"):
        connect("adb:C3", ARM)
    phones.connect("D4", state="no permissions (verify udev rules); see [developer.android.com]")
    with pytest.raises(DeviceError, match=r"(?s)D4 is no permissions.*udev"):
        connect("adb:D4", ARM)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match=r"(?s)adb is not installed.*platform-tools"):
        connect("adb", ARM)


def test_adb_of_the_sdk(phones, tmp_path, monkeypatch):
    phones.connect("A1")
    (tmp_path / "sdk").mkdir()
    (phones.folder / "tools").rename(tmp_path / "sdk/platform-tools")
    monkeypatch.setenv("ANDROID_HOME", str(tmp_path / "sdk"))
    assert connect("adb", ARM)[0].name == "adb:A1"


def test_a_phone_that_is_unplugged(phones, tmp_path):
    phones.connect("A1")
    runner = connect("adb", ARM)[0]
    (phones.home / "A1/phone.json").unlink()
    with pytest.raises(DeviceError, match=r"(?s)adb:A1 cannot be reached.*not found"):
        runner.run(job(tmp_path, "true"), tmp_path)


def test_what_a_phone_lacks(phones):
    phones.connect("old", abi="armeabi-v7a,armeabi", flags="neon vfpv4")
    phones.connect("A53", abi="arm64-v8a,armeabi-v7a", flags="fp asimd crc32")
    phones.connect("new")
    old, a53, new = connect("adb:old,adb:A53,adb:new", ARM)
    with pytest.raises(TargetError, match="lacks the architecture aarch64"):
        old.check(ARM)
    with pytest.raises(TargetError, match="lacks dotprod, fp16"):
        a53.check(ARM)
    new.check(resolve("pixel-8"))  # whose sve no code uses
    a53.check(resolve("armv8-a"))
    for phone in (old, a53):
        phone.check(resolve("armv7-neon"))
    with pytest.raises(TargetError, match="lacks the architecture armv7a"):
        new.check(resolve("armv7-neon"))
    with pytest.raises(TargetError, match="lacks the system ios"):
        new.check(resolve("iphone-15"))


def test_facts():
    assert Facts.read("aarch64", "Linux", "").missing(ARM) == []  # it does not say what it has
    different = "Features : asimd asimddp asimdhp\n\nFeatures : asimd\n"  # a thread may run on any core
    assert Facts.read("aarch64", "Linux", different).missing(ARM) == ["dotprod", "fp16"]
    assert Facts.read("aarch64", "Linux", f"Features : {FLAGS}").missing(resolve("armv7-neon")) == []
    level = resolve("x86-64-v3")
    assert "avx2" in Facts.read("x86_64", "Linux", "flags : sse4_2 fma avx\n").missing(level)
    assert Facts.read("arm64", "Darwin", "").missing(ARM) == ["the system linux"]


def test_local_refuses_another_architecture():
    with pytest.raises(TargetError, match="qemu"):
        Local().check(ARM)


def test_qemu_takes_a_core_like_the_targets():
    names = {
        "raspberry-pi-3": "cortex-a53",
        "raspberry-pi-5": "cortex-a76",
        "armv8-a": "cortex-a53",
        "pixel-8": "max",
    }
    for target, core in names.items():
        try:
            assert Qemu(resolve(target)).cpu == core
        except DeviceError as error:
            pytest.skip(str(error))
    with pytest.raises(DeviceError, match=r"(?s)knows no core 'pentium'.*cortex-a53"):
        Qemu(ARM, "pentium")


def test_no_qemu(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match=r"(?s)qemu-aarch64 is not installed.*qemu-user-static"):
        connect("qemu", ARM)


@pytest.mark.parametrize("name", ["", "local:x", "qemu:", "adb:", "ssh", "ssh:", "telnet:x", "local,"])
def test_no_device_has_that_name(name):
    with pytest.raises(InputError, match=r"names no device"):
        connect(name, ARM)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("pi", ["--", "pi"]),
        ("me@board.local:2222", ["-p", "2222", "--", "me@board.local"]),
        ("me@[fe80::1%eth0]:22", ["-p", "22", "--", "me@fe80::1%eth0"]),
    ],
)
def test_ssh_addresses(address, words, monkeypatch):
    monkeypatch.setenv("TERSOR_SSH", "ssh -J 'a gateway'")
    command = Ssh(address)._command
    assert command[:3] == ["ssh", "-J", "a gateway"] and command[-len(words) :] == words


@pytest.mark.parametrize("address", ["-oProxyCommand=x", "me@-x", "a b", "a:b", "-x@host", "host:"])
def test_what_is_no_ssh_address(address):
    with pytest.raises(InputError, match="no address"):
        Ssh(address)


def test_ssh_that_does_not_get_in(board, tmp_path, monkeypatch):
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    monkeypatch.setenv(
        "TERSOR_SSH", f"{board.command} -o IdentityFile=none -i {other} -o IdentitiesOnly=yes -F none"
    )
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    monkeypatch.setenv("TERSOR_SSH", f"ssh -F none -i {other} -o IdentitiesOnly=yes {options}")
    with pytest.raises(DeviceError, match=r"(?s)cannot be reached.*Permission denied.*ssh-copy-id"):
        Ssh(board.address).facts()
    monkeypatch.setenv("TERSOR_SSH", f"{board.command} -o UserKnownHostsFile=/dev/null")
    with pytest.raises(DeviceError, match=r"(?s)Host key verification failed.*by hand"):
        Ssh(board.address).facts()
    monkeypatch.setenv("TERSOR_SSH", board.command)
    with pytest.raises(DeviceError, match=r"(?s)refused.*start sshd"):
        Ssh("127.0.0.1:1").facts()


def test_ssh_is_asked_what_the_machine_is(board, monkeypatch):
    monkeypatch.setenv("TERSOR_SSH", board.command)
    facts, here = Ssh(board.address).facts(), Local().facts()
    assert facts.architectures == here.architectures and facts.flags == here.flags and facts.system == "Linux"
