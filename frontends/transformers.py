"""Models of Hugging Face transformers: objects, and local folders with config.json and safetensors."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.errors import InputError
from tersor.frontends import torch_export
from tersor.ir import Program

BATCH, LENGTH = 2, 16  # of the example inputs that are made here
LARGEST_BATCH, LARGEST_LENGTH = (
    8,
    512,
)  # of automatic dynamic dimensions, where the model has no limit of its own


def is_transformers_model(model: Any) -> bool:
    """Whether a model is a ``PreTrainedModel``; does not import transformers."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def unwrap(model: Any) -> Any:
    """The model inside torch.compile and data-parallel wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def capture(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    dynamic: Mapping[str, Mapping[int, tuple[str, int, int]]] | str | None = None,
    **options: Any,
) -> Program:
    """Captures a transformers model; its configuration is the same afterwards.

    Args:
        example_inputs: made for the architecture when left out.
        dynamic: as for `tersor.frontends.capture`; token ids and masks that it does not name vary like those of
            the same shape that it does, unless given as ``{}``.
        options: of `torch_export.capture`.

    Raises:
        InputError, CaptureError, UnsupportedOpError: see `tersor.frontends.capture`.
    """
    arguments = inspect.signature(model.forward).parameters
    if example_inputs is None:
        example_inputs = make_example_inputs(model)
    else:
        example_inputs = torch_export.by_name(model, example_inputs)
    if isinstance(dynamic, str):
        if dynamic != "auto":
            raise InputError(f"dynamic is {dynamic!r}", fix='give "auto", or dimensions by input and axis')
        dynamic = default_dynamic(model, example_inputs)
    elif isinstance(dynamic, Mapping):
        dynamic = _spread(dynamic, example_inputs)
    if "use_cache" in arguments:
        example_inputs = {"use_cache": False, **example_inputs}
    with _inference_settings(model):
        return torch_export.capture(model, example_inputs, dynamic, **options)


@contextmanager
def _inference_settings(model: nn.Module) -> Iterator[None]:
    """No cache among the results, named results, torch's own attention; restored afterwards."""
    config = model.config
    wanted = {"use_cache": False, "return_dict": True}
    before = {k: getattr(config, k) for k in wanted if hasattr(config, k)}
    attention = getattr(config, "_attn_implementation", None)
    switch = attention not in (None, "sdpa") and getattr(model, "_supports_sdpa", False)
    try:
        for key in before:
            setattr(config, key, wanted[key])
        if switch:
            model.set_attn_implementation("sdpa")
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)
        if switch:
            model.set_attn_implementation(attention)


# -- example inputs


def make_example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Plausible inputs for the model's architecture: the same ones every time.

    Raises:
        InputError: the kind of input is not known here.
    """
    config = model.config
    accepted = set(inspect.signature(model.forward).parameters)
    generator = torch.Generator().manual_seed(0)
    main = model.main_input_name
    if main == "input_ids":
        inputs = _text("input_ids", "attention_mask", config, accepted, generator)
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.randn(BATCH, vision.num_channels, height, width, generator=generator)
        inputs = {"pixel_values": pixels}
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions  # the encoder halves them
        inputs = {"input_features": torch.randn(BATCH, config.num_mel_bins, frames, generator=generator)}
    else:
        raise InputError(
            f"example inputs for a {type(model).__name__} are not known here",
            why=f"its main input is {main!r}",
            fix="pass example_inputs, by name",
        )
    if "decoder_input_ids" in accepted:
        inputs |= _text("decoder_input_ids", "decoder_attention_mask", config, accepted, generator)
    return inputs


def _text(
    ids_name: str, mask_name: str, config: Any, accepted: set[str], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Token ids, and a mask that pads all rows but the first."""
    text = getattr(config, "text_config", config)
    pad = getattr(text, "pad_token_id", None)
    ids = torch.randint(0, text.vocab_size, (BATCH, LENGTH), generator=generator)
    if pad is not None:  # some models find the padding by this id
        ids = torch.where(ids == pad, (pad + 1) % text.vocab_size, ids)
    if mask_name not in accepted:
        return {ids_name: ids}
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    for row in range(1, BATCH):
        mask[row, LENGTH - 3 * row :] = 0
    if pad is not None:
        ids = torch.where(mask == 1, ids, pad)
    return {ids_name: ids, mask_name: mask}


def default_dynamic(
    model: nn.Module, example_inputs: Mapping[str, Any]
) -> dict[str, dict[int, tuple[str, int, int]]]:
    """Batch for every input; length for token ids and masks, up to 512 or what the model's positions allow."""
    longest = _longest_text(model)
    dims: dict[str, dict[int, tuple[str, int, int]]] = {}
    for name, value in example_inputs.items():
        if not isinstance(value, torch.Tensor) or not value.ndim:
            continue
        dims[name] = {0: ("batch", 1, max(LARGEST_BATCH, value.shape[0]))}
        if _is_text(value):
            side = "target_length" if name.startswith("decoder_") else "length"
            dims[name][1] = (side, 1, longest)
    return dims


def _is_text(value: Any) -> bool:
    """Token ids, their types and positions, or a mask over them."""
    return isinstance(value, torch.Tensor) and value.ndim == 2 and not value.is_floating_point()


def _spread(dynamic: Mapping[str, Any], example_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Named dimensions for every input of a text of which one is named: a mask is as long as its ids."""
    texts = {name: value for name, value in example_inputs.items() if _is_text(value)}
    spread = dict(dynamic)
    for name, value in texts.items():
        for other in dynamic.keys() & texts.keys() if name not in dynamic else ():
            same_side = name.startswith("decoder_") == other.startswith("decoder_")
            if same_side and value.shape == texts[other].shape:
                spread[name] = dynamic[other]
    return spread


def _longest_text(model: nn.Module) -> int:
    """At most `LARGEST_LENGTH`, and no longer than the model has positions for."""
    config = getattr(model.config, "text_config", model.config)
    limit = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from after the padding id.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = module.num_embeddings - offset
    return LARGEST_LENGTH if limit is None else min(limit, LARGEST_LENGTH)


# -- folders


def load(folder: str | Path) -> nn.Module:
    """The model in a local folder, in float32; nothing is downloaded and nothing in the folder is executed.

    Raises:
        InputError: saying what the folder lacks, or what is wrong with it.
    """
    folder = Path(folder)
    config = _read_config(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(
            f"{folder} holds no weights",
            why="there is no *.safetensors file",
            fix="save the model with model.save_pretrained(folder)",
        )
    try:
        import transformers
        from safetensors import SafetensorError
    except ImportError as error:
        raise InputError(
            "a model folder needs the transformers library",
            why=str(error),
            fix="pip install tersor[transformers]",
        ) from error
    names = config.get("architectures") or []
    builder = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if builder is None:
        raise InputError(
            f"{folder / 'config.json'} names the architecture {names[0]!r}",
            why=f"transformers {transformers.__version__} does not have it",
            fix="load the model with its own code and pass the object",
        )
    try:
        model, info = builder.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be loaded",
            where=", ".join(w.name for w in weights),
            why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="check that the files are complete and belong together",
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}",
            why=f"missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}",
            fix="correct 'architectures' in config.json, or save the whole model",
        )
    return model.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder",
            fix="give a local folder with config.json and *.safetensors, or an ONNX file (.onnx)",
        )
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no config.json", fix="save the model with model.save_pretrained"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} is not JSON", why=str(error), fix="save the model again with model.save_pretrained"
        ) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(
            f"{path} is not a model configuration",
            why="it has no 'model_type'",
            fix="give the folder that model.save_pretrained wrote",
        )
    return config
