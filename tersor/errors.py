"""Every error that Tersor raises on purpose.

One shape for all of them: *what* went wrong, *where* (module path, file, source line), *why*, and what to do (*fix*).
"""

from __future__ import annotations


class TersorError(Exception):
    """Base of all Tersor errors; the message carries what, where, why and what to do, one per line."""

    def __init__(
        self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None
    ):
        self.what, self.where, self.why, self.fix = what, where, why, fix
        lines = [what]
        lines += [
            f"  {label}: {text}" for label, text in (("where", where), ("why", why), ("fix", fix)) if text
        ]
        super().__init__("\n".join(lines))


class InputError(TersorError):
    """A value handed in by the caller is unusable: name, shape, dtype, range, a NaN in a weight."""


class CaptureError(TersorError):
    """The model could not be turned into a program."""


class UnsupportedOpError(CaptureError):
    """The model uses operations outside the dialect; the message lists all of them at once."""


class ProgramError(TersorError):
    """A program breaks a rule of the IR (found by the verifier), or a saved program cannot be read."""


class PipelineError(TersorError):
    """A pipeline of passes is ordered or composed wrongly, or a pass misbehaved."""


class BudgetError(TersorError):
    """A stage gate or a comparison exceeded its accuracy budget."""


class TargetError(TersorError):
    """Unknown target, or one that cannot run or hold this model."""


class DeviceError(TersorError):
    """A device cannot be reached or used, or a program failed on it."""


class CompileError(TersorError):
    """Lowering or code generation failed."""


class ArtifactError(TersorError):
    """An artifact cannot be written, is damaged, or does not fit this machine."""
