"""Facts about ARM CPUs: instruction set extensions under Tersor's and LLVM's names, and which cores have them.

Sources: LLVM 22 `AArch64Processors.td` and `ARMProcessors.td` (a test compares);
Arm's technical reference manuals of the cores.
"""

from __future__ import annotations

LLVM_FEATURES: dict[str, dict[str, str]] = {
    "aarch64": {
        "neon": "neon",
        "fp16": "fullfp16",
        "dotprod": "dotprod",
        "i8mm": "i8mm",
        "bf16": "bf16",
    },
    "armv7a": {"neon": "neon", "fma": "vfp4"},
}
"""Architecture -> feature -> LLVM's name, for every extension that generated code may contain."""

FACTS: frozenset[str] = frozenset({"sve"})
"""Features that a description may state although no code is generated for them."""

_V8 = frozenset({"neon"})
_V8_2 = _V8 | {"fp16", "dotprod"}
_V8_6 = _V8_2 | {"i8mm", "bf16"}
_V9 = _V8_6 | {"sve"}

CORES: dict[str, dict[str, frozenset[str]]] = {
    "aarch64": {
        **dict.fromkeys(("cortex-a53", "cortex-a57", "cortex-a72"), _V8),
        **dict.fromkeys(
            ("cortex-a55", "cortex-a76", "cortex-a78", "cortex-a78ae", "cortex-x1", "neoverse-n1"), _V8_2
        ),
        **dict.fromkeys(("apple-a15", "apple-a16", "apple-a17", "apple-a18", "oryon-1"), _V8_6),
        **dict.fromkeys(("cortex-a510", "cortex-a520", "cortex-a710", "cortex-a715", "cortex-a720"), _V9),
        **dict.fromkeys(("cortex-x2", "cortex-x3", "cortex-x4"), _V9),
        **dict.fromkeys(("neoverse-n2", "neoverse-v1", "neoverse-v2"), _V9),
    },
    "armv7a": {"cortex-a7": frozenset({"neon", "fma"}), "cortex-a9": frozenset({"neon"})},
}
"""Architecture -> core, as LLVM calls it -> its features."""
