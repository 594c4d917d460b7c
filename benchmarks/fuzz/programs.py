"""Random programs: every operation of the dialect on whatever values are at hand, over static and named dimensions.

All choices come from a `random.Random`; hypothesis' own (`strategies.randoms`) shrinks what it finds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from tersor.errors import ProgramError
from tersor.ir import Builder, Dim, Function, Program, Range, Value
from tersor.ir.dims import product

LARGEST = 6_000  # elements of a value at the largest sizes
PRODUCTS = 2  # matrix products of a program: their kernels take most of the time to compile
RANK = 5

SMOOTH = ("neg", "abs", "tanh", "relu", "sigmoid", "silu", "gelu", "gelu_tanh", "erf", "cos", "sin")
BINARY = ("add", "sub", "mul", "maximum", "minimum")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
NUMBERS = (2, 0.5, -1.0, 0, 1, 3, 1.5, -0.25, 1e-3, 100.0)


@dataclass(frozen=True)
class Style:
    """What a random program is made of.

    Attributes:
        kinds: families of operations (methods of `_Writer`) with their weights.
        largest: most operations.
        refused: also element types and forms that are known to have no code.
    """

    kinds: dict[str, int]
    largest: int = 14
    refused: bool = False


EVERYTHING = Style(
    {
        "unary": 4,
        "domain": 2,
        "binary": 6,
        "number": 4,
        "compare": 2,
        "where": 2,
        "logical": 1,
        "cast": 2,
        "reshape": 4,
        "permute": 3,
        "expand": 2,
        "slice": 4,
        "concat": 3,
        "pad": 2,
        "select": 2,
        "gather": 1,
        "arange": 2,
        "full": 1,
        "cumsum": 1,
        "linear": 3,
        "matmul": 2,
        "norm": 3,
        "embedding": 2,
        "attention": 2,
        "rotary": 1,
        "conv": 1,
        "reduce": 4,
        "argmax": 1,
        "softmax": 2,
        "parameter": 2,
        "residual": 3,
    }
)


def random_program(rng: random.Random, style: Style = EVERYTHING) -> Program:
    """A program of at least one operation and one to three results; it computes finite numbers."""
    return _Writer(rng, style).write()


class _Writer:
    def __init__(self, rng: random.Random, style: Style):
        self.rng, self.style = rng, style
        self.program = Program()
        self.dims: dict[str, Dim] = {}
        self.products = 0
        self.values: list[fx.Node] = []
        self.ids: list[tuple[fx.Node, int]] = []  # whole numbers below a bound
        self.function: Function
        self.build: Builder

    # -- choices

    def chance(self, percent: int) -> bool:
        return self.rng.randrange(100) < percent

    def seed(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng.randrange(1 << 30))

    def pick(self, fits: Callable[[Value], bool] = lambda value: True) -> fx.Node | None:
        """A value that fits, later ones more often."""
        found = [n for n in self.values if fits(n.meta["value"])]
        if not found:
            return None
        return found[max(self.rng.randrange(len(found)), self.rng.randrange(len(found)))]

    def floats(self, rank: int = 0) -> fx.Node | None:
        return self.pick(lambda v: v.is_float and v.rank >= rank)

    def weight(self, *shape: int, scale: float | None = None) -> fx.Node:
        tensor = torch.randn(shape, generator=self.seed()) * (
            scale or max(shape[-1] if shape else 1, 1) ** -0.5
        )
        return self.build.parameter(self.rng.choice(("w", "layer.weight", "m.0.w")), tensor)

    # -- the frame

    def write(self) -> Program:
        names = self.rng.choice(((), ("batch",), ("length",), ("batch", "length"), ("batch", "length", "n")))
        ranges = {}
        for name in names:
            low = self.rng.choice((1, 1, 1, 2, 3))
            ranges[name] = Range(low, low + self.rng.choice((1, 3, 8, 17)))
            self.dims[name] = Dim.symbol(name)
        self.function = self.program.add_function("main", ranges)
        self._inputs()
        self.build = self.function.builder()
        kinds, weights = zip(*self.style.kinds.items(), strict=True)
        made: list[fx.Node] = []
        for _ in range(self.rng.randint(1, self.style.largest)):
            kind = self.rng.choices(kinds, weights)[0]
            before = set(self.function.graph.nodes)
            try:
                node = getattr(self, f"_{kind}")()
            except ProgramError:
                node = None  # the operands at hand do not fit
            if node is None or self._too_large(node):
                for extra in [n for n in reversed(self.function.graph.nodes) if n not in before]:
                    self.function.graph.erase_node(extra)
                continue
            made.append(node)
            self.values.append(node)
        if not made:
            made = [self.build.abs(next(n for n in self.values if n.meta["value"].is_float))]
        results = [
            made[-1],
            *self.rng.sample(self.values, min(len(self.values), self.rng.choice((0, 0, 1, 2)))),
        ]
        self.function.set_outputs({f"out_{i}": node for i, node in enumerate(dict.fromkeys(results))})
        self.function.erase_dead(*self.function.calls())
        self.program.drop_unused_parameters()
        return self.program

    def _too_large(self, node: fx.Node) -> bool:
        value = node.meta["value"]
        return value.rank > RANK or self.most(value.elements) > LARGEST

    def most(self, size: int | Dim) -> int:
        limits = {name: r.max for name, r in self.function.dims.items()}
        return size.evaluate(limits) if isinstance(size, Dim) else size

    def least(self, size: int | Dim) -> int:
        limits = {name: r.min for name, r in self.function.dims.items()}
        return size.evaluate(limits) if isinstance(size, Dim) else size

    def _inputs(self) -> None:
        rng, width = self.rng, self.rng.choice((1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24))
        lead = [self.dims.get("batch", rng.choice((1, 2, 3))), self.dims.get("length", rng.randint(1, 9))]
        shapes = [(*lead, width)]
        if self.chance(40):
            extra = self.dims.get("n", rng.randint(1, 6))
            shapes.append(
                rng.choice(
                    (
                        (*lead, width),
                        (lead[1], width),
                        (width,),
                        (lead[0], 1, width),
                        (*lead, 1),
                        (lead[0], extra, width),
                        (extra, width),
                        (lead[0], rng.randint(1, 4), lead[1]),
                        (),
                        (lead[0], 2, rng.randint(3, 7), rng.randint(3, 7)),
                    )
                )
            )
        if "n" in self.dims and not any(self.dims["n"] in s for s in shapes):
            shapes.append((self.dims["n"], width))
        for i, shape in enumerate(shapes):
            self.values.append(self.function.add_input(f"x{i}", Value("float32", shape)))
        if self.chance(25):
            dtype = rng.choice(("int64", "int64", "int32", "bool"))
            self.values.append(self.function.add_input("flags", Value(dtype, tuple(lead))))
        if self.chance(25):
            node = self.function.add_input("ids", Value("int64", tuple(lead)))
            self.ids.append((node, 0))  # used for rows of tables only, so that any number is a row
        if self.style.refused and self.chance(5):
            self.values.append(
                self.function.add_input("odd", Value(rng.choice(("float64", "float16", "uint8")), (2, 3)))
            )

    # -- element by element

    def _unary(self) -> fx.Node | None:
        x = self.floats()
        return x and self.build.emit(self.rng.choice(SMOOTH), x)

    def _domain(self) -> fx.Node | None:
        """Operations that are not defined, or too large, everywhere."""
        x, build = self.floats(), self.build
        if x is None:
            return None
        kind = self.rng.choice(("sqrt", "log", "exp", "rsqrt", "reciprocal", "div", "pow", "floor"))
        if kind == "sqrt":
            return build.sqrt(build.abs(x))
        if kind == "log":
            return build.log(build.add(build.abs(x), 0.5))
        if kind == "exp":
            return build.exp(build.minimum(x, 3.0))
        if kind == "floor":
            return build.floor(x)
        if kind == "pow":
            base = build.add(build.abs(x), 0.1)
            return build.pow(
                *self.rng.choice(
                    ((x, 2), (x, 3.0), (x, 2.0), (base, 0.5), (base, -0.5), (2.0, build.tanh(x)))
                )
            )
        positive = build.add(build.mul(x, x), 0.25)
        if kind == "div":
            top = self.floats()
            return build.div(self.rng.choice((1.0, 3, top, top)), positive)
        return build.emit(kind, positive)

    def _partner(self, x: fx.Node) -> fx.Node | None:
        """Another value that broadcasts with x, of any number type."""

        def fits(other: Value) -> bool:
            pairs = zip(reversed(other.shape), reversed(x.meta["value"].shape), strict=False)
            return all(a == b or 1 in (a, b) for a, b in pairs) and other.dtype != "bool"

        return self.pick(fits)

    def _binary(self) -> fx.Node | None:
        x = self.pick(lambda v: v.dtype != "bool")
        y = x is not None and self._partner(x)
        return (y or None) and self.build.emit(self.rng.choice(BINARY), *self.rng.sample((x, y), 2))

    def _residual(self) -> fx.Node | None:
        x = self.floats()
        y = x is not None and self.pick(lambda v: v == x.meta["value"])
        return (y or None) and self.build.add(x, y)

    def _number(self) -> fx.Node | None:
        x, number = self.pick(lambda v: v.dtype != "bool"), self.rng.choice(NUMBERS)
        if x is None:
            return None
        return self.build.emit(self.rng.choice(BINARY), *((x, number) if self.chance(70) else (number, x)))

    def _compare(self) -> fx.Node | None:
        x = self.pick(lambda v: v.dtype != "bool")
        y = x is not None and (self._partner(x) if self.chance(60) else self.rng.choice(NUMBERS))
        if x is None or y is None:
            return None
        # whether computed fractions are equal is decided by rounding
        names = COMPARISONS if not x.meta["value"].is_float else COMPARISONS[2:]
        return self.build.emit(self.rng.choice(names), x, y)

    def _where(self) -> fx.Node | None:
        x, condition = self.pick(lambda v: v.dtype != "bool"), self.pick(lambda v: v.dtype == "bool")
        if x is None or condition is None:
            return None
        y = self._partner(x) if self.chance(60) else self.rng.choice((0.0, -1.0, 2))
        return y if y is None else self.build.where(condition, *self.rng.sample((x, y), 2))

    def _logical(self) -> fx.Node | None:
        x, y = (self.pick(lambda v: v.dtype == "bool") for _ in range(2))
        if x is None:
            return None
        name = self.rng.choice(("logical_and", "logical_or", "logical_not"))
        return self.build.emit(name, *((x,) if name == "logical_not" else (x, y)))

    def _cast(self) -> fx.Node | None:
        x = self.pick()
        names = ["float32", "float32", "int64", "int32", "bool"]
        if self.style.refused and self.chance(5):
            names = ["float64", "float16", "bfloat16", "int8"]
        dtype = self.rng.choice(names)
        if x is not None and x.meta["value"].is_float and dtype.startswith("int"):
            x = self.build.maximum(self.build.minimum(x, 1000.0), -1000.0)
        return x and self.build.cast(x, dtype=dtype)

    # -- layout

    def _reshape(self) -> fx.Node | None:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return None
        shape = list(x.meta["value"].shape)
        i = self.rng.randrange(len(shape))
        kind = self.rng.choice(("merge", "split", "one", "drop", "flat"))
        if kind == "merge" and i + 1 < len(shape):
            shape[i : i + 2] = [shape[i] * shape[i + 1]]
        elif kind == "split" and isinstance(shape[i], int):
            factors = [f for f in range(2, shape[i]) if shape[i] % f == 0]
            factor = self.rng.choice(factors or [1])
            shape[i : i + 1] = [shape[i] // factor, factor]
        elif kind == "drop" and shape[i] == 1:
            del shape[i]
        elif kind == "flat":
            shape = [product(shape)]
        else:
            shape.insert(i, 1)
        return self.build.reshape(x, shape=tuple(shape))

    def _permute(self) -> fx.Node | None:
        x = self.pick(lambda v: v.rank > 1)
        return x and self.build.permute(
            x, dims=tuple(self.rng.sample(range(x.meta["value"].rank), x.meta["value"].rank))
        )

    def _expand(self) -> fx.Node | None:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return None
        shape = [
            self.rng.choice((1, 2, 3, *self.dims.values())) if d == 1 else d for d in x.meta["value"].shape
        ]
        if self.chance(30):
            shape.insert(0, self.rng.choice((1, 2, *self.dims.values())))
        return self.build.expand(x, shape=tuple(shape))

    def _slice(self) -> fx.Node | None:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return None
        dim = self.rng.randrange(x.meta["value"].rank)
        size = x.meta["value"].shape[dim]
        smallest = self.least(size)
        start = self.rng.randint(0, max(smallest - 1, 0))
        if isinstance(size, Dim):
            end = self.rng.choice(
                (None, size, start + 1, size - self.rng.randint(0, max(smallest - start - 1, 0)))
            )
            if self.chance(15):
                start, end = size - 1, size
        else:
            end = self.rng.randint(start + 1, size) if size else size
        step = self.rng.choice((2, 3)) if not isinstance(size, Dim) and self.chance(20) else 1
        return self.build.slice(
            x, dim=dim - x.meta["value"].rank * self.chance(30), start=start, end=end, step=step
        )

    def _concat(self) -> fx.Node | None:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return None
        shape, dtype = x.meta["value"].shape, x.meta["value"].dtype
        dim = self.rng.randrange(len(shape))

        def fits(v: Value) -> bool:
            return (
                v.dtype == dtype
                and v.rank == len(shape)
                and v.shape[:dim] == shape[:dim]
                and v.shape[dim + 1 :] == shape[dim + 1 :]
            )

        parts = [x, *(self.pick(fits) for _ in range(self.rng.randint(1, 2)))]
        return self.build.concat(tuple(self.rng.sample(parts, len(parts))), dim=dim)

    def _pad(self) -> fx.Node | None:
        x = self.pick(lambda v: v.rank > 0 and v.is_float)
        if x is None:
            return None
        pads = tuple(
            self.rng.choice((0, 0, 1, 2)) for _ in range(2 * self.rng.randint(1, x.meta["value"].rank))
        )
        return self.build.pad(x, pads=pads, value=self.rng.choice((0.0, 1.5)))

    def _select(self) -> fx.Node | None:
        x = self.pick(lambda v: v.rank > 0)
        if x is None:
            return None
        dim = self.rng.randrange(x.meta["value"].rank)
        rows = self.least(x.meta["value"].shape[dim])
        if not rows:
            return None
        shape = self.rng.choice(((), (1,), (3,), (2, 2)))
        index = self.build.parameter("index", torch.randint(0, rows, shape, generator=self.seed()))
        return self.build.index_select(x, index, dim=dim)

    def _gather(self) -> fx.Node | None:
        x = self.pick(lambda v: v.rank > 0 and all(d != 0 for d in v.shape))
        if x is None:
            return None
        shape = x.meta["value"].shape
        dim = self.rng.randrange(len(shape))
        if x.meta["value"].dtype != "bool" and self.chance(50):
            return self.build.gather(x, self.build.argmax(x, dim=dim, keepdim=True), dim=dim)
        if any(isinstance(d, Dim) for d in shape):
            return None
        index = torch.randint(
            0, shape[dim], tuple(shape[:dim] + (2,) + shape[dim + 1 :]), generator=self.seed()
        )
        return self.build.gather(x, self.build.parameter("index", index), dim=dim)

    def _arange(self) -> fx.Node:
        end = self.rng.choice((self.rng.randint(1, 9), *self.dims.values(), *self.dims.values()))
        node = self.build.arange(end=end, dtype=self.rng.choice(("int64", "int64", "float32", "int32")))
        return node if self.chance(50) else self.build.reshape(node, shape=(end, 1))

    def _full(self) -> fx.Node:
        dtype, value = self.rng.choice(
            (("float32", 0.5), ("int64", 3), ("bool", True), ("float32", -1.0), ("int32", 2))
        )
        like = self.pick()
        shape = like.meta["value"].shape if like is not None and self.chance(60) else (2, 1)
        return self.build.full(shape=shape, value=value, dtype=dtype)

    def _parameter(self) -> fx.Node:
        like = self.pick(lambda v: v.rank > 0)
        last = like.meta["value"].shape[-1] if like is not None else 4
        last = last if isinstance(last, int) else 1
        return self.weight(
            *self.rng.choice(((last,), (1, last), (self.rng.randint(1, 3), 1, last), ())), scale=1.0
        )

    def _cumsum(self) -> fx.Node | None:
        x = self.pick(lambda v: v.rank > 0)
        return x and self.build.cumsum(x, dim=self.rng.randrange(-x.meta["value"].rank, x.meta["value"].rank))

    # -- layers

    def _linear(self, x: fx.Node | None = None, outputs: int | None = None) -> fx.Node | None:
        x = x or self.pick(
            lambda v: v.dtype == "float32" and v.rank > 0 and isinstance(v.shape[-1], int) and v.shape[-1] > 0
        )
        if x is None or self.products >= PRODUCTS:
            return None
        self.products += 1
        outputs = outputs or self.rng.choice((1, 2, 3, 4, 6, 8, 16, 17, 33))
        bias = self.weight(outputs, scale=0.3) if self.chance(60) else None
        made = self.build.linear(
            x, self.weight(outputs, x.meta["value"].shape[-1]), bias, site=f"layer.{len(self.values)}"
        )
        return made if self.chance(60) else self.build.emit(self.rng.choice(SMOOTH), made)

    def _matmul(self) -> fx.Node | None:
        x = self.pick(lambda v: v.dtype == "float32" and v.rank > 1)
        if x is None or self.products >= PRODUCTS:
            return None
        inner, rank = x.meta["value"].shape[-1], x.meta["value"].rank
        y = self.pick(lambda v: v.dtype == "float32" and v.rank > 1 and inner in v.shape[-2:])
        if y is None:
            return None
        self.products += 1
        if y.meta["value"].shape[-2] != inner or self.chance(30):
            rank = y.meta["value"].rank
            y = self.build.permute(y, dims=(*range(rank - 2), rank - 1, rank - 2))
        return self.build.matmul(x, y)

    def _norm(self) -> fx.Node | None:
        x = self.pick(
            lambda v: v.dtype == "float32" and v.rank > 0 and isinstance(v.shape[-1], int) and v.shape[-1] > 1
        )
        if x is None:
            return None
        width, eps = x.meta["value"].shape[-1], self.rng.choice((1e-5, 1e-6, 1e-12, 0.1))
        gain = self.weight(width, scale=1.0) if self.chance(70) else None
        if self.chance(50):
            return self.build.rms_norm(x, gain, eps=eps)
        shift = self.weight(width, scale=0.2) if gain is not None and self.chance(70) else None
        return self.build.layer_norm(x, gain, shift, eps=eps)

    def _embedding(self) -> fx.Node | None:
        rows = self.rng.choice((1, 2, 5, 11))
        table = self.weight(rows, self.rng.choice((1, 3, 4, 8, 17)), scale=1.0)
        if self.ids and self.chance(70):
            return self.build.embedding(self.ids[0][0], table)
        x = self.pick(lambda v: v.dtype == "int64")
        if x is None:
            return None
        return self.build.embedding(self.build.minimum(self.build.maximum(x, 0), rows - 1), table)

    def _attention(self) -> fx.Node | None:
        q = self.pick(
            lambda v: v.dtype == "float32" and v.rank == 3 and isinstance(v.shape[2], int) and v.shape[2] > 0
        )
        if q is None or self.products >= PRODUCTS:
            return None
        self.products += 1
        batch, queries, width = q.meta["value"].shape
        heads = self.rng.choice([h for h in (1, 2, 3, 4, 6, 8) if width % h == 0])
        size = width // heads
        groups = self.rng.choice([g for g in range(1, heads + 1) if heads % g == 0])
        k = self.pick(
            lambda v: (
                v.dtype == "float32" and v.rank == 3 and v.shape[0] == batch and v.shape[2] == groups * size
            )
        )
        if k is None:
            source = self.pick(
                lambda v: v.dtype == "float32" and v.rank == 3 and v.shape[0] == batch and v.shape[2] == width
            )
            k = self.build.slice(source, dim=2, start=0, end=groups * size)
        v = self.pick(
            lambda v: (
                v.dtype == "float32"
                and v.rank == 3
                and v.shape[:2] == k.meta["value"].shape[:2]
                and isinstance(v.shape[2], int)
                and v.shape[2] > 0
                and v.shape[2] % groups == 0
            )
        )
        keys = k.meta["value"].shape[1]
        causal = self.chance(40) and keys == queries  # every query has to see a key
        window = self.rng.choice((1, 2, 5)) if causal and self.chance(40) else None
        return self.build.attention(
            q,
            k,
            v,
            self._attention_mask(batch, heads, queries, keys, causal),
            heads=heads,
            kv_heads=groups,
            scale=self.rng.choice((size**-0.5, 1.0, 0.3)),
            causal=causal,
            window=window,
        )

    def _attention_mask(self, batch, heads: int, queries, keys, causal: bool) -> fx.Node | None:
        """Added numbers, or booleans that leave every query the keys it needs."""
        if self.chance(50):
            return None
        shape = tuple(self.rng.choice((1, d)) for d in (batch, heads, queries))
        fitting = self.pick(
            lambda v: (
                v.dtype == "float32"
                and v.rank == 4
                and all(a in (1, b) for a, b in zip(v.shape, (batch, heads, queries, keys), strict=True))
            )
        )
        if fitting is not None and self.chance(60):
            return fitting
        if all(isinstance(d, int) for d in (*shape, keys)) and self.chance(50):
            return self.weight(*shape, keys, scale=1.0)
        places = self.build.reshape(self.build.arange(end=keys), shape=(1, 1, 1, keys))
        if self.chance(50) and not causal:
            return self.build.expand(self.build.lt(places, self.rng.randint(1, 5)), shape=(*shape, keys))
        far = self.build.mul(self.build.cast(places, dtype="float32"), self.rng.choice((-0.5, -0.125, 0.25)))
        return self.build.expand(far, shape=(*shape, keys))

    def _rotary(self) -> fx.Node | None:
        x = self.pick(
            lambda v: (
                v.dtype == "float32"
                and v.rank == 3
                and isinstance(v.shape[2], int)
                and v.shape[2] % 2 == 0
                and v.shape[2] > 0
            )
        )
        if x is None:
            return None
        _, length, width = x.meta["value"].shape
        heads = self.rng.choice([h for h in (1, 2, 3, 4) if width % h == 0 and width // h >= 2])
        turned = self.rng.choice([r for r in range(2, width // heads + 1, 2)])
        steps = self.build.reshape(self.build.arange(end=length, dtype="float32"), shape=(1, length, 1))
        angles = self.build.mul(steps, self.weight(1, 1, turned, scale=0.5))
        return self.build.rotary_embedding(
            x, self.build.cos(angles), self.build.sin(angles), heads=heads, interleaved=self.chance(40)
        )

    def _conv(self) -> fx.Node | None:
        rank = self.rng.choice((3, 4))
        x = self.pick(
            lambda v: (
                v.dtype == "float32" and v.rank == rank and isinstance(v.shape[1], int) and v.shape[1] > 0
            )
        )
        if x is None or self.products >= PRODUCTS:
            return None
        spatial, outputs = rank - 2, self.rng.choice((1, 3, 8))
        channels, lengths = x.meta["value"].shape[1], x.meta["value"].shape[2:]
        moves = [
            (
                self.rng.choice((1, 2)) if isinstance(d, int) else 1,
                self.rng.choice((0, 1)),
                self.rng.choice((1, 1, 2)),
            )
            for d in lengths
        ]
        kernel = tuple(self.rng.randint(1, 3) for _ in range(spatial))
        if any(
            self.least(d) + 2 * p < (k - 1) * a + 1
            for d, k, (_, p, a) in zip(lengths, kernel, moves, strict=True)
        ):
            return None
        self.products += 1
        weight, bias = (
            self.weight(outputs, channels, *kernel, scale=0.3),
            self.weight(outputs) if self.chance(50) else None,
        )
        stride, padding, dilation = zip(*moves, strict=True)
        if spatial == 1:
            stride, padding, dilation = stride[0], padding[0], dilation[0]
        name = f"conv{spatial}d"
        return self.build.emit(name, x, weight, bias, stride=stride, padding=padding, dilation=dilation)

    # -- reductions

    def _reduce(self) -> fx.Node | None:
        kind = self.rng.choice(("sum", "mean", "amax", "amin"))
        x = self.pick(
            lambda v: v.rank > 0 and (v.is_float or kind != "mean") and (v.dtype != "bool" or kind == "sum")
        )
        if x is None:
            return None
        rank = x.meta["value"].rank
        dims = tuple(self.rng.sample(range(rank), self.rng.randint(1, min(2, rank))))
        if any(self.least(x.meta["value"].shape[d]) == 0 for d in dims):
            return None
        return self.build.emit(
            kind, x, dims=tuple(d - rank * self.chance(30) for d in dims), keepdim=self.chance(60)
        )

    def _argmax(self) -> fx.Node | None:
        x = self.pick(lambda v: v.rank > 0 and v.dtype != "bool")
        if x is None:
            return None
        dim = self.rng.randrange(x.meta["value"].rank)
        return (
            None
            if not self.least(x.meta["value"].shape[dim])
            else self.build.argmax(x, dim=dim, keepdim=self.chance(50))
        )

    def _softmax(self) -> fx.Node | None:
        x = self.pick(lambda v: v.dtype == "float32" and v.rank > 0)
        name = "softmax" if self.chance(75) else "log_softmax"
        return x and self.build.emit(
            name, x, dim=self.rng.randrange(-x.meta["value"].rank, x.meta["value"].rank)
        )
