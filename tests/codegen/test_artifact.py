"""Artifacts on disk: complete or absent, deterministic, and never loaded when a byte is wrong."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from artifact_harness import SIGNATURE, expected, inputs, manifest, weights, write
from hypothesis import given
from hypothesis import strategies as st

from tersor.codegen.runtime import Manifest, TensorType, folder, load
from tersor.codegen.runtime.dimensions import parse
from tersor.codegen.runtime.weights import ALIGNMENT
from tersor.errors import ArtifactError, TargetError
from tersor.ir.dims import Dim

FILES = ("manifest.json", "module.so", "weights.safetensors", "report.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("original") / "tiny.tersor")


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "tiny.tersor"))


def test_an_artifact_holds_what_was_written(artifact: Path) -> None:
    assert sorted(os.listdir(artifact)) == sorted(FILES)
    assert os.listdir(artifact.parent) == ["tiny.tersor"]
    model = load(artifact)
    given = inputs()
    np.testing.assert_allclose(model(**given).hidden, expected(**given), rtol=1e-5, atol=1e-6)
    assert model.report == {"steps": []}
    assert model.manifest.functions == {"main": SIGNATURE}
    assert replace(model.manifest, files={}) == manifest()


def test_equal_arguments_give_equal_bytes(artifact: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again.tersor")
    for name in FILES:
        assert (again / name).read_bytes() == (artifact / name).read_bytes()


def test_weights_are_aligned_and_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tensors = {
        "odd": np.arange(7, dtype=np.float32),
        "scalar": np.array(3, np.int64),
        "flags": np.array([True, False, True]),
        "strided": np.arange(12, dtype=np.float16).reshape(3, 4).T,
        "empty": np.zeros((0, 3), np.float32),
        "even": np.ones((16, 2), np.float32),
    }
    signature = replace(SIGNATURE, weights=tuple(tensors))
    path = write(tmp_path / "odd.tersor", weights=tensors, manifest=manifest(functions={"main": signature}))
    stored = load_file(path / "weights.safetensors")
    loaded = load(path)._tensors
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        for copy in (stored[name], loaded[name]):
            assert copy.dtype == tensor.dtype
            np.testing.assert_array_equal(copy, tensor)
        assert loaded[name].ctypes.data % ALIGNMENT == 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.31, 0.77, 1.0])
def test_a_flipped_bit_is_found(artifact: Path, name: str, place: float) -> None:
    data = bytearray((artifact / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    (artifact / name).write_bytes(data)
    with pytest.raises(ArtifactError, match="manifest|damaged"):
        load(artifact)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_found(artifact: Path, name: str, kept: float) -> None:
    os.truncate(artifact / name, int(kept * (artifact / name).stat().st_size))
    with pytest.raises(ArtifactError, match=name):
        load(artifact)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load(artifact)


def test_every_piece_of_a_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PIECE", 100)
    path = write(tmp_path / "pieces.tersor")
    size = (path / "weights.safetensors").stat().st_size
    assert len(load(path).manifest.files["weights.safetensors"].sha256) == -(-size // 100)
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[250] ^= 1
    (path / "weights.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="after byte 200"):
        load(path)


@pytest.mark.parametrize(
    ("path", "message"), [("nothing.tersor", "there is no such folder"), (".", "no manifest.json")]
)
def test_what_is_no_artifact_is_refused(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(tmp_path / path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not the manifest of a Tersor artifact"),
        ('{"schema": 99}', "has schema 99"),
        ('{"schema": 2}', "checksum"),
        ("[" * 100_000, "not valid JSON"),
        ("\x00", "not valid JSON"),
    ],
)
def test_a_foreign_manifest_is_refused(artifact: Path, text: str, message: str) -> None:
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        load(artifact)


def test_a_manifest_with_wrong_kinds_of_entries_is_refused() -> None:
    from tersor.codegen.runtime.manifest import _digest

    body = json.loads(manifest().to_json())
    del body["digest"]
    for key in ("functions", "target", "versions", "gates", "verified", "files"):
        for wrong in (None, 5, "text"):
            changed = body | {key: wrong}
            text = json.dumps(changed | {"digest": _digest(changed)})
            with pytest.raises(ArtifactError, match="manifest"):
                Manifest.from_json(text, "manifest.json")


def test_another_version_of_tvm_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "old.tersor", manifest=manifest(versions={"tvm": "0.19.1"}))
    with pytest.raises(ArtifactError, match=r"TVM 0\.19.*\n.*pip install apache-tvm==0\.19\.1"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mattr": ["+avx512fp16", "+made-up"]}, "made-up"),
        ({"arch": "aarch64", "mcpu": "cortex-a76", "mattr": []}, "aarch64"),
    ],
)
def test_another_cpu_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = write(tmp_path / "far.tersor", manifest=manifest(target=manifest().target | change))
    with pytest.raises(TargetError, match=message):
        load(path)


def test_a_module_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "garbage.tersor", module=b"not a library" * 100)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load(path)


def test_a_module_without_the_function_is_refused(tmp_path: Path) -> None:
    functions = {"main": SIGNATURE, "absent": SIGNATURE}
    model = load(write(tmp_path / "less.tersor", manifest=manifest(functions=functions)))
    with pytest.raises(ArtifactError, match="absent"):
        model.functions["absent"](**inputs())
    assert model(**inputs()).hidden.shape == (2, 5, 8)


def test_code_that_refuses_its_arguments_is_an_error(tmp_path: Path) -> None:
    wide = tuple(replace(t, shape=(*t.shape[:2], 9)) if t.name == "x" else t for t in SIGNATURE.inputs)
    model = load(
        write(
            tmp_path / "wide.tersor", manifest=manifest(functions={"main": replace(SIGNATURE, inputs=wide)})
        )
    )
    given = inputs() | {"x": np.zeros((2, 5, 9), np.float32)}
    with pytest.raises(ArtifactError, match="compiled code failed"):
        model(**given)


# Writing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"table": weights()["table"]}}, "not given: .'matrix'"),
        ({"weights": weights() | {"more": np.zeros(3, np.float32)}}, "not used: .'more'"),
        ({"report": {"value": float("nan")}}, "report"),
        ({"report": {"value": object()}}, "report"),
        ({"manifest": manifest(tuning=({"time": object()},))}, "JSON"),
        ({"manifest": manifest(functions={})}, "have a function"),
        ({"module": "/nowhere/module.so"}, "module cannot be read"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        write(tmp_path / "tiny.tersor", **changes)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("tensor", [np.zeros(3, np.complex64), np.array(["a"])])
def test_a_weight_of_another_kind_is_refused(tmp_path: Path, tensor: np.ndarray) -> None:
    signature = replace(SIGNATURE, weights=("w",))
    with pytest.raises(ArtifactError, match="'w'"):
        write(
            tmp_path / "tiny.tersor", weights={"w": tensor}, manifest=manifest(functions={"main": signature})
        )
    assert os.listdir(tmp_path) == []


def test_only_artifacts_are_overwritten(artifact: Path, tmp_path: Path) -> None:
    write(artifact, report={"second": True})
    assert load(artifact).report == {"second": True}
    with pytest.raises(ArtifactError, match="exists already"):
        write(artifact, overwrite=False)

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"1")
    (tmp_path / "file").write_bytes(b"2")
    for place in ("photos", "file"):
        with pytest.raises(ArtifactError, match="not a Tersor artifact"):
            write(tmp_path / place)
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"1"
    assert sorted(os.listdir(tmp_path)) == ["file", "photos", "tiny.tersor"]


def test_a_link_to_an_artifact_stays_a_link(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(artifact)
    write(tmp_path / "link", report={"second": True})
    assert (tmp_path / "link").is_symlink()
    assert load(artifact).report == {"second": True}


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_impossible_names(artifact: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError):
        load(tmp_path / name)
    with pytest.raises(ArtifactError, match="cannot write"):
        write(tmp_path / name)
    with pytest.raises(ArtifactError, match="cannot write"):
        load(artifact).save(tmp_path / name)


def test_a_place_that_cannot_be_written_is_an_error() -> None:
    with pytest.raises(ArtifactError, match="does not exist.*\n.*create it"):
        write(Path("/nowhere/tiny.tersor"))
    with pytest.raises(ArtifactError, match="cannot write"):
        write(Path("/proc/tiny.tersor"))


@contextmanager
def small_file_system(folder: Path) -> Iterator[Path]:
    """A file system of 20 KiB; where mounting is not allowed, the test cannot run."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["free space known", "found out while writing"])
