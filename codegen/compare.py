"""Contract 1a: the lowered code against the program's torch reference, on by default after every compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence, Set
from dataclasses import asdict, dataclass, field

import torch
from torch import fx

from tersor.errors import BudgetError, CompileError
from tersor.ir.interpreter import bind_dims, run
from tersor.ir.matching import is_call
from tersor.ir.program import Function
from tersor.ir.samples import sample_inputs, sample_states
from tersor.ir.verifier import describe

TOLERANCE = 1e-4
"""Largest error of f32 code, relative to the output's largest magnitude."""

ROUNDED_TOLERANCE = 0.0141
"""Largest distance of code that rounds to codes on the way, relative to the output's norm: a cosine of .9999.

Float sums differ in their last bits between targets; where such a sum lies between two codes, it becomes the other
one, and that is a whole step."""

NOISE_FACTOR, MOST_NOISE = 4.0, 0.25
"""Where a program that rounds amplifies, so that its own float32 and float64 evaluations part by more than the
tolerance, code may be off by this many times that distance, up to a cosine of .97; and codes that these evaluations
give otherwise may be others by as many times as much."""

NOISE_INPUTS = 3
"""Inputs that the distance is measured on: whether a sum falls on the other side of a code is a matter of luck."""

CODES_APART = 0.001
"""Share of a layer's codes that may be another than the program makes of the same inputs, the next one."""

Tensors = Mapping[str, torch.Tensor]
Call = Callable[[Tensors, MutableMapping[str, torch.Tensor]], Tensors]
"""From inputs and states by name to outputs; the states' new values replace those in the mapping."""


@dataclass(frozen=True)
class Observed:
    """A function that gives codes from its inside behind its own results (`observation`), and its compiled code."""

    function: Function
    compiled: Call

    def codes(self, function: Function) -> tuple[str, ...]:
        """Names of the results that ``function`` does not have."""
        return self.function.outputs[len(function.outputs) :]


@dataclass(frozen=True)
class Comparison:
    """One run of both: the sizes of the named dimensions, the error of each output and updated state (``$name``), and
    for the codes inside, where they are observed, how many there are, how many are other ones and by how much at most
    (``made``, ``moved``, ``by``); see `compare`.
    """

    sizes: dict[str, int]
    errors: dict[str, float]
    codes: dict[str, int] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)

    def to_dict(self) -> dict:
        return asdict(self)


def compare(
    function: Function,
    compiled: Call,
    tolerance: float | None = None,
    *,
    observed: Observed | None = None,
    batches: Sequence[Tensors] = (),
) -> list[Comparison]:
    """Runs both at the smallest, the largest and an odd size of every named dimension, on the same random states.

    The error is the largest difference relative to the output's largest magnitude; in a program that rounds to codes
    the difference's norm relative to the output's.

    Codes that are observed are compared one layer after the other: the program goes on with the codes of the compiled
    code, so what is seen of a layer is its own error and not what became of one before it. With all its codes given
    a program of integer products rounds no more than one in float32, and its results are compared as such.

    Args:
        observed: the function with its codes.
        batches: inputs to compare on besides the random ones, such as calibration data.

    Raises:
        CompileError: the program itself fails there.
        BudgetError: an output is further off than ``tolerance``, or not finite where the reference is; or codes are
            others by more than one, or more of them than `CODES_APART`, and that is not the program's own noise: by
            how much it parts from itself in float64.
    """
    comparisons = []
    reference = _Reference(function, observed)
    tolerance = tolerance or (ROUNDED_TOLERANCE if reference.rounds else TOLERANCE)
    for sizes, inputs, states in _probes(function, batches):
        actual_states = dict(states)
        place = f"function {function.name!r} at {sizes or 'its static shapes'}"
        codes: Tensors = {}
        if observed is not None:
            inside = observed.compiled(inputs, dict(states))
            codes = {name: torch.as_tensor(inside[name]) for name in observed.codes(function)}
        try:
            expected = reference.run(inputs, states, codes)
        except Exception as error:  # whatever torch raises
            raise CompileError(
                "the program does not run on the random inputs that the compiled code is compared on",
                where=place,
                why=f"{type(error).__name__}: {error}",
                fix="check the ranges of the dynamic dimensions; verify=False skips the comparison",
            ) from error
        noise = _Noise(reference, inputs, sizes, codes, expected)
        moved = _check_codes(reference, codes, expected, noise, place)
        actual = compiled(inputs, actual_states)
        measure = distance if reference.rounds else relative_error
        errors = {name: measure(actual[name], expected[name]) for name in function.outputs}
        errors |= {f"${name}": measure(actual_states[name], states[name]) for name in function.states}
        comparisons.append(Comparison(sizes, errors, moved))
        allowed = tolerance
        if reference.rounds and comparisons[-1].worst > tolerance:
            allowed = max(tolerance, min(NOISE_FACTOR * noise.of_results(), MOST_NOISE))
        if not comparisons[-1].worst <= allowed:
            worst = max(
                errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf")
            )
            raise BudgetError(
                f"the compiled code disagrees with the program: output {worst!r} is off by {errors[worst]:.2e} "
                f"of its scale (tolerance {allowed:.2g})",
                where=place,
                why="a kernel is wrong for this target, or the program amplifies rounding",
                fix=_FIX,
            )
    return comparisons


