"""From a torch model to plain C in one call, with every recipe; for other machines too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import tersor
from tersor.cli import main
from tersor.codegen.export.toolchain import toolchain
from tersor.errors import ArtifactError, TargetError
from tersor.targets import resolve
from tests.codegen import emulator

transformers = pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, vocab_size=100
)
AXES = {0: ("batch", 1, 4), 1: ("length", 1, 64)}


def text(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 99, (batch, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}


def load(folder: Path):
    spec = importlib.util.spec_from_file_location("exported", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


def same(compiled, exported, given) -> None:
    expected = compiled(**given)
    found = exported(**{name: value.numpy() for name, value in given.items()})
    for name in (o.name for o in compiled.signature.outputs):
        value = expected[name].numpy()
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("kind", "recipe"), [("bert", "int8"), ("bert", "bf16"), ("bert", "fp16"), ("llama", "int8-dynamic")]
)
def test_text_models(kind, recipe, tmp_path):
    torch.manual_seed(0)
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**SIZES))
    else:
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
        model = transformers.LlamaForCausalLM(config)
    data = [text(2, 8 + i, i) for i in range(8)] if recipe == "int8" else None
    dynamic = {"input_ids": AXES, "attention_mask": AXES}
    example = text(2, 8)
    compiled = tersor.compile(
        model.eval(), example, recipe=recipe, dynamic=dynamic, calibration=data, threads=1
    )
    exported = load(compiled.export_c(tmp_path / "out"))
    for batch, length in ((1, 1), (3, 7), (4, 64)):
        same(compiled, exported, text(batch, length))


def test_int8_on_arm_agrees_with_this_machine(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).eval()
    how = dict(recipe="int8-dynamic", dynamic={"input_ids": AXES, "attention_mask": AXES})
    here = tersor.compile(model, text(2, 8), threads=1, **how)
    target = resolve("armv8.2-dotprod:linux-musl")
    out = tersor.compile(model, text(2, 8), target=target, **how).export_c(tmp_path / "out")
    files = [out / "main.c", out / "libmodel.a"]
    toolchain(target, static=True).link(files, tmp_path / "main", static=True, options=[f"-I{out}"])
    for batch, length in ((1, 7), (2, 64)):
        given = text(batch, length)
        (tmp_path / "in").write_bytes(b"".join(value.numpy().tobytes() for value in given.values()))
        options = [str(out / "weights.bin"), f"batch={batch}", f"length={length}"]
        options += [f"in={tmp_path / 'in'}", f"out={tmp_path / 'found'}"]
        emulator.run(tmp_path / "main", target, *options, cpu="cortex-a76")
        found = torch.from_numpy(np.fromfile(tmp_path / "found", np.float32))
        expected = here(**given).last_hidden_state.flatten()
        assert torch.cosine_similarity(found, expected, dim=0) > 0.9999
        assert (found - expected).abs().max() < 0.02  # one code more or less here and there


def test_vit(tmp_path):
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    compiled = tersor.compile(model, pixels, recipe="int8-dynamic", threads=1)
    same(compiled, load(compiled.export_c(tmp_path / "out")), pixels)


def test_a_loaded_artifact_has_nothing_to_export(tmp_path):
    model = torch.nn.Linear(8, 8)
    compiled = tersor.compile(model, (torch.ones(1, 8),), threads=1, output=tmp_path / "a.tersor")
    compiled.export_c(tmp_path / "out")
    with pytest.raises(ArtifactError, match="export-c"):
        tersor.load(tmp_path / "a.tersor").export_c(tmp_path / "out")


def test_a_model_for_another_system_is_exported_and_not_called(tmp_path, monkeypatch):
    monkeypatch.delenv("ANDROID_NDK_HOME", raising=False)
    android = {"arch": "x86_64", "os": "android", "mcpu": "x86-64-v3", "features": frozenset({"avx2", "fma"})}
    target = tersor.Target(name="android-x86", **android)
    model, example = torch.nn.Linear(8, 8), (torch.ones(1, 8),)
    compiled = tersor.compile(model, example, target=target)
    with pytest.raises(TargetError, match="cannot run"):
        compiled(torch.ones(1, 8))
    out = compiled.export_c(tmp_path / "out")
    # no NDK here: the app's build compiles the sources
    assert (out / "src/kernels.o").exists() and not (out / "libmodel.a").exists()
    with pytest.raises(TargetError, match="no artifact"):
        tersor.compile(model, example, target=target, output=tmp_path / "a.tersor")


def test_the_command_line(tmp_path, capsys):
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    assert main(["compile", str(tmp_path / "bert"), "--export-c", str(out), "--name", "bert"]) == 0
    assert "bert.h" in {p.name for p in out.iterdir()} and str(out) in capsys.readouterr().out
    assert main(["compile", str(tmp_path / "bert")]) != 0
    assert "--export-c" in capsys.readouterr().err
