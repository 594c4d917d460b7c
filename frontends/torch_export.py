"""Captures a ``torch.nn.Module`` through torch.export.

The model is traced in evaluation mode with its inputs as keywords and functionalised; each ATen operator then becomes
dialect operations (`tersor.frontends.aten`), and the program is brought to its canonical form (`ir.canonicalize`).
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import fx, nn
from torch._decomp import get_decompositions
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from tersor.errors import CaptureError, InputError, ProgramError, TersorError, UnsupportedOpError
from tersor.frontends import aten_quantized, aten_selection, aten_spatial  # noqa: F401
from tersor.frontends.aten import CONVERTERS, Context
from tersor.frontends.dynamic import DynamicDims, export_dims, read_dynamic
from tersor.frontends.origin import module_path, source_line, translate_export_error
from tersor.frontends.symbols import Symbols
from tersor.ir import Program, Value, ops, verify
from tersor.ir.canonicalize import canonicalize

log = logging.getLogger("tersor.capture")
RUNS = "check that model(**example_inputs) runs, and that dtypes agree"
ROOT = "model"  # the attribute under which `_Traced` holds the user's model


def capture(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    dynamic: Mapping[str, Mapping[int, tuple[str, int, int]]] | None = None,
    *,
    name: str = "main",
    allow_nonfinite: bool = False,
    states: Collection[str] = (),
) -> Program:
    """A program that computes what ``model`` computes in evaluation mode.

    Buffers that the model writes to become states of the program.

    Args:
        model: any module; its training flags and attributes are the same afterwards.
        example_inputs: arguments of ``forward`` by name, or a tuple in its order. Tensors (torch or numpy) become
            inputs of the program; None, numbers and strings are built in as constants.
        dynamic: input name -> axis -> (dimension name, smallest size, largest size). Axes that share a name always
            have equal sizes. Example sizes of 1 are enlarged, since torch.export cannot trace them.
        name: of the program's function.
        allow_nonfinite: accept NaN and infinity in parameters.
        states: buffers that are states even if this model only reads them.

    Raises:
        InputError: example inputs, dynamic dimensions or weights are unusable.
        UnsupportedOpError: the model has operators outside the dialect; the message lists all of them.
        CaptureError: torch.export cannot trace the model, or an output is not a tensor.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}", fix="give a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "the model is a TorchScript module",
            why="torch.export traces Python code, which it no longer has",
            fix="give the module that it was made from",
        )
    tensors, constants = _bind_inputs(model, example_inputs)
    dims = read_dynamic({} if dynamic is None else dynamic, tensors)
    _check_weights(model, allow_nonfinite)
    traced = _Traced(model, constants)
    exported = _export(traced, dims.enlarge(tensors), dims)
    program = _convert(exported, traced.outputs.names, dims, name, states)
    for note in canonicalize(program):
        log.info(note)
    verify(program)
    return program


# -- the model as torch.export sees it


class _OutputNames:
    """A plain object: torch.export puts back lists and dicts that a module holds after tracing."""

    def __init__(self) -> None:
        self.names: list[str] = []


