"""Models compiled for machines that this one is not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tersor.codegen.runtime import FunctionSignature
from tersor.errors import TargetError
from tersor.targets import Target


class CrossCompiled:
    """What `tersor.compile` gives for a target whose code this machine cannot run: `export_c` writes it as C.

    Attributes:
        target: what it is compiled for.
        functions: how each function is called.
        report: what the passes did, as plain data.
    """

    def __init__(
        self,
        target: Target,
        functions: Mapping[str, FunctionSignature],
        report: Mapping[str, Any],
        exporter: Callable[..., Path],
    ):
        self.target, self.functions, self.report = target, functions, report
        self._exporter = exporter

    def export_c(
        self, path: str | os.PathLike[str], *, name: str = "model", compiler: str | None = None
    ) -> Path:
        """Writes the model as plain C, as `CompiledModel.export_c` does; raises the same errors."""
        return self._exporter(path, name=name, compiler=compiler)

    def __call__(self, *inputs: Any, **named: Any) -> NoReturn:
        """Raises TargetError: the code is for another machine."""
        raise TargetError(
            f"this model is compiled for {self.target.name!r}, which this machine cannot run",
            fix="compiled.export_c(folder), and run it there",
        )

    def __repr__(self) -> str:
        return f"CrossCompiled(target={self.target.name!r}, functions {', '.join(self.functions)})"
