"""Exported models on devices: this machine, emulation, phones that are folders; from Python and the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import tersor
from tersor.cli import main
from tersor.codegen.export.folder import Exported
from tersor.errors import ArtifactError, DeviceError, InputError, TargetError
from tests.codegen.export.exported import export, loader
from tests.ir.stateful import WIDTH, decoder
from tests.targets.runners.phones import Phones

qemu = pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="needs qemu-user-static")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)

    def forward(self, x, scale):
        hidden = torch.nn.functional.gelu(self.first(x))
        return {"y": self.second(hidden) * scale, "hidden": hidden}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Exports by target."""
    made, example = {}, {"x": torch.ones(2, 3, 8), "scale": torch.ones(4)}
    for target in ("native", "armv8.2-dotprod", "pixel-8"):
        dynamic = {"x": {0: ("batch", 1, 4), 1: ("length", 1, 9)}}
        compiled = tersor.compile(model, example, target=target, dynamic=dynamic)
        made[target] = compiled.export_c(tmp_path_factory.mktemp("export") / "out", name="tiny")
    return made


@pytest.fixture
def phones(tmp_path, monkeypatch):
    return Phones(tmp_path / "adb", monkeypatch)


def inputs(batch: int = 3, length: int = 5) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(s).astype("float32") for name, s in
            (("x", (batch, length, 8)), ("scale", (4,)))}  # fmt: skip


def right(model: Model, given: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(value) for name, value in given.items()})
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=1e-5)


def test_here(model, folders):
    device = tersor.load_on(folders["native"], "local")
    right(model, inputs(), device(**inputs()))
    times = device.benchmark(dims={"batch": 4}, calls=5, threads=2)
    assert 0 < times.min <= times.median and times.calls == 5 and times.threads == 2
    assert times.sizes == {"batch": 4, "length": 3} and 500_000 < times.memory < 50_000_000
    assert "MB resident" in str(times) and "emulated" not in str(times)
    assert device.benchmark(inputs(1, 2), calls=1).sizes == {"batch": 1, "length": 2}


@qemu
@pytest.mark.parametrize("target", ["armv8.2-dotprod", "pixel-8"])
def test_emulated(model, folders, target):
    device = tersor.load_on(folders[target], "qemu", threads=2)
    right(model, inputs(), device(**inputs()))
    times = device.benchmark(calls=1)
    assert times.emulated and "says nothing about a device" in str(times) and "resident" not in str(times)


@qemu
def test_on_a_phone(model, folders, phones):
    place = phones.connect("A1")
    device = tersor.load_on(folders["pixel-8"], "adb")
    right(model, inputs(), device(**inputs()))
    right(model, inputs(1, 9), device(**inputs(1, 9)))
    kept = [path for path in (place / "tersor").rglob("*") if path.is_file()]
    assert [path.read_bytes() for path in kept] == [Path(folders["pixel-8"], "weights.bin").read_bytes()]


@qemu
def test_a_core_that_lacks_what_the_code_uses(folders, phones):
    # a phone that says nothing about its core, which is less than the model was compiled for
    phones.connect("A1", cpu="cortex-a53")
    (phones.home / "A1/cpuinfo").write_text("")
    out = int8_export(folders["native"].parent)
    with pytest.raises(DeviceError, match="SIGILL") as found:
        tersor.load_on(out, "adb").benchmark(calls=1)
    assert "--target" in found.value.fix


def int8_export(folder: Path) -> Path:
    linear = torch.nn.Linear(64, 64)
    compiled = tersor.compile(linear, (torch.ones(4, 64),), target="armv8.2-dotprod", recipe="int8-dynamic")
    return compiled.export_c(folder / "int8")


def test_what_cannot_be(folders, tmp_path):
    with pytest.raises(TargetError, match="architecture aarch64"):
        tersor.load_on(folders["pixel-8"], "local")
    with pytest.raises(InputError, match="several"):
        tersor.load_on(folders["native"], "local,local")
    with pytest.raises(ArtifactError, match="no exported model"):
        tersor.load_on(tmp_path, "local")
    device = tersor.load_on(folders["native"], "local")
    with pytest.raises(InputError, match="dimension 'batch' is 5"):
        device(**inputs(5))
    with pytest.raises(InputError, match="missing input 'scale'"):
        device(x=inputs()["x"])
    with pytest.raises(InputError, match="no function 'decode'"):
        device.run("decode", **inputs())
    with pytest.raises(InputError, match="no dimension 'lenght'"):
        device.benchmark(dims={"lenght": 3})
    for wrong in ({"calls": 0}, {"threads": 0}, {"calls": True}):
        with pytest.raises(InputError, match="above 0"):
            device.benchmark(**wrong)


def test_functions_are_run_by_name(tmp_path):
    out = export(decoder(), tmp_path / "out")
    device = tersor.load_on(out, "local")
    x = np.random.default_rng(0).standard_normal((1, 5, WIDTH)).astype(np.float32)
    given = {"x": x, "position": np.int64(0)}
    expected = loader(out).load().session().run("prefill", **given)["y"]
    np.testing.assert_array_equal(device.run("prefill", **given)["y"], expected)
    assert "prefill, decode" in repr(device)
    with pytest.raises(InputError, match=r"(?s)no function 'main'.*prefill or decode"):
        device(**given)
    assert device.benchmark(function="decode", calls=2).calls == 2


