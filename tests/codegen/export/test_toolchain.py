"""C compilers for targets: how they are called."""

from __future__ import annotations

import pytest

from tersor.codegen.export.toolchain import toolchain
from tersor.codegen.llvm import llvm_target
from tersor.targets import resolve

pytest.importorskip("ziglang")


@pytest.mark.parametrize(
    ("name", "triple", "floats"),
    [("armv7-neon", "arm-linux-musleabihf", "hard"), ("moto-g-2013", "arm-linux-musleabi", "soft")],
)
def test_c_passes_floats_as_the_kernels_do(name, triple, floats, monkeypatch):
    monkeypatch.delenv("ANDROID_NDK_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    tools, target = toolchain(resolve(name), static=True), resolve(name)
    assert tools.command[-2:] == ("-target", triple)
    assert llvm_target(target).attrs["mfloat-abi"] == floats


def test_static_programs_carry_no_tables_to_unwind_by(tmp_path):
    (tmp_path / "main.c").write_text('#include <stdio.h>\nint main(void) { return puts("") < 0; }\n')
    tools = toolchain(resolve("armv8-a"), static=True)
    tools.link([tmp_path / "main.c"], tmp_path / "main", static=True)
    assert b".text" in (made := (tmp_path / "main").read_bytes()) and b".eh_frame" not in made
