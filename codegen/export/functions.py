"""Kernels as plain C functions: no runtime behind them, no allocation, loops over threads as functions of a range.

A kernel becomes

    int32_t NAME(void *worker, void *scratch, <its buffers>, <int64_t its sizes>);

and each of its parallel loops a function for the iterations from ``begin`` to ``end``, called by several threads:

    int32_t NAME_part0(int64_t begin, int64_t end, void *scratch, <what the loop reads of its kernel>);

Where the loop stood the kernel calls ``NAME_part0_launch(worker, extent, <the same>)``: C source that comes with the
object and hands the part to the threads of ``worker``. Temporaries too large for the stack lie in ``scratch``: memory
of one thread that begins at a multiple of `ALIGNMENT`. Where an assertion does not hold, the int32 that ``worker``
points to becomes `FAILED` and the kernel ends. What the functions return is always 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, PointerType, PrimType, StringImm, Var
from tvm.tirx import stmt as S
from tvm.tirx.analysis import undefined_vars
from tvm.tirx.buffer import is_buffer_var

from tersor.errors import CompileError

FAILED = 1
"""What a kernel leaves in its worker's status when an assertion does not hold: a position outside a state."""

STACK = 1024
"""Bytes up to which a temporary is left on the stack; LLVM turns most of those into registers."""

ALIGNMENT = 64
"""Bytes to whose multiples scratch memory, and each temporary in it, is aligned."""


@dataclass(frozen=True)
class Parameter:
    """A parameter that is the kernel's own: a buffer of ``dtype`` elements, or a number."""

    variable: Var
    dtype: str
    is_buffer: bool


@dataclass(frozen=True)
class PlainFunction:
    """One C function: a whole kernel, or one of its parts.

    parameters: what follows ``worker, scratch`` (a kernel) or ``begin, end, scratch`` (a part).
    scratch: bytes of its temporaries, an expression over the parameters' variables.
    may_fail: whether it has an assertion.
    """

    symbol: str
    parameters: tuple[Parameter, ...]
    code: tirx.PrimFunc
    scratch: Expr | int
    may_fail: bool


@dataclass(frozen=True)
class PlainKernel:
    """A kernel as C functions: its buffers, then its sizes are the parameters of ``main``.

    sizes: where each size is found: the number of a buffer, and one of its dimensions.
    """

    main: PlainFunction
    parts: tuple[PlainFunction, ...]
    sizes: tuple[tuple[int, int], ...]

    @property
    def functions(self) -> tuple[PlainFunction, ...]:
        return (self.main, *self.parts)

    def scratch(self, ranges: Sequence[tuple[int, int]]) -> int:
        """Bytes of scratch memory that suffice for all sizes within ranges (smallest, largest).

        Raises:
            CompileError: a temporary may be of any size.
        """
        analyzer = tvm.sym.Analyzer()
        sizes = [p.variable for p in self.main.parameters if not p.is_buffer]
        for variable, (low, high) in zip(sizes, ranges, strict=True):
            analyzer.update(variable, tvm.sym.ConstIntBound(low, high))
        most = max(analyzer.const_int_bound(tirx.convert(f.scratch)).max_value for f in self.functions)
        if most > _MOST:
            raise CompileError(
                f"kernel {self.main.symbol!r} has a temporary that no size bounds",
                fix="make its size depend on the shapes of the kernel's arguments only",
            )
        return most


def launch_symbol(part: str) -> str:
    """The C function that hands a part to threads."""
    return f"{part}_launch"


def plain_kernel(symbol: str, function: tirx.PrimFunc) -> PlainKernel:
    """The C functions of a kernel as `Kernel.build` makes it.

    Raises:
        CompileError: it keeps a large temporary across a parallel loop.
    """
    splitter = _Splitter(symbol)
    body = splitter.split(function.body, _Scope())
    buffers = list(function.params)
    sizes = _sizes(buffers)
    main = _function(symbol, [splitter.worker], [*buffers, *(v for v, _ in sizes)], body)
    return PlainKernel(main, tuple(splitter.parts), tuple(place for _, place in sizes))


