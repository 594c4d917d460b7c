"""Inner loops of products on 64-bit ARM in assembly, in an order that cores without reordering run well.

In-order cores (Cortex-A53, A55) stand still wherever a load, or the sum of an address, comes too late. LLVM puts the
loads of each pass of a loop at its top, so the loops are written here, as inline assembly in functions that LLVM merges
into the kernel:

* A register is loaded anew right after its last use, as many products before its next one as possible.
* One index serves all rows of the left matrix; the right one is a single stream at constant offsets from its pointer.
* LLVM allocates the registers, all 32 for the tallest tiles: sums, a vector of words per row, the right vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

VECTOR = 16
"""Bytes of a register."""

REGISTERS = 32
"""Vector registers; no other target has more."""

LINE = 64
"""Bytes that one prefetch brings."""

FARTHEST = 28672
"""Bytes: how far ahead a prefetch can reach by an offset, less a pass of the loop."""


@dataclass(frozen=True)
class MultiplyAdd:
    """The instruction that a loop is made of.

    type: LLVM's of the sums. sums, operands: arrangements of the instruction's registers.
    lane: arrangement of a left operand that is one lane of a register. Where it is None the whole register is.
    words: of a left register, to be used one after the other. word: the register's name for a single word.
    paired: two right vectors are loaded by one instruction, while the last ones are in use, and a pass of the loop is
    twice as long: fewer instructions, more registers and code. LLVM's models of Cortex-A53 and A55 gain by it as long
    as six cycles pass between such a load and the next one of any kind: see ``Loop._order``.
    piece: how many words may be added up before the sums, which are fp16 then and start from zero, are added to those
    in memory, which are f32. None: the sums in memory are of ``type`` and simply go on.
    long: a pass of the loop is twice as long: more code, in which less is spent on counting.
    """

    mnemonic: str
    type: str
    sums: str
    operands: str
    lane: str | None = None
    words: int = 1
    word: str = "q"
    paired: bool = False
    piece: int | None = None
    long: bool = False

    @property
    def right_registers(self) -> int:
        return 4 if self.paired else 2

    @property
    def step(self) -> int:
        """Words that a pass of the loop uses up."""
        return max(self.words, 4) * (2 if self.paired or self.long else 1)

    @property
    def stored(self) -> str:
        """LLVM's type of what a register of sums is in memory."""
        return self.type.replace("half", "float") if self.piece else self.type

    def vectors(self, stored: int) -> int:
        """Registers for so many vectors of sums in memory."""
        return stored // 2 if self.piece else stored

    def most_rows(self, stored: int) -> int:
        """Rows of the tallest tile, so many vectors of sums in memory wide."""
        return (REGISTERS - self.right_registers) // (self.vectors(stored) + 1)


