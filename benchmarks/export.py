"""The C export of all-MiniLM-L6-v2: what it weighs, the memory it takes, and what emulated ARM CPUs make of it.

    python -m benchmarks.export --calibration stsb-en-train.csv --data stsb-en-test.csv

Sizes: bytes of the export's files, and of its example linked statically, which needs nothing else; beside them the
parameters of the program that the recipe leaves. Memory: the most that was resident (VmHWM) in this machine's static
program, whose inputs read rows all over the table of words. Results: real sentences on each emulated CPU; the cosines
of their vectors to those of the x86-64-v3 export on this machine, and the codes that integer products read beside that
export's. Each goes on with its own codes, and one that falls otherwise moves most of those behind it: what kernels do
is seen in the codes before which a sentence had no other one. (x86-64-v3 has no products of bf16 numbers, which round
in their own way.)
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

import tersor
from benchmarks.accuracy.similarity import BATCH, HIDDEN, INPUTS, LENGTH, Batch, batches, read
from benchmarks.record import without_folders
from benchmarks.report import machine
from benchmarks.run import several
from tersor.cli.demo import embed, load_tokenizer, model_folder
from tersor.codegen.compiler import prepare
from tersor.codegen.export.folder import Exported
from tersor.codegen.export.writer import export_c
from tersor.codegen.observation import with_observers
from tersor.ir import Program
from tersor.ir.costs import cost
from tersor.passes import Context
from tersor.passes.calibration import Calibration, Dataset
from tersor.passes.recipes import get
from tersor.targets import Target, missing_on_host, resolve
from tersor.targets.runners import Local, Qemu, Runner

HERE, ANOTHER = "x86-64-v3", "x86-64-v4"
CPUS = {
    "armv7-neon": ("cortex-a15",),
    "armv7-neon-vfp4": ("cortex-a7", "cortex-a15"),
    "armv8-a": ("cortex-a53",),
    "armv8.2-dotprod": ("cortex-a76", "neoverse-n1"),
    "armv8.6-i8mm": ("max",),
}
"""CPUs that qemu emulates, by the instruction set that code is made for."""

MUSL = ":linux-musl"


class StaticLocal(Local):
    """This machine, for programs that bring their C library."""

    static = True


@dataclass
class Report:
    """Tables by title: columns, then rows."""

    date: str
    command: str
    machine: dict[str, object]
    recipe: str
    tables: dict[str, list[list[str]]] = field(default_factory=dict)

    def add(self, title: str, row: dict[str, str]) -> None:
        """One more row of a table, printed as it comes."""
        if title not in self.tables:
            self.tables[title] = [list(row)]
            print(f"\n{title}\n\n{_line(row)}\n{'|---' * len(row)}|")
        self.tables[title].append(list(row.values()))
        print(_line(row.values()), flush=True)

    def write(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")
        described = "; ".join(f"{key}: {value}" for key, value in self.machine.items())
        parts = [f"# C export of MiniLM, recipe {self.recipe}, {self.date}", described, f"`{self.command}`"]
        for title, (columns, *rows) in self.tables.items():
            parts += [
                f"## {title}",
                "\n".join([_line(columns), "|---" * len(columns) + "|", *map(_line, rows)]),
            ]
        (folder / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        print(f"\nwrote {folder / name}.json and .md")


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line asks for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    now = datetime.datetime.now()
    command = shlex.join(["python", "-m", "benchmarks.export", *map(without_folders, arguments)])
    report = Report(f"{now:%Y-%m-%d %H:%M}", command, machine(), options.recipe)
    tokenizer = load_tokenizer()
    tokenizer.enable_truncation(LENGTH)
    calibration = batches(tokenizer, read(options.calibration)[0], options.samples)
    given = batches(tokenizer, sorted(read(options.data)[0], key=len), options.sentences)
    program = quantized(options.recipe, calibration)
    with tempfile.TemporaryDirectory(prefix="tersor-") as scratch:
        for target in (*options.targets, HERE):
            folder = export_c(prepare(program, resolve(target + MUSL), verify=False), Path(scratch, "plain"))
            sizes(report, Exported.read(folder), cost(program).parameter_bytes, Path(scratch, "program"))
        memory(report, folder)
        observed, observers = with_observers(program)
        if observers:
            results(report, observed, observers["main"].name, options.targets, given, Path(scratch))
    report.write(options.output, f"{now:%Y-%m-%d-%H%M%S}-export")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; argparse ends the process when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--calibration", type=Path, required=True, help="CSV file: sentence, sentence, score from 0 to 5"
    )
    parser.add_argument("--data", type=Path, required=True, help="the same, of sentences to run")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--samples", type=int, default=256, help="sentences to calibrate with")
    parser.add_argument("--sentences", type=int, default=32, help="sentences that every CPU runs")
    parser.add_argument(
        "--targets", type=several(CPUS), default=list(CPUS), help=f"of {','.join(CPUS)}; default: all"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results"
    )
    return parser.parse_args(arguments)


def quantized(recipe: str, calibration: list[Batch]) -> Program:
    """MiniLM as the recipe leaves it."""
    axes = {0: ("batch", 1, BATCH), 1: ("length", 1, LENGTH)}
    program = tersor.capture(model_folder(), None, dict.fromkeys(INPUTS, axes))
    data = Dataset.read(Calibration.of(calibration), program.main)
    return get(recipe).run(program, Context(target=resolve(HERE), calibration=data))[0]


def sizes(report: Report, exported: Exported, weights: int, program: Path) -> None:
    """What an export weighs; ``weights``: bytes of the program's parameters."""
    exported.build(program, static=True)
    stored, code = exported.weights.stat().st_size, program.stat().st_size
    libraries = {name: (exported.path / name).stat().st_size for name in ("libmodel.a", "libmodel.so")}
    report.add(
        "Bytes",
        {
            "target": exported.target.name,
            "parameters": f"{weights:,}",
            "weights.bin": f"{stored:,}",
            **{name: f"{size:,}" for name, size in libraries.items()},
            "static program": f"{code:,}",
            "weights.bin / parameters": f"{stored / weights:.4f}",
            "with the program": f"{(stored + code) / weights:.4f}",
        },
    )


