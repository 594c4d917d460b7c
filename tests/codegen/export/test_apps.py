"""What exports for phones bring along: built and run here as far as that goes, read where it does not."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.codegen.compiler import prepare
from tersor.codegen.export.apps import app_files
from tersor.codegen.export.apps.app import App
from tersor.codegen.export.objects import kernel_module
from tersor.codegen.export.plan import plan
from tersor.codegen.export.toolchain import toolchain
from tersor.ir.interpreter import run as interpret
from tersor.targets import Target, resolve
from tests.codegen.export.exported import export
from tests.ir import small_models
from tests.ir.stateful import decoder

HERE = Path(__file__).parent
ANDROID_HERE = Target(
    name="android-x86", arch="x86_64", os="android", mcpu="x86-64-v3", features=frozenset({"avx2", "fma"})
)
"""Android on the CPU of this machine, as in Android Studio's emulator: its code runs in a program of Linux too."""

needs_cmake = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("cc")), reason="needs cmake, cc")


@pytest.fixture(autouse=True)
def no_ndk(monkeypatch):
    monkeypatch.delenv("ANDROID_NDK_HOME", raising=False)


@pytest.fixture(scope="module")
def android(tmp_path_factory):
    """A small BERT, whose name has what JNI writes in another way."""
    return export(
        small_models.bert(), tmp_path_factory.mktemp("app") / "out", ANDROID_HERE, name="my_encoder"
    )


@pytest.fixture(scope="module")
def ios(tmp_path_factory):
    return export(small_models.bert(), tmp_path_factory.mktemp("app") / "out", "iphone-15", name="my_encoder")


def jdk() -> Path:
    """The home of a Java development kit, or the test is skipped."""
    compiler = shutil.which("javac")
    home = Path(compiler).resolve().parents[1] if compiler else None
    if home is None or not (home / "include/jni.h").exists():
        pytest.skip("needs a JDK: apt-get install default-jdk-headless")
    return home


def run(*command, timeout=300, **options) -> str:
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        **options,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_cmake
def test_a_java_program_runs_the_model(android, tmp_path):
    home = jdk()
    module, build, classes = android / "android/src/main", tmp_path / "build", tmp_path / "classes"
    includes = f"-I{home / 'include'} -I{home / 'include/linux'} -Wall -Wextra -Wpedantic -Werror"
    run("cmake", "-S", module / "cpp", "-B", build, f"-DCMAKE_C_FLAGS={includes}")
    run("cmake", "--build", build, "--target", "my_encoder_jni")
    library = build / "libmy_encoder_jni.so"
    assert set(segment_alignments(library)) == {16384}

    sources = [*(module / "java").rglob("*.java"), *(HERE / "java").rglob("*.java")]
    run(home / "bin/javac", "-Xlint:all,-options", "-Werror", "--release", "8", "-d", classes, *sources)
    (tmp_path / "assets").mkdir()
    shutil.copy(android / "weights.bin", tmp_path / "assets/my_encoder.weights")
    options = [
        "-Xcheck:jni",
        f"-Djava.library.path={build}",
        "-cp",
        classes,
        "Check",
        tmp_path,
        tmp_path / "hidden",
    ]
    assert run(home / "bin/java", *options) == "ok\n"

    ids = (7 * torch.arange(10) + 1).remainder(50).reshape(2, 5)
    mask = (torch.arange(5) < 3).long().expand(2, 5)
    expected = interpret(small_models.bert().main, {"input_ids": ids, "attention_mask": mask})["hidden"]
    found = np.fromfile(tmp_path / "hidden", np.float32).reshape(2, 5, 16)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("target", ["pixel-8", "moto-g-2013"])
def test_the_library_of_an_app_links_for_phones_of_64_and_32_bits(target, tmp_path):
    """With musl in Android's place, as there is no NDK."""
    pytest.importorskip("ziglang")
    home = jdk()
    out = export(small_models.bert(), tmp_path / "out", target, name="my_encoder")
    sources = [out / "android/src/main/cpp/jni.c", *(out / "src").glob("*.c"), out / "src/kernels.o"]
    options = [f"-I{path}" for path in (out, home / "include", home / "include/linux")]
    options += ["-Werror", "-Wl,-z,defs", "-Wl,-z,max-page-size=16384"]
    library = tmp_path / "libmy_encoder_jni.so"
    toolchain(resolve(target), static=True).link(sources, library, shared=True, options=options)
    assert b"Java_tersor_my_1encoder_Model_nativeMain" in library.read_bytes()


