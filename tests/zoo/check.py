"""Checks one model of the zoo: captured from torch and from its own ONNX file, compiled, compared."""

from __future__ import annotations

import hashlib
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import tersor
from tersor.codegen.compare import relative_error
from tersor.errors import TersorError
from tersor.frontends.torch_export import flatten_outputs
from tersor.ir import Dim, Program, run
from tersor.ir.matching import COMMUTATIVE, is_call, is_number
from tersor.ir.program import Function
from tests.zoo.model import KINDS, Inputs, ZooModel

TOLERANCE = 1e-5
ROUTES = ("torch", "onnx")


@dataclass(frozen=True)
class Route:
    """What came of one way into a program.

    Attributes:
        failure: why there is no program; the other fields say nothing then.
        error: the worst difference to torch over all outputs and sizes, relative to each output's scale.
        operations: how often the canonical program has each.
        sites: the names of its places.
        structure: hash of the graph without names, order and the contents of parameters.
        decomposed: attentions, norms and GELUs that are still several operations.
        program: as captured.
    """

    failure: str = ""
    error: float = math.inf
    operations: Counter[str] = field(default_factory=Counter)
    sites: frozenset[str] = frozenset()
    structure: str = ""
    decomposed: Counter[str] = field(default_factory=Counter)
    program: Program | None = None


@dataclass(frozen=True)
class ZooResult:
    """A model's routes by name ("torch", "onnx" and, where asked for, "torchscript")."""

    model: ZooModel
    routes: dict[str, Route]

    @property
    def same_operations(self) -> bool:
        return self._same(lambda r: r.operations)

    @property
    def same_structure(self) -> bool:
        return self._same(lambda r: r.structure)

    @property
    def same_sites(self) -> bool:
        return self._same(lambda r: r.sites)

    def _same(self, part: Any) -> bool:
        first, second = (self.routes[name] for name in ROUTES)
        return not first.failure and not second.failure and part(first) == part(second)

    @property
    def decomposed(self) -> Counter[str]:
        """The most of each kind that either route leaves."""
        return self.routes["torch"].decomposed | self.routes["onnx"].decomposed

    def shortcomings(self) -> dict[str, str]:
        """What does not hold, by `KINDS`, with what was seen."""
        seen = {}
        for name in ROUTES:
            route = self.routes[name]
            if route.failure:
                seen[name] = route.failure
            elif not route.error <= TOLERANCE:
                seen[name] = f"its output is off by {route.error:.1e} of its scale"
        if not any(self.routes[name].failure for name in ROUTES):
            torch_route, onnx_route = (self.routes[name] for name in ROUTES)
            if not self.same_operations:
                seen["operations"] = _difference(torch_route.operations, onnx_route.operations)
            if not self.same_sites:
                seen["sites"] = _difference(Counter(torch_route.sites), Counter(onnx_route.sites))
        return seen | {kind: f"{count} of them" for kind, count in self.decomposed.items()}

    def surprises(self) -> list[str]:
        """Shortcomings without a reason, and reasons without a shortcoming; empty for a model that is as it should."""
        seen, known = self.shortcomings(), self.model.exceptions
        missing = [f"{KINDS[k]}: {what}" for k, what in seen.items() if k not in known]
        return missing + [f"no longer true: {KINDS[k]} ({known[k]})" for k in known.keys() - seen.keys()]


def _difference(first: Counter, second: Counter) -> str:
    return f"only from torch: {dict(first - second)}, only from ONNX: {dict(second - first)}"


