"""Where things come from in the user's model, and torch.export's failures in our words."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from typing import Any

import torch
from torch import fx

from tersor.errors import CaptureError
from tersor.frontends.dynamic import DynamicDims

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def module_path(node: fx.Node, root: str) -> str:
    """Path of the innermost module that an exported node came from; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(stack.values())), "")
    return "" if path == root else path.removeprefix(f"{root}.")


def source_line(node: fx.Node) -> str:
    """ "file.py:line" of the innermost frame outside torch; "" where torch recorded none."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not _is_foreign(frame[0])]
    return "" if not own else f"{_short(own[-1][0])}:{own[-1][1]}"


def _is_foreign(file: str) -> bool:
    return file.startswith((_TORCH, _HERE, "<"))


def _short(file: str) -> str:
    """Relative to the installed packages or the working directory, where it lies under one of them."""
    for base in (sysconfig.get_path("purelib"), os.getcwd(), *sys.path):
        if base and file.startswith(base.rstrip(os.sep) + os.sep):
            return file[len(base.rstrip(os.sep)) + 1 :]
    return file


def translate_export_error(error: Exception, dims: DynamicDims) -> CaptureError:
    """What torch.export's exception means for the model and the dynamic dimensions asked for."""
    text, where = str(error), _place(error)
    names = {type(e).__name__ for e in _chain(error)}
    if "Constraints violated" in text or "ConstraintViolationError" in names:
        return _constraint_error(text)
    if names & {
        "GuardOnDataDependentSymNode",
        "DataDependentOutputException",
        "PendingUnbackedSymbolNotFound",
    } or ("data-dependent" in text.lower()):
        return CaptureError(
            "the model's control flow or a shape depends on the values of tensors",
            where=where,
            why="a program is one fixed graph for all inputs",
            fix="replace the branch by torch.where, or compute the value outside the model and pass it as a constant",
        )
    if (
        "expected compiled_fn to be GraphModule" in text
    ):  # one tensor under two names, of which one is written to
        return CaptureError(
            "the model writes to a tensor that it also has under another name, or that is no buffer",
            where=where,
            why="what is kept from call to call is found by the name of a buffer",
            fix="register_buffer every tensor that is written to, and write through self.<buffer> in forward",
        )
    fix = "check that model(**example_inputs) runs in evaluation mode; if it does, simplify the place named above"
    if len(dims.ranges) > 1 and re.search(
        r"\bs\d+\b", text
    ):  # torch's symbols are sizes that it had to compare
        fix = (
            f"if some of {', '.join(dims.ranges)} are always equal, give them one name; else make one static"
        )
    return CaptureError(
        "torch.export cannot trace the model with these example inputs",
        where=where,
        why=f"{type(error).__name__}: {_first_lines(text)}",
        fix=fix,
    )


def _constraint_error(text: str) -> CaptureError:
    """torch suggests new Dim(...) lines; we say what to write into ``dynamic`` instead."""
    reasons, fixes = [], []
    # Names with an underscore in front are torch's own, for parts of a dimension.
    for name, minimum, maximum in re.findall(
        r"\b([^\W_]\w*) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)", text
    ):
        bounds = [f"at least {minimum}"] * bool(minimum) + [f"at most {maximum}"] * bool(maximum)
        reasons.append(f"{name} must be {' and '.join(bounds)}")
        fixes.append(f"give {name} a range that is {' and '.join(bounds)}")
    for name, value in re.findall(r"^\s*(\w+) = (\d+)\s*$", text, re.MULTILINE):
        reasons.append(f"the model works for {name} = {value} only")
        fixes.append(f"leave {name} out of the dynamic dimensions")
    for name, other in re.findall(r"^\s*(\w+) = (?!Dim\()([A-Za-z_][\w*+/ -]*)\s*$", text, re.MULTILINE):
        reasons.append(f"{name} is always {other}")
        fixes.append(
            f"use one name for {name} and {other}" if other.isidentifier() else f"make {name} static"
        )
    if not reasons:
        unmet = re.findall(r"Not all values of (\w+) = (\S+) in .* guard (.+?)\.?$", text, re.MULTILINE)
        for name, size, guard in unmet:
            reasons.append(f"not every {name} in its range satisfies {guard.replace(size, name)}")
            fixes.append(f"choose a range for {name} in which it does, or make it static")
    return CaptureError(
        "the dynamic dimensions do not fit the model",
        why="; ".join(reasons) or _first_lines(text),
        fix="; ".join(fixes) or "make the dimension static",
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _place(error: Exception) -> str | None:
    """The innermost line of the user's or a library's model code in the traceback."""
    for exception in _chain(error):
        frames = [f for f in traceback.extract_tb(exception.__traceback__) if not _is_foreign(f.filename)]
        if len(frames) and not frames[-1].filename.startswith(_HERE):
            inner: Any = frames[-1]
            return f"{_short(inner.filename)}:{inner.lineno}, in {inner.name}: {inner.line}"
    return None


def _first_lines(text: str, count: int = 3) -> str:
    return " ".join(line.strip() for line in text.strip().splitlines()[:count])