def test_awkward_names_and_states_make_java_that_compiles(tmp_path):
    home = jdk()
    program = decoder(functions=("close", "decode"))
    out = export(program, tmp_path / "out", ANDROID_HERE, name="int")
    source = out / "android/src/main/java/tersor/int_"
    run(
        home / "bin/javac",
        "-Xlint:all,-options",
        "-Werror",
        "--release",
        "8",
        "-d",
        tmp_path,
        *source.glob("Model*"),
    )
    text = (source / "Model.java").read_text()
    assert "public CloseOutputs close2(long length, float[] x, long position)" in text
    assert "Java_tersor_int_1_Model_nativeClose2" in (out / "android/src/main/cpp/jni.c").read_text()


def test_every_dtype_has_types_in_java_and_swift(tmp_path):
    dtypes = "int64 uint64 int32 uint32 int16 uint16 int8 uint8 bool float32 float64 float16 bfloat16".split()
    dims = {"n": {"field": "n", "min": 1, "max": 9}}
    inputs = [{"name": d, "field": f"{d}_in", "dtype": d, "shape": ["2*n + 1", "n**2"]} for d in dtypes]
    outputs = [{"name": d, "field": f"{d}_out", "dtype": d, "shape": ["n", 3]} for d in dtypes]
    main = {"name": "main", "symbol": "main", "dims": dims, "inputs": inputs, "outputs": outputs}
    app = App({"name": "model", "functions": [main], "states": {}}, "aarch64", 64, 1)
    java = {
        k: v
        for k, v in app_files(app, "android").items()
        if k.endswith(("Model.java", "ModelException.java"))
    }
    swift = app_files(app, "ios")["swift/Sources/TersorModel/Model.swift"]
    assert "repeating: 0, count: n * 3)" in swift and "[UInt16]" in swift
    home = jdk()
    for place, text in java.items():
        (tmp_path / Path(place).name).write_text(text)
    run(home / "bin/javac", "-Werror", "--release", "8", "-d", tmp_path / "classes", *tmp_path.glob("*.java"))


def test_an_ndk_makes_libraries_for_pages_of_16_kb(tmp_path):
    (tmp_path / "empty.c").write_text("int empty(void) { return 0; }\n")
    for target, expected in ((ANDROID_HERE, {16384}), (resolve("x86-64-v3"), {4096})):
        toolchain(target, "cc").link([tmp_path / "empty.c"], tmp_path / "empty.so", shared=True)
        assert set(segment_alignments(tmp_path / "empty.so")) == expected


def segment_alignments(library: Path) -> list[int]:
    """Of the parts of a 64-bit ELF file that are loaded (System V ABI, program header)."""
    data = library.read_bytes()
    offset, (size, count) = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + i * size) for i in range(count)]
    return [header[7] for header in headers if header[0] == 1]