def check(model: ZooModel, thorough: bool = True, torchscript: bool = False) -> ZooResult:
    """Runs every route of a model at every one of its sizes.

    Args:
        thorough: compiles the program of each route, with its dynamic dimensions. Otherwise the programs are run in
            torch, and only the one from ONNX is compiled, with the sizes of the example.
        torchscript: also the older exporter of torch (``torch.onnx.export(dynamo=False)``).
    """
    module = model.build()
    expected = [_reference(module, model.inputs(**sizes)) for sizes in model.sizes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        sources: dict[str, Any] = {
            "torch": lambda: (module, model.example()),
            "onnx": lambda: (export(model, module, path), None),
        }
        if torchscript:
            sources["torchscript"] = lambda: (export_torchscript(model, module, path), None)
        routes = {name: _route(source, model, expected, thorough) for name, source in sources.items()}
    if not thorough and not routes["onnx"].failure:
        routes["onnx"] = _with_static_code(model, routes["onnx"], expected[0])
    return ZooResult(model, routes)


def _route(source: Any, model: ZooModel, expected: list, compiled: bool) -> Route:
    try:
        origin, example = source()
        program = tersor.capture(origin, example, model.dynamic)
        call = _compile(program) if compiled else lambda **inputs: run(program.main, inputs)
        pairs = zip(model.sizes, expected, strict=True)
        error = max(_error(call(**model.inputs(**sizes)), wanted) for sizes, wanted in pairs)
    except ExportError as failure:
        return Route(failure=f"torch.onnx.export: {failure}")
    except TersorError as failure:
        return Route(failure=str(failure))
    except Exception as failure:  # a mistake of ours: the other models are checked all the same
        return Route(failure=f"crashed with {type(failure).__name__}: {failure}")
    function = program.main
    return Route(
        "",
        error,
        Counter(n.target.name for n in function.calls()),
        frozenset(n.meta["site"].removeprefix("model_.") for n in function.calls() if "site" in n.meta),
        structure(function),
        decomposed(function),
        program,
    )


def _with_static_code(model: ZooModel, route: Route, expected: list) -> Route:
    """The route, with the error of native code for the example's sizes, which is quickly made."""
    program = route.program
    call = _compile(program.specialize({n: s for n, s in model.sizes[0].items() if n in program.main.dims}))
    return replace(route, error=max(route.error, _error(call(**model.example()), expected)))


def _compile(program: Program) -> tersor.CompiledModel:
    """Without the comparison that belongs to compiling: `check` compares with torch itself."""
    return tersor.compile(program, recipe="fp32", threads=1, verify=False)


def _error(outputs: Mapping[str, torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Outputs have other names in a file, but the same order."""
    return max(relative_error(a, e) for a, e in zip(outputs.values(), expected, strict=True))


def _reference(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(flatten_outputs(module(**inputs)).values())


# -- exporters


class ExportError(Exception):
    """torch's exporter failed, before any of our code saw the model."""


class _Positional(nn.Module):
    """The TorchScript exporter takes positional arguments and returns tuples."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model_, self.names = model, names

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flatten_outputs(self.model_(**dict(zip(self.names, arguments, strict=True)))).values())


def export(model: ZooModel, module: nn.Module, path: Path) -> Path:
    """The model's file by torch.onnx.export's default exporter, with its dynamic dimensions by name.

    Raises:
        ExportError: with the first line that says why.
    """
    dims = {
        name: torch.export.Dim(name, min=low, max=high)
        for axes in model.dynamic.values()
        for name, low, high in axes.values()
    }
    inputs = model.example()
    shapes = {n: {a: dims[d[0]] for a, d in model.dynamic.get(n, {}).items()} for n in inputs}
    with _quiet():
        program = torch.onnx.export(
            module, (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes if dims else None, verbose=False
        )
        program.save(str(path))
    return path


def export_torchscript(model: ZooModel, module: nn.Module, path: Path) -> Path:
    """The model's file by torch's older exporter.

    Raises:
        ExportError: with the first line that says why.
    """
    inputs = model.example()
    axes = {n: {a: d[0] for a, d in dims.items()} for n, dims in model.dynamic.items()}
    with _quiet():
        torch.onnx.export(
            _Positional(module, list(inputs)), tuple(inputs.values()), str(path), dynamo=False, opset_version=17,
            input_names=list(inputs), dynamic_axes=axes,
        )  # fmt: skip
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """No pages of warnings, and the exporter's many kinds of errors as one."""
    silenced = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # whatever the exporter raises
        raise ExportError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.disable(silenced)


# -- what a program looks like


def structure(function: Function) -> str:
    """Hash of signature and operations; operands of commutative operations in any order, parameters by their type."""
    hashes: dict[fx.Node, str] = {}

    def encode(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return hashes[argument]
        if isinstance(argument, list | tuple):
            return [encode(a) for a in argument]
        return float(f"{argument:.5g}") if isinstance(argument, float) else str(argument)

    for node in function.nodes:
        if node.op == "output":
            line: Any = encode(node.args)
        elif node.op != "call_function":
            line = [node.op, node.target if node.op == "placeholder" else "", str(node.meta["value"])]
        else:
            arguments = {k: encode(a) for k, a in node.target.bind(node.args, node.kwargs).items()}
            if node.target.name in COMMUTATIVE:
                arguments = {"operands": sorted(map(str, arguments.values()))}
            line = [node.target.name, arguments]
        hashes[node] = hashlib.sha256(repr(line).encode()).hexdigest()
    return hashlib.sha256(repr(sorted(hashes.values())).encode()).hexdigest()


_ELEMENTWISE = ("add", "sub", "mul", "div", "neg", "pow", "where", "cast", "maximum", "minimum")
_LAYOUT = ("reshape", "permute", "expand", "slice", "concat", "pad")
_FAR = 12  # operations that are looked at on each side


def decomposed(function: Function) -> Counter[str]:
    """Attentions, norms and GELUs that are still several operations.

    An attention is a softmax between two products, whatever masks, biases, moves and scales lie between; a norm is a
    mean (or a sum divided by a number) whose square root is taken; a GELU is an erf, a tanh of a polynomial with the
    coefficient 0.044715, or x times the sigmoid of a multiple of x.
    """
    left: Counter[str] = Counter()
    left["attention"] = sum(
        _reaches(n, "matmul", _operands, (*_ELEMENTWISE, *_LAYOUT))
        and _reaches(n, "matmul", _users, (*_ELEMENTWISE, *_LAYOUT))
        for n in function.calls("softmax")
    )
    left["norm"] = sum(map(_is_norm, function.calls("sqrt", "rsqrt", "pow")))
    left["gelu"] = len(function.calls("erf")) + sum(map(_is_gelu, function.calls("tanh", "sigmoid")))
    return +left


def _operands(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


def _users(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


def _reaches(node: fx.Node, name: str, step: Any, through: tuple[str, ...]) -> bool:
    """Whether an operation is found from a node, over others of the names in ``through`` only."""
    front, seen = [node], {node}
    for _ in range(_FAR):
        following = [n for f in front for n in step(f) if n not in seen]
        if any(is_call(n, name) for n in following):
            return True
        front = [n for n in following if is_call(n, *through)]
        seen.update(front)
    return False


def _is_norm(root: fx.Node) -> bool:
    if root.target.name == "pow" and root.args[1] not in (0.5, -0.5):
        return False
    node = root.args[0]
    while is_call(node, "add", "maximum", "cast") and any(map(is_number, node.args)) | (len(node.args) == 1):
        node = next(a for a in node.args if isinstance(a, fx.Node))
    counted = is_call(node, "div", "mul") and is_number(node.args[1]) and is_call(node.args[0], "sum")
    return is_call(node, "mean") or counted


def _is_gelu(node: fx.Node) -> bool:
    x = node.args[0]
    if node.target.name == "sigmoid":
        scaled = is_call(x, "mul") and any(map(is_number, x.args))
        inner = next(a for a in x.args if isinstance(a, fx.Node)) if scaled else None
        return any(is_call(user, "mul") and inner in user.args for user in node.users)
    front = [x]
    for _ in range(6):
        front = [f for f in front if is_call(f, *_ELEMENTWISE)]
        if any(is_number(a) and math.isclose(a, 0.044715, rel_tol=1e-4) for f in front for a in f.args):
            return True
        front = [a for f in front for a in f.args if isinstance(a, fx.Node | Dim)]
    return False
