"""Names of weights that an exporter lost.

Exporters of torch transpose the weights of linear layers at export and number the results: ``val_56``,
``permute_3``, ``onnx::MatMul_317``. Their names follow from the layer's bias, or from the module path of the node.
"""

from __future__ import annotations

import re

from torch import fx

from tersor.ir.matching import is_call
from tersor.ir.program import Function

_NUMBERED = re.compile(r"((val|onnx::\w+)_\d+|(permute|transpose|t)(_\d+)?)(_q|_quantized)?")


def restore_weight_names(function: Function) -> None:
    """Renames numbered matrices that one product reads.

    A name that is taken is left to its owner, unless both are the same matrix: a layer that is called several times
    is one layer again (exporters transpose its weight once for each call).
    """
    _return_convolutions(function)
    for node in function.calls("matmul"):
        weight = node.args[1]
        if weight.op != "get_attr" or not _NUMBERED.fullmatch(weight.target):
            continue
        readers = [n for n in function.graph.find_nodes(op="get_attr") if n.target == weight.target]
        name = _weight_name(node)
        if name is None or sum(len(n.users) for n in readers) != 1:
            continue
        numbered, owner = function.parameters[weight.target], function.parameters.get(name)
        if owner is not None and (owner.value != numbered.value or owner.digest != numbered.digest):
            continue
        if owner is None:
            function.parameters[name] = numbered
        del function.parameters[weight.target]
        weight.target = name


def _return_convolutions(function: Function) -> None:
    """Exporters that fold a batch norm into a convolution leave it under the norm's name: back to its weight's."""
    for node in function.calls("conv1d", "conv2d"):
        weight = node.args[1]
        if weight.op == "get_attr" and len(weight.users) == 1 and weight.target.endswith(".weight"):
            node.meta["module"] = weight.target.removesuffix(".weight")


def _weight_name(product: fx.Node) -> str | None:
    module = product.meta.get("module", "")
    for user in product.users:
        bias = next((a for a in user.args if isinstance(a, fx.Node) and a.op == "get_attr"), None)
        if is_call(user, "add") and bias is not None and re.search(r"[._]bias$", bias.target):
            # Equal tensors are stored once, so the bias may be called after another layer.
            if bias.target.startswith(f"{module}."):
                return f"{bias.target.removesuffix('bias')}weight"
    return f"{module}.weight" if module else None
