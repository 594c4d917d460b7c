"""How GEMM is cut for a target: an analytic choice from registers, vector width and caches.

The register tile is ``rows`` rows of the left matrix by one panel of packed weights, two vectors wide; its
accumulators, one row of the panel and one broadcast element must fit in the vector registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tersor.codegen.kernels.inner_product import InnerProduct, inner_product
from tersor.targets import Target

PANEL_VECTORS = 2
"""Vectors across a register tile: two weight vectors feed all rows, so loads stay below half of the multiply-adds."""

CACHE_LINE = 64
"""Bytes."""

STREAM_AHEAD = 12288
"""Bytes between the weights in use and those being fetched, when every weight is used only once; measured on Zen 5."""

PARALLEL_FLOPS = 2e6
PARALLEL_BYTES = 400e3
"""Work below both (about 10 us on one core) is not worth waking other threads for."""

BLOCK_ROWS = 32
"""Rows of a block below which splitting rows between threads costs more than it balances."""

MOST_BLOCKS = 4
"""More would read the weights too often."""


@dataclass(frozen=True)
class GemmTile:
    """How one GEMM is cut.

    rows: height of the register tiles when a panel needs several of them.
    streams: tile heights for few rows, ascending; up to the last of them all rows make one tile.
    blocks: parts that the rows are split into, to give every thread the same number of tasks.
    ahead: bytes between the weights in use and those being fetched, in streaming tiles.

    ValueError when some number of rows is too many for the streaming tiles and too few for one of ``rows``.
    """

    rows: int
    streams: tuple[int, ...]
    blocks: int = 1
    ahead: int = STREAM_AHEAD

    def __post_init__(self) -> None:
        if self.rows > self.streams[-1] + 1:
            raise ValueError(
                f"tiles of {self.rows} rows leave a gap above streaming tiles of {self.streams[-1]}"
            )


def panel_width(target: Target) -> int:
    """Columns of a packed panel of any dtype: 32 with AVX-512, 16 with AVX2, 8 with NEON."""
    return PANEL_VECTORS * target.lanes("float32")


def most_rows(target: Target, product: InnerProduct | None = None) -> int:
    """Height of the tallest register tile: what the weight vectors leave of the registers, less a spare for LLVM.

    ``product``: what is computed, by default f32. Loops in assembly need no spare: see ``MultiplyAdd.most_rows``.
    """
    product = product or inner_product("float32", target)
    spare = PANEL_VECTORS + 2 if target.vector_registers <= 16 else PANEL_VECTORS + 6
    if target.arch == "armv7a" and "fma" not in target.features:
        spare += 2  # products, before they are added
    rows, columns = product.block
    each = PANEL_VECTORS * product.lanes // columns  # registers for a block of rows
    each += len(product.parts) if product.loads else 0
    return (target.vector_registers - spare) // each * rows - (len(product.parts) - 1)


def choose(target: Target, panels: int, product: InnerProduct | None = None) -> GemmTile:
    """The analytic choice for a GEMM over so many panels: tiles of 8x32 with AVX-512, 6x16 with AVX2, 9x8 with NEON.

    ``product``: as in ``most_rows``.
    """
    product = product or inner_product("float32", target)
    most, step = most_rows(target, product), product.block[0]
    rows = min(8 - 2 * (len(product.parts) - 1), most)  # what is taken apart needs registers too
    few = 4
    if product.assembly:
        most = rows = product.assembly.most_rows(PANEL_VECTORS * product.per_vector) * step
        few = -(-rows // 2 // step) * step
    streams = tuple(sorted({r for r in (step, 2, few, rows, most) if r <= most}))
    return GemmTile(rows, streams, _blocks(panels, target.cores or 1))


def neighbours(tile: GemmTile, target: Target, product: InnerProduct | None = None) -> tuple[GemmTile, ...]:
    """Tiles that differ from this one in one respect; what tuning tries. ``product``: as in ``most_rows``."""
    heights = {h for h in (4, 6, 8, 10, 12) if h <= most_rows(target, product)} - {tile.rows}
    blocks = {1, 2, MOST_BLOCKS} - {tile.blocks}
    return (
        *(replace(tile, rows=height) for height in sorted(heights)),
        *(replace(tile, blocks=count) for count in sorted(blocks)),
        *(replace(tile, ahead=distance) for distance in (tile.ahead // 2, tile.ahead * 2)),
    )


def _blocks(panels: int, cores: int) -> int:
    """The fewest blocks of rows that keep 95 % of the cores busy, or the busiest split there is."""

    def busy(blocks: int) -> float:
        tasks = panels * blocks
        return tasks / (-(-tasks // cores) * cores)

    counts = range(1, MOST_BLOCKS + 1)
    return next((b for b in counts if busy(b) >= 0.95), max(counts, key=busy))


def partition(m: int, rows: int) -> tuple[tuple[int, int], ...]:
    """(count, height) of as few tiles of at most ``rows`` rows as cover ``m`` exactly, heights differing by one."""
    tiles = -(-m // rows)
    height = -(-m // tiles)
    short = height * tiles - m
    return ((tiles - short, height), (short, height - 1)) if short else ((tiles, height),)