def memory(report: Report, folder: Path) -> None:
    """What is resident while it runs: all weights, the session, inputs and outputs, and the rest."""
    layout = (folder / "src/layout.h").read_text(encoding="utf-8")
    planned = sum(
        int(re.search(rf"MODEL_{name}_BYTES (\d+)", layout)[1]) for name in ("STATE", "WORKSPACE", "SCRATCH")
    )
    model, weights = tersor.load_on(folder, StaticLocal()), (folder / "weights.bin").stat().st_size
    words = load_tokenizer().get_vocab_size()
    for batch, length in ((1, 16), (1, LENGTH), (BATCH, LENGTH)):
        ids = np.linspace(0, words - 1, batch * length).astype(np.int64).reshape(batch, length)
        inputs = {INPUTS[0]: ids, INPUTS[1]: np.ones_like(ids)}
        outputs = model(**inputs)
        own = sum(value.nbytes for value in (*inputs.values(), *outputs.values()))
        found = model.benchmark(inputs, calls=3).memory
        report.add(
            "Resident memory",
            {
                "input": f"{batch}x{length}",
                "weights.bin": f"{weights:,}",
                "session": f"{planned:,}",
                "inputs and outputs": f"{own:,}",
                "most resident": f"{found:,}",
                "beyond these": f"{found - weights - planned - own:,}",
            },
        )


def results(
    report: Report, program: Program, function: str, targets: Sequence[str], given: list[Batch], scratch: Path
) -> None:
    """The same sentences on every CPU, beside this machine, and on another level of this machine's."""

    def on(target: str, device: Callable[[Target], Runner]) -> list[dict[str, np.ndarray]]:
        resolved = resolve(target + MUSL)
        folder = export_c(prepare(program, resolved, verify=False), scratch / "observed")
        model = tersor.load_on(folder, device(resolved))
        return [model.run(function, **batch) for batch in given]

    expected = on(HERE, lambda _: StaticLocal())
    beside = [] if missing_on_host(resolve(ANOTHER)) else [ANOTHER]
    runs: list[tuple[str, str, Callable[[Target], Runner]]] = []
    runs += [(name, "this machine", lambda _: StaticLocal()) for name in beside]
    runs += [(name, cpu, partial(Qemu, cpu=cpu)) for name in targets for cpu in CPUS[name]]
    for target, cpu, device in runs:
        found = on(target, device)
        cosines, codes = [], Codes()
        for batch, ours, wanted in zip(given, found, expected, strict=True):
            pair = (embed(x[HIDDEN], batch["attention_mask"]) for x in (ours, wanted))
            cosines += list(np.multiply(*pair).sum(1))
            codes.compare(ours, wanted)
        report.add(
            f"Results beside {HERE}",
            {
                "target": target,
                "CPU": cpu,
                "sentences": str(len(cosines)),
                "cosine, smallest": f"{min(cosines):.6f}",
                "mean": f"{np.mean(cosines):.6f}",
                "codes of equal inputs": f"{codes.fresh:,}",
                "other ones": f"{codes.moved:,} ({codes.moved / codes.fresh:.5%})",
                "by at most": str(codes.by),
                "of all codes": f"{codes.others / codes.all:.3%}",
            },
        )


@dataclass
class Codes:
    """How many codes are others: those of ``fresh`` inputs, which were the same so far in their sentence, and all."""

    fresh: int = 0
    moved: int = 0
    by: int = 0
    all: int = 0
    others: int = 0

    def compare(self, found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
        """Adds a batch: results by name, codes [batch, ...] in the order in which they are made."""
        same = np.ones(len(wanted[HIDDEN]), bool)
        for name in (n for n in wanted if n.startswith("codes.")):
            apart = np.abs(found[name].astype(int) - wanted[name].astype(int)).reshape(len(same), -1)
            self.all, self.others = self.all + apart.size, self.others + np.count_nonzero(apart)
            self.fresh += apart[same].size
            self.moved += np.count_nonzero(apart[same])
            self.by = max(self.by, apart[same].max(initial=0))
            same &= ~apart.any(1)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
