"""Parameters and the values that describe tensors."""

from __future__ import annotations

import pytest
import torch

from tersor.errors import ProgramError
from tersor.ir import Dim, Parameter, ParameterStore, Value
from tersor.ir.value import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_of_a_tensor(dtype):
    value = Value.of(torch.zeros(2, 3, dtype=DTYPES[dtype]))
    assert value == Value(dtype, (2, 3))
    assert value.bytes == 6 * torch.zeros(1, dtype=DTYPES[dtype]).element_size()
    assert str(value) == f"{dtype}[2, 3]"


def test_value_over_named_dimensions():
    batch = Dim.symbol("batch")
    value = Value("float32", (batch, 4))
    assert (value.elements, value.bytes, value.rank, value.is_float) == (4 * batch, 16 * batch, 2, True)
    assert str(value) == "float32[batch, 4]"


def test_complex_tensors_are_refused():
    with pytest.raises(ProgramError, match="complex64"):
        Parameter(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_digest_is_of_contents(dtype, shape):
    tensor = torch.ones(shape, dtype=DTYPES[dtype])
    digest = Parameter(tensor).digest
    assert digest == Parameter(tensor.clone()).digest
    if tensor.numel():
        assert digest != Parameter(torch.zeros_like(tensor)).digest
    assert digest != Parameter(tensor.reshape(*shape, 1)).digest
    other = "int32" if dtype == "float32" else "float32"
    assert digest != Parameter(tensor.to(DTYPES[other])).digest


def test_digest_sees_through_strides():
    tensor = torch.randn(3, 4)
    assert Parameter(tensor.T).digest == Parameter(tensor.T.contiguous()).digest != Parameter(tensor).digest


def test_bytes_are_row_major_where_a_size_of_one_has_any_stride():
    column = torch.arange(6, dtype=torch.int32).reshape(2, 3)[:, :1][:1].clone()
    odd = torch.arange(6, dtype=torch.int32).as_strided((1,), (3,))
    parameter = Parameter(odd)
    assert parameter.tensor.stride() == (1,) and parameter.tensor.data_ptr() == odd.data_ptr()
    assert parameter.digest == Parameter(column.reshape(1)).digest


def test_parameters_carry_no_gradient():
    assert not Parameter(torch.nn.Parameter(torch.ones(2))).tensor.requires_grad


def test_names_are_made_unique():
    store = ParameterStore()
    assert [store.add("w", torch.ones(1)) for _ in range(3)] == ["w", "w_1", "w_2"]
    assert list(store) == ["w", "w_1", "w_2"]


def test_a_stored_parameter_keeps_its_hash():
    parameter = Parameter(torch.ones(2))
    store = ParameterStore()
    store.add("w", parameter)
    assert store["w"] is parameter


def test_tied_memory_counts_once():
    tensor = torch.zeros(4, 4)
    store = ParameterStore()
    for name, t in (
        ("a", tensor),
        ("b", torch.zeros(4, 4)),
        ("c", tensor),
        ("d", tensor[:2]),
        ("e", tensor[2:]),
    ):
        store.add(name, t)
    store["f"] = store["b"]
    assert store.tied() == {"c": "a", "f": "b"}
    assert store.bytes == 64 + 64 + 32 + 32
    empty = ParameterStore({"a": Parameter(torch.zeros(0)), "b": Parameter(torch.zeros(0))})
    assert empty.tied() == {}


def test_copies_share_parameters_but_not_names():
    store = ParameterStore()
    store.add("w", torch.ones(2))
    other = store.copy()
    other["w"] = torch.zeros(2)
    other.add("v", torch.ones(1))
    assert list(store) == ["w"] and store["w"].tensor.sum() == 2
    del other["w"]
    assert "w" in store and len(other) == 1
