"""Passes by name, and plugins by entry points."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

from tersor.errors import PipelineError
from tersor.passes import Equivalent, Pass, PassResult, load_plugins, passes, register, registry
from tersor.passes.fold.norm_beta import FoldNormBeta


@pytest.fixture
def clean_registry():
    """Takes out what a test registers, and forgets which plugins were loaded."""
    known, broken = registry.passes(), dict(registry._broken)
    registry.load_plugins.cache_clear()
    yield
    registry._passes.clear()
    registry._passes.update(known)
    registry._broken.clear()
    registry._broken.update(broken)
    registry.load_plugins.cache_clear()


def test_every_pass_has_a_name_a_summary_and_a_place():
    found = passes()
    assert {"fold.norm_beta", "fold.zero_heads", "cleanup.dead_code"} <= found.keys()
    for name, cls in found.items():
        assert cls.name == name
        assert cls.__doc__
        assert cls.__module__.rpartition(".")[2] == name.rpartition(".")[2], (
            "one pass per file, called like the pass"
        )


def test_lookup_suggests_near_names():
    with pytest.raises(PipelineError, match="no pass 'fold.norm_betta'") as raised:
        registry.get("fold.norm_betta")
    assert "'fold.norm_beta'" in raised.value.fix
    with pytest.raises(PipelineError) as raised:
        registry.get("zero_heads")
    assert "'fold.zero_heads'" in raised.value.fix


def test_a_pass_is_made_from_itself_its_class_its_name_or_plain_data():
    wanted = FoldNormBeta(skip=("a",))
    assert registry.make(wanted) is wanted
    assert registry.make(FoldNormBeta) == registry.make("fold.norm_beta") == FoldNormBeta()
    assert registry.make({"pass": "fold.norm_beta", "skip": ["a"]}) == wanted
    for wrong in (3, {"name": "fold.norm_beta"}, int):
        with pytest.raises(PipelineError, match="is no pass"):
            registry.make(wrong)


def test_a_name_is_taken_once(clean_registry):
    @register("toy.once")
    class First(Pass):
        """One."""

    with pytest.raises(PipelineError, match="registered twice"):

        @register("toy.once")
        class Second(Pass):
            """Another."""


def test_a_cell_that_runs_again_registers_again(clean_registry):
    source = "class Again(Pass):\n    'x'\n"
    for _ in range(2):
        scope = {"Pass": Pass, "__name__": "__main__"}
        exec(source, scope)
        register("toy.again")(scope["Again"])
    assert registry.get("toy.again") is scope["Again"]


@pytest.mark.parametrize("name", ["fold", "Fold.x", "fold.", "fold.x y"])
def test_a_malformed_name_is_refused(name):
    with pytest.raises(PipelineError, match="is no name for a pass"):
        register(name)(FoldNormBeta)


def test_only_passes_are_registered():
    with pytest.raises(PipelineError, match="no subclass"):
        register("toy.int")(int)


class FakeEntryPoint:
    def __init__(self, name, load):
        self.name, self.load, self.value = name, load, f"{name}.passes"
        self.dist = type("Distribution", (), {"name": f"{name}-package"})


def test_a_broken_plugin_is_named_and_breaks_nothing_else(clean_registry, monkeypatch):
    def good():
        @register("good.nothing")
        class Nothing(Pass):
            """Does nothing."""

            numerics = Equivalent()

            def run(self, program, context):
                return PassResult()

    def bad():
        raise ImportError("no module named lost")

    points = [FakeEntryPoint("bad", bad), FakeEntryPoint("good", good)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "tersor.passes" else [])
    with pytest.warns(
        UserWarning, match="'bad' of package 'bad-package' cannot be loaded .*no module named lost"
    ):
        broken = load_plugins()
    assert broken == {"bad-package": "ImportError: no module named lost"}
    assert "good.nothing" in passes() and "fold.norm_beta" in passes()
    with pytest.raises(PipelineError) as raised:
        registry.get("bad.something")
    assert "bad-package: ImportError: no module named lost" in raised.value.why


PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "plugin"


@pytest.fixture(scope="session")
def installed_plugin(tmp_path_factory) -> Path:
    """The example package, installed into a folder of its own (nothing is downloaded)."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    source = tmp_path_factory.mktemp("source") / "plugin"
    # pip builds inside the source folder
    subprocess.run(["cp", "-r", str(PLUGIN), str(source)], check=True)
    result = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def run_with(plugin: Path, code: str) -> str:
    script = f"import sys; sys.path.insert(0, {str(plugin)!r})\n" + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_installed_package_brings_a_pass_and_an_op(installed_plugin):
    printed = run_with(
        installed_plugin,
        """
        import torch
        from tersor.ir import Dim, Program, Range, Value, ops, verify
        from tersor.passes import Pipeline, passes

        assert "tersor_squash.activations" in passes()
        made = Program()
        function = made.add_function("main", {"batch": Range(1, 4)})
        x = function.add_input("x", Value("float32", (Dim.symbol("batch"), 8)))
        function.set_outputs({"y": function.builder().gelu(x)})
        after, report = Pipeline(["tersor_squash.activations"]).run(made)
        verify(after)
        (node,) = after.main.calls()
        print(node.target.name, len(report.steps[0].changes))
        value = torch.randn(3, 8)
        assert torch.equal(after(x=value)["y"], torch.ops.tersor_squash.squash(value, bound=3.0))
        assert ops.captured(torch.ops.tersor_squash.squash.default) is node.target

        scratch = Program().add_function("main")
        operand = scratch.add_input("x", Value("float32", (3, 8)))
        scratch.set_outputs({"y": node.target.decompose(scratch.builder(), operand, bound=3.0)})
        from tersor.ir import run
        assert torch.allclose(run(scratch, {"x": value})["y"], after(x=value)["y"])
        """,
    )
    assert printed.split() == ["tersor_squash.squash", "1"]


def test_without_the_package_its_pass_is_unknown():
    assert "tersor_squash.activations" not in passes()
