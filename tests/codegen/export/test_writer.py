"""Whole programs as C: the same bits as the artifact's code, and defined errors for everything that is wrong."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest

from tersor.codegen.compiler import build, prepare
from tersor.codegen.export import writer
from tersor.codegen.export.writer import export_c
from tersor.codegen.runtime import load
from tersor.errors import ArtifactError, CompileError, InputError
from tersor.targets import resolve
from tests.codegen.export.exported import export, inputs, loader
from tests.ir import small_models
from tests.ir.stateful import ROOM, WIDTH, decoder

gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="needs gcc and g++")

SIZES = [{"batch": 1, "length": 1}, {"batch": 3, "length": 7}, {"batch": 4, "length": 12}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT."""
    return export(small_models.bert(), tmp_path_factory.mktemp("bert") / "out")


@pytest.fixture(scope="module")
def module(folder):
    return loader(folder)


@pytest.fixture(scope="module")
def model(module):
    return module.load()


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_outputs_are_those_of_the_artifact(name, tmp_path):
    program = small_models.ALL[name]()
    compilation = prepare(program, resolve("native"))
    build(compilation, tmp_path / "model.tersor", threads=1)
    artifact = load(tmp_path / "model.tersor", threads=1)
    model = loader(export_c(compilation, tmp_path / "out")).load(threads=2)
    for seed, sizes in enumerate(SIZES):
        given = inputs(program, sizes, seed)
        expected, found = artifact(**given), model(**given)
        for output in artifact.signature.outputs:
            np.testing.assert_array_equal(found[output.name], expected[output.name])


def test_states_live_in_sessions(tmp_path):
    program = decoder()
    compilation = prepare(program, resolve("native"))
    build(compilation, tmp_path / "model.tersor", threads=1)
    expected = load(tmp_path / "model.tersor", threads=1).session()
    module = loader(export_c(compilation, tmp_path / "out"))
    model = module.load()
    session, other = model.session(), model.session()
    x = np.random.default_rng(0).standard_normal((1, ROOM, WIDTH)).astype(np.float32)

    def both(function, x, position):
        given = {"x": x, "position": np.int64(position)}
        found = session.run(function, **given)["y"]
        np.testing.assert_array_equal(found, expected.functions[function](**given)["y"])
        return found

    both("prefill", x[:, :5], 0)
    last = both("decode", x[:, 5:6], 5)
    alone = other.run("decode", x=x[:, 5:6], position=np.int64(5))["y"]
    assert not np.array_equal(alone, last)
    with pytest.raises(module.Error, match="outside the state") as outside:
        session.run("decode", x=x[:, :1], position=np.int64(ROOM))
    assert outside.value.status == 13
    with pytest.raises(module.Error, match="reset it"):
        session.run("decode", x=x[:, :1], position=np.int64(0))
    session.reset()
    np.testing.assert_array_equal(session.run("decode", x=x[:, 5:6], position=np.int64(5))["y"], alone)


def test_bound_calls_read_what_their_arrays_hold(model):
    session = model.session()
    given = inputs(small_models.bert(), {"batch": 2, "length": 5})
    call = session.bound("main", **given)
    first = {name: value.copy() for name, value in call().items()}
    given["input_ids"] += 1
    second = call()
    expected = model(**given)
    assert all(np.array_equal(second[name], expected[name]) for name in expected)
    assert not np.array_equal(first["hidden"], second["hidden"]) and call() is second


def test_sessions_of_several_threads_share_a_model(model):
    given = [inputs(small_models.bert(), {"batch": 2, "length": 3 + i}, i) for i in range(4)]
    expected = [model(**g) for g in given]
    wrong = []

    def work(i):
        session = model.session(threads=1 + i % 2)
        for _ in range(50):
            found = session.run("main", **given[i])
            if any(not np.array_equal(found[name], expected[i][name]) for name in found):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_more_threads_than_cpus(model):
    given = inputs(small_models.bert(), {"batch": 4, "length": 12})
    expected, allowed = model(**given), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        session = model.session(threads=3)
        for pause in (0, 0.01, 0.01):  # after which the threads sleep
            time.sleep(pause)
            found = session.run("main", **given)
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
    finally:
        os.sched_setaffinity(0, allowed)


