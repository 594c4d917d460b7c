"""The program: named functions over one shared store of parameters and state.

A function is a functional ``torch.fx`` graph whose nodes are

* ``placeholder``: an input of the signature, in order; or a *state* as the call finds it (``meta["state"]``);
* ``get_attr``: a parameter, by its name in the store;
* ``call_function``: a dialect operation (`tersor.ir.dialect`), operands in ``args``, attributes in ``kwargs``;
* ``output``: the tuple of results, in the order of ``Function.outputs``, and the new values of states by name.

A *state* (a cache of keys, a counter) is a tensor of fixed shape that calls hand on to the next call; it starts as
zeros. Functions stay functional: one reads the old value and returns the new one. States belong to the program; what
`prefill` leaves behind, `decode` finds.

``node.meta`` holds ``value`` (`Value`, on all but the output), and provenance where known: ``site`` (stable
name of the place), ``module`` (module path), ``source`` (file and line in the user's model), ``made_by``
(pass that made the node).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tersor.errors import ProgramError
from tersor.ir.dialect import Op, ops
from tersor.ir.dims import Dim
from tersor.ir.parameters import Parameter, ParameterStore
from tersor.ir.value import Value

PROVENANCE = ("site", "module", "source", "made_by")
TOLD_SITE = "told_site"
"""While a program is captured: (operation, site) of what a node is part of, where the source tells it."""
_INHERITED = (*(key for key in PROVENANCE if key != "site"), TOLD_SITE)


@dataclass(frozen=True)
class Range:
    """The sizes that a named dimension may take, both ends included, from 1 on.

    Raises:
        ProgramError: there are no such sizes.
    """

    min: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ProgramError(
                f"a dimension cannot range over {self.min}..{self.max}", fix="give 1 <= min <= max"
            )


def is_state(node: Any) -> bool:
    """Whether a node is a state as the call finds it."""
    return isinstance(node, fx.Node) and node.op == "placeholder" and bool(node.meta.get("state"))


class Function:
    """One function of a program: a graph and its signature.

    Attributes:
        name: unique in the program.
        graph: the ``fx.Graph`` (see the module's docstring).
        dims: ranges of the named dimensions.
        outputs: a name for each result, in order; nested results of the source model are named with dots.
        example: sizes of named dimensions in the inputs it was captured with, where it was.
        parameters: the program's parameters.
        declared: the program's states, also those that this function does not have.
    """

    def __init__(
        self,
        name: str,
        dims: Mapping[str, Range] | None = None,
        parameters: ParameterStore | None = None,
        declared: dict[str, Value] | None = None,
    ):
        self.name = name
        self.graph = fx.Graph()
        self.dims: dict[str, Range] = dict(dims or {})
        self.outputs: tuple[str, ...] = ()
        self.example: dict[str, int] = {}
        self.parameters = parameters if parameters is not None else ParameterStore()
        self.declared: dict[str, Value] = declared if declared is not None else {}

    # -- reading

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    @property
    def inputs(self) -> dict[str, Value]:
        """The signature: input names with their values, in order."""
        return {n.target: n.meta["value"] for n in self.input_nodes}

    @property
    def input_nodes(self) -> list[fx.Node]:
        """The nodes of the inputs, in order."""
        return [n for n in self.graph.find_nodes(op="placeholder") if not is_state(n)]

    @property
    def states(self) -> dict[str, Value]:
        """The states that it reads or updates, by name."""
        return {name: node.meta["value"] for name, node in self.state_nodes.items()}

    @property
    def state_nodes(self) -> dict[str, fx.Node]:
        """Where each state stands as the call finds it, by the state's name."""
        return {n.target: n for n in self.graph.find_nodes(op="placeholder") if is_state(n)}

    @property
    def output_node(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The result nodes, in the order of ``outputs``."""
        return tuple(self.output_node.args[0])

    @property
    def updates(self) -> dict[str, fx.Node]:
        """The nodes of the states' new values, by name; a state that is not here stays as it is."""
        return dict(self.output_node.args[1]) if len(self.output_node.args) > 1 else {}

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        """What a call has to compute: the results, then the states' new values."""
        return (*self.results, *self.updates.values())

    def calls(self, *names: str) -> list[fx.Node]:
        """Operation nodes in order; only those of the named operations where names are given."""
        return [
            n for n in self.graph.nodes if n.op == "call_function" and (not names or n.target.name in names)
        ]

    def parameter(self, node: Any) -> torch.Tensor | None:
        """The tensor behind a ``get_attr`` node; None for anything else."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.parameters[node.target].tensor
        return None

    # -- writing

    def add_input(self, name: str, value: Value) -> fx.Node:
        """One more input, behind the others."""
        others = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_after(others[-1]) if others else self.graph.inserting_before(None):
            node = self.graph.create_node("placeholder", name, name=name)
        node.meta["value"] = value
        return node

    def add_state(self, name: str, value: Value | None = None) -> fx.Node:
        """The state ``name`` as a call finds it; ``value`` declares one that the program does not have yet.

        Raises:
            ProgramError: it is unknown and no value is given, is declared with another value, has a size that is not
                fixed, or the function has it already.
        """
        known = self.declared.get(name)
        if known is None and value is None:
            raise ProgramError(f"the program has no state {name!r}", fix="give its dtype and shape")
        if known is not None and value not in (None, known):
            raise ProgramError(f"state {name!r} is {known}, not {value}", why="functions share their states")
        if name in self.state_nodes:
            raise ProgramError(f"function {self.name!r} has the state {name!r} already")
        value = known or value
        if problem := state_problem(value):
            raise ProgramError(f"state {name!r}: {problem}", fix="give it the largest size it can need")
        node = self.add_input(name, value)
        node.meta["state"] = True
        self.declared[name] = value
        return node

    def set_update(self, name: str, new: fx.Node) -> None:
        """``new`` is what the next call finds in the state; the function has its outputs already."""
        self._end(self.results, self.updates | {name: new})

    def set_outputs(
        self, results: Mapping[str, fx.Node], updates: Mapping[str, fx.Node] | None = None
    ) -> None:
        """Ends the function with these named results and new values of states, instead of earlier ones.

        Without ``updates`` those of before are kept.
        """
        if updates is None:
            ended = self.graph.nodes and self.output_node.op == "output"
            updates = self.updates if ended else {}
        self._end(tuple(results.values()), updates)
        self.outputs = tuple(results)

    def _end(self, results: tuple[fx.Node, ...], updates: Mapping[str, fx.Node]) -> None:
        if self.graph.nodes and self.output_node.op == "output":
            self.graph.erase_node(self.output_node)
        ends = (results, dict(updates)) if updates else (results,)
        self.graph.create_node("output", "output", ends)

    def builder(
        self, *, before: fx.Node | None = None, like: fx.Node | None = None, made_by: str | None = None
    ) -> Builder:
        """Emits nodes at the end (before the output), or before a node.

        Provenance is that of ``like``, or of ``before``.
        """
        return Builder(self, before, like or before, made_by)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Every user of ``old`` reads ``new`` instead; dead nodes go, the site of ``old`` moves to ``new``.

        ``new`` may be computed from ``old``, an operation put behind it: what lies between keeps reading ``old``,
        and ``old`` its site.
        """
        between = _between(old, new)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in between)
        if not between:
            if "site" in old.meta and "site" not in new.meta:
                new.meta["site"] = old.meta["site"]
            self.erase_dead(old)

    def erase_dead(self, *candidates: fx.Node) -> int:
        """Removes nodes without users, and what they alone kept alive; returns how many."""
        stack, gone = list(candidates), 0
        while stack:
            node = stack.pop()
            if node.users or node.op in ("placeholder", "output") or node._erased:
                continue
            operands = node.all_input_nodes
            self.graph.erase_node(node)
            gone += 1
            stack.extend(operands)
        return gone

    def copy(self, parameters: ParameterStore, declared: dict[str, Value] | None = None) -> Function:
        """The same function over these parameters and states (None: states of its own, declared alike)."""
        other = Function(
            self.name, self.dims, parameters, dict(self.declared) if declared is None else declared
        )
        other.outputs, other.example = self.outputs, dict(self.example)
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copied = other.graph.node_copy(node, lambda n: mapping[n])
            copied.meta = dict(node.meta)
            mapping[node] = copied
        return other

    def digest(self) -> str:
        """Structural hash: signature, operations, attributes and parameter contents.

        Names, provenance and the order of independent nodes are free; dead and duplicate nodes count.
        """
        hashes = self.value_digests()
        dims = sorted((name, r.min, r.max) for name, r in self.dims.items())
        nodes = sorted(h for node, h in hashes.items() if node.op != "get_attr")
        return _sha256([self.name, dims, list(self.inputs), self.outputs, nodes])

    def value_digests(self) -> dict[fx.Node, str]:
        """For each node a hash of all that its value follows from: inputs, operations, attributes and contents of
        parameters. Equal hashes are equal values, in this function or in another version of it.
        """
        hashes: dict[fx.Node, str] = {}

        def encode(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return {"node": hashes[arg]}
            if isinstance(arg, list | tuple):
                return [encode(a) for a in arg]
            if isinstance(arg, Mapping):
                return {"states": sorted((name, encode(a)) for name, a in arg.items())}
            if isinstance(arg, Dim):
                return {"dim": str(arg)}
            return arg if arg is None or isinstance(arg, bool | int | str) else {"other": repr(arg)}

        for node in self.graph.nodes:
            if node.op == "placeholder":
                kind = "state" if is_state(node) else "input"
                line: Any = [kind, node.target, str(node.meta["value"])]
            elif node.op == "get_attr":
                line = ["parameter", self.parameters[node.target].digest]
            elif node.op == "output":
                line = ["output", encode(node.args)]
            else:
                arguments = node.target.bind(
                    node.args, node.kwargs
                )  # a default left out is the same as one given
                line = [node.target.name, {name: encode(argument) for name, argument in arguments.items()}]
            hashes[node] = _sha256(line)
        return hashes


def state_problem(value: Value) -> str | None:
    """Why a value cannot be a state's."""
    if any(isinstance(d, Dim) for d in value.shape):
        return f"{value} has a size that is not fixed, and a session keeps its memory from call to call"
    return None


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _between(old: fx.Node, new: fx.Node) -> set[fx.Node]:
    """The nodes on paths from ``old`` to ``new``, and ``new``; none when it does not depend on ``old``."""
    reaches: dict[fx.Node, bool] = {old: True}
    stack = [new]
    while stack:
        node = stack[-1]
        # operands come first, so nothing above ``old`` can depend on it
        operands = node.all_input_nodes if node > old else []
        if node not in reaches and (waiting := [o for o in operands if o not in reaches]):
            stack.extend(waiting)
            continue
        stack.pop()
        if node not in reaches:
            reaches[node] = any(reaches[o] for o in operands)
    return {node for node, depends in reaches.items() if depends and node is not old}


class Program:
    """Functions over one store of parameters and state; calling it runs ``main`` in torch.

    Copies share parameters, so keeping versions of a program is cheap.

    Attributes:
        functions: by name.
        parameters: by name, see `ParameterStore`.
        states: dtype and shape of each state by name; `Function.add_state` declares them.
    """

    def __init__(self, parameters: ParameterStore | None = None, states: Mapping[str, Value] | None = None):
        self.functions: dict[str, Function] = {}
        self.parameters = parameters if parameters is not None else ParameterStore()
        self.states: dict[str, Value] = dict(states or {})

    @property
    def main(self) -> Function:
        """The function called ``main``, or else the first one: what calibration data is for.

        Raises:
            ProgramError: there is none.
        """
        if not self.functions:
            raise ProgramError("the program has no function", fix="add one: program.add_function('main')")
        return self.functions.get("main") or next(iter(self.functions.values()))

    def add_function(self, name: str, dims: Mapping[str, Range] | None = None) -> Function:
        if name in self.functions:
            raise ProgramError(f"the program has a function called {name!r} already")
        self.functions[name] = Function(name, dims, self.parameters, self.states)
        return self.functions[name]

    def copy(self) -> Program:
        other = Program(self.parameters.copy(), self.states)
        for name, function in self.functions.items():
            other.functions[name] = function.copy(other.parameters, other.states)
        return other

    def merge(self, other: Program) -> None:
        """Adds the functions of another program, which lose themselves there: they share this one's states by name, and
        its parameters where name and contents are equal; other parameters of that name get one of their own.

        Raises:
            ProgramError: a function's name is taken, or a state is declared differently; nothing has changed then.
        """
        problems = [f"both have a function {name!r}" for name in other.functions if name in self.functions]
        problems += [
            f"state {name!r} is {self.states[name]} here and {value} there"
            for name, value in other.states.items()
            if self.states.get(name, value) != value
        ]
        if problems:
            raise ProgramError(
                "two programs do not go together",
                why="; ".join(problems),
                fix="give functions different names; states of one name are one state",
            )
        renamed = {name: self._adopt(name, parameter) for name, parameter in other.parameters.items()}
        self.states.update(other.states)
        for name, function in other.functions.items():
            for node in function.graph.find_nodes(op="get_attr"):
                node.target = renamed[node.target]
            function.parameters, function.declared = self.parameters, self.states
            self.functions[name] = function
        other.functions = {}

    def _adopt(self, name: str, parameter: Parameter) -> str:
        known = self.parameters.get(name)
        if known is not None and (
            known.storage == parameter.storage
            or (known.value == parameter.value and known.digest == parameter.digest)
        ):
            return name
        return self.parameters.add(name, parameter)

    def zero_states(self) -> dict[str, torch.Tensor]:
        """Every state as it starts, for `tersor.ir.run`."""
        return {name: torch.zeros(v.shape, dtype=v.torch_dtype) for name, v in self.states.items()}

    def digest(self) -> str:
        """Structural hash of all functions (see `Function.digest`)."""
        return hashlib.sha256(
            "".join(f.digest() for _, f in sorted(self.functions.items())).encode()
        ).hexdigest()

    def nodes(self) -> Iterator[tuple[Function, fx.Node]]:
        for function in self.functions.values():
            for node in function.nodes:
                yield function, node

    def specialize(self, sizes: Mapping[str, int]) -> Program:
        """A copy in which these named dimensions are fixed.

        Raises:
            ProgramError: a size is outside the range of its dimension.
        """

        def fix(x: Any) -> Any:
            if isinstance(x, Dim):
                return x.evaluate({name: sizes.get(name, Dim.symbol(name)) for name in x.symbols})
            return tuple(fix(y) for y in x) if isinstance(x, list | tuple) else x

        other = self.copy()
        for function in other.functions.values():
            for name in function.dims.keys() & sizes.keys():
                allowed = function.dims.pop(name)
                function.example.pop(name, None)
                if not allowed.min <= sizes[name] <= allowed.max:
                    raise ProgramError(
                        f"dimension {name!r} cannot be {sizes[name]}",
                        why=f"it ranges from {allowed.min} to {allowed.max}",
                    )
            for node in function.graph.nodes:
                node.kwargs = {key: fix(value) for key, value in node.kwargs.items()}
                if "value" in node.meta:
                    value = node.meta["value"]
                    node.meta["value"] = Value(value.dtype, fix(value.shape))
        return other

    def drop_unused_parameters(self) -> list[str]:
        """Removes parameters that no function reads; returns their names."""
        used = {n.target for _, n in self.nodes() if n.op == "get_attr"}
        unused = [name for name in self.parameters if name not in used]
        for name in unused:
            del self.parameters[name]
        return unused

    def __str__(self) -> str:
        from tersor.ir.text import print_program

        return print_program(self)

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Runs ``main`` in torch: tensors by input name -> tensors by output name; states start as zeros and are
        dropped (`run` keeps them).
        """
        from tersor.ir.interpreter import run

        return run(self.main, inputs)


class Builder:
    """Emits nodes into a function: ``build.linear(x, w, b)``, ``build.parameter("name", tensor)``.

    Shape metadata is inferred as a node is made; provenance is inherited.
    """

    def __init__(self, function: Function, before: fx.Node | None, like: fx.Node | None, made_by: str | None):
        self.function, self._before, self.made_by = function, before, made_by
        self._provenance = {k: like.meta[k] for k in _INHERITED if k in like.meta} if like else {}

    @contextmanager
    def _place(self) -> Iterator[None]:
        graph = self.function.graph
        before = self._before
        if before is None and graph.nodes and self.function.output_node.op == "output":
            before = self.function.output_node
        if before is None:
            yield
        else:
            with graph.inserting_before(before):
                yield

    def emit(self, op: Op | str, *operands: Any, site: str | None = None, **attributes: Any) -> fx.Node:
        """One operation node.

        Raises:
            ProgramError: the operands do not fit the operation.
        """
        op = ops.get(op) if isinstance(op, str) else op
        attributes = {name: _frozen(a) for name, a in attributes.items()}
        value = infer(op, operands, attributes)
        with self._place():
            node = self.function.graph.create_node(
                "call_function", op, tuple(operands), attributes, name=op.name.replace(".", "_")
            )
        node.meta.update(self._provenance, value=value)
        if self.made_by:
            node.meta["made_by"] = self.made_by
        if site:
            node.meta["site"] = site
        return node

    def parameter(self, name: str, tensor: torch.Tensor | Parameter) -> fx.Node:
        """A new parameter (its name made unique) and the node that reads it."""
        return self.read(self.function.parameters.add(name, tensor))

    def read(self, name: str) -> fx.Node:
        """A node that reads the stored parameter ``name``."""
        with self._place():
            node = self.function.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        node.meta["value"] = self.function.parameters[name].value
        return node

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in ops:
            raise AttributeError(name)
        return lambda *operands, **attributes: self.emit(name, *operands, **attributes)


def infer(op: Op, operands: Iterable[Any], attributes: Mapping[str, Any]) -> Value:
    """The result's value of an operation on nodes, numbers and None.

    Raises:
        ProgramError: operands or attributes are missing, unknown, or do not fit the operation.
    """

    def value(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return x.meta["value"]
        return tuple(value(y) for y in x) if isinstance(x, list | tuple) else x

    operands = tuple(value(x) for x in operands)
    op.bind(operands, attributes)
    try:
        return op.infer(*operands, **attributes)
    except ProgramError:
        raise
    except (
        Exception
    ) as error:  # a number where a tensor belongs, a rank too low: rules need not foresee everything
        given = ", ".join([*map(_shown, operands), *(f"{k}={_shown(v)}" for k, v in attributes.items())])
        raise ProgramError(
            f"{op.name}({given}) does not fit", why=f"{type(error).__name__}: {error}"
        ) from error


def _shown(x: Any) -> str:
    return f"({', '.join(map(_shown, x))})" if isinstance(x, tuple) else str(x)


def _frozen(attribute: Any) -> Any:
    """Lists (torch's size arguments) as tuples, so that equal attributes compare equal."""
    return tuple(map(_frozen, attribute)) if isinstance(attribute, list | tuple) else attribute