def test_a_small_disk_is_an_error(
    artifact: Path, tmp_path: Path, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(artifact)
    with small_file_system(tmp_path / "small") as small:
        if not checked:
            plenty = shutil.disk_usage(tmp_path)
            monkeypatch.setattr(shutil, "disk_usage", lambda place: plenty)
        for action in (lambda: write(small / "new.tersor"), lambda: model.save(small / "new.tersor")):
            with pytest.raises(ArtifactError, match="MB free"):
                action()
            assert os.listdir(small) == []


def test_a_disk_that_fills_up_while_writing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (artifact / name).read_bytes() for name in FILES}
    model = load(artifact)
    real = os.fsync
    for allowed in range(6):
        left = [allowed]

        def fsync(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        for action in (lambda: write(artifact, report={"second": True}), lambda: model.save(artifact)):
            left[0] = allowed
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", fsync)
                if allowed == 5:  # the last one follows the rename
                    with pytest.raises(ArtifactError, match="MB free"):
                        action()
                    continue
                with pytest.raises(ArtifactError, match="nothing was left.*\n(.*\n)*.*MB free"):
                    action()
            assert {name: (artifact / name).read_bytes() for name in FILES} == before
            assert os.listdir(artifact.parent) == ["tiny.tersor"]


def test_the_old_artifact_comes_back_when_the_new_cannot_take_its_place(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (artifact / name).read_bytes() for name in FILES}
    rename, calls = os.rename, []

    def second_fails(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(ArtifactError, match="cannot write"):
        write(artifact, report={"second": True})
    assert {name: (artifact / name).read_bytes() for name in FILES} == before
    assert os.listdir(artifact.parent) == ["tiny.tersor"]


def test_a_write_that_the_system_refuses(tmp_path: Path) -> None:
    """A real failure in the middle of a file, which needs no rights: a limit on the size of files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(ArtifactError, match="cannot write"):
            write(tmp_path / "tiny.tersor")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


# Signatures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": (TensorType("x", "float31", (2,)),), "dims": {}, "example": {}}, "float31"),
        ({"inputs": (TensorType("x", "float32", (-1,)),), "dims": {}, "example": {}}, "dimension -1"),
        ({"inputs": (TensorType("x", "float32", ("n",)),), "dims": {}, "example": {}}, "'n'.*no range"),
        ({"inputs": SIGNATURE.inputs * 2}, "occurs twice"),
        ({"outputs": (TensorType("y", "float32", ("batch-",)),)}, "not a dimension"),
        ({"dims": {"batch": (1, 4), "length": (8, 2)}}, "range"),
        ({"dims": SIGNATURE.dims | {"extra": (1, 2)}}, "does not occur alone"),
        ({"example": {"length": 65}}, "example"),
    ],
)
def test_an_inconsistent_signature_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        replace(SIGNATURE, **changes)


def test_a_manifest_survives_its_text() -> None:
    made = manifest(
        recipe="int8",
        gates=({"stage": "smooth", "kept": True},),
        tuning=({"kernel": "gemm", "tile": [6, 64]},),
        threads=3,
        files={"module.so": folder.FileRecord(5, ("ab",))},
    )
    assert Manifest.from_json(made.to_json(), "here") == made


terms = st.lists(
    st.tuples(st.integers(-5, 5), st.lists(st.sampled_from(["batch", "length", "n_2"]), max_size=3)),
    max_size=4,
)


@given(terms)
def test_expressions_mean_what_the_program_means(items: list[tuple[int, list[str]]]) -> None:
    dim: int | Dim = 0
    for coefficient, names in items:
        product: int | Dim = coefficient
        for name in names:
            product = product * Dim.symbol(name)
        dim = dim + product
    values = {"batch": 3, "length": 50, "n_2": 7}
    value = dim.evaluate(values) if isinstance(dim, Dim) else dim
    assert parse(str(dim)).evaluate(values) == value
    assert parse(str(dim)).symbols == (dim.symbols if isinstance(dim, Dim) else frozenset())


@pytest.mark.parametrize(
    "text", ["", "a+", "a b", "a//b", "a**b", "__import__('os')", "(a)", "a*", "*a", "1.5", "a--b"]
)
def test_other_texts_are_no_expressions(text: str) -> None:
    with pytest.raises(ValueError, match="not a dimension expression"):
        parse(text)
