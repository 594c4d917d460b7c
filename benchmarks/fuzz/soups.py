"""Random graphs of ONNX operators, right and nearly right, captured and compared with onnxruntime."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import tersor
from benchmarks.fuzz.case import Outcome, Stage
from benchmarks.fuzz.compare import IllConditioned, disagreement, spread
from benchmarks.fuzz.peer import compare_with_onnxruntime, inputs_for, small_sizes
from benchmarks.fuzz.worker import PEER
from tersor.errors import InputError
from tersor.frontends.onnx import convert  # noqa: F401  enters the converters
from tersor.frontends.onnx.table import CONVERTERS
from tersor.ir import Program

OPSETS = range(11, 24)
UNKNOWN = (
    "LSTM",
    "Loop",
    "NonMaxSuppression",
    "Det",
    "TopK",
    "Resize",
    "MaxPool",
    "Unique",
    "Bernoulli",
    "Scan",
)
"""Operators that are known to have no converter, or had none: refused, whatever their operands are."""
COMPILED = 6  # per cent of the captured ones
WIDTHS = (1, 2, 3, 4, 6, 8)
FLOAT, INT64, INT32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL
INT8, UINT8, HALF, DOUBLE = TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT16, TensorProto.DOUBLE

SHAPE_OPERANDS = {
    "shape",
    "axes",
    "axis",
    "starts",
    "ends",
    "steps",
    "repeats",
    "pads",
    "split",
    "indices",
    "depth",
    "k",
    "start",
    "limit",
    "delta",
    "K",
    "sizes",
    "constant_value",
    "ratio",
    "training_mode",
    "min",
    "max",
}
"""Formal operands that files usually store as small constants."""
TEXTS = {
    "auto_pad": ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"),
    "mode": ("constant", "reflect", "edge", "linear", "DCR"),
    "approximate": ("none", "tanh"),
    "direction": ("LEFT", "RIGHT", "forward"),
    "reduction": ("none", "add"),
    "equation": ("ij,jk->ik", "bij,bjk->bik", "...d->...", "bij->bji", "bhqd,bhkd->bhqk", "ii->i", "i,j->ij"),
}


@cache
def operators() -> tuple[str, ...]:
    """Standard operators that have a converter, and a few that have none."""
    known = sorted(name for domain, name in CONVERTERS if not domain)
    return (*(name for name in known if onnx.defs.has(name)), *UNKNOWN)


def random_model(rng: random.Random) -> onnx.ModelProto:
    """A model of a few operators; about one in four is not valid ONNX."""
    return _Writer(rng).write()


class _Writer:
    def __init__(self, rng: random.Random):
        self.rng, self.opset = rng, rng.choice(OPSETS)
        self.sloppy = rng.random() < 0.25  # leaves operators in that do not fit
        self.types: dict[str, onnx.TypeProto | None] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.width = rng.choice(WIDTHS)

    def chance(self, percent: int) -> bool:
        return self.rng.randrange(100) < percent

    def write(self) -> onnx.ModelProto:
        rng, inputs = self.rng, []
        lead = [rng.choice(("batch", "batch", 1, 2, "")), rng.choice(("length", 1, 2, 3, 5))]
        for i in range(rng.randint(1, 3)):
            shape = rng.choice(
                (
                    (*lead, self.width),
                    (*lead, self.width),
                    tuple(lead),
                    (self.width,),
                    (lead[1], self.width),
                    (lead[0], 2, lead[1], self.width),
                    (1,),
                    (),
                )
            )
            code = rng.choice((FLOAT,) * 8 + (INT64, INT64, INT32, BOOL, UINT8, INT8, HALF, DOUBLE))
            made = helper.make_tensor_value_info(f"x{i}", code, [d or None for d in shape])
            inputs.append(made)
            self.types[made.name] = made.type
        for i in range(rng.randint(0, 2)):
            shape = rng.choice(
                (
                    (self.width,),
                    (self.width, self.width),
                    (self.width, 3),
                    (),
                    (1, self.width),
                    (3, self.width, 2),
                )
            )
            self._store(f"w{i}", self._floats(shape))
        for i in range(rng.randint(1, 7)):
            self._node(i)
        made = [name for node in self.nodes for name in node.output if name]
        made = made or ["x0"]
        results = list(dict.fromkeys([made[-1], *rng.sample(made, min(len(made), rng.choice((0, 0, 1, 2))))]))
        outputs = [
            helper.make_value_info(n, self.types[n])
            if self.types.get(n) is not None and not self.chance(10)
            else helper.make_empty_tensor_value_info(n)
            for n in results
        ]
        tensors = [numpy_helper.from_array(value, name) for name, value in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "soup", inputs, outputs, tensors)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _floats(self, shape: tuple[int, ...]) -> np.ndarray:
        made = np.random.default_rng(self.rng.randrange(1 << 30)).standard_normal(shape).astype(np.float32)
        return np.abs(made) + 0.5 if self.chance(20) else made

    def _store(self, name: str, value: np.ndarray) -> str:
        self.tensors[name] = value
        code = helper.np_dtype_to_tensor_dtype(value.dtype)
        self.types[name] = helper.make_tensor_type_proto(code, value.shape)
        return name

    # -- one operator

    def _node(self, i: int) -> None:
        name = self.rng.choice(operators())
        try:
            schema = onnx.defs.get_schema(name, self.opset)
        except onnx.defs.SchemaError:
            return  # younger than the opset
        inputs = self._operands(schema, i)
        rank = self._rank(inputs[0]) if inputs else 0
        if name == "NonZero" and not rank:
            return  # [0, 1] by the standard, [1, 1] in onnxruntime
        if name == "ReduceLogSumExp" and self._code(inputs[0]) in (INT32, INT64):
            return  # onnxruntime makes every e**x an integer before it adds them up, and loses most of the sum
        attributes = self._attributes(schema, rank)
        count = (
            schema.min_output
            if schema.min_output == schema.max_output or self.chance(70)
            else min(schema.max_output, 3)
        )
        if name == "Dropout" and self.opset < 12:
            count = 1  # what the mask is outside of training is not said
        if name == "Split":
            count = self.rng.randint(1, 3)
        outputs = [f"v{i}_{j}" for j in range(max(count, 1))]
        node = helper.make_node(
            name, inputs, outputs, name=self.rng.choice((f"n{i}", f"/layer.{i}/{name}", "")), **attributes
        )
        types = self._infer(schema, node)
        if types is None and not (self.sloppy and self.chance(40)):
            for unused in set(self.tensors) - {x for n in self.nodes for x in n.input} - {"w0", "w1"}:
                del self.tensors[unused], self.types[unused]
            return
        self.nodes.append(node)
        for output in outputs:
            self.types[output] = (types or {}).get(output)

    def _operands(self, schema: Any, i: int) -> list[str]:
        inputs: list[str] = []
        for j, formal in enumerate(schema.inputs):
            optional = formal.option == onnx.defs.OpSchema.FormalParameterOption.Optional
            variadic = formal.option == onnx.defs.OpSchema.FormalParameterOption.Variadic
            if optional and self.chance(45):
                inputs.append("")
                continue
            for _ in range(self.rng.randint(1, 3) if variadic else 1):
                inputs.append(self._operand(schema, formal, inputs, f"c{i}_{j}"))
        while inputs and not inputs[-1]:
            inputs.pop()
        if self.sloppy and inputs and self.chance(8):
            inputs.pop()
        return inputs

    def _operand(self, schema: Any, formal: Any, before: list[str], name: str) -> str:
        like = before[0] if before else ""
        if formal.name in SHAPE_OPERANDS and not self.chance(5):
            return self._store(name, self._small(schema.name, formal.name, like))
        allowed = {str(t) for t in formal.types}
        bound = [
            n for n, f in zip(before, schema.inputs, strict=False) if f.type_str == formal.type_str and n
        ]
        wanted = self._code(bound[0]) if bound and not (self.sloppy and self.chance(15)) else None
        fitting = [
            n
            for n in self.types
            if (_type_name(self._code(n)) in allowed or self._code(n) is None)
            and (wanted is None or self._code(n) == wanted)
        ]
        if (not fitting or self.chance(15)) and self._static(like) is not None:
            shape = self._static(like)
            if shape and self.chance(60):
                shape = self.rng.choice((shape[-1:], (1,), (), shape, (shape[-1], 3)))
            value = self._floats(shape)
            code = wanted or next(
                (c for c in (FLOAT, INT64, BOOL, UINT8, HALF) if _type_name(c) in allowed), FLOAT
            )
            return self._store(
                name, (value * 3 if code != FLOAT else value).astype(helper.tensor_dtype_to_np_dtype(code))
            )
        if self.sloppy and self.chance(6):
            return self.rng.choice(("nowhere", "", *self.types))
        pool = fitting or list(self.types)
        return pool[max(self.rng.randrange(len(pool)), self.rng.randrange(len(pool)))]

    def _small(self, op: str, formal: str, like: str) -> np.ndarray:
        """A constant that says where, how often or how large."""
        rng, rank = self.rng, self._rank(like)
        shape = self._shape(like)
        if op == "Clip":
            return np.float32(rng.choice((-1.0, 0.0, 0.5, 2.0)))
        if formal in (
            "axis",
            "k",
            "depth",
            "start",
            "limit",
            "delta",
            "ratio",
            "training_mode",
            "K",
            "constant_value",
        ):
            if formal == "constant_value":
                return np.float32(rng.choice((0, 1.5)))
            if formal == "training_mode":
                return np.bool_(False)
            if formal == "ratio":
                return np.float32(0.5)
            values = {
                "axis": range(-rank, max(rank, 1)),
                "depth": (3, 5),
                "limit": (4, 7),
                "start": (0, 1),
                "delta": (1, 2, -1),
            }
            return np.int64(rng.choice(tuple(values.get(formal, (-1, 0, 1, 2)))))
        if formal == "shape" and op == "Reshape":
            wanted = [rng.choice((0, d, d)) if isinstance(d, int) else rng.choice((0, -1)) for d in shape]
            if len(wanted) > 1 and self.chance(60):
                at = rng.randrange(len(wanted) - 1)
                wanted[at : at + 2] = [-1]
            elif self.chance(40):
                wanted.insert(rng.randint(0, len(wanted)), 1)
            if wanted.count(-1) > 1 and not self.sloppy:
                wanted = [-1]
            return np.array(wanted, np.int64)
        if formal == "repeats":
            return np.array([rng.choice((1, 1, 2)) for _ in range(rank)], np.int64)
        if formal == "pads":
            return np.array([rng.choice((0, 0, 1, 2)) for _ in range(2 * rank)], np.int64)
        if formal == "split":
            total = next((d for d in shape if isinstance(d, int)), 2)
            first = rng.randint(0, max(total, 1))
            return np.array([first, total - first], np.int64)
        if formal == "indices":
            low = -2 if self.chance(40) else 0
            made = rng.choice(((), (1,), (2,), (2, 2), self._static(like) or ()))
            return np.random.default_rng(rng.randrange(1 << 30)).integers(low, 2, made)
        if formal in ("starts", "ends", "steps"):
            values = {"starts": (0, 1, -1, -2), "ends": (1, 2, -1, 1 << 62, 5), "steps": (1, 1, 1, 2, -1)}[
                formal
            ]
            return np.array([rng.choice(values)], np.int64)
        if formal == "axes" and op in ("Slice", "Pad"):
            return np.array([rng.randrange(-max(rank, 1), max(rank, 1))], np.int64)
        if formal == "axes":
            axes = rng.sample(range(max(rank, 1)), min(max(rank, 1), rng.choice((1, 1, 2))))
            return np.array([a - rank * self.chance(30) for a in axes], np.int64)
        return np.array(
            [
                rng.choice((1, 2, 3, *(d for d in shape if isinstance(d, int))))
                for _ in range(rng.randint(1, 3))
            ],
            np.int64,
        )

    def _attributes(self, schema: Any, rank: int) -> dict[str, Any]:
        kinds = onnx.defs.OpSchema.AttrType
        rng, made = self.rng, {}
        for name, formal in sorted(schema.attributes.items()):
            if not (formal.required or self.chance(35)):
                continue
            if schema.name == "Constant" and made:
                break
            if formal.type == kinds.INT:
                wide = (
                    range(-rank, max(rank, 1)) if not (self.sloppy and self.chance(10)) else (-9, 7, 1 << 40)
                )
                value: Any = rng.choice(
                    {
                        "axis": tuple(wide),
                        "to": (FLOAT, INT64, INT32, BOOL, FLOAT, HALF, UINT8),
                        "dtype": (FLOAT, INT64, BOOL),
                        "keepdims": (0, 1),
                        "batch_dims": (0, 0, 1),
                        "group": (1, 2),
                        "num_heads": (1, 2),
                        "q_num_heads": (1, 2),
                        "kv_num_heads": (1, 2),
                        "num_outputs": (1, 2, 3),
                        "num_groups": (1, 2),
                        "stash_type": (1,),
                    }.get(name, (0, 1, 1, 2))
                )
            elif formal.type == kinds.FLOAT:
                value = rng.choice((0.0, 1e-5, 0.5, 1.0, 2.0, 1e-12) if name != "epsilon" else (1e-5, 1e-3))
            elif formal.type == kinds.STRING:
                value = rng.choice(TEXTS.get(name, ("", "relu")))
            elif formal.type == kinds.TENSOR:
                value = numpy_helper.from_array(self._floats(rng.choice(((1,), (1,), (2,), (self.width,)))))
            elif formal.type == kinds.INTS:
                count = rank if name in ("perm", "pads") else rng.choice((1, 1, 2))
                value = (
                    rng.sample(range(rank), rank)
                    if name == "perm"
                    else [rng.randrange(-1, 3) for _ in range(count)]
                )
                if name in ("strides", "dilations", "kernel_shape", "pads"):
                    value = [max(v, int(name != "pads")) for v in value][: max(rank - 2, 1)] * (
                        2 if name == "pads" else 1
                    )
                if not value:
                    continue
            elif formal.type == kinds.FLOATS:
                value = [0.5, 1.5]
            else:
                continue
            made[name] = value
        return made

    # -- what is known

    def _infer(self, schema: Any, node: onnx.NodeProto) -> dict[str, onnx.TypeProto] | None:
        types = {n: self.types.get(n) for n in node.input if n}
        if any(t is None for t in types.values()):
            return {}
        data = {n: numpy_helper.from_array(self.tensors[n]) for n in node.input if n in self.tensors}
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=[helper.make_opsetid("", self.opset)]
            )
        except Exception:  # whatever the checker thinks of it
            return None
        return found if found else None

    def _code(self, name: str) -> int | None:
        kind = self.types.get(name)
        return kind.tensor_type.elem_type or None if kind is not None else None

    def _shape(self, name: str) -> list[int | str]:
        kind = self.types.get(name)
        if kind is None or not kind.tensor_type.HasField("shape"):
            return []
        return [d.dim_value if d.HasField("dim_value") else "?" for d in kind.tensor_type.shape.dim]

    def _static(self, name: str) -> tuple[int, ...] | None:
        if name and self.types.get(name) is None:
            return None
        return tuple(d if isinstance(d, int) and 0 <= d < 64 else 1 for d in self._shape(name))

    def _rank(self, name: str) -> int:
        return len(self._shape(name))


def _type_name(code: int | None) -> str:
    """As in schemas: ``tensor(float)``."""
    names = {FLOAT: "float", DOUBLE: "double", HALF: "float16"}
    return f"tensor({names.get(code) or TensorProto.DataType.Name(code or 0).lower()})"


class Soups:
    """Random graphs of operators."""

    limit, memory = 60.0, 1 << 30

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def run(self, rng: random.Random, stage: Stage) -> Outcome:
        stage(PEER)  # onnx itself infers shapes while a model is made
        model = random_model(rng)
        compiled = rng.randrange(100) < COMPILED
        stage("capturing")
        program = tersor.capture(model)
        outcome = compare_with_onnxruntime(model.SerializeToString(), program, stage)
        if outcome.kind == "wrong":
            return Outcome(outcome.kind, outcome.label, outcome.detail + "\n" + onnx.printer.to_text(model))
        return self._compiled(program, outcome, stage) if compiled and outcome.kind == "right" else outcome

    @staticmethod
    def _compiled(program: Program, outcome: Outcome, stage: Stage) -> Outcome:
        stage("compiling")
        compiled = tersor.compile(program, threads=1, verify=False)
        for seed, sizes in enumerate(small_sizes(program)):
            inputs = inputs_for(program, sizes, seed)
            try:
                expected, slack = spread(program.main, inputs, seed)
            except InputError:
                continue  # stored positions that these sizes do not have: onnxruntime has refused them
            stage("running")
            actual = {name: torch.as_tensor(value) for name, value in compiled(**inputs).items()}
            try:
                wrong = disagreement(actual, expected, slack)
            except IllConditioned:
                continue
            if wrong:
                return Outcome("wrong", "compiled", f"at {sizes}: {wrong}\n{program}")
        return outcome
