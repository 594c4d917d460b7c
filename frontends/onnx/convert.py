"""An ONNX graph as a program: runs over the operators once, with sizes evaluated and branches decided on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from tersor.errors import CaptureError, InputError, ProgramError, TersorError, UnsupportedOpError
from tersor.frontends.onnx import (  # noqa: F401  their converters are entered
    contrib,
    elementwise,
    layout,
    nn,
    qoperator,
    quantized,
    reduction,
    selection,
    spatial,
)
from tersor.frontends.onnx.codes import Encoded, decoded_by
from tersor.frontends.onnx.naming import restore_weight_names
from tersor.frontends.onnx.products import scale_products
from tersor.frontends.onnx.reader import (
    STANDARD,
    Graph,
    LocalFunction,
    Model,
    Operator,
    Reference,
    StoredTensor,
    reads,
)
from tersor.frontends.onnx.table import CONVERTERS, Call, Converter, find_converter
from tersor.frontends.onnx.values import SMALL, Known, SizeCall, evaluate_sizes
from tersor.ir import Builder, Dim, Program, Range, Value
from tersor.ir.canonicalize.indices import TableTooShort
from tersor.ir.interpreter import execute
from tersor.ir.program import TOLD_SITE, Function

Environment = dict[str, "fx.Node | Known"]
_DEQUANTIZING = {"Cast", "Sub", "Mul", "Div", "Transpose", "Reshape", "Identity"}
DEEPEST = 50  # functions and branches inside each other
MOST_OPERATORS = 100_000  # once functions are written out; the largest Transformers have some ten thousand

_ADVICE = {
    "Loop": "a program is one fixed graph: unroll the loop before exporting, or export its body alone",
    "Scan": "a program is one fixed graph: unroll the scan before exporting",
    "NonZero": "the result's shape depends on values: use Where, or multiply by a mask",
    "Compress": "the result's shape depends on values: use Where, or multiply by a mask",
    "Unique": "the result's shape depends on values: compute it outside the model",
    "NonMaxSuppression": "cut the model before it, and run it on the program's results",
    "RandomNormal": "draw random numbers outside the model, and pass them in",
    "RandomNormalLike": "draw random numbers outside the model, and pass them in",
    "RandomUniform": "draw random numbers outside the model, and pass them in",
    "RandomUniformLike": "draw random numbers outside the model, and pass them in",
    "LSTM": "recurrent layers are not Transformers; there is no plan for them",
    "GRU": "recurrent layers are not Transformers; there is no plan for them",
    "RNN": "recurrent layers are not Transformers; there is no plan for them",
}
_ELSE = "export the model from torch, or without the optimisations that made this operator"


@dataclass(frozen=True)
class _Scope:
    """Where operators are read: what names mean, the opsets, the attributes of the function called."""

    values: Environment
    opsets: Mapping[str, int]
    attributes: Mapping[str, Any]
    depth: int = 0
    module: str = ""

    def version(self, domain: str) -> int:
        return self.opsets.get(domain, 1)


@dataclass
class _Missing:
    count: int = 0
    names: list[str] = field(default_factory=list)


class Conversion:
    """One pass over a model."""

    def __init__(
        self,
        model: Model,
        inputs: Mapping[str, Value],
        dims: Mapping[str, Range],
        name: str,
        allow_nonfinite: bool,
    ):
        self.model, self.inputs, self.allow_nonfinite = model, inputs, allow_nonfinite
        self.program = Program()
        self.function = self.program.add_function(name, dims)
        self.encoded: dict[str, Encoded] = {}  # by the parameter that holds the decoded values
        self.stored: dict[str, list[tuple[torch.Tensor, str]]] = defaultdict(list)

    def run(self) -> Program:
        """The program, not yet in canonical form.

        Raises:
            UnsupportedOpError: listing every operator without a converter.
            CaptureError: an operator is used in a way that has no counterpart.
        """
        graph = self.model.graph
        self._refuse_unsupported(graph)
        self._refuse_explosion(graph)
        values: Environment = {n: self.function.add_input(n, v) for n, v in self.inputs.items()}
        scope = _Scope(values, self.model.opsets, {})
        results = self._graph(graph, scope)
        build = self.function.builder()
        if len(set(graph.outputs)) != len(graph.outputs):
            raise InputError(f"outputs of the file have equal names: {', '.join(graph.outputs)}")
        self.function.set_outputs(
            {
                name: self._materialize(build, r) if isinstance(r, Known) else r
                for name, r in zip(graph.outputs, results, strict=True)
            }
        )
        scale_products(self.function, self.encoded)
        restore_weight_names(self.function)
        self.program.drop_unused_parameters()
        return self.program

    # -- graphs and operators

    def _graph(self, graph: Graph, scope: _Scope) -> list[fx.Node | Known]:
        if scope.depth > DEEPEST:
            raise CaptureError(
                "functions of the model call each other without end", why="recursion is not ONNX"
            )
        # A stored tensor is read when it is used, and shadows nothing: ONNX names are unique.
        tensors = {**graph.tensors}
        for operator in _live(graph):
            inputs = [self._value(name, scope, tensors) for name in operator.inputs]
            results = self._operator(operator, inputs, scope)
            for name, result in zip(operator.outputs, results, strict=False):
                if name and result is not None:
                    scope.values[name] = result
        return [self._value(name, scope, tensors) for name in graph.outputs]

    def _value(self, name: str, scope: _Scope, tensors: Mapping[str, StoredTensor]) -> Any:
        if not name:
            return None
        if name not in scope.values and name in tensors:
            scope.values[name] = Known(tensors[name].read(), name=name)
        if name not in scope.values:
            raise InputError(f"the ONNX file is damaged: nothing makes the value {name!r}")
        return scope.values[name]

    def _operator(self, operator: Operator, inputs: list[Any], scope: _Scope) -> tuple[Any, ...]:
        attributes = {
            name: scope.attributes.get(v.name) if isinstance(v, Reference) else v
            for name, v in operator.attributes.items()
        }
        attributes = {name: v for name, v in attributes.items() if v is not None}
        converter = find_converter(operator.domain, operator.op, scope.version(operator.domain))
        try:
            if (operator.domain, operator.op) == (STANDARD, "If"):
                return tuple(self._branch(operator, inputs, attributes, scope))
            if converter is not None:
                return self._convert(converter, operator, inputs, attributes, scope)
            local = self.model.functions.get((operator.domain, operator.op))
            if local is not None:
                return tuple(self._call(local, operator, inputs, attributes, scope))
            raise _unsupported_error({str(operator): _Missing(1, [operator.name])})
        except TersorError as error:
            if error.where is not None or isinstance(error, UnsupportedOpError | TableTooShort):
                raise
            place = operator.name or f"{operator.op} that makes {operator.outputs[0]!r}"
            where = " ".join(filter(None, (place, operator.source and f"({operator.source})")))
            kind = InputError if isinstance(error, InputError) else CaptureError
            fix = error.fix
            if isinstance(error, ProgramError) and self.function.dims:
                fix = (
                    f"if the exporter fixed a size that the file says varies ({', '.join(self.function.dims)}), export "
                    "it again, or fix it here: dynamic={input: {axis: (name, n, n)}}, --dynamic INPUT:AXIS=NAME:n..n"
                )
            raise kind(error.what, where=where, why=error.why, fix=fix) from error

    def _convert(
        self, converter: Converter, operator: Operator, inputs: list[Any], attributes: dict, scope: _Scope
    ) -> tuple[Any, ...]:
        if inputs and all(x is None or isinstance(x, Known) for x in inputs):
            result = self._fold(converter, operator, inputs, attributes)
            if result is not None:
                return result
        origin = _Origin({"module": operator.module or scope.module, "source": operator.source})
        if operator.told_site:
            origin.meta[TOLD_SITE] = operator.told_site
        call = Call(self.function.builder(like=origin), operator, inputs, attributes, self._materialize)
        return _as_tuple(_guarded(operator, lambda: converter(call)))

    def _branch(self, operator: Operator, inputs: list[Any], attributes: dict, scope: _Scope) -> list[Any]:
        condition = inputs[0]
        if not isinstance(condition, Known):
            raise CaptureError(
                "the model has an If that depends on the values of its inputs",
                why="a program is one fixed graph for all inputs",
                fix="export the model in evaluation mode with the branch decided, or use Where",
            )
        body = attributes.get("then_branch" if condition.number() else "else_branch")
        if not isinstance(body, Graph):
            raise InputError("the ONNX file is damaged: an If lacks a branch")
        self._refuse_unsupported(body)
        inner = _Scope({**scope.values}, scope.opsets, scope.attributes, scope.depth + 1, operator.module)
        return self._graph(body, inner)

    def _call(
        self, local: LocalFunction, operator: Operator, inputs: list[Any], attributes: dict, scope: _Scope
    ) -> list[Any]:
        given = dict(zip(local.graph.inputs, inputs, strict=False))
        values = {name: v for name, v in given.items() if v is not None}
        module = operator.module or scope.module
        attributes = {**local.defaults, **attributes}
        inner = _Scope(values, {**scope.opsets, **local.opsets}, attributes, scope.depth + 1, module)
        return self._graph(local.graph, inner)

    # -- what is known

    def _fold(
        self, converter: Converter, operator: Operator, inputs: list[Any], attributes: dict
    ) -> tuple[Any, ...] | None:
        """Results of an operator on small known values; None where it has to be part of the program.

        Stored tensors of fractions are parameters and stay what they are; what is computed from them alone is
        folded when the program is brought into canonical form. Those that are stored as 8-bit codes are decoded here.
        """
        if any(x is not None and x.sizes is not None for x in inputs):
            if operator.domain != STANDARD or sum(_elements(x) for x in inputs if x is not None) > 1024:
                return None
            arrays = [None if x is None else x.objects() for x in inputs]
            call = SizeCall(arrays, attributes, self.function.dims)
            result = _guarded(operator, lambda: evaluate_sizes(operator.op, call))
            return None if result is None else (result,)
        codes = operator.op in _DEQUANTIZING and any(_holds_codes(x) for x in inputs)
        if not codes and any(x is not None and not _is_constant(x) for x in inputs):
            return None
        scratch = Function("scratch", self.function.dims)
        build = scratch.builder()

        def materialize(_: Builder, x: Known) -> fx.Node:
            return build.parameter("constant", x.tensor)

        call = Call(build, operator, inputs, attributes, materialize)
        results = _as_tuple(_guarded(operator, lambda: converter(call)))
        nodes = scratch.nodes
        limit = max(SMALL, 8 * max(x.tensor.nbytes for x in inputs if x is not None)) if codes else SMALL
        if any(isinstance(n.meta["value"].bytes, Dim) or n.meta["value"].bytes > limit for n in nodes):
            return None
        values: dict[fx.Node, torch.Tensor] = {}
        kept = {r for r in results if isinstance(r, fx.Node)}
        with torch.no_grad():
            try:
                _guarded(operator, lambda: execute(scratch, nodes, values, {}, keep=kept))
            except InputError as error:  # the place is the operator, not a node of the scratch program
                raise InputError(error.what, why=error.why) from error
        found = [Known(values[r].clone()) if isinstance(r, fx.Node) else r for r in results]
        return tuple(_decoded(operator.op, inputs, x) if codes else x for x in found)

    def _materialize(self, build: Builder, x: Known) -> fx.Node:
        """A known value as a value of the program: a parameter, or built from dimensions."""
        if x.sizes is not None:
            if x.is_number:
                return build.full(shape=x.shape, value=x.number(), dtype="int64")
            parts = [build.full(shape=(1,), value=d, dtype="int64") for d in x.sizes.reshape(-1)]
            return build.reshape(build.concat(tuple(parts), dim=0), shape=x.shape)
        if not x.name:
            if x.is_number:
                return build.full(shape=x.shape, value=x.number(), dtype=x.dtype)
            return build.parameter("constant", x.tensor)
        # One stored tensor may be read as it is and, decoded, as something else.
        for tensor, name in self.stored[x.name]:
            if tensor is x.tensor or (tensor.dtype == x.tensor.dtype and torch.equal(tensor, x.tensor)):
                return build.read(name)
        self._check_finite(x)
        name = self.function.parameters.add(x.name, x.tensor)
        self.stored[x.name].append((x.tensor, name))
        if x.encoded is not None:
            self.encoded[name] = x.encoded
        return build.read(name)

    def _check_finite(self, x: Known) -> None:
        """Masks may be stored with minus infinity; everything else that is not finite is damage."""
        if self.allow_nonfinite or not x.tensor.is_floating_point() or torch.isfinite(x.tensor.sum()):
            return
        bad = torch.isnan(x.tensor) | (x.tensor == float("inf"))
        if bad.any():
            raise InputError(
                f"tensor {x.name!r} holds NaN or infinity",
                why=f"{int(bad.sum())} of {x.tensor.numel()} values are not finite",
                fix="repair the file, or pass allow_nonfinite=True",
            )

    # -- what is missing

    def _refuse_unsupported(self, graph: Graph) -> None:
        missing: dict[str, _Missing] = defaultdict(_Missing)
        self._collect(graph, missing, set())
        if missing:
            raise _unsupported_error(missing)

    def _refuse_explosion(self, graph: Graph) -> None:
        """A few functions that each call the next one twice are more operators than anyone can convert."""
        counts: dict[tuple[str, str], int] = {}

        def count(graph: Graph, inside: tuple[tuple[str, str], ...]) -> int:
            total = len(graph.operators)
            for operator in graph.operators:
                key = operator.domain, operator.op
                if key in self.model.functions and key not in inside and len(inside) <= DEEPEST:
                    if key not in counts:
                        counts[key] = count(self.model.functions[key].graph, (*inside, key))
                    total += counts[key]
                total += sum(count(g, inside) for g in operator.attributes.values() if isinstance(g, Graph))
            return total

        if (total := count(graph, ())) > MOST_OPERATORS:
            raise CaptureError(
                f"the model has {total} operators once its functions are written out",
                why=f"at most {MOST_OPERATORS} are taken: the file is damaged, or made to keep its reader busy",
            )

    def _collect(self, graph: Graph, missing: dict[str, _Missing], entered: set[tuple[str, str]]) -> None:
        """Operators without a converter; those in branches are looked at when a branch is taken."""
        for operator in _live(graph):
            key = operator.domain, operator.op
            if key in CONVERTERS or key == (STANDARD, "If"):
                continue
            if key in self.model.functions:
                if key not in entered:
                    entered.add(key)
                    self._collect(self.model.functions[key].graph, missing, entered)
                continue
            missing[str(operator)].count += 1
            missing[str(operator)].names.append(operator.name or operator.outputs[0])


@dataclass(frozen=True)
class _Origin:
    """What a builder takes provenance from."""

    meta: dict[str, Any]


def _live(graph: Graph) -> list[Operator]:
    """Operators that an output depends on, in order."""
    needed = set(graph.outputs)
    live = []
    for operator in reversed(graph.operators):
        if needed.intersection(operator.outputs):
            needed.update(reads(operator))
            live.append(operator)
    return live[::-1]


def _guarded(operator: Operator, work: Callable[[], Any]) -> Any:
    """The result of work on an operator; an attribute or operand of a wrong kind is the file's fault, in our words."""
    try:
        return work()
    except TersorError:
        raise
    except (
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        ZeroDivisionError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise InputError(
            f"{operator} has operands or attributes that do not fit it",
            why=f"{type(error).__name__}: {error}",
        ) from error


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _elements(x: Known) -> int:
    count = 1
    for d in x.shape:
        count *= d
    return count


def _is_constant(x: Known) -> bool:
    """Whether a value is there to be computed with at once, and not a weight."""
    if x.tensor.nbytes > SMALL:
        return False
    return not (x.name and x.tensor.is_floating_point() and x.tensor.numel() > 1)


def _decoded(op: str, inputs: list[Known], result: Known) -> Known:
    """A result on stored codes, with the name and the codes it comes from."""
    source = next(x for x in inputs if _holds_codes(x))
    operands = inputs if source is inputs[0] or op != "Mul" else inputs[::-1]
    encoded = decoded_by(op, [x.tensor for x in operands], operands[0].encoded, source.name)
    if encoded is not None and not torch.equal(encoded.decoded(), result.tensor.float()):
        encoded = None
    return replace(result, name=source.name, codes=True, encoded=encoded)


def _holds_codes(x: Known | None) -> bool:
    """Whether a value is stored in 8 bits, or was."""
    return x is not None and (x.codes or (bool(x.name) and x.tensor.dtype in (torch.int8, torch.uint8)))


def _unsupported_error(missing: Mapping[str, _Missing]) -> UnsupportedOpError:
    lines = []
    for op, found in sorted(missing.items(), key=lambda item: -item[1].count):
        shown = ", ".join(found.names[:3]) + (", ..." if len(found.names) > 3 else "")
        advice = _ADVICE.get(op.rpartition(".")[2], _ELSE)
        lines.append(f"  - {op}, {found.count} time{'s' if found.count > 1 else ''} ({shown}): {advice}")
    listed = "\n".join(lines)
    return UnsupportedOpError(f"operators of the model that have no converter: {len(missing)}\n{listed}")