@dataclass(frozen=True)
class _Scope:
    """What encloses a statement: views of buffers, attributes, whether a large temporary is alive."""

    views: tuple[S.DeclBuffer, ...] = ()
    attributes: tuple[S.AttrStmt, ...] = ()
    temporary: bool = False


class _Splitter:
    """Takes the parallel loops out of a kernel."""

    def __init__(self, symbol: str):
        self.symbol = symbol
        self.worker = Var("worker", _pointer("uint8"))
        self.parts: list[PlainFunction] = []

    def split(self, stmt: S.Stmt, scope: _Scope) -> S.Stmt:
        if isinstance(stmt, S.SeqStmt):
            views, temporary, done = scope.views, scope.temporary, []
            for inner in stmt.seq:
                inner_scope = _Scope(views, scope.attributes, temporary)
                done.append(self.split(inner, inner_scope))
                if isinstance(inner, S.DeclBuffer):
                    views = (*views, inner)
                temporary |= isinstance(inner, S.AllocBuffer) and not _fits_stack(inner.buffer)
            return _sequence(done)
        if isinstance(stmt, S.IfThenElse):
            return self._branches(stmt, scope)
        if isinstance(stmt, S.AttrStmt):
            inside = _Scope(scope.views, (*scope.attributes, stmt), scope.temporary)
            return S.AttrStmt(stmt.node, stmt.attr_key, stmt.value, self.split(stmt.body, inside))
        if isinstance(stmt, S.For):
            if stmt.kind == S.ForKind.PARALLEL:
                return self._call(launch_symbol(self._part(stmt, scope)), [self.worker, _extent(stmt)])
            return _with_body(stmt, self.split(stmt.body, scope))
        return stmt

    def _branches(self, stmt: S.IfThenElse, scope: _Scope) -> S.Stmt:
        """Most kernels choose between a loop over threads and the same loop without: both call one part."""
        then, otherwise = stmt.then_case, stmt.else_case
        if (
            isinstance(then, S.For)
            and isinstance(otherwise, S.For)
            and then.kind == S.ForKind.PARALLEL
            and tvm_ffi.structural_equal(_serial(then), otherwise)
        ):
            part = self._part(then, scope)
            alone = self._call(part, [_int64(0), _extent(then), _SCRATCH])
            return S.IfThenElse(
                stmt.condition, self._call(launch_symbol(part), [self.worker, _extent(then)]), alone
            )
        return S.IfThenElse(
            stmt.condition,
            self.split(then, scope),
            None if otherwise is None else self.split(otherwise, scope),
        )

    def _part(self, loop: S.For, scope: _Scope) -> str:
        """A function for some iterations of a loop; its symbol. ``self.arguments`` is what it reads."""
        if scope.temporary or _contains(loop, S.AssertStmt):
            raise CompileError(
                f"kernel {self.symbol!r} has an assertion in a parallel loop, or a large temporary around one",
                why="temporaries, and what an assertion finds, are one thread's",
                fix="assert before the loop, allocate inside",
            )
        begin, end = Var("begin", PrimType("int64")), Var("end", PrimType("int64"))
        dtype = loop.loop_var.ty.dtype
        first = loop.min + tirx.Cast(dtype, begin)
        body: S.Stmt = S.For(
            loop.loop_var, first, tirx.Cast(dtype, end - begin), S.ForKind.SERIAL, _all_serial(loop.body)
        )
        views, known = [], [begin, end]
        while True:
            free = _free(_sequence([*views, body]), known)
            missing = [v for v in scope.views if any(v.buffer.same_as(f) for f in free)]
            if not missing:
                break
            views = [v for v in scope.views if v in missing or v in views]
        for attribute in reversed(scope.attributes):
            body = S.AttrStmt(attribute.node, attribute.attr_key, attribute.value, body)
        symbol = f"{self.symbol}_part{len(self.parts)}"
        self.arguments = sorted(free, key=lambda v: not is_buffer_var(v))
        self.parts.append(_function(symbol, [begin, end], self.arguments, _sequence([*views, body])))
        return symbol

    def _call(self, symbol: str, lead: Sequence[Expr]) -> S.Stmt:
        arguments = [v.data if is_buffer_var(v) else v for v in self.arguments]
        return S.Evaluate(tirx.call_extern("int32", symbol, *lead, *arguments))