def test_many_runs_take_no_memory(model):
    session = model.session(threads=2)
    given = inputs(small_models.bert(), {"batch": 1, "length": 2})
    arguments, _, alive = model.functions["main"].bind(given)
    call = model.call("main")

    def pages():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    for _ in range(100):
        assert call(session._handle, ctypes.byref(arguments)) == 0
    before = pages()
    for _ in range(10_000):
        assert call(session._handle, ctypes.byref(arguments)) == 0
    assert pages() - before < 16 and alive


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"input_ids": None}, 1),
        ({"hidden": None}, 1),
        ({"batch": 0}, 2),
        ({"length": 13}, 2),
        ({"length": -1}, 2),
        ({"input_ids_count": 5}, 3),
        ({"input_ids_count": 7}, 3),
        ({"hidden_count": 95}, 3),
        ({"hidden_count": 97}, 0),
    ],
)
def test_wrong_arguments(model, change, status):
    session = model.session()
    given = inputs(small_models.bert(), {"batch": 2, "length": 3})
    arguments, _, alive = model.functions["main"].bind(given)
    for field, value in change.items():
        setattr(arguments, field, value)
    assert model.call("main")(session._handle, ctypes.byref(arguments)) == status
    assert alive


def test_null_pointers_and_options(model, module):
    call, handle = model.call, ctypes.c_void_p()
    weights, session = ctypes.byref(model.weights), ctypes.byref(handle)

    def create(threads=1, memory=None, memory_bytes=0, cpus=None):
        cpus = (ctypes.c_int * len(cpus))(*cpus) if cpus else None
        options = module._Options(threads, cpus, memory, memory_bytes)
        return call("session_create")(session, weights, ctypes.byref(options))

    assert call("main")(None, None) == call("main")(handle, None) == 1
    assert call("session_create")(None, weights, None) == call("session_create")(session, None, None) == 1
    assert call("model_open")(None, b"weights.bin") == call("model_open")(weights, None) == 1
    assert (
        call("model_use")(weights, None, 0) == call("model_check")(None) == call("session_reset")(None) == 1
    )
    call("session_destroy")(None)
    call("model_close")(None)
    model.weights = type(model.weights)()
    folder = os.path.dirname(module.__file__)
    assert call("model_open")(ctypes.byref(model.weights), f"{folder}/weights.bin".encode()) == 0
    weights = ctypes.byref(model.weights)
    assert create(threads=-1) == create(threads=257) == 9
    assert call("session_bytes")(257) == 0
    assert create(threads=2, cpus=[0, 100_000]) == 11
    size = call("session_bytes")(1)
    memory = ctypes.create_string_buffer(size)
    assert create(1, ctypes.addressof(memory), size - 1) == 7
    assert create(1, ctypes.addressof(memory), size) == 0
    call("session_destroy")(handle)
    assert create(threads=0) == 0
    call("session_destroy")(handle)
    assert all(call("message")(i) for i in range(-1, 20))


def test_a_session_in_use_is_busy(model):
    session = model.session()
    given = inputs(small_models.bert(), {"batch": 4, "length": 12})
    arguments, _, alive = model.functions["main"].bind(given)
    call, found = model.call("main"), set()

    def work():
        for _ in range(2000):
            found.add(call(session._handle, ctypes.byref(arguments)))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found <= {0, 12} and 0 in found and alive


@pytest.mark.parametrize(
    ("damage", "status"),
    [("cut", 5), ("empty", 4), ("missing", 4), ("header", 5), ("long", 5), ("contents", 0)],
)
def test_damaged_weights(folder, tmp_path, damage, status):
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)
    weights = copy / "weights.bin"
    data = bytearray(weights.read_bytes())
    if damage == "missing":
        weights.unlink()
    else:
        data[len(data) - 100 if damage == "contents" else 20] ^= 1
        data = {"cut": data[:-1], "empty": b"", "long": data + b"0"}.get(damage, data)
        weights.write_bytes(data)
    module = loader(copy)
    if status:
        with pytest.raises(module.Error) as caught:
            module.load(copy)
        assert caught.value.status == status
    else:  # only who asks for it reads all weights
        with pytest.raises(module.Error, match="damaged"):
            module.load(copy).verify()