class _Traced(nn.Module):
    """Calls the model with keywords; results come out as a flat list, their names are kept aside."""

    def __init__(self, model: nn.Module, constants: Mapping[str, Any]):
        super().__init__()
        setattr(self, ROOT, model)
        self.constants = dict(constants)
        self.outputs = _OutputNames()

    def forward(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        results = flatten_outputs(getattr(self, ROOT)(**inputs, **self.constants))
        self.outputs.names = list(results)
        return list(results.values())


def flatten_outputs(result: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a nested result by dotted name: keys of mappings, fields of dataclasses, positions of sequences.

    A single tensor is called "output"; None is left out.

    Raises:
        CaptureError: something in it is neither a tensor nor a container.
    """
    if result is None:
        return {}
    if isinstance(result, torch.Tensor):
        return {prefix or "output": result}
    if isinstance(result, Mapping):
        items = result.items()
    elif is_dataclass(result):
        items = [(f.name, getattr(result, f.name)) for f in fields(result)]
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        items = zip(result._fields, result, strict=True)
    elif isinstance(result, list | tuple):
        items = (
            ((str(i), r) for i, r in enumerate(result))
            if len(result) > 1 or prefix
            else [("output", result[0])]
        )
    else:
        raise CaptureError(
            f"the model's output {prefix or '(the whole)'} is a {type(result).__name__}",
            why="a program returns tensors, in dicts, dataclasses, tuples and lists",
            fix="return tensors only (for a transformers model: use_cache=False)",
        )
    flat: dict[str, torch.Tensor] = {}
    for key, value in items:
        flat.update(flatten_outputs(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


@contextmanager
def _evaluation(model: nn.Module):
    """Evaluation mode without gradients or fused inference kernels; the model is left as it was found."""
    training = {module: module.training for module in model.modules()}
    silenced = logging.root.manager.disable
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        logging.disable(logging.ERROR)  # torch logs pages for a failure that we put into words
        # The fast path of nn.TransformerEncoder is one opaque operator that hides what the layer computes.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), warnings.catch_warnings():
            # torch's own export code trips over its own deprecation.
            warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        logging.disable(silenced)
        for module, flag in training.items():
            module.training = flag


def by_name(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Example inputs by the names that the model's forward gives them, arrays as tensors; one alone is the first.

    Raises:
        InputError: there are more than arguments, or they are neither named nor in an order.
    """
    named = _argument_names(model)
    if _is_array(example_inputs):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs):
        return {name: _as_tensor(value) for name, value in example_inputs.items()}
    if not isinstance(example_inputs, list | tuple):
        raise InputError(
            f"the example inputs are {_described(example_inputs)}",
            fix=f"give a dict of tensors by argument name ({', '.join(named)}), or a tuple in that order",
        )
    if len(example_inputs) > len(named):
        raise InputError(
            f"{len(example_inputs)} example inputs for a model of {len(named)} arguments",
            why=f"forward takes {', '.join(named) or 'no argument that has a name'}",
            fix="leave out what it does not take; a forward(*args) needs a module around it whose forward names them",
        )
    return {name: _as_tensor(value) for name, value in zip(named, example_inputs, strict=False)}


def _argument_names(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters
    return [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "__array__")


def _as_tensor(value: Any) -> Any:
    return torch.as_tensor(value) if _is_array(value) else value


def _described(value: Any) -> str:
    kind = f"a {type(value).__name__}"
    return f"{kind} with the keys {', '.join(map(repr, value))}" if isinstance(value, Mapping) else kind


def _bind_inputs(model: nn.Module, example_inputs: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and constants by name, in the order of the model's forward."""
    parameters = inspect.signature(model.forward).parameters
    named = _argument_names(model)
    example_inputs = by_name(model, example_inputs)
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # forward(**kwargs) takes every name, but one nearly right is a mistake that it would swallow
    unknown = [
        n
        for n in example_inputs
        if n not in named and (not anything or get_close_matches(n, set(named) - set(example_inputs), 1, 0.9))
    ]
    missing = [
        n for n in named if parameters[n].default is inspect.Parameter.empty and n not in example_inputs
    ]
    if unknown or missing:
        raise InputError(
            "the example inputs do not fit the model",
            why="; ".join(
                f"{what}: {', '.join(names)}"
                for what, names in (("unknown", unknown), ("missing", missing))
                if names
            ),
            fix=f"forward takes {', '.join(named)}",
        )
    ordered = [n for n in named if n in example_inputs] + [n for n in example_inputs if n not in named]
    tensors: dict[str, torch.Tensor] = {}
    constants: dict[str, Any] = {}
    for name in ordered:
        value = example_inputs[name]
        if isinstance(value, torch.Tensor):
            if not value.numel():
                raise InputError(
                    f"example input {name!r} is empty",
                    why=f"its shape is {list(value.shape)}",
                    fix="give an example with at least one element",
                )
            tensors[name] = value.detach()
        elif value is None or isinstance(value, bool | int | float | str):
            constants[name] = value
        else:
            raise InputError(
                f"example input {name!r} is a {type(value).__name__}",
                fix="give a tensor, or a constant (None, a number, a string)",
            )
    if not tensors:
        raise InputError(
            "there is no tensor among the example inputs",
            why=f"forward takes {', '.join(named) or 'no argument'}",
            fix="give at least one: what never changes is a constant of the model, and needs no compiling",
        )
    return tensors, constants


def _check_weights(model: nn.Module, allow_nonfinite: bool) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise InputError(f"parameter {name!r} has no data (device 'meta')", fix="load the weights first")
        if allow_nonfinite or not parameter.is_floating_point():
            continue
        # A finite sum proves that all are finite, at a fraction of the cost of looking at each.
        if not torch.isfinite(parameter.detach().sum()) and not (finite := torch.isfinite(parameter)).all():
            count = int((~finite).sum())
            raise InputError(
                f"parameter {name!r} holds NaN or infinity",
                why=f"{count} of {parameter.numel()} values are not finite",
                fix="repair the checkpoint; or compile the program of "
                "tersor.frontends.capture(..., allow_nonfinite=True)",
            )


def _export(traced: _Traced, tensors: dict[str, torch.Tensor], dims: DynamicDims) -> ExportedProgram:
    aten_quantized.enter_converters()
    with _evaluation(getattr(traced, ROOT)):
        try:
            exported = torch.export.export(
                traced, (tensors,), dynamic_shapes=(export_dims(dims, tensors),), strict=False
            )
            if not _is_functional(exported):
                # The empty table functionalises and keeps composite operators (linear, attention, norms) whole.
                exported = exported.run_decompositions({})
            return _decompose_rest(exported)
        except TersorError:
            raise
        except Exception as error:
            raise translate_export_error(error, dims) from error


def _is_functional(exported: ExportedProgram) -> bool:
    """Whether nothing is written in place, so that torch need not trace a second time: that takes longer than
    all the rest."""
    return not any(
        isinstance(n.target, HigherOrderOperator)
        or (isinstance(n.target, OpOverload) and n.target._schema.is_mutable)
        for n in exported.graph.nodes
    )


def _decompose_rest(exported: ExportedProgram) -> ExportedProgram:
    """Takes apart, with torch's own decompositions, the operators that have no converter."""
    composite = torch.export.default_decompositions()
    tried: set[Any] = set()
    while True:
        missing = {n.target for n in _unsupported(exported)} - tried
        known = get_decompositions(list(missing))
        known |= {target: composite[target] for target in missing if target in composite}
        if not known:
            return exported
        tried |= missing
        exported = exported.run_decompositions(known)


# -- the exported graph as a program


def _live(exported: ExportedProgram) -> list[fx.Node]:
    """Nodes that a result depends on, in order; assertions and dead branches are not among them."""
    live: set[fx.Node] = set()
    for node in reversed(exported.graph.nodes):
        if node.op in ("output", "placeholder") or node in live:
            live.add(node)
            live.update(node.all_input_nodes)
    return [n for n in exported.graph.nodes if n in live]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), bool | int | torch.SymInt)


def _unsupported(exported: ExportedProgram) -> list[fx.Node]:
    return [
        n
        for n in _live(exported)
        if n.op == "call_function"
        and not _is_size(n)
        and n.target not in CONVERTERS
        and ops.captured(n.target) is None
        and getattr(n.target, "__name__", "") != "getitem"
    ]


def _convert(
    exported: ExportedProgram,
    output_names: Sequence[str],
    dims: DynamicDims,
    name: str,
    states: Collection[str],
) -> Program:
    written = _written_buffers(exported)
    if unsupported := _unsupported(exported):
        raise _unsupported_error(unsupported)
    conversion = _Conversion(exported, dims, name, written, states)
    return conversion.run(output_names)


@dataclass
class _Conversion:
    """One pass over the exported graph."""

    exported: ExportedProgram
    dims: DynamicDims
    name: str
    written: Mapping[str, str]  # buffer -> the result that is its next value
    states: Collection[str]

    def run(self, output_names: Sequence[str]) -> Program:
        program = Program()
        self.function = program.add_function(self.name, self.dims.ranges)
        self.function.example = dict(self.dims.example)
        self.parameters: dict[tuple, str] = {}
        self.environment: dict[fx.Node, Any] = {}
        inputs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        self.symbols = Symbols(self._symbol_names(inputs), self.dims.ranges)
        for node in _live(self.exported):
            if node.op == "placeholder":
                self.environment[node] = self._placeholder(node, inputs[node.name])
            elif node.op == "call_function":
                self.environment[node] = self._call(node)
        ends = {node.name: node for node in self.exported.graph.output_node().args[0]}
        outputs = self.exported.graph_signature.output_specs
        results = [ends[spec.arg.name] for spec in outputs if spec.kind is OutputKind.USER_OUTPUT]
        if not results:
            raise CaptureError("the model returns no tensor", fix="return what is to be computed")
        if len(set(output_names)) != len(output_names):
            raise CaptureError(f"output names collide: {', '.join(output_names)}", fix="rename the outputs")
        self.function.set_outputs(
            {n: self.environment[r] for n, r in zip(output_names, results, strict=True)},
            {_buffer(target): self.environment[ends[new]] for target, new in self.written.items()},
        )
        program.drop_unused_parameters()
        return program

    def _symbol_names(self, inputs: Mapping[str, Any]) -> dict[Any, str]:
        names = {}
        for node in self.exported.graph.find_nodes(op="placeholder"):
            if inputs[node.name].kind is InputKind.USER_INPUT and isinstance(
                node.meta.get("val"), torch.Tensor
            ):
                for axis, dim in self.dims.axes.get(self._input_name(node), {}).items():
                    size = node.meta["val"].shape[axis]
                    if isinstance(size, torch.SymInt):
                        names[size.node.expr] = dim
        return names

    @staticmethod
    def _input_name(node: fx.Node) -> str:
        return node.target.removeprefix("inputs_")

    def _placeholder(self, node: fx.Node, spec: Any) -> Any:
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                return spec.arg.value
            return self.function.add_input(self._input_name(node), self.symbols.value(node.meta["val"]))
        if not isinstance(spec.arg, TensorArgument):
            raise CaptureError(
                f"the model holds {spec.target!r}, which is not a tensor", why=f"it is {spec.kind.name}"
            )
        store = (
            self.exported.constants if spec.kind is InputKind.CONSTANT_TENSOR else self.exported.state_dict
        )
        tensor = store[spec.target] if spec.target in store else self.exported.constants[spec.target]
        tensor, name = tensor.detach().cpu(), _buffer(spec.target)
        if spec.target in self.written or (spec.kind is InputKind.BUFFER and name in self.states):
            return self._state(name, tensor)
        # Tied weights are one tensor under several names: one parameter, called by the first of them.
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self.parameters or not tensor.numel():
            self.parameters[key] = self.function.parameters.add(name, tensor)
        return self.function.builder().read(self.parameters[key])

    def _state(self, name: str, tensor: torch.Tensor) -> fx.Node:
        if tensor.any():
            raise CaptureError(
                f"the model writes to the buffer {name!r} while it runs, and it does not begin as zeros",
                why="it would be a state of the program, and states begin as zeros",
                fix="set it to zeros before capture, return the new value as an output, or turn the update off in "
                "evaluation mode",
            )
        return self.function.add_state(name, Value.of(tensor))

    def _call(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if _is_size(node):
            return self.symbols.dim(value)
        node.meta["module"] = module_path(node, ROOT)
        node.meta["source"] = source_line(node)
        arguments = fx.map_arg(node.args, self.environment.__getitem__)
        keywords = fx.map_arg(node.kwargs, self.environment.__getitem__)
        if getattr(node.target, "__name__", "") == "getitem":
            return arguments[0][arguments[1]]
        try:
            expected = self._value(value)
            build = self.function.builder(like=node)
            if (op := ops.captured(node.target)) is not None:
                return self._third_party(build, op, node, arguments, keywords)
            result = CONVERTERS[node.target](Context(build, expected), *arguments, **keywords)
            return self._agreeing(build, result, expected)
        except TersorError as error:
            where = f"{node.meta['module'] or 'the model'} ({node.meta['source']})"
            misfit = isinstance(error, ProgramError)  # an operation refuses its operands
            fix = error.fix or (
                RUNS if misfit else "write this place with other operations, see docs/program.md"
            )
            raise CaptureError(error.what, where=where, why=error.why, fix=fix) from error

    def _value(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.symbols.value(value)
        if isinstance(value, list | tuple):
            return tuple(self._value(v) for v in value)
        return None

    def _third_party(self, build: Any, op: Any, node: fx.Node, arguments: Any, keywords: Any) -> fx.Node:
        """Operands by position, attributes by the names that the torch operator gives its arguments."""
        schema = [a.name for a in node.target._schema.arguments]
        given = {**dict(zip(schema, arguments, strict=False)), **keywords}
        attributes = {n: v for n, v in given.items() if n in op.attributes}
        return build.emit(op, *(v for n, v in given.items() if n not in op.attributes), **attributes)

    def _agreeing(self, build: Any, result: Any, expected: Any) -> Any:
        """A converter must reach the shape torch reached; a dtype that torch promoted otherwise is cast."""
        if isinstance(expected, tuple):
            return tuple(self._agreeing(build, r, e) for r, e in zip(result, expected, strict=True))
        if result is None or not isinstance(expected, Value):
            return result
        actual = result.meta["value"]
        if actual.shape != expected.shape:
            raise CaptureError(
                f"an operator became {actual}, torch has {expected}",
                why="this is a defect of Tersor",
                fix="report it, with the line of the model",
            )
        return result if actual.dtype == expected.dtype else build.cast(result, dtype=expected.dtype)


def _written_buffers(exported: ExportedProgram) -> dict[str, str]:
    """The buffers that the model writes to, and what in the graph is their next value.

    Raises:
        CaptureError: it writes to its inputs.
    """
    specs = exported.graph_signature.output_specs
    if inputs := [s.target for s in specs if s.kind is OutputKind.USER_INPUT_MUTATION]:
        raise CaptureError(
            f"the model writes to its inputs: {', '.join(n.removeprefix('inputs_') for n in inputs)}",
            why="a program's inputs belong to its caller",
            fix="keep what is written in a buffer (register_buffer), which becomes a state; or return the new value",
        )
    return {s.target: s.arg.name for s in specs if s.kind is OutputKind.BUFFER_MUTATION}


def _buffer(target: str) -> str:
    return target.removeprefix(f"{ROOT}.")


def _unsupported_error(nodes: Sequence[fx.Node]) -> UnsupportedOpError:
    counts = Counter(str(n.target) for n in nodes)
    places: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        place = f"{module_path(node, ROOT) or 'the model'} ({source_line(node) or 'source unknown'})"
        if place not in places[str(node.target)]:
            places[str(node.target)].append(place)
    lines = []
    for op, count in counts.most_common():
        shown = places[op][:3] + ([f"and {len(places[op]) - 3} more places"] if len(places[op]) > 3 else [])
        lines.append(f"  - {op}, {count} time{'s' if count > 1 else ''}: {'; '.join(shown)}")
    listed = "\n".join(lines)
    return UnsupportedOpError(
        f"operators of the model that are not in the dialect: {len(counts)}\n{listed}",
        fix="rewrite these places with supported operators, or add each with tersor.ir.register_op(name, reference, "
        "decompose=..., captures=(the operator,))",
    )