@pytest.mark.parametrize(
    ("target", "reserved"), [("pixel-8", True), ("iphone-15", True), ("pixel-8:linux", False)]
)
def test_the_register_that_belongs_to_the_system_is_left_alone(target, reserved):
    compilation = prepare(small_models.llama(), resolve(target))
    _, kernels = plan(compilation.lowered.module, compilation.signatures, "k_")
    assembly = kernel_module(kernels, compilation.target).inspect_source("asm")
    assert re.search(r"\b[xw]17\b", assembly)
    assert (re.search(r"\b[xw]18\b", assembly) is None) == reserved


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs sh")
def test_the_script_for_xcode_makes_the_framework_of_all_sources(ios, tmp_path):
    """xcrun and xcodebuild are stand-ins: zig compiles for ARM Macs, whose objects are of the same kind."""
    pytest.importorskip("ziglang")
    zig = f'"{sys.executable}" -m ziglang'
    programs = {
        "xcrun": f"""\
shift 2
program=$1
shift
if [ "$program" = clang ]; then
    shift 3
    exec {zig} cc -target aarch64-macos -fno-sanitize=all -g0 "$@"
fi
shift 2
output=$1
shift
exec {zig} ar rcs "$output" "$@"
""",
        "xcodebuild": f"""\
mkdir -p "$7"
cp "$3" "$7"
cp -R "$5" "$7/Headers"
echo "$@" >"{tmp_path}/xcodebuild"
""",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nset -eu\n{text}")
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    shutil.copytree(ios, out)
    run(
        "sh",
        out / "swift/build-xcframework.sh",
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert (tmp_path / "xcodebuild").read_text().startswith("-create-xcframework -library ")
    framework = out / "swift/CTersorMyEncoder.xcframework"
    members = run(sys.executable, "-m", "ziglang", "ar", "t", framework / "libmy_encoder.a").split()
    assert {"kernels.o", "model.o", "functions.o", "threads.o"} <= set(members)
    assert (out / "swift/Sources/TersorMyEncoder/weights.bin").read_bytes() == (
        out / "weights.bin"
    ).read_bytes()

    (tmp_path / "user.m").write_text(
        "@import CTersorMyEncoder;\nint status(void) { return my_encoder_main(0, 0); }\n"
    )
    headers = framework / "Headers"
    command = ["cc", "-target", "aarch64-macos", "-fmodules", f"-fmodules-cache-path={tmp_path / 'cache'}"]
    command += [f"-fmodule-map-file={headers / 'module.modulemap'}", "-c", tmp_path / "user.m"]
    command += ["-o", tmp_path / "user.o"]
    run(sys.executable, "-m", "ziglang", *command)


def syntax_errors(language: str, text: str) -> list[str]:
    """Where a tree-sitter grammar cannot read a text."""
    tree_sitter = pytest.importorskip("tree_sitter")
    grammar = pytest.importorskip(f"tree_sitter_{language}")
    tree = tree_sitter.Parser(tree_sitter.Language(grammar.language())).parse(text.encode())
    nodes, found = [tree.root_node], []
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.is_error or node.is_missing:
            found.append(f"line {node.start_point[0] + 1}: {node.text.decode()}")
    return found


def test_swift_and_gradle_files_are_well_formed(android, ios):
    files = {
        "swift": list((ios / "swift").rglob("*.swift")),
        "kotlin": list((android / "android").glob("*.kts")),
    }
    for language, paths in files.items():
        assert len(paths) == 2
        for path in paths:
            assert syntax_errors(language, path.read_text()) == []
            cut = path.read_text().rstrip()[:-1]
            assert syntax_errors(language, cut), "the grammar sees that the last bracket is missing"


def test_swift_calls_what_the_header_declares(ios):
    swift = (ios / "swift/Sources/TersorMyEncoder/Model.swift").read_text()
    header = (ios / "my_encoder.h").read_text()
    used = set(re.findall(r"\bmy_encoder_\w+|\bMY_ENCODER_\w+", swift))
    assert len(used) > 8 and used <= set(re.findall(r"\b\w+\b", header))
    assert set(re.findall(r"arguments\.(\w+) =", swift)) == {
        "batch", "length", "input_ids", "input_ids_count", "attention_mask", "attention_mask_count",
        "hidden", "hidden_count", "logits", "logits_count",
    }  # fmt: skip
    function = "func main(batch: Int, length: Int, inputIds: [Int64], attentionMask: [Int64]) throws -> MainOutputs {"
    assert function in " ".join(swift.split())


def test_the_page_of_the_export_names_the_module(android, ios):
    assert "`android/README.md`" in (android / "README.md").read_text()
    page = (ios / "README.md").read_text()
    assert "`swift/README.md`" in page and "libmy_encoder.a" not in page and "no libraries" in page


def test_the_page_of_an_export_with_libraries_says_how_to_link_them(tmp_path):
    page = (
        export(small_models.bert(), tmp_path / "out", ANDROID_HERE, compiler="cc") / "README.md"
    ).read_text()
    assert "cc -O2 main.c libmodel.a" in page and "| `libmodel.a` |" in page and "`android/README.md`" in page


@pytest.mark.parametrize(
    ("arch", "abi"), [("aarch64", "arm64-v8a"), ("armv7a", "armeabi-v7a"), ("x86_64", "x86_64")]
)
def test_gradle_builds_for_the_architecture_of_the_kernels(arch, abi):
    files = app_files(App({"name": "model", "functions": [], "states": {}}, arch, 64, 1), "android")
    assert f'abiFilters += "{abi}"' in files["android/build.gradle.kts"]


def test_other_systems_get_no_app():
    app = App({"name": "model", "functions": [], "states": {}}, "aarch64", 64, 1)
    assert app_files(app, "linux") == {}