@dataclass(frozen=True)
class Loop:
    """Adds the products of ``words`` >= 1 words: ``height`` rows by an even number of vectors ``stored`` in memory.

    words: None: the function's last argument, an i64, is their number, a positive multiple of ``product.step``; the
    caller keeps to ``product.piece``.
    ahead: bytes between the right words in use and those prefetched; None prefetches nothing.
    ValueError when it needs more registers than there are, when these are more words than a piece has, or when right
    vectors come in pairs and there are not two of them.
    """

    product: MultiplyAdd
    height: int
    stored: int
    words: int | None
    ahead: int | None = None

    def __post_init__(self) -> None:
        if self.height > self.product.most_rows(self.stored) or self.stored % 2:
            raise ValueError(f"no registers for {self.height} rows of {self.stored} vectors")
        if self.product.paired and self.vectors != 2:
            raise ValueError(f"a pair of right vectors is not {self.vectors}")
        if self.product.piece and (self.words or 0) > self.product.piece:
            raise ValueError(f"{self.words} words are more than {self.product.piece}")

    @property
    def vectors(self) -> int:
        """Registers of sums in a row."""
        return self.product.vectors(self.stored)

    @property
    def name(self) -> str:
        p = self.product
        forms = [form for form in ("paired", "long") if getattr(p, form)]
        parts = ["tersor", p.mnemonic, p.sums, *forms]
        parts += [f"{self.height}x{self.vectors}x{self.words or 'n'}"]
        return "_".join(parts + ([f"ahead{self.ahead}"] if self.ahead is not None else []))

    def text(self) -> str:
        """LLVM's text of ``void name(sums of each row.., left rows.., right)``, all of them pointers."""
        rows, vector, stored = range(self.height), self.product.type, self.product.stored
        outputs = [vector] * self._scalar(0) + ["ptr", "i64", "i64"]
        result = f"{{ {', '.join(outputs)} }}"
        lines = []
        if self.words is None:
            lines += [f"%steps = udiv i64 %words, {self.product.step}", "%passes = sub i64 %steps, 1"]
        for i in range(self._sums):
            row, v = divmod(i, self.vectors)
            lines.append(f"%p{i} = getelementptr {stored}, ptr %sums{row}, i64 {v}")
            lines.append(f"%s{i} = load {stored}, ptr %p{i}, align {VECTOR}")
        # a lane of 16 bits is one of the first 16 registers': instructions have no more bits for it
        left = "=&x" if self.product.lane == "h" else "=&w"
        constraints = ["=&w"] * self._sums + [left] * self.height
        constraints += ["=&w"] * self.product.right_registers + ["=&r"] * 3
        constraints += [str(i) for i in range(self._sums)] + [str(self._scalar(i)) for i in range(3)]
        constraints += ["r"] * (self.height * self._apart) + ["~{cc}", "~{memory}"]
        starts = ["zeroinitializer" if self.product.piece else f"%s{i}" for i in range(self._sums)]
        arguments = [f"{vector} {start}" for start in starts]
        passes = "%passes" if self.words is None else self._passes
        arguments += ["ptr %right", "i64 0", f"i64 {passes}", *(f"ptr %left{r}" for r in rows)]
        if self._apart > 1:
            lines += [f"%next{r} = getelementptr i8, ptr %left{r}, i64 {VECTOR}" for r in rows]
            arguments += [f"ptr %next{r}" for r in rows]
        code = "\\0A".join(self._code())
        # LLVM takes it for short, and would unroll loops round it
        lines.append(
            f'%r = call {result} asm sideeffect "{code}", "{",".join(constraints)}"({", ".join(arguments)}) noduplicate'
        )
        for i in range(self._sums):
            lines.append(f"%o{i} = extractvalue {result} %r, {i}")
            if self.product.piece:
                lines.append(f"%w{i} = fpext {vector} %o{i} to {stored}")
                lines.append(f"%t{i} = fadd {stored} %s{i}, %w{i}")
            lines.append(
                f"store {stored} {'%t' if self.product.piece else '%o'}{i}, ptr %p{i}, align {VECTOR}"
            )
        parameters = [f"ptr %sums{r}" for r in rows] + [f"ptr %left{r}" for r in rows] + ["ptr %right"]
        parameters += ["i64 %words"] if self.words is None else []
        head = f"define void @{self.name}({', '.join(parameters)}) alwaysinline {{"
        return "\n".join([head, *(f"  {line}" for line in lines), "  ret void", "}", ""])

    @property
    def _passes(self) -> int | None:
        """Of the loop; at least one vector of left words, if there is one, is left for the code behind it."""
        return None if self.words is None else max(self.words - self.product.words, 0) // self.product.step

    @property
    def _behind(self) -> int:
        """Words left for the code behind the loop."""
        return self.product.step if self.words is None else self.words - self._passes * self.product.step

    def _code(self) -> Iterator[str]:
        """The instructions; ``$i`` is an operand of the assembly."""
        size, step = self.product.words, self.product.step
        vectors, single = divmod(self._behind, size)
        yield from (self._load_left(row, size if vectors else 1) for row in range(self.height))
        yield from self._load_right(0)
        if self._passes != 0:
            if self._passes is None:
                yield f"cbz ${self._scalar(2)}, 2f"
            yield "1:"
            yield from self._steps([size] * (step // size), size, loop=True)
            yield "b.ne 1b"
            if self._passes is None:
                yield "2:"
        yield from self._steps([size] * vectors + [1] * single, None, loop=False)

    def _steps(self, units: list[int], following: int | None, loop: bool) -> Iterator[str]:
        """The products of left registers with so many words each; ``following`` is the one behind them."""
        total, step, apart = sum(units), 0, self._apart
        late = self.height * 3 // 4
        pointer, _, passes = (f"${self._scalar(i)}" for i in range(3))
        for unit, then in zip(units, [*units[1:], following], strict=True):
            for lane in range(unit):
                last, moved = step == total - 1, 0
                following_vector = (step + 1) % apart  # which of those that one index serves
                if then and unit == 1 and not following_vector:
                    yield self._advance(unit * apart)
                for place, (row, v) in enumerate(self._order()):
                    yield self._multiply(row, step * self.vectors + v, lane)
                    if v == 0 and row == max(late - 1, 0):
                        if then and unit > 1 and lane == 1:
                            yield self._advance(unit)
                        if loop and step == total // 2:
                            yield f"subs {passes}, {passes}, #1"
                        if loop and last:
                            moved = total * self.vectors
                            yield f"add {pointer}, {pointer}, #{moved * VECTOR}"
                    if loop and v == 0 and row == late:
                        yield from self._prefetch(step * self.vectors * VECTOR)
                    if self.product.paired and place == 0 and (loop or not last):
                        yield from self._load_right((step + 1) * self.vectors, moved)
                    used = place - self.height * (self.vectors - 1)
                    if then and lane == unit - 1 and used >= 0:
                        yield self._load_left(used, then, following_vector)
                    after = step * self.vectors + v + self.product.right_registers
                    freed = not self.product.paired and row == self.height - 1
                    if freed and (loop or after < total * self.vectors):
                        yield self._load_one(after, moved)
                step += 1

    def _order(self) -> Iterator[tuple[int, int]]:
        """Rows and vectors of a step's products.

        Vector by vector, so that each right register is loaded anew as early as can be. Where those come in pairs, at
        the start of a step, row by row: the left ones are then free one after the other all through its second half.
        """
        if self.product.paired:
            return itertools.product(range(self.height), range(self.vectors))
        return ((row, v) for v in range(self.vectors) for row in range(self.height))

    @property
    def _apart(self) -> int:
        """Vectors of a left row that one index serves, by as many pointers: sums of addresses take what cores multiply
        by, too, and words of a whole vector need one for each."""
        return 2 if self.product.words == 1 else 1

    @property
    def _sums(self) -> int:
        return self.height * self.vectors

    def _left(self, row: int) -> int:
        return self._sums + row

    def _right(self, index: int) -> int:
        """The operand that is vector ``index`` of the right words."""
        return self._sums + self.height + index % self.product.right_registers

    def _scalar(self, i: int) -> int:
        """The operand that is the right pointer, the index into left rows, the passes left."""
        return self._sums + self.height + self.product.right_registers + i

    def _multiply(self, row: int, index: int, lane: int) -> str:
        p, v = self.product, index % self.vectors
        sums = f"${{{row * self.vectors + v}}}.{p.sums}"
        left, right = f"${{{self._left(row)}}}", f"${{{self._right(index)}}}.{p.operands}"
        if p.lane is None:
            return f"{p.mnemonic} {sums}, {left}.{p.operands}, {right}"
        return f"{p.mnemonic} {sums}, {right}, {left}.{p.lane}[{lane}]"

    def _load_left(self, row: int, words: int, vector: int = 0) -> str:
        width = "q" if words == self.product.words else self.product.word
        # behind the sums and scalars as inputs
        pointer = self._scalar(3) + self._sums + 3 + vector * self.height + row
        return f"ldr ${{{self._left(row)}:{width}}}, [${pointer}, ${self._scalar(1)}]"

    def _advance(self, words: int) -> str:
        index = f"${self._scalar(1)}"
        return f"add {index}, {index}, #{words * VECTOR // self.product.words}"

    def _load_right(self, first: int, moved: int = 0) -> Iterator[str]:
        """Vectors ``first`` and the next one, if there is one, of the right words."""
        if not self.product.paired:
            there = min(2, self._behind * self.vectors)
            yield from (self._load_one(first + i, moved) for i in range(there))
            return
        pair = ", ".join(f"${{{self._right(first + i)}:q}}" for i in range(2))
        yield f"ldp {pair}, [${self._scalar(0)}, #{(first - moved) * VECTOR}]"

    def _load_one(self, index: int, moved: int) -> str:
        offset = (index - moved) * VECTOR
        return f"ldr ${{{self._right(index)}:q}}, [${self._scalar(0)}, #{offset}]"

    def _prefetch(self, offset: int) -> Iterator[str]:
        if self.ahead is not None and offset % LINE == 0:
            yield f"prfm pldl1keep, [${self._scalar(0)}, #{min(self.ahead, FARTHEST) // 8 * 8 + offset}]"