def test_weights_can_be_linked_in(model, folder):
    data = (folder / "weights.bin").read_bytes()
    memory = ctypes.create_string_buffer(len(data) + 64)
    at = -ctypes.addressof(memory) % 64
    memory[at : at + len(data)] = data
    other = type(model.weights)()
    start = ctypes.addressof(memory) + at
    assert model.call("model_use")(ctypes.byref(other), ctypes.c_void_p(start), len(data)) == 0
    assert model.call("model_check")(ctypes.byref(other)) == 0
    assert model.call("model_use")(ctypes.byref(other), ctypes.c_void_p(start + 4), len(data)) == 6
    assert model.call("model_use")(ctypes.byref(other), ctypes.c_void_p(start), len(data) - 64) == 5


@gcc
def test_nothing_but_libc_libm_and_threads_is_needed(folder):
    listed = subprocess.run(["nm", "-u", folder / "libmodel.so"], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()}
    libc = {
        "calloc",
        "close",
        "free",
        "fstat",
        "malloc",
        "memcpy",
        "memset",
        "mmap",
        "munmap",
        "open",
        "sched_yield",
    }
    libc |= {"__fxstat", "__stack_chk_fail", "memmove"}
    libc |= {"sched_setaffinity", "sched_getaffinity", "sched_getcpu", "__sched_cpucount"}
    start = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize", "__gmon_start__"}
    libm = {"expf", "logf", "powf", "sinf", "cosf", "tanhf", "erff", "fmaf"}
    unknown = {s for s in symbols - libc - start - libm if not s.startswith("pthread_")}
    assert not unknown


INTERFACE = {f"model_{name}" for name in ("main", "message", "session_bytes")}
INTERFACE |= {f"model_model_{name}" for name in ("open", "use", "check", "close")}
INTERFACE |= {f"model_session_{name}" for name in ("create", "reset", "destroy")}


@gcc
def test_a_shared_library_shows_its_interface_only_and_nothing_to_debuggers(folder):
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", folder / "libmodel.so"], capture_output=True, text=True, check=True
    )
    symbols = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert {s for s in symbols if s.startswith("model_")} == INTERFACE
    assert b".debug" not in (folder / "src/kernels.o").read_bytes()


def test_a_dll_shows_its_interface_and_leaves_no_other_files(tmp_path):
    pytest.importorskip("ziglang", reason="needs ziglang, which links for Windows: pip install ziglang")
    out = export(small_models.bert(1), tmp_path / "out", "x86-64-v3:windows")
    library = (out / "model.dll").read_bytes()
    assert all(f"{name}\0".encode() in library for name in INTERFACE) and b"model_k_" not in library
    libraries = {"libmodel.a", "libmodel.dll.a", "model.dll"}
    texts = {"CMakeLists.txt", "README.md", "main.c", "model.h", "model.py", "signature.json"}
    assert {p.name for p in out.iterdir()} == libraries | texts | {"src", "weights.bin"}


@gcc
def test_the_sources_have_no_warnings_and_build_with_cmake(folder, tmp_path):
    strict = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{folder}", f"-I{folder / 'src'}"]
    for source in ("src/model.c", "src/functions.c", "src/threads.c", "main.c"):
        subprocess.run(
            ["gcc", *strict, "-c", folder / source, "-o", tmp_path / "x.o"], check=True, timeout=60
        )
    (tmp_path / "user.cpp").write_text(
        '#include "model.h"\nint main() { return model_message(0) == nullptr; }\n'
    )
    command = ["g++", f"-I{folder}", tmp_path / "user.cpp", folder / "libmodel.a", "-lpthread", "-lm"]
    subprocess.run([*command, "-o", tmp_path / "user"], check=True, timeout=60)
    subprocess.run([tmp_path / "user"], check=True, timeout=60)
    if shutil.which("cmake") is None:
        pytest.skip("the CMake project needs cmake")
    for arguments in (["-S", folder, "-B", tmp_path / "build"], ["--build", tmp_path / "build"]):
        subprocess.run(["cmake", *arguments], check=True, timeout=120, capture_output=True)
    run = [tmp_path / "build/model_main", folder / "weights.bin", "threads=2", "calls=3"]
    shown = subprocess.run(run, check=True, timeout=60, capture_output=True, text=True).stdout
    assert "main:" in shown and "hidden:" in shown and "logits:" in shown


