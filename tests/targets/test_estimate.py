"""The least time that work takes on a target: what is counted, and what is said where numbers are missing."""

from __future__ import annotations

import pytest

from tersor.errors import InputError, TargetError
from tersor.targets import Cluster, Target, arm, resolve
from tersor.targets.estimate import LIKE, PIPES, Work, estimate


def target(*clusters: Cluster, features: str = "neon fp16 dotprod", **numbers: int) -> Target:
    cores = sum(cluster.count for cluster in clusters)
    return Target(
        name="board",
        arch="aarch64",
        features=frozenset(features.split()),
        clusters=clusters,
        cores=cores or None,
        sources=dict.fromkeys(["cores", "clusters", *numbers], "test"),
        **numbers,
    )


N1 = Cluster("neoverse-n1", 2, 1000)


@pytest.mark.parametrize(
    ("dtype", "features", "a_cycle"),
    [
        ("float32", "neon", 8),
        ("bfloat16", "neon", 8),
        ("bfloat16", "neon bf16", 32),
        ("float16", "neon", 8),
        ("float16", "neon fp16", 16),
        ("int8", "neon", 0.67 * 16),
        ("int8", "neon dotprod", 32),
        ("int8", "neon dotprod i8mm", 64),
    ],
)
def test_products_by_the_best_instruction_that_the_target_has(dtype, features, a_cycle):
    board = target(Cluster("neoverse-n2", 1, 2000), features=features)
    found = estimate([Work(3, dtype, 1_000_000, 0)], board)
    assert found.milliseconds == pytest.approx(3e6 / (a_cycle * 2e9) * 1e3)


def test_threads_take_the_fastest_cores_first():
    board = target(Cluster("cortex-x1", 1, 2000), Cluster("cortex-a55", 2, 1000))
    work = [Work(1, "float32", 64_000_000, 0)]
    times = [estimate(work, board, threads).milliseconds for threads in (1, 2, 3)]
    assert times == pytest.approx([64e6 / r * 1e3 for r in (32e9, 40e9, 48e9)])
    with pytest.raises(InputError, match="has 3 cores, not 4"):
        estimate(work, board, 4)


def test_weights_and_products_overlap_within_an_operation():
    board = target(N1, bandwidth=8_000_000_000)
    # 8 GB/s of float32 weights keep up with 2 products of each
    few, many = Work(1, "float32", 1_000_000, 4_000_000), Work(1, "float32", 10_000_000, 4_000_000)
    found = estimate([few, many], board)
    assert found.milliseconds == pytest.approx(0.5 + 1.25)
    assert (found.products, found.weights) == pytest.approx((0.125 + 1.25, 1.0))


def test_weights_in_the_caches_cost_nothing():
    board = target(N1, l2=1 << 20, l3=1 << 21, bandwidth=1)
    found = estimate([Work(3, "float32", 8_000, 1 << 20)], board)
    assert found.milliseconds == pytest.approx(0.003) and found.weights == 0
    assert "caches" in str(found)
    assert estimate([Work(4, "float32", 8_000, 1 << 20)], board).milliseconds > 1e6
    assert estimate([Work(4, "float32", 8_000, 1 << 20)], board, threads=2).milliseconds < 1  # two L2


def test_it_is_marked_as_an_estimate_and_says_what_is_not_known():
    text = str(estimate([Work(1, "int8", 10**9, 10**8)], resolve("pixel-8"), threads=2))
    assert text.startswith("estimate for pixel-8, 2 threads: at least") and "not measured" in text
    assert "memory bandwidth is not known" in text and "cortex-x3" in text and "cortex-a715" in text
    assert "taken for neoverse-v2" in text and "LLVM" in text


@pytest.mark.parametrize(
    ("board", "unknown"),
    [
        (target(), "the target's cores are not known"),
        (target(Cluster("cortex-a76", 4)), "the target's frequency of cortex-a76 is not known"),
        (target(Cluster("apple-a16", 2, 3000)), "apple-a16: how many products"),
    ],
)
def test_no_estimate_where_numbers_are_missing(board, unknown):
    with pytest.raises(TargetError, match=f"(?s)no estimate for 'board'.*{unknown}"):
        estimate([Work(1, "float32", 1, 0)], board)


def test_the_tables_name_cores_that_exist():
    known = arm.CORES["aarch64"]
    assert set(PIPES) | set(LIKE) <= set(known) and set(LIKE.values()) <= set(PIPES)
    assert not set(PIPES) & set(LIKE)
    for core, pipes in PIPES.items():
        features = {"dotprod": pipes.sdot, "i8mm": pipes.usmmla, "bf16": pipes.bfmmla}
        assert {name for name, rate in features.items() if rate} == set(features) & known[core]
    for core, like in LIKE.items():
        assert set(known[core]) - set(known[like]) == set()
