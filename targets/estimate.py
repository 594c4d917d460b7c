"""How long a program takes on a target at the least, from its work and what is known about the cores.

A bound, no measurement: products at the rate at which the cores' pipes can start them, on the fastest cores first;
weights that no cache holds at the memory's bandwidth; the longer of the two for each operation; nothing else counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tersor.errors import InputError, TargetError
from tersor.targets.registry import size
from tersor.targets.schema import Cluster, Target


@dataclass(frozen=True)
class Work:
    """An operation: how often it runs, its products (multiplications and additions) in ``dtype``, its bytes of weights.

    dtype: "int8", "bfloat16", "float16" or "float32"; all other floats count as that.
    """

    count: int
    dtype: str
    products: int
    weights: int


@dataclass(frozen=True)
class Pipes:
    """Vector instructions of 128 bits that a core can start in a cycle; None where it has none of the kind.

    fmla: 4 products of float32, or 8 of float16 on cores with fp16 arithmetic. sdot: 16 of int8. usmmla: 32 of int8.
    bfmmla: 16 of bfloat16. smull: smull, smlal2 and sadalp together, 16 of int8, for cores without sdot.
    """

    fmla: float
    smull: float
    sdot: float | None = None
    usmmla: float | None = None
    bfmmla: float | None = None


SOURCE = "LLVM 19's scheduling models"
PIPES: dict[str, Pipes] = {
    "cortex-a53": Pipes(1, 0.33),
    "cortex-a55": Pipes(2, 0.33, 1),
    "cortex-a57": Pipes(1, 0.5),
    "cortex-a510": Pipes(2, 0.47, 2, 2, 2),
    "neoverse-n1": Pipes(2, 0.5, 2),
    "neoverse-n2": Pipes(2, 0.67, 2, 2, 2),
    "neoverse-v1": Pipes(4, 1, 4, 4, 4),
    "neoverse-v2": Pipes(4, 1, 4, 4, 4),
}
"""By the core that the model is of.

Source: LLVM 19, read by ``python -m benchmarks.kernels.pipes``. Its models of in-order cores (A53, A55, A510) are
rough, and rather optimistic.
"""

LIKE: dict[str, str] = {
    "cortex-a72": "cortex-a57",  # LLVM's choice
    "cortex-a520": "cortex-a510",  # LLVM's choice
    "cortex-a76": "neoverse-n1",  # which Arm made of it
    "cortex-a78": "neoverse-n1",
    "cortex-a78ae": "neoverse-n1",
    "cortex-x1": "neoverse-v1",  # which Arm made of it
    "cortex-x2": "neoverse-v1",
    "cortex-a710": "neoverse-n2",  # which Arm made of it
    "cortex-a715": "neoverse-n2",  # LLVM's choice
    "cortex-a720": "neoverse-n2",  # LLVM's choice
    "cortex-x3": "neoverse-v2",  # which Arm made of it
    "cortex-x4": "neoverse-v2",
}
"""Cores taken for another one, of the same line and as many vector pipes. Where no reason is given it is assumed."""


@dataclass(frozen=True)
class Estimate:
    """The least time of a call in milliseconds, on so many threads of a target.

    products: the part that the products alone take; weights: that of reading the weights, None where the target's
    bandwidth is not known. based_on: what was assumed, for people.
    """

    target: str
    threads: int
    milliseconds: float
    products: float
    weights: float | None
    based_on: tuple[str, ...]

    def __str__(self) -> str:
        count = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return "\n".join(
            [
                f"estimate for {self.target}, {count}: at least {self.milliseconds:.3g} ms a call; not measured, "
                "and real calls take longer",
                *(f"  {line}" for line in self.based_on),
            ]
        )


def estimate(work: Iterable[Work], target: Target, threads: int = 1) -> Estimate:
    """The least time of some work on a target.

    Raises:
        TargetError: the target's cores, their frequency or their pipes are not known.
        InputError: it has fewer cores than threads.
    """
    work = list(work)
    cores = _fastest(target, threads)
    rates = {dtype: sum(_rate(core, dtype, target) for core in cores) for dtype in {w.dtype for w in work}}
    total = sum(w.count * w.weights for w in work)
    cache = (target.l3 or 0) + (target.l2 or 0) * threads
    bandwidth = None if total <= cache else target.bandwidth
    seconds = products = reading = 0.0
    for w in work:
        multiplying = w.products / rates[w.dtype]
        fetching = w.weights / bandwidth if bandwidth else 0.0
        products += w.count * multiplying
        reading += w.count * fetching
        seconds += w.count * max(multiplying, fetching)
    known = total <= cache or bandwidth is not None
    return Estimate(
        target.name,
        threads,
        seconds * 1e3,
        products * 1e3,
        reading * 1e3 if known else None,
        tuple(_reasons(work, target, cores, total, cache)),
    )


def _fastest(target: Target, threads: int) -> list[Cluster]:
    """The cluster of each thread."""
    if not target.clusters:
        raise _unknown(
            target, "cores are not known: of what kind, how fast", "name a board, a phone or a server"
        )
    cores = [cluster for cluster in target.clusters for _ in range(cluster.count)]
    if threads > len(cores):
        raise InputError(
            f"{target.name} has {len(cores)} cores, not {threads}", fix="give as many threads at most"
        )
    return cores[:threads]


def _rate(core: Cluster, dtype: str, target: Target) -> float:
    """Products in a second, by the best instruction that code for the target uses."""
    if core.mhz is None:
        raise _unknown(target, f"frequency of {core.core} is not known")
    pipes = PIPES.get(LIKE.get(core.core, core.core))
    if pipes is None:
        raise _unknown(target, f"{core.core}: how many products it can do in a cycle is not known")
    has = target.features
    if dtype == "int8":
        if "i8mm" in has and pipes.usmmla:
            rate = 32 * pipes.usmmla
        else:
            rate = 16 * (pipes.sdot if "dotprod" in has and pipes.sdot else pipes.smull)
    elif dtype == "bfloat16" and "bf16" in has and pipes.bfmmla:
        rate = 16 * pipes.bfmmla
    elif dtype == "float16" and "fp16" in has:
        rate = 8 * pipes.fmla
    else:
        rate = 4 * pipes.fmla
    return rate * core.mhz * 1e6


def _reasons(
    work: Sequence[Work], target: Target, cores: list[Cluster], total: int, cache: int
) -> Iterable[str]:
    for dtype in sorted({w.dtype for w in work}):
        count = sum(w.count * w.products for w in work if w.dtype == dtype)
        yield f"{count / 1e6:.4g} million products in {dtype}"
    for cluster in dict.fromkeys(cores):
        like = LIKE.get(cluster.core)
        model = f"taken for {like}, " if like else ""
        used = cores.count(cluster)
        yield f"on {used} {cluster.core} at {cluster.mhz} MHz, {model}its pipes all busy ({SOURCE})"
    if total <= cache:
        yield f"{size(total)} of weights in the caches"
    elif target.bandwidth:
        yield f"{size(total)} of weights at {target.bandwidth / 1e9:.4g} GB/s ({target.sources['bandwidth']})"
    else:
        yield f"without the time that {size(total)} of weights take: the target's memory bandwidth is not known"


def _unknown(target: Target, what: str, fix: str | None = None) -> TargetError:
    return TargetError(f"no estimate for {target.name!r}", why=f"the target's {what}", fix=fix)