_FIX = "report it with the program (tersor inspect); verify=False skips this comparison"


def _probes(
    function: Function, batches: Sequence[Tensors]
) -> Iterator[tuple[dict[str, int], Tensors, dict[str, torch.Tensor]]]:
    """Sizes, inputs and states to compare on."""
    for seed, sizes in enumerate(probe_sizes(function)):
        yield sizes, sample_inputs(function, sizes, seed), sample_states(function, sizes, seed)
    for batch in batches:
        sizes = bind_dims(function.inputs, batch)
        yield sizes, batch, sample_states(function, sizes)


class _Reference:
    """The program in torch, which is given the codes that the compiled code has made, where these are observed.

    rounds: whether values are rounded to far fewer bits than float32 on the way, codes that are given left out.
    """

    def __init__(self, function: Function, observed: Observed | None):
        self.function = function if observed is None else observed.function
        self.codes = () if observed is None else observed.codes(function)
        self.rounds = _rounds(self.function, set(self.nodes(self.function).values()))

    def nodes(self, function: Function) -> dict[str, fx.Node]:
        """The codes in this function or a copy of it, by name."""
        results = dict(zip(function.outputs, function.results, strict=True))
        return {name: results[name] for name in self.codes}

    def run(self, inputs: Tensors, states: MutableMapping[str, torch.Tensor], codes: Tensors) -> Tensors:
        """The results, among them the codes that it makes of those given for earlier layers."""
        return self._run(self.function, inputs, states, codes)

    def run_precisely(self, inputs: Tensors, states: dict[str, torch.Tensor], codes: Tensors) -> Tensors:
        """The same in float64, where sums are rounded elsewhere.

        Attention in bf16 is left unrounded: kernels round its weights before they are divided by their sum, which is
        as far from rounding them behind as that is from not rounding.
        """
        precise = self.function.copy(self.function.parameters)
        for node in precise.calls("attention"):
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "products"}
        return self._run(precise, inputs, states, codes, dtype=torch.float64)

    def _run(
        self,
        function: Function,
        inputs: Tensors,
        states: MutableMapping[str, torch.Tensor],
        codes: Tensors,
        dtype: torch.dtype | None = None,
    ) -> Tensors:
        made: dict[str, torch.Tensor] = {}
        names = {node: name for name, node in self.nodes(function).items() if name in codes}

        def observe(node: fx.Node, value: torch.Tensor) -> torch.Tensor | None:
            if node not in names:
                return None
            made[names[node]] = value
            return codes[names[node]].to(value.dtype)

        with torch.inference_mode():
            return run(function, inputs, states, observe=observe, dtype=dtype) | made


