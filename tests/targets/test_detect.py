"""Reading a machine from its /proc and /sys, on invented machines and on this one."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tersor.errors import TargetError
from tersor.targets import x86
from tersor.targets.detect import detect, native
from tersor.targets.registry import required_features

V3_FLAGS = " ".join(x86.LLVM_FEATURES[name] for name in sorted(x86.LEVELS["x86-64-v3"]))
V4_FLAGS = " ".join(x86.LLVM_FEATURES[name] for name in sorted(x86.LEVELS["x86-64-v4"]))


def machine(
    root: Path, flags: str = V4_FLAGS, vendor: str = "AuthenticAMD", family: int = 26, model: int = 2
) -> Path:
    """A machine with four hardware threads on two cores, private L1 and L2, and 8 GiB."""
    files = {
        "proc/cpuinfo": f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        f"model name\t: Test CPU\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\nflags\t\t: none\n",
        "proc/meminfo": "MemTotal:        8388608 kB\nMemFree: 1 kB\n",
        "proc/self/cgroup": "0::/job/step\n",
    }
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        base = f"sys/devices/system/cpu/cpu{cpu}"
        files[f"{base}/topology/thread_siblings_list"] = f"{siblings}\n"
        for index, (level, kind, size, shared) in enumerate(
            [
                ("1", "Data", "32K", siblings),
                ("1", "Instruction", "64K", siblings),
                ("2", "Unified", "1M", "0-3"),
                ("3", "Unified", "16M", "0-3"),
            ]
        ):
            for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                files[f"{base}/cache/index{index}/{name}"] = f"{text}\n"
    write(root, files)
    return root


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_cores_caches_and_memory_are_read(tmp_path: Path) -> None:
    target = detect(machine(tmp_path), [0, 1, 2, 3], "x86_64", "Linux")
    assert (target.cores, target.l1d, target.l2, target.l3) == (2, 32 << 10, 512 << 10, 16 << 20)
    assert target.memory == 8 << 30
    assert target.sources["memory"] == "MemTotal in /proc/meminfo"


def test_affinity_limits_the_cores(tmp_path: Path) -> None:
    assert detect(machine(tmp_path), [1, 3], "x86_64", "Linux").cores == 1


def test_limits_of_any_enclosing_control_group_apply(tmp_path: Path) -> None:
    machine(tmp_path)
    write(
        tmp_path,
        {
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/memory.max": f"{2 << 30}\n",
            "sys/fs/cgroup/job/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
    )
    target = detect(tmp_path, [0, 1], "x86_64", "Linux")
    assert target.memory == 2 << 30 and target.sources["memory"] == "/sys/fs/cgroup/job/memory.max"
    assert target.cores == 1 and "quota" in target.sources["cores"]


def test_version_1_control_groups_are_read_through_a_container(tmp_path: Path) -> None:
    machine(tmp_path)
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{1 << 30}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    target = detect(tmp_path, [0, 1], "x86_64", "Linux")
    assert target.memory == 1 << 30
    assert target.cores == 2


def test_a_machine_without_sysfs_leaves_quantities_absent(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": f"vendor_id : X\nflags : {V3_FLAGS}\n"})
    target = detect(tmp_path, [0, 1], "x86_64", "Linux")
    assert (target.l1d, target.l2, target.l3, target.memory) == (None,) * 4
    assert target.cores == 2 and target.mcpu == "x86-64-v3"


def test_features_a_hypervisor_hides_are_switched_off(tmp_path: Path) -> None:
    target = detect(machine(tmp_path, V4_FLAGS + " avx512_vnni"), [0], "x86_64", "Linux")
    assert target.mcpu == "znver5"
    assert {"+avx512vnni", "-avx512bf16", "-avx512vp2intersect", "-prefer-256-bit"} <= set(target.mattr)
    assert {"avx512", "vnni"} <= target.features and "avx512_bf16" not in target.features
    assert required_features(target) == x86.LEVELS["x86-64-v4"] | {"avx512vnni"}


@pytest.mark.parametrize(
    ("vendor", "family", "model", "flags", "mcpu"),
    [
        ("AuthenticAMD", 0x17, 0x01, V3_FLAGS, "znver1"),
        ("AuthenticAMD", 0x17, 0x31, V3_FLAGS, "znver2"),
        ("AuthenticAMD", 0x19, 0x01, V3_FLAGS, "znver3"),
        ("AuthenticAMD", 0x19, 0x11, V4_FLAGS, "znver4"),
        ("AuthenticAMD", 0x1F, 0x01, V4_FLAGS, "x86-64-v4"),
        ("GenuineIntel", 6, 0x3C, V3_FLAGS, "haswell"),
        ("GenuineIntel", 6, 0x55, V4_FLAGS, "skylake-avx512"),
        ("GenuineIntel", 6, 0x55, V4_FLAGS + " avx512_vnni", "cascadelake"),
        ("GenuineIntel", 6, 0x55, V4_FLAGS + " avx512_vnni avx512_bf16", "cooperlake"),
        ("GenuineIntel", 6, 0x8F, V4_FLAGS, "sapphirerapids"),
        ("GenuineIntel", 6, 0xFE, V3_FLAGS, "x86-64-v3"),
        ("HygonGenuine", 0x18, 0, V3_FLAGS, "x86-64-v3"),
    ],
)
def test_cpu_families(tmp_path: Path, vendor: str, family: int, model: int, flags: str, mcpu: str) -> None:
    target = detect(machine(tmp_path, flags, vendor, family, model), [0], "x86_64", "Linux")
    assert target.mcpu == mcpu
    assert target.vector_bits == (512 if "avx512f" in flags else 256)


def test_a_cpu_without_avx2_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="missing: .*avx2.*fma"):
        detect(machine(tmp_path, "sse4_2 popcnt"), [0], "x86_64", "Linux")


@pytest.mark.parametrize(("arch", "system"), [("aarch64", "Linux"), ("x86_64", "Darwin")])
def test_other_machines_are_refused(tmp_path: Path, arch: str, system: str) -> None:
    with pytest.raises(TargetError, match="tersor targets"):
        detect(machine(tmp_path), [0], arch, system)


def test_a_machine_without_cpuinfo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be identified"):
        detect(tmp_path, [0], "x86_64", "Linux")


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="native is x86-64 Linux"
)
def test_native_describes_this_machine() -> None:
    target = native()
    assert target.name == "native" and target.cores >= 1 and target.memory > 1 << 28
    assert {"avx2", "fma"} <= target.features
    assert native() is target