_SCRATCH = Var("scratch", PointerType(PrimType("uint8"), "global"))
"""The scratch memory of whatever function it occurs in."""


def _function(symbol: str, lead: list[Var], own: list[Var], body: S.Stmt) -> PlainFunction:
    """A function with the parameters ``lead``, scratch, ``own``; buffers among them are passed as pointers."""
    may_fail = _contains(body, S.AssertStmt)
    if may_fail:
        body = _with_status(body, lead[0])
    temporaries = _Temporaries()
    body = temporaries.place(body)
    parameters, declared = [], []
    for variable in own:
        if is_buffer_var(variable):
            dtype = str(variable.ty.dtype)
            pointer = Var(variable.name, _pointer(dtype))
            declared.append(S.DeclBuffer(variable, data=pointer))
            parameters.append((pointer, Parameter(variable, dtype, True)))
        else:
            parameters.append((variable, Parameter(variable, str(variable.ty.dtype), False)))
    body = _sequence([*declared, body, S.Return(tirx.const(0, "int32"))])
    for key, value in (("device_type", 1), ("device_id", 0)):
        body = S.AttrStmt(StringImm("default"), key, tirx.const(value, "int32"), body)
    code = tirx.PrimFunc([*lead, _SCRATCH, *(v for v, _ in parameters)], body, PrimType("int32"))
    code = code.with_attr("global_symbol", symbol).with_attr("tirx.noalias", True).with_attr("s_tir", True)
    return PlainFunction(symbol, tuple(p for _, p in parameters), code, temporaries.size, may_fail)


class _Temporaries:
    """Gives every large temporary of a function a place in its scratch memory; ``size`` is what they take in all."""

    def __init__(self) -> None:
        self.size: Expr | int = 0

    def place(self, stmt: S.Stmt) -> S.Stmt:
        def leaf(stmt: S.Stmt) -> S.Stmt:
            if not isinstance(stmt, S.AllocBuffer) or _fits_stack(stmt.buffer):
                return stmt
            bytes_ = tirx.decl_buffer((_ANY_SIZE,), "uint8", "scratch_bytes")
            address = tirx.address_of(tirx.BufferLoad(bytes_, [self.size]))
            self.size = self.size + _aligned(_bytes(stmt.buffer))
            pointer = Var(stmt.buffer.name, address.ty)
            return S.SeqStmt(
                [
                    S.DeclBuffer(bytes_, data=_SCRATCH),
                    S.Bind(pointer, address),
                    S.DeclBuffer(stmt.buffer, data=pointer),
                ]
            )

        return _map(stmt, leaf)


def _with_status(body: S.Stmt, worker: Var) -> S.Stmt:
    """Assertions as C can have them: the status is set, and the function ends."""
    status = tirx.decl_buffer((1,), "int32", "status")
    failed = S.BufferStore(status, tirx.const(FAILED, "int32"), [0])
    leave = _sequence([failed, S.Return(tirx.const(0, "int32"))])

    def leaf(stmt: S.Stmt) -> S.Stmt:
        if not isinstance(stmt, S.AssertStmt):
            return stmt
        return S.IfThenElse(tirx.Not(stmt.condition), leave, None)

    return _sequence([S.DeclBuffer(status, data=worker), _map(body, leaf)])


_ANY_SIZE = 1 << 40
"""Extent of a buffer whose size nobody looks at."""

_MOST = 1 << 40
"""Bytes; what is larger has no bound."""


def _sizes(buffers: Sequence[Var]) -> list[tuple[Var, tuple[int, int]]]:
    """The symbolic dimensions of some buffers, each once, and where it occurs."""
    found: list[tuple[Var, tuple[int, int]]] = []
    for i, buffer in enumerate(buffers):
        for axis, extent in enumerate(buffer.ty.shape):
            if isinstance(extent, Var) and not any(extent.same_as(other) for other, _ in found):
                found.append((extent, (i, axis)))
    return found


def _bytes(buffer: Var) -> Expr | int:
    dtype = buffer.ty.dtype.dtype if isinstance(buffer.ty.dtype, PrimType) else buffer.ty.dtype
    size: Expr | int = dtype.itemsize
    for extent in buffer.ty.shape:
        size = size * (int(extent) if isinstance(extent, tirx.IntImm) else extent)
    return size