@gcc
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_sources_are_clean_under_sanitizers(folder, tmp_path, sanitizers, model):
    program = tmp_path / "main"
    sources = [folder / name for name in ("main.c", "src/model.c", "src/functions.c", "src/threads.c")]
    flags = ["-std=c99", "-g", "-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    command = [
        "gcc",
        *flags,
        f"-I{folder}",
        *sources,
        folder / "src/kernels.o",
        "-lm",
        "-lpthread",
        "-o",
        program,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip(f"gcc has no sanitizers {sanitizers}")
    assert done.returncode == 0, done.stderr
    given = inputs(small_models.bert(), {"batch": 3, "length": 11})
    (tmp_path / "in").write_bytes(b"".join(g.tobytes() for g in given.values()))
    options = [
        "threads=3",
        "calls=20",
        "batch=3",
        "length=11",
        f"in={tmp_path / 'in'}",
        f"out={tmp_path / 'out'}",
    ]
    done = subprocess.run(
        [program, folder / "weights.bin", *options], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = b"".join(value.tobytes() for value in model(**given).values())
    assert (tmp_path / "out").read_bytes() == expected
    wrong = subprocess.run([program, "nowhere", *options], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 1 and "cannot be read" in wrong.stderr


def test_the_same_program_gives_the_same_bytes(folder, tmp_path):
    again = export(small_models.bert(), tmp_path / "out")
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc")
    assert [f for f in files if (folder / f).read_bytes() != (again / f).read_bytes()] == []


def test_an_earlier_export_is_replaced_and_other_folders_are_not(tmp_path):
    program = small_models.vit()
    out = export(program, tmp_path / "out")
    (out / "old").write_text("")
    export(program, out, name="other")
    assert not (out / "old").exists() and (out / "libother.a").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    with pytest.raises(ArtifactError, match="not an exported model"):
        export(program, tmp_path / "mine")
    with pytest.raises(ArtifactError, match="does not exist"):
        export(program, tmp_path / "no/out")
    with pytest.raises(InputError, match="name"):
        export(program, tmp_path / "out2", name="my model")
    with pytest.raises(CompileError, match="no C compiler"):
        export(program, tmp_path / "out2", compiler="no-such-compiler")
    with pytest.raises(CompileError, match="a C compiler failed"):
        export(program, tmp_path / "out2", compiler="false")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_names_that_are_no_c_names(tmp_path):
    maker = small_models.Maker({"int": small_models.Range(1, 4)})
    x = maker.function.add_input("a.b", small_models.Value("float32", (small_models.Dim.symbol("int"), 16)))
    build_ = maker.build
    program = maker.done(
        **{"a": build_.mul(x, 2.0), "a.b": build_.add(x, 1.0), "default": build_.sub(x, 1.0)}
    )
    model = loader(export(program, tmp_path / "out")).load()
    given = np.arange(32, dtype=np.float32).reshape(2, 16)
    found = model(**{"a.b": given})
    np.testing.assert_array_equal(found["a"], given * 2)
    np.testing.assert_array_equal(found["a.b"], given + 1)
    np.testing.assert_array_equal(found["default"], given - 1)


def test_the_signature_describes_every_function(folder):
    described = json.loads((folder / writer.SIGNATURE).read_text())
    (main,) = described["functions"]
    assert main["dims"]["length"] == {"field": "length", "min": 1, "max": 12, "usual": 12}
    assert [t["name"] for t in main["outputs"]] == ["hidden", "logits"]
