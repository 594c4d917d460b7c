"""Brings a captured program to its canonical form, so that one kind of model has one form, whoever wrote it.

One module per theme; each rule says what it does above its definition:

    precision    arithmetic in 16 bits
    cleanup      what computes nothing, or is computed twice
    layout       reshapes and permutes: one normal form, pushed down past what does not mind them
    linear       products with weights; fused projections taken apart
    convolution  batch norms and padding taken into convolutions
    norms        layer norms and RMS norms that are spelt out
    activations  GELU and SiLU that are spelt out
    rotary       rotary position embeddings on merged heads
    attention    attention that is spelt out; scales; key heads shared by groups
    indices      look-ups and comparisons by position
    masks        causal, window and boolean masks
    states       caches in the layout that attention reads
    constants    what depends on no input
    sites        stable names of places

`affine` reads integer arithmetic over positions, for indices and masks.
"""

from __future__ import annotations

import re

from tersor.ir.canonicalize import (
    activations,
    attention,
    cleanup,
    convolution,
    indices,
    layout,
    linear,
    masks,
    norms,
    rotary,
)
from tersor.ir.canonicalize.constants import fold_constants
from tersor.ir.canonicalize.precision import widen
from tersor.ir.canonicalize.sites import assign_sites
from tersor.ir.canonicalize.states import merge_heads_of_states
from tersor.ir.matching import Rule, RuleReport, apply_rules
from tersor.ir.program import Function, Program

# Rotations are found in the order the model wrote; later the slices of their halves move away.
_SPELT_OUT = (*cleanup.RULES, *norms.RULES, *activations.RULES, *rotary.RULES)
_SHAPED = (*_SPELT_OUT, *layout.RULES, *linear.RULES)
_ATTENTION = (*_SHAPED, *attention.RULES)
STAGES: tuple[tuple[Rule, ...], ...] = (
    _SPELT_OUT,
    _ATTENTION,
    (*_ATTENTION, *linear.SPLIT_RULES),
    (*_SHAPED, *cleanup.PRODUCT_RULES, *indices.RULES, *linear.SPLIT_RULES),
    masks.RULES,
    (*_SHAPED, *indices.RULES),
)


def canonicalize(program: Program) -> list[str]:
    """Rewrites every function in place; returns what a reader should know about it.

    The program computes the same values up to the rounding of the operations that were fused; exceptions (rows whose
    keys are all hidden) are among the notes.
    """
    known = set(program.parameters)
    functions = program.functions.values()
    for function in functions:
        cleanup.remove_dead(function)
    notes = widen(program)
    for rules in STAGES:
        for function in functions:
            _settle(function, rules)
        _restore_names(program, known)
    merge_heads_of_states(program, _settle_shapes)
    for function in functions:
        notes += fold_constants(function)
        _settle(function, (*_SHAPED, *convolution.RULES))
        notes += [f"%{n.name}: {n.meta.pop('note')}" for n in function.calls() if "note" in n.meta]
    _restore_names(program, known)
    for function in functions:
        assign_sites(function)
    return notes


def _settle(function: Function, rules: tuple[Rule, ...]) -> RuleReport:
    cleanup.remove_dead(function)
    cleanup.merge_duplicates(function)
    report = apply_rules(function, rules)
    cleanup.remove_dead(function)
    cleanup.merge_duplicates(function)
    return report


def _settle_shapes(program: Program) -> None:
    for function in program.functions.values():
        _settle(function, _SHAPED)


def _restore_names(program: Program, known: set[str]) -> None:
    """Drops unused parameters; one that took the place of a transposed or folded one takes its name too."""
    program.drop_unused_parameters()
    for name in list(program.parameters):
        original = re.sub(r"_\d+$", "", name)
        if name not in known and original in known and original not in program.parameters:
            program.parameters[original] = program.parameters[name]
            del program.parameters[name]
            for _, node in program.nodes():
                if node.op == "get_attr" and node.target == name:
                    node.target = original