class _Noise:
    """How far the program is from itself in float64, found when it is asked for."""

    def __init__(
        self,
        reference: _Reference,
        inputs: Tensors,
        sizes: Mapping[str, int],
        codes: Tensors,
        expected: Tensors,
    ):
        self._reference, self._inputs, self._sizes = reference, inputs, sizes
        self._codes, self._expected = codes, expected
        self._precise: Tensors | None = None

    def of_results(self) -> float:
        """The largest distance of a result; where no codes are given the largest on some inputs, as whether a sum falls
        on the other side of a code is a matter of luck.
        """
        reference, function = self._reference, self._reference.function
        results = [name for name in function.outputs if name not in reference.codes]
        if self._codes:
            pairs = [(self._precisely(), self._expected)]
        else:
            pairs = []
            for seed in range(NOISE_INPUTS):
                inputs = sample_inputs(function, self._sizes, seed)
                states = [sample_states(function, self._sizes, seed) for _ in range(2)]
                pairs.append(
                    (
                        reference.run_precisely(inputs, states[0], {}),
                        reference.run(inputs, states[1], {}),
                    )
                )
        return max([0.0, *(distance(a[name], b[name]) for a, b in pairs for name in results)])

    def of_codes(self, name: str) -> tuple[float, int]:
        """The share of codes that are other ones, and by how much at most."""
        moved, most = apart(self._precisely()[name], self._expected[name])
        return moved / max(self._expected[name].numel(), 1), most

    def _precisely(self) -> Tensors:
        if self._precise is None:
            states = sample_states(self._reference.function, self._sizes)
            self._precise = self._reference.run_precisely(self._inputs, states, self._codes)
        return self._precise


def _check_codes(
    reference: _Reference, codes: Tensors, expected: Tensors, noise: _Noise, place: str
) -> dict[str, int]:
    """How many codes there are, are others, and by how much; a layer that has too many is an error."""
    made = moved = by = 0
    for name, node in reference.nodes(reference.function).items():
        count, most = apart(codes[name], expected[name])
        made, moved, by = made + codes[name].numel(), moved + count, max(by, most)
        share, step = CODES_APART, 1
        if most > step or count > max(1, share * codes[name].numel()):
            moved_by_noise, most_by_noise = noise.of_codes(name)
            share = max(share, min(NOISE_FACTOR * moved_by_noise, MOST_NOISE))
            step = max(step, int(NOISE_FACTOR * most_by_noise))
        if most > step or count > max(1, share * codes[name].numel()):
            raise BudgetError(
                f"the compiled code disagrees with the program: {count} of {codes[name].numel()} codes are others, "
                f"by up to {most} ({share:.2%} may be, by {step})",
                where=f"{describe(node)}, {place}",
                why="the kernel that makes them, or one between them and the codes before, is wrong for this target",
                fix=_FIX,
            )
    return {"made": made, "moved": moved, "by": by} if codes else {}


def apart(actual: torch.Tensor, expected: torch.Tensor) -> tuple[int, int]:
    """How many of two tensors' whole numbers differ, and by how much at most."""
    difference = (actual.double() - expected.double()).abs()
    return int((difference > 0).sum()), int(difference.max()) if difference.numel() else 0


def probe_sizes(function: Function) -> list[dict[str, int]]:
    """Size assignments to try: all smallest; each dimension largest in turn; an odd one in between for all."""
    dims = function.dims
    smallest = {name: r.min for name, r in dims.items()}
    probes = [smallest]
    probes += [smallest | {name: r.max} for name, r in dims.items()]
    probes.append(
        {name: min(r.max, max(r.min, (r.min + min(r.max, 64)) // 2 | 1)) for name, r in dims.items()}
    )
    return [dict(p) for p in dict.fromkeys(tuple(sorted(p.items())) for p in probes)]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| / max |expected|; NaN and infinities must agree exactly (else inf)."""
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = expected[finite].abs().max().item()
    return (actual[finite] - expected[finite]).abs().max().item() / (scale or 1.0)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; NaN and infinities must agree exactly (else inf)."""
    actual, expected = actual.double(), expected.double()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    norm = expected[finite].norm().item()
    return (actual[finite] - expected[finite]).norm().item() / (norm or 1.0)


def _rounds(function: Function, given: Set[fx.Node]) -> bool:
    """Whether values are rounded to far fewer bits than float32 on the way, in other places than those given."""
    narrow = {"bfloat16", "float16", "int8", "uint8"}
    return any(
        node.target.name == "round"
        or (node.meta["value"].dtype in narrow and not is_call(node, *_MOVES))
        or node.kwargs.get("products", "float32") in narrow
        for node in function.calls()
        if node not in given
    )


_MOVES = ("reshape", "permute", "slice", "concat", "expand")
