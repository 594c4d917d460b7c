"""Accuracy on real data: Spearman correlation of a model's sentence similarities with people's (STS-B test).

    python -m benchmarks.stsb stsb-en-test.csv                              # all-MiniLM-L6-v2, beside torch
    python -m benchmarks.stsb stsb-en-test.csv --model one.onnx two.onnx    # ONNX files, beside onnxruntime

The data is a CSV file of sentence, sentence, score (Cer et al. 2017), which the repository does not hold. A sentence's
vector is the model's own where it has a result [batch, width], else the mean over real tokens of its result [batch,
length, width]. Words become ids with the tokenizer of all-MiniLM-L6-v2 (both from the ``demo`` extra): models with the
vocabulary of uncased BERT share it; for others give --tokenizer.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import tersor
from benchmarks.report import machine
from tersor.cli.demo import MODEL_PACKAGE, embed, encode, load_tokenizer, model_folder

BATCH, LENGTH = 8, 256
"""Sentences a call, and the most tokens a sentence keeps."""

Model = Callable[..., Mapping[str, np.ndarray]]
VERSIONS = ("tersor", "torch", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Subject:
    """A model compiled by us, and the same in its reference engine."""

    name: str
    ours: Model
    engine: str
    theirs: Model
    inputs: tuple[str, ...]


def main(arguments: list[str] | None = None) -> None:
    """Print both correlations and the mean cosine between the two engines' vectors, for each model."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    with options.data.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    scores = np.array([float(row[2]) for row in rows])
    sentences = [row[0] for row in rows] + [row[1] for row in rows]
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.enable_truncation(LENGTH)
    now = datetime.datetime.now()
    head = [
        f"# STS-B test, {now:%Y-%m-%d %H:%M}",
        "; ".join(f"{key}: {value}" for key, value in machine().items()),
        ", ".join(f"{name} {metadata.version(name)}" for name in VERSIONS),
        f"`{shlex.join(['python', '-m', 'benchmarks.stsb', *map(without_folders, arguments)])}`",
        f"Spearman correlation with people's scores over {len(rows)} pairs; recipe {options.recipe}.",
    ]
    table = ["| model | tersor | reference | difference | mean cosine |", "|---|---|---|---|---|"]
    print("\n\n".join(head), "", *table, sep="\n", flush=True)
    for subject in subjects(options.model, options.recipe):
        ours, theirs = (
            vectors(model, subject.inputs, tokenizer, sentences) for model in (subject.ours, subject.theirs)
        )
        found, expected = (spearman(similarities(v), scores) for v in (ours, theirs))
        table.append(
            f"| {subject.name} | {found:.4f} | {expected:.4f} ({subject.engine}) | {abs(found - expected):.5f} "
            f"| {(ours * theirs).sum(1).mean():.7f} |"
        )
        print(table[-1], flush=True)
    if options.output:
        path = options.output / f"{now:%Y-%m-%d-%H%M%S}-stsb.md"
        path.write_text("\n\n".join([*head, "\n".join(table)]) + "\n", encoding="utf-8")
        print(f"wrote {path}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; argparse ends the process when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stsb",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, help="CSV file: sentence, sentence, score from 0 to 5")
    parser.add_argument("--model", type=Path, nargs="+", default=[], metavar="FILE.onnx")
    parser.add_argument("--tokenizer", type=Path, metavar="tokenizer.json")
    parser.add_argument("--recipe", default="fp32")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write a report into this folder too")
    return parser.parse_args(arguments)


def subjects(files: Sequence[Path], recipe: str) -> Iterable[Subject]:
    """One model after the other: compiling takes a while."""
    for file in files:
        compiled = tersor.compile(file, recipe=recipe)
        inputs = tuple(tensor.name for tensor in compiled.functions["main"].signature.inputs)
        yield Subject(f"{in_folder(file)} ({digest(file)})", compiled, "onnxruntime", session(file), inputs)
    if not files:
        inputs = ("input_ids", "attention_mask")
        axes = {0: ("batch", 1, BATCH), 1: ("length", 1, LENGTH)}
        compiled = tersor.compile(model_folder(), recipe=recipe, dynamic=dict.fromkeys(inputs, axes))
        yield Subject(MODEL_PACKAGE, compiled, "torch", torch_model(), inputs)


def in_folder(file: Path) -> str:
    """A file by its name and its folder's: many are called model.onnx."""
    return f"{file.parent.name}/{file.name}"


def without_folders(argument: str) -> str:
    """An argument for the record: where files lie on this machine is nobody's business."""
    return in_folder(Path(argument)) if Path(argument).is_file() else argument


def digest(file: Path) -> str:
    """The beginning of the file's sha256."""
    with open(file, "rb") as opened:
        return f"sha256 {hashlib.file_digest(opened, 'sha256').hexdigest()[:12]}"


def session(file: Path) -> Model:
    """The same file in onnxruntime, called like a compiled model."""
    import onnxruntime

    made = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [result.name for result in made.get_outputs()]
    return lambda **inputs: dict(zip(names, made.run(names, inputs), strict=True))


def torch_model() -> Model:
    """The weights of all-MiniLM-L6-v2 in torch, called like a compiled model."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(model_folder()).eval()

    def call(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            hidden = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).last_hidden_state
        return {"last_hidden_state": hidden.numpy()}

    return call


def vectors(model: Model, inputs: Sequence[str], tokenizer: Any, sentences: Sequence[str]) -> np.ndarray:
    """Unit vectors [sentences, width]; sentences of similar length share a batch."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        encoded = encode(tokenizer, [sentences[i] for i in chosen])
        encoded["token_type_ids"] = np.zeros_like(encoded["input_ids"])
        results = model(**{name: encoded[name] for name in inputs})
        found.update(zip(chosen, pooled(results, encoded["attention_mask"]), strict=True))
    return np.stack([found[i] for i in range(len(sentences))])


def pooled(results: Mapping[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Unit vectors [batch, width] from a model's results (see the module's docstring)."""
    fractions = [value for value in results.values() if value.dtype.kind == "f"]
    own = next((value for value in fractions if value.ndim == 2), None)
    if own is not None:
        return own / np.linalg.norm(own, axis=1, keepdims=True)
    return embed(next(value for value in fractions if value.ndim == 3), mask)


def similarities(unit: np.ndarray) -> np.ndarray:
    """Cosines of the first half's rows with the second half's."""
    first, second = np.split(unit, 2)
    return (first * second).sum(1)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


if __name__ == "__main__":
    main()
