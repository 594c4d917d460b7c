"""The description of a target: validation, derived properties, and the round trip through TOML."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor.errors import TargetError
from tersor.targets import Cluster, Target

V4 = Target(
    name="v4",
    arch="x86_64",
    mcpu="x86-64-v4",
    mattr=("-prefer-256-bit",),
    features=frozenset({"avx2", "avx512"}),
    l1d=32768,
    memory=1 << 31,
    os="linux",
    sources={"l1d": 'a "quoted" data sheet, C:\\path', "memory": "assumed: small"},
)


PHONE = Target(
    name="phone",
    arch="aarch64",
    os="android",
    features=frozenset({"neon"}),
    cores=6,
    clusters=(Cluster("cortex-x3", 2, 2910), Cluster("cortex-a510", 4)),
    sources={"cores": "its page", "clusters": "its page"},
)


@pytest.mark.parametrize("target", [V4, PHONE], ids=["v4", "phone"])
def test_toml_round_trip_keeps_every_field(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(target.to_toml())
    again = Target.from_toml(path)
    assert again.to_dict() == target.to_dict()
    assert again == target and hash(again) == hash(target)


def test_equality_ignores_sources_only() -> None:
    values = V4.to_dict()
    assert Target.from_dict({**values, "sources": {"l1d": "x", "memory": "y"}}) == V4
    assert Target.from_dict({**values, "l1d": 1024}) != V4


def test_vector_properties_follow_the_features() -> None:
    assert (V4.vector_bits, V4.vector_registers) == (512, 32)
    assert [V4.lanes(dtype) for dtype in ("float32", "bfloat16", "int8", "bool", "int64")] == [
        16,
        32,
        64,
        64,
        8,
    ]
    v3 = Target(name="v3", arch="x86_64", features=frozenset({"avx2"}))
    assert (v3.vector_bits, v3.vector_registers, v3.lanes("float32")) == (256, 16, 8)
    for arch, registers in (("aarch64", 32), ("armv7a", 16)):
        target = Target(name="pi", arch=arch, features=frozenset({"neon", "avx2"}))
        assert (target.vector_bits, target.vector_registers, target.lanes("float32")) == (128, registers, 4)


def test_a_target_without_vector_unit_is_refused() -> None:
    old = Target(name="old", arch="x86_64", features=frozenset({"sse2"}))
    with pytest.raises(TargetError, match="no vector unit"):
        _ = old.vector_bits
    with pytest.raises(TargetError, match="no vector unit"):
        old.check()
    with pytest.raises(TargetError, match="no code is generated for ios on armv7a"):
        Target(name="old", arch="armv7a", os="ios", features=frozenset({"neon"})).check()
    V4.check()
    with pytest.raises(TargetError, match="'float'"):
        V4.lanes("float")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l2": 1024}, "l2 has no entry in sources"),
        ({"l1d": 0}, "l1d must be a whole number above 0"),
        ({"l1d": 1.5}, "l1d must be a whole number above 0"),
        ({"l1d": True}, "l1d must be a whole number above 0"),
        ({"name": ""}, "name must be a non-empty text"),
        ({"mcpu": 3}, "mcpu must be a non-empty text"),
        ({"mattr": ["avx2"]}, "mattr entry 'avx2'"),
        ({"mattr": "+avx2"}, "not the right kind: mattr"),
        ({"features": [1]}, "not the right kind: features"),
        ({"sources": []}, "not the right kind: sources"),
        ({"cache": 3}, "unknown keys: cache"),
        ({"os": "amiga"}, "os 'amiga' is none of linux, linux-musl"),
        ({"clusters": [{"core": "cortex-a53"}]}, "not the right kind: clusters"),
        ({"clusters": [{"core": "cortex-a53", "count": 0}]}, "count of cluster 'cortex-a53'"),
        ({"clusters": [{"core": "cortex-a53", "count": 4, "mhz": "fast"}]}, "mhz of cluster 'cortex-a53'"),
        ({"clusters": [{"core": "", "count": 4}]}, "core of a cluster"),
        ({"clusters": [{"core": "cortex-a53", "count": 4}]}, "clusters have other than None cores"),
        ({"clusters": [{"core": "cortex-a53", "count": 4}]}, "clusters has no entry in sources"),
    ],
)
def test_a_wrong_description_says_what_is_wrong(changes: dict, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        Target.from_dict({**V4.to_dict(), **changes})
    assert message in str(caught.value)


def test_missing_keys_are_named() -> None:
    with pytest.raises(TargetError, match="missing keys: arch"):
        Target.from_dict({"name": "x"})


@pytest.mark.parametrize("content", [None, b"name = ", b"\xff\xfe"])
def test_an_unreadable_file_is_a_target_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TargetError, match="cannot be read") as caught:
        Target.from_toml(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "system", "triple"),
    [
        ("x86_64", None, "x86_64-linux-gnu"),
        ("x86_64", "windows", "x86_64-windows-gnu"),
        ("aarch64", "linux-musl", "aarch64-linux-musl"),
        ("aarch64", "android", "aarch64-linux-android"),
        ("aarch64", "ios", "arm64-apple-ios"),
        ("armv7a", "linux", "armv7a-linux-gnueabihf"),
    ],
)
def test_llvm_triple_names_architecture_and_system(arch: str, system: str | None, triple: str) -> None:
    assert Target(name="m", arch=arch, os=system).llvm_triple == triple


@pytest.mark.parametrize(("arch", "system"), [("armv7a", "ios"), ("riscv64", None)])
def test_a_pair_without_code_is_refused(arch: str, system: str | None) -> None:
    with pytest.raises(TargetError, match=f"no code is generated for {system or 'linux'} on {arch}"):
        _ = Target(name="m", arch=arch, os=system).llvm_triple
