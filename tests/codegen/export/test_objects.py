"""Object files are what the target's system reads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tersor.codegen.export.functions import plain_kernel
from tersor.codegen.export.objects import object_code
from tersor.codegen.kernels.scan import CumSum
from tersor.targets import resolve


@pytest.mark.parametrize(
    ("target", "system", "magic"),
    [
        ("x86-64-v3", "linux", b"\x7fELF\x02"),
        ("x86-64-v3", "windows", b"\x64\x86"),
        ("x86-64-v3", "macos", b"\xcf\xfa\xed\xfe\x07\x00\x00\x01"),
        ("armv8-a", "linux", b"\x7fELF\x02"),
        ("armv8-a", "android", b"\x7fELF\x02"),
        ("armv8-a", "macos", b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"),
        ("armv8-a", "ios", b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"),
        ("armv8-a", "windows", b"\x64\xaa"),
        ("armv7-neon", "linux", b"\x7fELF\x01"),
    ],
)
def test_the_format_is_that_of_the_system(target, system, magic):
    target = replace(resolve(target), name="test", os=system)
    code = object_code([plain_kernel("k", CumSum((8, 16), 1).build(target))], target)
    assert code.startswith(magic)
    assert b"TVMBackend" not in code and b"TVMFFI" not in code
