"""Pages for newcomers work from the first line to the last; phones and boards are stand-ins, qemu runs their code."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib

import pytest

from tests.pages import ROOT, blocks, shell
from tests.targets.runners.boards import raspberry_pi_5
from tests.targets.runners.phones import Phones
from tests.tersor import sentence_encoder

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    shutil.which("qemu-aarch64-static") is None,
    reason="needs qemu-aarch64-static: apt-get install qemu-user-static",
)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder in which the pages' commands find the examples and a model; the model."""
    monkeypatch.delenv("ANDROID_NDK_HOME", raising=False)
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/examples").symlink_to(ROOT / "examples")
    return tmp_path / "clone", sentence_encoder.save(tmp_path / "clone/model")


def installable(commands: str) -> None:
    """pip is not run: what it would be asked for exists."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in commands.splitlines():
        words = shlex.split(line)
        assert words[:4] == ["pip", "install", "-c", "constraints.txt"] and (ROOT / words[3]).exists()
        assert words[4:] == ["torch"] or (words[4] == "-e" and words[5].startswith(".["))
        assert set(words[-1].partition("[")[2].rstrip("]").split(",")) - {""} <= set(extras)


def cosines_are_right(model, folder, shown: str, times: int) -> None:
    ids = [sentence_encoder.ids(folder / "model", sentence) for sentence in sentence_encoder.SENTENCES]
    found = [float(line) for line in shown.splitlines() if re.fullmatch(r"-?[01]\.\d{7}", line)]
    assert len(found) == times and len(set(found)) == 1
    assert found[0] == pytest.approx(sentence_encoder.cosine(model, *ids), abs=0.02)  # 8 bits


def test_put_it_on_a_phone(clone, tmp_path, monkeypatch):
    folder, model = clone
    phone = Phones(tmp_path / "adb", monkeypatch).connect("A1")
    install, *commands = blocks("docs/phone.md", "sh")
    installable(install)
    shown = shell("\n".join(commands), folder)
    assert "qemu:max (emulated)" in shown and "adb:A1" in shown
    cosines_are_right(model, folder, shown, 2)
    assert (phone / "similarity").exists()
    assert (folder / "out/android/README.md").exists() and (folder / "ios/swift/README.md").exists()


def test_put_it_on_a_raspberry_pi(clone, tmp_path, monkeypatch):
    folder, model = clone
    home = raspberry_pi_5(tmp_path / "ssh", monkeypatch)
    install, *commands = blocks("docs/raspberry-pi.md", "sh")
    installable(install)
    shown = shell("\n".join(commands), folder)
    assert "(emulated)" in shown and "ssh:pi@raspberrypi" in shown
    cosines_are_right(model, folder, shown, 2)
    assert (home / "similarity").exists()
