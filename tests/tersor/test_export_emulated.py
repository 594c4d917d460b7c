"""Whole models as C on emulated ARM CPUs: float32 beside torch; int8 beside this machine, code by code.

Each model is exported once for an instruction set, with its lengths open, and runs on every CPU that has it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import tersor
from tersor.codegen.compiler import prepare
from tersor.codegen.export.writer import export_c
from tersor.codegen.observation import with_observers
from tersor.ir import Program
from tersor.passes import Context
from tersor.passes.calibration import Calibration, Dataset
from tersor.passes.recipes import get
from tersor.targets import resolve
from tests.codegen.export.exported import loader

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not all(shutil.which(f"qemu-{arch}-static") for arch in ("aarch64", "arm")),
    reason="needs qemu: apt-get install qemu-user-static",
)
pytest.importorskip(
    "ziglang", reason="needs ziglang, which links programs for other CPUs: pip install ziglang"
)

LENGTHS = (1, 7, 64, 255)
CPUS = {
    "armv7-neon": ("cortex-a15",),
    "armv7-neon-vfp4": ("cortex-a15",),
    "armv8-a": ("cortex-a53", "cortex-a76", "neoverse-n1", "max"),
    "armv8.2-dotprod": ("cortex-a76", "neoverse-n1"),
    "armv8.6-i8mm": ("max",),
}
"""What qemu emulates, by the instruction set that code is made for."""

REFERENCE = resolve("x86-64-v3")
"""No products of bf16 numbers, which round in their own way: attention in int8 models stores such numbers."""

FUSED = set(CPUS) - {"armv7-neon"}
"""Those that fuse products and additions as the reference does: all of their results are its, bit for bit."""

OTHER_CODES, COSINE = 0.001, 0.9999
"""Of the others: share of the codes that may be the next one, and how alike results in int8 must be."""

SIZES = dict(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, vocab_size=100
)
AXES = {0: ("batch", 1, 2), 1: ("length", 1, 255)}


def text(length: int, batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(2, 99, (batch, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}


def pixels(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def on_each_cpu(program: Program, target: str, folder: Path) -> Iterator[tuple[str, tersor.DeviceModel]]:
    resolved = resolve(f"{target}:linux-musl")
    exported = export_c(prepare(program, resolved, verify=False), folder / "out")
    for cpu in CPUS[target]:
        yield cpu, tersor.load_on(exported, f"qemu:{cpu}")


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config).eval()


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)).eval()


TEXTS = dict.fromkeys(("input_ids", "attention_mask"), AXES)
FLOATS = {
    "bert": (bert, [text(length) for length in LENGTHS] + [text(9, 2)], TEXTS),
    "llama": (llama, [text(length) for length in LENGTHS], TEXTS),
    "vit": (vit, [pixels(1), pixels(3)], {"pixel_values": {0: ("batch", 1, 3)}}),
}


@pytest.mark.parametrize("target", ["armv7-neon", "armv8-a"])
@pytest.mark.parametrize("kind", list(FLOATS))
def test_float32_is_that_of_torch(kind, target, tmp_path):
    make, batches, dynamic = FLOATS[kind]
    model = make()
    with torch.inference_mode():
        expected = [model(**inputs) for inputs in batches]
    for cpu, emulated in on_each_cpu(tersor.capture(model, batches[1], dynamic), target, tmp_path):
        for inputs, wanted in zip(batches, expected, strict=True):
            found = emulated(**inputs)
            assert found
            for name, value in found.items():
                np.testing.assert_allclose(value, wanted[name].numpy(), atol=1e-4, err_msg=f"{name}, {cpu}")


@pytest.fixture(scope="module")
def integers(tmp_path_factory) -> Iterator[tuple[Program, list]]:
    """BERT in int8, whose function main_observed gives the codes of its products too; what this machine makes of it."""
    program = tersor.capture(bert(), text(8), TEXTS)
    data = Dataset.read(Calibration.of([text(8 + 5 * i, 2) for i in range(8)]), program.main)
    program, _ = get("int8").run(program, Context(target=REFERENCE, calibration=data))
    program, observers = with_observers(program)
    assert observers["main"].name == "main_observed"
    here = export_c(prepare(program, REFERENCE, verify=False), tmp_path_factory.mktemp("here") / "out")
    session = loader(here).load().session()
    expected = []
    for length in LENGTHS:
        given = {name: value.numpy() for name, value in text(length).items()}
        expected.append(session.run("main_observed", **given))
    return program, expected


@pytest.mark.parametrize("target", list(CPUS))
def test_int8_is_that_of_this_machine(target, integers, tmp_path):
    program, results = integers
    for cpu, emulated in on_each_cpu(program, target, tmp_path):
        moved = total = 0
        for length, expected in zip(LENGTHS, results, strict=True):
            found = emulated.run("main_observed", **text(length))
            for name, value in found.items():
                if name.startswith("codes."):
                    apart = np.abs(value.astype(int) - expected[name].astype(int))
                    assert apart.max() <= 1, f"{name} at length {length} on {cpu}"
                    moved, total = moved + int(apart.sum()), total + apart.size
                elif target in FUSED:
                    np.testing.assert_array_equal(
                        value, expected[name], f"{name} at length {length} on {cpu}"
                    )
                else:
                    a, b = (x.astype(np.float64).ravel() for x in (value, expected[name]))
                    assert a @ b >= COSINE * np.linalg.norm(a) * np.linalg.norm(b), (
                        f"length {length} on {cpu}"
                    )
        most = 0 if target in FUSED else OTHER_CODES * total
        assert total > 100_000 and moved <= most, f"{moved} of {total} on {cpu}"