def _aligned(size: Expr | int) -> Expr | int:
    return (size + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT


def _fits_stack(buffer: Var) -> bool:
    size = _bytes(buffer)
    return isinstance(size, int) and size <= STACK


def _map(stmt: S.Stmt, leaf: Callable[[S.Stmt], S.Stmt]) -> S.Stmt:
    """A statement with ``leaf`` applied to all that contain no others."""
    if isinstance(stmt, S.SeqStmt):
        return _sequence([_map(inner, leaf) for inner in stmt.seq])
    if isinstance(stmt, S.For):
        return _with_body(stmt, _map(stmt.body, leaf))
    if isinstance(stmt, S.IfThenElse):
        otherwise = None if stmt.else_case is None else _map(stmt.else_case, leaf)
        return S.IfThenElse(stmt.condition, _map(stmt.then_case, leaf), otherwise)
    if isinstance(stmt, S.AttrStmt):
        return S.AttrStmt(stmt.node, stmt.attr_key, stmt.value, _map(stmt.body, leaf))
    if isinstance(stmt, S.While):
        return S.While(stmt.condition, _map(stmt.body, leaf))
    return leaf(stmt)


def _free(stmt: S.Stmt, known: list[Var]) -> list[Var]:
    """The variables that a statement needs from outside, those in the shapes of its buffers included."""
    declared: list[Var] = []
    inside = list(known)

    def leaf(stmt: S.Stmt) -> S.Stmt:
        if isinstance(stmt, S.DeclBuffer | S.AllocBuffer):
            declared.append(stmt.buffer)
        elif isinstance(stmt, S.Bind):
            inside.append(stmt.var)
        return stmt

    _map(stmt, leaf)
    found = list(undefined_vars(stmt, known))
    for buffer in [*found, *declared]:
        for extent in buffer.ty.shape if is_buffer_var(buffer) else ():
            found += [v for v in undefined_vars(extent, inside) if not any(v.same_as(f) for f in found)]
    return found


def _contains(stmt: S.Stmt, kind: type) -> bool:
    found = []
    _map(stmt, lambda leaf: (found.append(isinstance(leaf, kind)), leaf)[1])
    return any(found)


def _with_body(loop: S.For, body: S.Stmt, kind: S.ForKind | None = None) -> S.For:
    kind = loop.kind if kind is None else kind
    return S.For(
        loop.loop_var, loop.min, loop.extent, kind, body, loop.thread_binding, loop.annotations, loop.step
    )


def _serial(loop: S.For) -> S.For:
    return _with_body(loop, loop.body, S.ForKind.SERIAL)


def _all_serial(stmt: S.Stmt) -> S.Stmt:
    """A part runs on one thread, so the parallel loops in it are ordinary ones."""
    if isinstance(stmt, S.SeqStmt):
        return _sequence([_all_serial(inner) for inner in stmt.seq])
    if isinstance(stmt, S.For):
        kind = S.ForKind.SERIAL if stmt.kind == S.ForKind.PARALLEL else stmt.kind
        return _with_body(stmt, _all_serial(stmt.body), kind)
    if isinstance(stmt, S.IfThenElse):
        otherwise = None if stmt.else_case is None else _all_serial(stmt.else_case)
        return S.IfThenElse(stmt.condition, _all_serial(stmt.then_case), otherwise)
    if isinstance(stmt, S.AttrStmt):
        return S.AttrStmt(stmt.node, stmt.attr_key, stmt.value, _all_serial(stmt.body))
    return stmt


def _sequence(stmts: Sequence[S.Stmt]) -> S.Stmt:
    """One statement of several, which may be sequences themselves: TVM wants them flat."""
    flat = [s for stmt in stmts for s in (stmt.seq if isinstance(stmt, S.SeqStmt) else [stmt])]
    return flat[0] if len(flat) == 1 else S.SeqStmt(flat)


def _extent(loop: S.For) -> Expr:
    return tirx.Cast("int64", loop.extent)


def _int64(value: int) -> Expr:
    return tirx.const(value, "int64")


def _pointer(dtype: str) -> PointerType:
    return PointerType(PrimType(dtype), "global")
