"""Targets by name, and the checks made against them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor import targets
from tersor.errors import TargetError
from tersor.targets import Target, arm, x86
from tersor.targets.registry import CATALOG
from tersor.targets.schema import NUMBERS


def test_names_lists_native_and_the_catalog() -> None:
    assert targets.names()[0] == "native"
    assert {"x86-64-v3", "x86-64-v4"} <= set(targets.names())


@pytest.mark.parametrize("path", sorted(CATALOG.glob("*.toml")), ids=lambda path: path.stem)
def test_catalog_entries_are_named_like_their_file_and_give_sources(path: Path) -> None:
    target = targets.resolve(path.stem)
    assert target.name == path.stem
    assert target.vector_bits in (128, 256, 512) and target.llvm_triple
    assert all(key in target.sources for key in (*NUMBERS, "features") if getattr(target, key) is not None)
    assert not set(target.sources) - {*NUMBERS, "features", "clusters"}
    # Tersor's features and LLVM's are two views of one CPU.
    required = targets.required_features(target)
    if target.arch == "x86_64":
        assert target.features == x86.feature_names(required)
    else:
        known = arm.LLVM_FEATURES[target.arch]
        assert {known[name] for name in target.features - arm.FACTS} == required
    # What is promised of a device, each of its cores has.
    cores = [arm.CORES[target.arch][cluster.core] for cluster in target.clusters]
    assert not cores or target.features == frozenset.intersection(*cores)


def test_the_catalog_covers_boards_phones_and_servers() -> None:
    wanted = "raspberry-pi-3 raspberry-pi-zero-2 rk3588 pixel-8 galaxy-s24 iphone-15 moto-g-2013 graviton3 armv7-neon"
    assert set(wanted.split()) <= set(targets.names())
    assert targets.resolve("rk3588").cores == 8
    assert [str(cluster) for cluster in targets.resolve("pixel-8").clusters] == [
        "1 cortex-x3 up to 2910 MHz",
        "4 cortex-a715 up to 2370 MHz",
        "4 cortex-a510 up to 1700 MHz",
    ]
    assert (
        "dotprod" in targets.resolve("pixel-6").features and "i8mm" not in targets.resolve("pixel-6").features
    )


def test_a_system_may_follow_the_name() -> None:
    phone = targets.resolve("armv8.2-dotprod:android")
    assert (phone.name, phone.os, phone.llvm_triple) == (
        "armv8.2-dotprod:android",
        "android",
        "aarch64-linux-android",
    )
    assert phone.features == targets.resolve("armv8.2-dotprod").features
    assert targets.missing_on_host(targets.resolve("x86-64-v3:windows")) == ["the system windows"]
    with pytest.raises(TargetError, match="'x86-64-v3:amiga'.*\n*.*NAME:SYSTEM"):
        targets.resolve("x86-64-v3:amiga")


def test_resolve_returns_a_target_unchanged_and_reads_a_file(tmp_path: Path) -> None:
    target = targets.resolve("x86-64-v3")
    assert targets.resolve(target) is target
    path = tmp_path / "board.toml"
    path.write_text(target.to_toml())
    assert targets.resolve(str(path)) == target


@pytest.mark.parametrize(
    ("name", "near"), [("nativ", "native"), ("x86-64-v5", "x86-64-v4"), ("X86-64-V3", "x86-64-v3")]
)
def test_an_unknown_name_is_answered_with_near_ones_and_the_list(name: str, near: str) -> None:
    with pytest.raises(TargetError) as caught:
        targets.resolve(name)
    assert f"unknown target {name!r}" in str(caught.value)
    assert near in str(caught.value).split("known targets")[0]
    assert all(known in str(caught.value) for known in targets.names())


def test_something_that_is_no_name_is_refused() -> None:
    with pytest.raises(TargetError, match="not int"):
        targets.resolve(4)


def test_required_features_join_the_level_and_the_attributes() -> None:
    target = Target(
        name="t", arch="x86_64", mcpu="x86-64-v3", mattr=("+avx512vnni", "-f16c", "-prefer-256-bit")
    )
    required = targets.required_features(target)
    assert {"avx2", "fma", "avx512vnni"} <= required
    assert "f16c" not in required and "prefer-256-bit" not in required


def test_missing_on_host_compares_with_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    v3, v4 = targets.resolve("x86-64-v3"), targets.resolve("x86-64-v4")
    monkeypatch.setattr("tersor.targets.registry.host_llvm_features", lambda: x86.LEVELS["x86-64-v3"])
    assert targets.missing_on_host(v3) == []
    assert targets.missing_on_host(v4) == ["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"]
    assert targets.missing_on_host(Target(name="pi", arch="aarch64")) == ["a CPU of architecture aarch64"]
    monkeypatch.setattr("tersor.targets.registry.host_llvm_features", frozenset)
    assert targets.missing_on_host(v3) == ["a CPU of architecture x86_64"]


def test_memory_is_checked_against_the_target() -> None:
    board = Target(name="board", arch="x86_64", memory=2 << 30, sources={"memory": "data sheet"})
    targets.check_memory(board, 2 << 30, "the model")
    with pytest.raises(TargetError, match="the model needs 3.1 GiB, the target 'board' has 2 GiB"):
        targets.check_memory(board, int(3.1 * (1 << 30)), "the model")
    targets.check_memory(targets.resolve("x86-64-v3"), 1 << 60, "memory of this target is unknown")


def test_describe_shows_values_with_their_sources() -> None:
    text = targets.describe(targets.resolve("x86-64-v3"))
    assert (
        "x86-64-v3" in text and "32 KiB" in text and "assumed:" in text and "16 registers of 256 bits" in text
    )
    memory = next(line for line in text.splitlines() if line.strip().startswith("memory"))
    assert "unknown" in memory


def test_describe_lists_the_kinds_of_cores() -> None:
    text = targets.describe(targets.resolve("pixel-8"))
    assert "core types    1 cortex-x3 up to 2910 MHz" in text and "4 cortex-a510 up to 1700 MHz" in text
    assert "L2 per core   unknown" in text
