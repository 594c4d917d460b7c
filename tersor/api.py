"""The front door: capture, compress, compile in one call. It wires the rooms together and holds no algorithms."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tersor.codegen.runtime import CompiledModel, load
from tersor.codegen.runtime.folder import check_place
from tersor.codegen.runtime.threads import check as check_threads
from tersor.cross import CrossCompiled
from tersor.errors import InputError, PipelineError, TargetError
from tersor.ir.program import Program
from tersor.passes import Context, Pipeline, load_plugins
from tersor.passes.calibration import Calibration, Dataset
from tersor.passes.gates import Fidelity
from tersor.passes.recipes import get as get_recipe
from tersor.targets import Target, missing_on_host, resolve

if TYPE_CHECKING:
    from torch import nn

    from tersor.passes.analysis import Analysis

Dynamic = Mapping[str, Mapping[int, tuple[str, int, int]]] | Literal["auto"]
Recipe = str | Path | Sequence[Any] | Pipeline
Progress = Callable[[str], None]


def capture(
    model: nn.Module | str | Path,
    example_inputs: Mapping[str, Any] | tuple | None = None,
    dynamic: Dynamic | None = None,
    *,
    name: str = "main",
    into: Program | None = None,
) -> Program:
    """Turns a model into a program; buffers that it writes to (caches of keys and values) become states.

    Args:
        model: a torch module, a transformers model, a local folder with config.json and safetensors, or an ONNX
            model (the path of an .onnx file, or a ModelProto; needs the ``onnx`` extra).
        example_inputs: tensors by input name, or a tuple in the order of ``forward``; made for the architecture
            where absent and the model is one of transformers'.
        dynamic: ``{"input_ids": {0: ("batch", 1, 8), 1: ("length", 1, 512)}}``: axes whose size may vary, with a
            name (equal names are equal sizes), the smallest and the largest size. In models of transformers, masks
            and ids of the same text follow. ``"auto"`` gives those a batch of 1 to 8 and every length they can take.
        name: of the program's function.
        into: a program to add this function to (and returned), instead of a new one: prefill and decode, encoder and
            decoder. Functions share states by name, and parameters where name and contents are equal.

    Raises:
        CaptureError: the model cannot be exported; UnsupportedOpError lists every unsupported operation at once.
        ProgramError: ``into`` has a state of this name and another shape.
        InputError: the inputs do not fit, or a weight holds NaN or infinity.
    """
    from tersor import frontends

    load_plugins()  # their operations may occur in the model
    return frontends.capture(model, example_inputs, dynamic, name=name, into=into)


def compile(
    model: nn.Module | Program | str | Path,
    example_inputs: Mapping[str, Any] | tuple | None = None,
    *,
    target: str | Target = "native",
    recipe: Recipe = "fp32",
    dynamic: Dynamic | None = None,
    threads: int | None = None,
    tune_minutes: float = 0.0,
    calibration: Any = None,
    evaluation: Iterable[Mapping[str, Any]] | None = None,
    verify: bool = True,
    profile: bool = False,
    cache: str | Path | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> CompiledModel | CrossCompiled:
    """Compiles a model to native code for a target: capture, the recipe's passes, code generation, comparison.

    Args:
        model, example_inputs, dynamic: as for `capture`; a `Program` is taken as it is.
        target: a name that ``tersor targets`` lists, or a description.
        recipe: a named recipe, a list of passes, a pipeline, or the path of a TOML file.
        threads: threads a call uses, at most as many as this process has CPUs; None means one per physical core
            at run time.
        tune_minutes: time to search for better kernel tiles on this machine; 0 takes the analytic choice.
        calibration: data for the passes that need some: a list, a DataLoader or any iterable of inputs by name, a
            folder of .npz files, or a `Calibration`, which also says what is padding and how much to hold out.
        evaluation: held-out inputs by name; stages with a budget are judged on them, against the captured model.
            Without them on what is held out of the calibration data.
        verify: compares the compiled code with the program on random inputs and on a held-out batch of the calibration
            data, codes layer by layer, and refuses when it disagrees.
        profile: times the program's kernels before each lossy pass, so that the report says which part of the time
            each layer takes; on targets whose code this machine can run.
        cache: folder in which results of passes and statistics are kept, so that a run that was killed goes on where
            it stopped; None keeps nothing.
        output: folder to save the artifact to (as ``compiled.save`` does).
        progress: called with the name of each step as it starts.

    Returns:
        The model, to be called, saved and exported; for a target whose code this machine cannot run a
        `CrossCompiled`, to be exported. ``compiled.export_c(folder)`` writes it as plain C.

    Raises:
        TersorError: the subclass says which step failed; nothing half-written stays behind.
    """
    from tersor.codegen import build, export_c, prepare
    from tersor.codegen.latency import Latency

    report_step = progress or (lambda step: None)
    # What can be wrong with the options is said before any work.
    resolved, pipeline = resolve(target), _pipeline(recipe)
    threads = None if threads is None else check_threads(threads, "threads")
    if isinstance(tune_minutes, bool) or not isinstance(tune_minutes, int | float) or tune_minutes < 0:
        raise InputError(
            f"tune_minutes is {tune_minutes!r}", fix="give a number of minutes, or 0 for no tuning"
        )
    foreign = bool(missing_on_host(resolved)) or resolved.os not in (None, "linux")
    if foreign and output is not None:
        raise TargetError(
            f"there is no artifact for target {resolved.name!r}",
            why="artifacts run in a Python process of this machine",
            fix="leave out output, and export C: compiled.export_c(folder), or --export-c FOLDER",
        )
    pipeline.check_data(calibration is not None)
    given = None if calibration is None else Calibration.of(calibration)
    folder = _scratch_folder() if output is None else check_place(output)
    program = _program(model, example_inputs, dynamic, report_step)
    report_step("running passes")
    data = None if given is None else Dataset.read(given, program.main)
    latency = None if missing_on_host(resolved) else Latency(resolved)
    context = Context(
        target=resolved,
        calibration=data,
        evaluate=None if evaluation is None else Fidelity(program, evaluation),
        measure=latency,
        profile=latency.by_site if latency and profile else None,
        cache=cache,
        progress=report_step,
    )
    program, report = pipeline.run(program, context)
    compilation = prepare(program, resolved, tune_minutes, report_step, verify=verify)
    exporter = partial(export_c, compilation, recipe=pipeline.name, progress=report_step)
    if foreign:
        return CrossCompiled(resolved, compilation.signatures, report.to_dict(), exporter)
    build(
        compilation,
        folder,
        recipe=pipeline.name,
        threads=threads,
        verify=verify,
        batches={} if data is None else {program.main.name: [data.held_out[0].inputs]},
        report=report.to_dict(),
        progress=report_step,
    )
    compiled = load(folder, threads=threads, temporary=output is None)
    compiled.exporter = exporter
    return compiled


def explain(recipe: Recipe = "fp32", *, target: str | Target = "native") -> str:
    """The plan that `compile` would follow, as text; nothing runs.

    Raises:
        PipelineError: the recipe is wrong; every violation is listed.
        TargetError: the target is unknown.
    """
    from tersor.targets import describe

    return f"{_pipeline(recipe).explain()}\n\n{describe(resolve(target))}"


def analyze(
    model: nn.Module | Program | str | Path,
    example_inputs: Mapping[str, Any] | tuple | None = None,
    *,
    calibration: Any = None,
    target: str | Target = "native",
    dynamic: Dynamic | None = None,
    schemes: Sequence[str] = ("int8", "int8-dynamic", "bf16"),
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    batches: int = 4,
    latency: bool = True,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """What each linear layer and each attention costs when it alone is quantized, and why; nothing is changed.

    Args:
        model, example_inputs, dynamic: as for `capture`; a `Program` is taken as it is, so the result of a pipeline
            (folds, smoothing) can be looked at as well.
        calibration: as for `compile`, and needed; errors are measured on the part that is held out.
        target: what shares of latency are measured for.
        schemes: ways to quantize a site.
        only, skip: globs of sites.
        batches: held-out batches to compare outputs on, at most; each costs about half a run of the program per site
            and scheme.
        latency: times the program's kernels, where this machine can run code for the target.
        cache: folder in which statistics are kept.
        progress: called with the name of each step as it starts.

    Returns:
        The sites, the most expensive first: ``print`` it, or ``save`` it as JSON.

    Raises:
        InputError: there is no calibration data, or it does not fit the program, or an option is wrong.
    """
    from tersor.codegen.latency import Latency
    from tersor.passes import analysis
    from tersor.passes.analysis.sensitivity import check_options

    step = progress or (lambda name: None)
    resolved = resolve(target)
    check_options(calibration, schemes, batches)
    program = _program(model, example_inputs, dynamic, step)
    return analysis.analyze(
        program,
        calibration,
        schemes=schemes,
        only=only,
        skip=skip,
        batches=batches,
        profile=Latency(resolved).by_site if latency and not missing_on_host(resolved) else None,
        cache=cache,
        step=step,
    )


def _program(
    model: nn.Module | Program | str | Path,
    example_inputs: Mapping[str, Any] | tuple | None,
    dynamic: Dynamic | None,
    step: Progress,
) -> Program:
    """A program as it is, or what a model is captured as."""
    if not isinstance(model, Program):
        step("capturing")
        return capture(model, example_inputs, dynamic)
    if example_inputs is not None or dynamic is not None:
        raise InputError(
            "a program has its signature already",
            fix="leave out example_inputs and dynamic, or give the model",
        )
    return model


def _scratch_folder() -> Path:
    """A name for an artifact that goes with the process; writing an artifact is atomic, so nothing is made yet."""
    return Path(tempfile.gettempdir(), f"tersor-{secrets.token_hex(8)}.tersor")


def _pipeline(recipe: Recipe) -> Pipeline:
    if isinstance(recipe, Pipeline):
        return recipe
    if isinstance(recipe, str | Path):
        return get_recipe(recipe)
    if not isinstance(recipe, Sequence):
        raise PipelineError(
            f"a recipe is not a {type(recipe).__name__}",
            fix="give a name that `tersor recipes` lists, a list of passes, a Pipeline, or the path of a .toml file",
        )
    return Pipeline(recipe)
