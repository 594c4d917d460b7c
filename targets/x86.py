"""Facts about x86-64 CPUs: how Linux, LLVM and Tersor name instruction sets; LLVM's names for CPU families.

Sources: LLVM 22 `Host.cpp` (families and models) and `X86TargetParser.cpp` (features of a CPU name);
Linux `arch/x86/include/asm/cpufeatures.h` (flags of /proc/cpuinfo); the x86-64 psABI (levels).
"""

from __future__ import annotations

from collections.abc import Collection

LLVM_FEATURES: dict[str, str] = {
    "sse4.2": "sse4_2",
    "popcnt": "popcnt",
    "movbe": "movbe",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "avx": "avx",
    "avx2": "avx2",
    "f16c": "f16c",
    "fma": "fma",
    "gfni": "gfni",
    "avxvnni": "avx_vnni",
    "avxvnniint8": "avx_vnni_int8",
    "avxifma": "avx_ifma",
    "avxneconvert": "avx_ne_convert",
    "avx512f": "avx512f",
    "avx512cd": "avx512cd",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
}
"""LLVM feature -> flag in /proc/cpuinfo, for every extension that generated numeric code may contain."""

_V3 = frozenset({"sse4.2", "popcnt", "movbe", "bmi", "bmi2", "lzcnt", "avx", "avx2", "f16c", "fma"})
_V4 = _V3 | {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
LEVELS: dict[str, frozenset[str]] = {"x86-64-v3": _V3, "x86-64-v4": _V4}
"""psABI level -> the LLVM features it guarantees (those of `LLVM_FEATURES`)."""

_FEATURES: dict[str, frozenset[str]] = {
    "avx2": frozenset({"avx2"}),
    "fma": frozenset({"fma"}),
    "f16c": frozenset({"f16c"}),
    "avx_vnni": frozenset({"avxvnni"}),
    "avx512": _V4,
    "vnni": _V4 | {"avx512vnni"},
    "avx512_bf16": _V4 | {"avx512bf16"},
    "avx512_fp16": _V4 | {"avx512fp16"},
}


def feature_names(llvm_features: Collection[str]) -> frozenset[str]:
    """Tersor's names for a set of LLVM features: `avx512` means all of AVX-512 F, CD, BW, DQ and VL."""
    present = set(llvm_features)
    return frozenset(name for name, needed in _FEATURES.items() if needed <= present)


INTEL_MODELS: dict[str, tuple[int, ...]] = {
    "haswell": (0x3C, 0x3F, 0x45, 0x46),
    "broadwell": (0x3D, 0x47, 0x4F, 0x56),
    "skylake": (0x4E, 0x5E, 0x8E, 0x9E, 0xA5, 0xA6),
    "skylake-avx512": (0x55,),
    "icelake-client": (0x7D, 0x7E),
    "icelake-server": (0x6A, 0x6C),
    "tigerlake": (0x8C, 0x8D),
    "alderlake": (0x97, 0x9A),
    "raptorlake": (0xB7, 0xBA, 0xBF),
    "sapphirerapids": (0x8F,),
    "emeraldrapids": (0xCF,),
    "graniterapids": (0xAD,),
}
"""LLVM's CPU name -> Intel's model numbers of family 6."""


def cpu_name(vendor: str, family: int, model: int, llvm_features: Collection[str]) -> str:
    """LLVM's name for a CPU, for its scheduling model; the psABI level where the family is unknown.

    The features decide between siblings with one family number. A name may imply instructions that a
    hypervisor hides: callers switch those off explicitly.
    """
    present = set(llvm_features)
    level = "x86-64-v4" if _V4 <= present else "x86-64-v3"
    if vendor == "AuthenticAMD":
        if family == 0x17:
            return "znver2" if model >= 0x30 else "znver1"
        if family == 0x19:
            return "znver4" if _V4 <= present else "znver3"
        if family == 0x1A:
            return "znver5"
    if vendor == "GenuineIntel" and family == 6:
        name = next((name for name, models in INTEL_MODELS.items() if model in models), level)
        if name == "skylake-avx512":
            # One model number, three generations: Cascade Lake added VNNI and Cooper Lake bf16.
            if "avx512bf16" in present:
                return "cooperlake"
            if "avx512vnni" in present:
                return "cascadelake"
        return name
    return level
