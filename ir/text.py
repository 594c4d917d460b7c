"""A program as text for people: printed, and compared line by line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import fx

from tersor.ir.parameters import ParameterStore
from tersor.ir.program import Function, Program, is_state

Detail = Literal["brief", "normal", "full"]
_PROVENANCE = {"brief": (), "normal": ("site",), "full": ("site", "module", "source", "made_by")}


def print_program(program: Program, detail: Detail = "normal") -> str:
    """One line per operation, then a table of the parameters.

    ``%name`` is a value (the names that errors use), ``@name`` a parameter, ``$name`` a state as the call finds it (its
    new value stands behind the results), ``: float32[batch, 8]`` the result's type. Behind ``#`` stands the site; with
    "full" also module path, source line and the pass that made the node; with "brief" nothing, and the table of
    parameters is left out too.
    """
    parts = [print_function(function, detail) for function in program.functions.values()]
    if detail != "brief":
        parts.append(print_parameters(program.parameters))
    return "\n\n".join(parts)


def print_function(function: Function, detail: Detail = "normal") -> str:
    """One function in the form of `print_program`."""
    lines = [_signature(function)]
    for node in function.calls():
        comment = ", ".join(_origins(node, _PROVENANCE[detail]))
        lines.append(f"  {_line(node)}" + (f"  # {comment}" if comment else ""))
    lines.append(f"  {_ends(function, _show)}")
    return "\n".join(lines)


def print_parameters(parameters: ParameterStore) -> str:
    """Names, types and sizes; a tied parameter names the one whose memory it shares."""
    tied, width = parameters.tied(), max(map(len, parameters), default=0)
    lines = [f"parameters: {len(parameters)} tensors, {human_bytes(parameters.bytes)}"]
    for name, parameter in parameters.items():
        size = f"tied with {tied[name]}" if name in tied else human_bytes(parameter.tensor.nbytes)
        lines.append(f"  {name:{width}}  {parameter.value}  {size}")
    return "\n".join(lines)


def diff(before: Program, after: Program, context: int = 2) -> str:
    """What differs structurally, as a unified diff; empty when the digests are equal.

    Names of values and parameters do not count: where both programs have a line, the name in ``before`` is
    used for both. A parameter is shown with the start of its content hash.
    """
    if before.digest() == after.digest():
        return ""
    parts = []
    for name in dict.fromkeys([*before.functions, *after.functions]):
        old, new = before.functions.get(name), after.functions.get(name)
        if old is None or new is None:
            parts.append(f"{'-' if new is None else '+'}function {name}")
        elif old.digest() != new.digest():
            parts += _function_diff(old, new, context)
    return "\n".join(parts)


def human_bytes(size: int) -> str:
    """A number of bytes with the unit that fits: ``90.9 MB``."""
    return _scaled(size, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: int) -> str:
    """A count with the unit that fits: ``11.2 G``."""
    return _scaled(count, ("", "k", "M", "G", "T")).rstrip()


def _scaled(number: int, units: tuple[str, ...]) -> str:
    scaled, unit = float(number), 0
    while scaled >= 999.95 and unit < len(units) - 1:
        scaled, unit = scaled / 1000, unit + 1
    return f"{scaled:.1f} {units[unit]}" if unit else f"{number} {units[0]}"


def _signature(function: Function) -> str:
    inputs = ", ".join(f"{name}: {value}" for name, value in function.inputs.items())
    states = ", ".join(f"${name}: {value}" for name, value in function.states.items())
    dims = ", ".join(f"{name} {r.min}..{r.max}" for name, r in function.dims.items())
    parts = [f"states {states}" if states else "", f"dims {dims}" if dims else ""]
    return " ".join([f"{function.name}({inputs})", *filter(None, parts)])


def _ends(function: Function, show: Callable[[Any], str]) -> str:
    results = zip(function.outputs, function.results, strict=True)
    text = "return " + ", ".join(f"{name} = {show(node)}" for name, node in results)
    updates = ", ".join(f"${name} = {show(node)}" for name, node in function.updates.items())
    return f"{text}; {updates}" if updates else text


def _origins(node: fx.Node, keys: Iterable[str]) -> list[str]:
    said: list[str] = []
    for key in keys:
        text = node.meta.get(key)
        if text and text not in said:  # a site is often the module path itself
            said.append(text)
    return [f"by {t}" if t == node.meta.get("made_by") else t for t in said]


def _line(node: fx.Node, show: Callable[[Any], str] | None = None) -> str:
    show = show or _show
    return f"{show(node)} = {_call(node, show)}  : {node.meta['value']}"


def _call(node: fx.Node, show: Callable[[Any], str]) -> str:
    given = len(node.args)
    while given and node.args[given - 1] is None:
        given -= 1
    operands = [show(arg) for arg in node.args[:given]]
    attributes = [f"{k}={show(v)}" for k, v in node.kwargs.items() if node.target.attributes[k] != v]
    return f"{node.target.name}({', '.join(operands + attributes)})"


def _show(arg: Any, name: Callable[[fx.Node], str] | None = None) -> str:
    if isinstance(arg, fx.Node):
        if name is not None:
            return name(arg)
        return _kind(arg) if arg.op == "get_attr" or is_state(arg) else f"%{arg.name}"
    if isinstance(arg, list | tuple):
        inner = ", ".join(_show(a, name) for a in arg)
        return f"({inner},)" if len(arg) == 1 else f"({inner})"
    return str(arg)


def _function_diff(old: Function, new: Function, context: int) -> list[str]:
    # First pair the calls that are alike but for the operands; then compare with the operands named by the
    # pairing.
    old_calls, new_calls = old.calls(), new.calls()
    keys = [
        [_call(node, lambda arg: _show(arg, _place)) for node in calls] for calls in (old_calls, new_calls)
    ]
    pairs = difflib.SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks()
    partner = {new_calls[j + k]: old_calls[i + k] for i, j, size in pairs for k in range(size)}
    parameters: dict[str, str] = {}
    for function in (old, new):
        for node in function.graph.find_nodes(op="get_attr"):
            parameters.setdefault(function.parameters[node.target].digest, node.target)

    def lines(function: Function) -> list[str]:
        def name(node: fx.Node) -> str:
            if node.op == "get_attr":
                digest = function.parameters[node.target].digest
                return f"@{parameters[digest]}#{digest[:8]}"
            if node.op == "placeholder":
                return _kind(node)
            if function is old:
                return f"%{node.name}"
            return f"%{partner[node].name}" if node in partner else f"%{node.name}'"

        def show(arg: Any) -> str:
            return _show(arg, name)

        body = [_line(node, show) for node in function.calls()]
        return [_signature(function), *body, _ends(function, show)]

    compared = difflib.unified_diff(lines(old), lines(new), "before", "after", n=context, lineterm="")
    return [f"function {old.name}:", *compared]


def _kind(node: fx.Node) -> str:
    """What is read from outside: a parameter, a state, an input."""
    return f"{'@' if node.op == 'get_attr' else '$' if is_state(node) else '%'}{node.target}"


def _place(node: fx.Node) -> str:
    """A node without what renaming and rewriting may change."""
    return "@" if node.op == "get_attr" else _kind(node) if node.op == "placeholder" else "%"