def test_a_damaged_folder(folders, tmp_path):
    out = shutil.copytree(folders["native"], tmp_path / "out")
    for text in ("", "[]", "{}", '{"functions": [{}]}'):
        (out / "signature.json").write_text(text)
        with pytest.raises(ArtifactError, match="export it again"):
            Exported.read(out)
    shutil.copy(folders["native"] / "signature.json", out)
    with open(out / "weights.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DeviceError, match=r"(?s)exit status 1.*weights"):
        tersor.load_on(out, "local").benchmark(calls=1)


def test_what_an_export_says_of_itself(folders):
    exported = Exported.read(folders["pixel-8"])
    assert exported.target.name == "pixel-8" and exported.target.os == "android"
    assert exported.recipe == "fp32" and set(exported.versions) == {"tersor", "tvm", "tvm_ffi", "llvm"}
    assert exported.usual["main"] == {"batch": 2, "length": 3}


@qemu
def test_the_command_line(model, folders, phones, tmp_path, capsys):
    phones.connect("A1")
    phones.connect("old", flags="asimd")
    out = str(folders["armv8.2-dotprod"])
    options = ["--device", "adb:A1,qemu:max", "--size", "length=9", "--threads", "2", "--calls", "2"]
    assert main(["bench", out, *options]) == 0
    shown = capsys.readouterr().out
    assert "adb:A1" in shown and "qemu:max (emulated)" in shown and "batch 2, length 9" in shown
    assert "say nothing about a device" in shown

    assert main(["bench", out, "--device", "adb:old,adb:A1", "--calls", "1", "--json"]) == 2
    text = capsys.readouterr()
    failed = {entry["device"]: entry.get("error") for entry in json.loads(text.out)}
    assert failed["adb:A1"] is None and "lacks dotprod" in failed["adb:old"] and "lacks dotprod" in text.err

    np.savez(tmp_path / "x.npz", **inputs())
    run = [
        "run",
        out,
        "--device",
        "qemu",
        "--input",
        str(tmp_path / "x.npz"),
        "--output",
        str(tmp_path / "y.npz"),
    ]
    assert main(run) == 0
    right(model, inputs(), dict(np.load(tmp_path / "y.npz")))

    assert main(["bench", out]) == 2
    assert "--device qemu" in capsys.readouterr().err


@qemu
def test_a_command_that_is_ended(folders, phones):
    place = phones.connect("A1") / "tersor"
    options = ["bench", str(folders["armv8.2-dotprod"]), "--device", "adb", "--calls", "100000000"]
    code = "import sys; from tersor.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *options], stderr=subprocess.PIPE)
    while not (running := list(place.glob("run-*/pid"))) and process.poll() is None:
        time.sleep(0.05)
    assert running
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert [path.name for path in place.iterdir()] == ["kept"]


def test_devices_are_for_exported_models(model, folders, tmp_path, capsys):
    out = tmp_path / "a.tersor"
    tersor.compile(torch.nn.Linear(8, 8), (torch.ones(1, 8),), threads=1, output=out)
    assert main(["bench", str(out), "--device", "local"]) == 2
    assert "--export-c" in capsys.readouterr().err
    assert main(["bench", str(folders["native"]), "--against", "torch"]) == 2
    assert "artifacts" in capsys.readouterr().err
    assert main(["bench", str(folders["native"]), "--calls", "2"]) == 0
    assert "local" in capsys.readouterr().out


def test_inspect_shows_an_export(folders, capsys):
    assert main(["inspect", str(folders["pixel-8"])]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("main(x: float32[batch, length, 8], scale: float32[4]) -> y: float32")
    assert "length from 1 to 9" in shown and "pixel-8 (aarch64-linux-android)" in shown
    assert "fp32" in shown and "llvm 22" in shown and "weights.bin" in shown


def test_estimates(folders, capsys):
    found = tersor.estimate(folders["armv8.2-dotprod"], target="raspberry-pi-5", dims={"batch": 4})
    products = 4 * 3 * (8 * 16 + 16 * 4)
    assert found.milliseconds == pytest.approx(products / (2 * 4 * 2.4e9) * 1e3)
    with pytest.raises(InputError, match="dimension 'batch' is 9"):
        tersor.estimate(folders["pixel-8"], dims={"batch": 9})
    with pytest.raises(TargetError, match="compiled for aarch64"):
        tersor.estimate(folders["pixel-8"], target="x86-64-v3")
    assert main(["bench", str(folders["pixel-8"]), "--estimate", "--threads", "5"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("estimate for pixel-8, 5 threads: at least") and "float32" in shown
    assert main(["bench", str(folders["native"]), "--estimate"]) == 2
    assert "cores are not known" in capsys.readouterr().err
    assert main(["bench", str(folders["pixel-8"]), "--estimate", "--device", "qemu"]) == 2


@pytest.mark.parametrize(
    ("recipe", "dtype", "bytes_each"),
    [("int8-dynamic", "int8", 1), ("bf16", "bfloat16", 2), ("fp16", "float16", 2)],
)
def test_work_is_that_of_the_final_program(recipe, dtype, bytes_each, tmp_path):
    linear = torch.nn.Linear(64, 32)
    example, dynamic = {"input": torch.ones(4, 64)}, {"input": {0: ("batch", 1, 4)}}
    compiled = tersor.compile(linear, example, target="armv8.6-i8mm", recipe=recipe, dynamic=dynamic)
    exported = Exported.read(compiled.export_c(tmp_path / "out"))
    (work,) = exported.work("main", {"batch": 3})
    assert (work.count, work.dtype, work.products) == (1, dtype, 3 * 64 * 32)
    assert 64 * 32 * bytes_each <= work.weights <= 64 * 32 * bytes_each + 32 * 4
