"""Inner loops of products by lane on 64-bit ARM, in an order that cores without reordering run well.

``fmla v, v, v.s[i]`` and its like take one operand from a lane of a register: a vector of neighbouring words of a row
of the left matrix is loaded once and used lane by lane. In-order cores (Cortex-A53, A55) stand still wherever a load,
or the sum of an address, comes too late. LLVM puts the loads of each pass of a loop at its top, so the loops are
written here, as inline assembly in functions that LLVM merges into the kernel:

* Registers are loaded anew, for the next pass, right after their last use in this one, so that a load is always a
  dozen multiplications ahead of its use.
* One index register serves all rows; the right matrix is a single stream at constant offsets from its pointer.
* LLVM allocates the registers, all 32 for the tallest tiles: sums, a vector of words per row, the right vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

VECTOR = 16
"""Bytes of a register."""

REGISTERS = 32

LINE = 64
"""Bytes that one prefetch brings."""

FARTHEST = 28672
"""Bytes: how far ahead a prefetch can reach by an offset, less a pass of the loop."""


@dataclass(frozen=True)
class ByLane:
    """A multiply-add by lane.

    mnemonic: the instruction. sums, right, lane: arrangements of its operands. word: the register's name for a single
    word. words: of a vector. type: LLVM's of the sums.
    paired: two right vectors are loaded by one instruction, while the last ones are in use, and a pass of the loop is
    twice as long: fewer instructions, more registers and code. By LLVM's models Cortex-A53 gains by it, Cortex-A55 not.
    """

    mnemonic: str
    sums: str
    right: str
    lane: str
    word: str
    words: int
    type: str
    paired: bool

    def most_rows(self, vectors: int) -> int:
        """Rows of the tallest tile."""
        return (REGISTERS - self.right_registers(vectors)) // (vectors + 1)

    @property
    def step(self) -> int:
        """Words that a pass of the loop uses up."""
        return self.words * (2 if self.paired else 1)

    def right_registers(self, vectors: int) -> int:
        return 2 * vectors if self.paired else vectors


@dataclass(frozen=True)
class Loop:
    """A tile's sums of ``words`` >= 1 products: ``height`` rows by ``vectors`` vectors.

    ahead: bytes between the right words in use and those prefetched; None prefetches nothing.
    ValueError when it needs more registers than there are.
    """

    product: ByLane
    height: int
    vectors: int
    words: int
    ahead: int | None = None

    def __post_init__(self) -> None:
        if self.height > self.product.most_rows(self.vectors) or (self.product.paired and self.vectors % 2):
            raise ValueError(f"no registers for {self.height} rows of {self.vectors} vectors")

    @property
    def name(self) -> str:
        p = self.product
        parts = ["tersor", p.mnemonic, p.sums, *(["paired"] if p.paired else [])]
        parts += [f"{self.height}x{self.vectors}x{self.words}"]
        return "_".join(parts + ([f"ahead{self.ahead}"] if self.ahead is not None else []))

    def text(self) -> str:
        """LLVM's text of ``void name(sums of each row.., left rows.., right)``, all of them pointers."""
        rows, count = range(self.height), self.height * self.vectors
        vector = self.product.type
        registers = count + self.height + self.product.right_registers(self.vectors)
        outputs = [vector] * registers + ["ptr", "i64", "i64"]
        lines = []
        for i in range(count):
            row, v = divmod(i, self.vectors)
            lines.append(f"%p{i} = getelementptr {vector}, ptr %sums{row}, i64 {v}")
            lines.append(f"%s{i} = load {vector}, ptr %p{i}, align {VECTOR}")
        constraints = ["=&w"] * registers + ["=&r"] * 3
        constraints += [str(i) for i in range(count)] + [str(registers + i) for i in range(3)]
        constraints += ["r"] * self.height + ["~{cc}", "~{memory}"]
        arguments = [f"{vector} %s{i}" for i in range(count)]
        arguments += ["ptr %right", "i64 0", f"i64 {self._passes}", *(f"ptr %left{r}" for r in rows)]
        body = "\\0A".join(self._code())
        lines.append(
            f"%r = call {{ {', '.join(outputs)} }} asm sideeffect "
            f'"{body}", "{",".join(constraints)}"({", ".join(arguments)})'
        )
        for i in range(count):
            lines.append(f"%o{i} = extractvalue {{ {', '.join(outputs)} }} %r, {i}")
            lines.append(f"store {vector} %o{i}, ptr %p{i}, align {VECTOR}")
        parameters = [f"ptr %sums{r}" for r in rows] + [f"ptr %left{r}" for r in rows] + ["ptr %right"]
        head = f"define void @{self.name}({', '.join(parameters)}) alwaysinline {{"
        return "\n".join([head, *(f"  {line}" for line in lines), "  ret void", "}", ""])

    @property
    def _passes(self) -> int:
        """Of the loop; what is left for the code behind it is at least one vector of left words, if there is one."""
        return max(self.words - self.product.words, 0) // self.product.step

    def _code(self) -> Iterator[str]:
        """The instructions; ``$i`` is an operand of the assembly."""
        whole, single = divmod(self.words, self.product.words)
        group, word = self.product.words, 1
        first = group if whole else word
        yield from (self._load_left(r, first) for r in range(self.height))
        yield from self._load_right(0, 0)
        if self._passes:
            yield "1:"
            yield from self._steps([group] * (self.product.step // group), group, loop=True)
            yield "b.ne 1b"
        units = [group] * (whole - self._passes * self.product.step // group) + [word] * single
        yield from self._steps(units, None, loop=False)

    def _steps(self, units: list[int], following: int | None, loop: bool) -> Iterator[str]:
        """The products of units of so many words each; ``following`` is the unit behind them."""
        size = self.vectors * VECTOR
        total, step = sum(units), 0
        middle = max(self.height * 3 // 4 - 1, 0)
        for unit, then in zip(units, [*units[1:], following], strict=True):
            for lane in range(unit):
                last, base = step == total - 1, 0
                more = then is not None or not last
                if unit == 1 and then:
                    yield self._advance(unit)
                for v in range(self.vectors):
                    for r in range(self.height):
                        yield self._multiply(r, v, step, lane)
                        if v == 0 and r == middle:
                            if unit > 1 and lane == 1 and then:
                                yield self._advance(unit)
                            if loop and step == 2:
                                yield f"subs ${self._scalar(2)}, ${self._scalar(2)}, #1"
                            if loop and last:
                                base = total * size
                                yield f"add ${self._scalar(0)}, ${self._scalar(0)}, #{base}"
                        if loop and v == 0 and r == self.height // 2 and step * size % LINE == 0:
                            yield from self._prefetch(step * size)
                        if v == self.vectors - 1:
                            if more and self.product.paired and r == 0:
                                yield from self._load_right(step + 1, (step + 1) * size - base)
                            if then and lane == unit - 1:
                                yield self._load_left(r, then)
                    if more and not self.product.paired:
                        yield self._load_one(step + 1, v, (step + 1) * size - base)
                step += 1

    def _multiply(self, row: int, v: int, step: int, lane: int) -> str:
        p = self.product
        total, left = row * self.vectors + v, self.height * self.vectors + row
        right = self._right(step, v)
        return f"{p.mnemonic} ${{{total}}}.{p.sums}, ${{{right}}}.{p.right}, ${{{left}}}.{p.lane}[{lane}]"

    def _right(self, step: int, v: int) -> int:
        """The operand that is right vector v in a step."""
        half = step % 2 * self.vectors if self.product.paired else 0
        return self.height * (self.vectors + 1) + half + v

    def _scalar(self, i: int) -> int:
        """The operand that is the right pointer, the index into left rows, the passes left."""
        return self.height * (self.vectors + 1) + self.product.right_registers(self.vectors) + i

    def _load_left(self, row: int, words: int) -> str:
        left, pointer = (
            self.height * self.vectors + row,
            self._scalar(3) + self.height * self.vectors + 3 + row,
        )
        width = self.product.word if words == 1 else "q"
        return f"ldr ${{{left}:{width}}}, [${pointer}, ${self._scalar(1)}]"

    def _advance(self, words: int) -> str:
        index = self._scalar(1)
        return f"add ${index}, ${index}, #{words * VECTOR // self.product.words}"

    def _load_right(self, step: int, offset: int) -> Iterator[str]:
        if not self.product.paired:
            yield from (self._load_one(step, v, offset) for v in range(self.vectors))
            return
        for v in range(0, self.vectors, 2):
            pair = ", ".join(f"${{{self._right(step, v + i)}:q}}" for i in range(2))
            yield f"ldp {pair}, [${self._scalar(0)}, #{offset + v * VECTOR}]"

    def _load_one(self, step: int, v: int, offset: int) -> str:
        return f"ldr ${{{self._right(step, v)}:q}}, [${self._scalar(0)}, #{offset + v * VECTOR}]"

    def _prefetch(self, offset: int) -> Iterator[str]:
        if self.ahead is not None:
            yield f"prfm pldl1keep, [${self._scalar(0)}, #{min(self.ahead, FARTHEST) // 8 * 8 + offset}]"
