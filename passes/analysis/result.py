"""The answer of an analysis: figures by site, as a table for people and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tersor.errors import InputError
from tersor.folders import save_json
from tersor.ir.text import human_bytes
from tersor.passes.report import plain_figures

VERSION = 1
"""Of the JSON form."""


@dataclass(frozen=True)
class Outcome:
    """What one scheme costs at one site when nothing else is quantized, on held-out data.

    Attributes:
        sqnr_db: signal to quantization noise of the site's own result, in decibels.
        input_sqnr_db, weights_sqnr_db: the same with only the input, only the weights rounded; None where the
            scheme does not round both.
        output_sqnr_db, output_cosine: of the program's outputs with those of the program as it is.
        bytes: of the site's parameters after it.
    """

    sqnr_db: float
    input_sqnr_db: float | None
    weights_sqnr_db: float | None
    output_sqnr_db: float
    output_cosine: float
    bytes: int


@dataclass(frozen=True)
class SiteAnalysis:
    """One site.

    Attributes:
        site, op: its name and operation.
        macs, macs_share: multiply-accumulates of one call at the largest sizes, and their part of the program's.
        bytes: of its parameters as they are.
        input_ratio: magnitude of the largest input channel over that of the median one; a grid for all channels
            leaves the median one log2 of that many bits less. None where the input is not looked at.
        weight_ratio: the same of the columns of the weights; rows have grids of their own, which wide columns stretch.
        latency_share: part of the program's latency that the site takes; None where not measured.
        outcomes: by scheme.
        skipped: scheme -> why it does not apply.
    """

    site: str
    op: str
    macs: int
    macs_share: float
    bytes: int
    input_ratio: float | None
    weight_ratio: float | None
    latency_share: float | None
    outcomes: Mapping[str, Outcome]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def cause(self) -> str:
        """Which operand makes most of the noise under the first scheme that rounds two, and its widest channel."""
        for outcome in self.outcomes.values():
            if outcome.input_sqnr_db is None or outcome.weights_sqnr_db is None:
                continue
            if outcome.input_sqnr_db <= outcome.weights_sqnr_db:
                what, ratio = "input, widest channel", self.input_ratio
            else:
                what, ratio = "weights, widest column", self.weight_ratio
            return what.partition(",")[0] if ratio is None else f"{what} {ratio:.3g}x"
        return ""


@dataclass(frozen=True)
class Analysis:
    """What quantizing each site alone would cost; ``print`` it, or `save` it.

    Attributes:
        sites: the most expensive first: by noise at the outputs under the first of ``schemes`` that applies to a site.
        schemes: in the order in which they were asked for.
        skipped: sites that no scheme applies to, with the reason.
        batches: how many held-out batches outputs were compared on.
        notes: what a reader should know.
    """

    sites: tuple[SiteAnalysis, ...]
    schemes: tuple[str, ...]
    skipped: Mapping[str, str]
    batches: int
    notes: tuple[str, ...] = ()

    def __getitem__(self, site: str) -> SiteAnalysis:
        """The site of that name; KeyError when it was not analyzed."""
        for row in self.sites:
            if row.site == site:
                return row
        raise KeyError(site)

    def __len__(self) -> int:
        return len(self.sites)

    # -- for programs

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; figures that are infinite are the strings "inf" and "-inf"."""
        return {"version": VERSION, **plain_figures(asdict(self))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            InputError: it is not what `to_json` gives, or that of another version.
        """
        try:
            if data["version"] != VERSION:
                raise ValueError(f"it is of version {data['version']}, not {VERSION}")
            rows = tuple(_site(row) for row in data["sites"])
            return cls(
                rows, tuple(data["schemes"]), dict(data["skipped"]), data["batches"], tuple(data["notes"])
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("this is no saved analysis", why=str(error), fix="save one again") from None

    def save(self, path: str | Path) -> None:
        """Writes the analysis as JSON; InputError when it cannot."""
        save_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote; InputError when it cannot."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError("this is no saved analysis", where=str(path), why=str(error)) from None
        return cls.from_json(data)

    # -- for people

    def __rich__(self) -> Group:
        parts: list[Any] = [self._table()]
        reasons: dict[str, list[str]] = {}
        for site, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(site)
        for row in self.sites:
            for scheme, reason in row.skipped.items():
                reasons.setdefault(f"{scheme}: {reason}", []).append(row.site)
        for reason, sites in reasons.items():
            more = f" and {len(sites) - 3} more" if len(sites) > 3 else ""
            parts.append(Text(f"not tried at {', '.join(sites[:3])}{more}: {reason}", "dim"))
        return Group(*parts, *(Text(note) for note in self.notes))

    def __str__(self) -> str:
        console = Console(width=180, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _table(self) -> Table:
        """A row per site; for each scheme the decibels at the site and at the program's outputs."""
        count = "one held-out batch" if self.batches == 1 else f"{self.batches} held-out batches"
        table = Table(
            title=f"{len(self.sites)} sites, each quantized alone, on {count}: SQNR in dB at the site > outputs",
            title_justify="left",
        )
        timed = any(row.latency_share is not None for row in self.sites)
        table.add_column("site", overflow="fold")
        after = f"bytes > {self.schemes[0]}"
        for heading in ("MACs", *(["latency"] if timed else []), after, *self.schemes):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("noise mostly from", overflow="fold")
        for row in self.sites:
            table.add_row(
                row.site,
                f"{100 * row.macs_share:.1f} %",
                *([_percent(row.latency_share)] if timed else []),
                _bytes(row, self.schemes[0]),
                *(_decibels(row.outcomes.get(scheme)) for scheme in self.schemes),
                row.cause,
            )
        return table


def _site(row: Mapping[str, Any]) -> SiteAnalysis:
    outcomes = {
        scheme: Outcome(**{k: float(v) if isinstance(v, str) else v for k, v in outcome.items()})
        for scheme, outcome in row["outcomes"].items()
    }
    numbers = {
        k: float(row[k]) if isinstance(row[k], str) else row[k] for k in ("input_ratio", "weight_ratio")
    }
    return SiteAnalysis(**{**row, **numbers, "outcomes": outcomes})


def _bytes(row: SiteAnalysis, scheme: str) -> str:
    if scheme not in row.outcomes:
        return human_bytes(row.bytes) if row.bytes else ""
    return f"{human_bytes(row.bytes)} > {human_bytes(row.outcomes[scheme].bytes)}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _decibels(outcome: Outcome | None) -> str:
    return "" if outcome is None else f"{outcome.sqnr_db:.1f} > {outcome.output_sqnr_db:.1f}"
