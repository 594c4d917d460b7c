"""Models that write to buffers: caches and counters become states; several functions go into one program."""

from __future__ import annotations

import pytest
import torch
from decoders import HEADS, KV_HEADS, ROOM, SIZE, WORDS, Decoder
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tersor.errors import CaptureError, InputError, ProgramError
from tersor.frontends import capture
from tersor.frontends.static_cache import WithStaticCache
from tersor.ir import Program, Value, run, verify

LENGTH = {"ids": {1: ("length", 1, ROOM)}}
START = torch.tensor(0)


def ids(count: int = 12) -> torch.Tensor:
    return torch.randint(0, WORDS, (1, count), generator=torch.Generator().manual_seed(1))


def two_functions(model: nn.Module, name: str = "ids") -> Program:
    """Prefill of any length and decode of one token."""
    program = capture(
        model, {name: ids(7), "position": START}, {name: {1: ("length", 1, ROOM)}}, name="prefill"
    )
    assert capture(model, {name: ids(1), "position": START}, name="decode", into=program) is program
    return program


def generated(program: Program, tokens: torch.Tensor, name: str = "ids") -> torch.Tensor:
    """Logits of all tokens: a prefill of seven, the others one by one."""
    states = program.zero_states()
    (first,) = run(program.functions["prefill"], {name: tokens[:, :7], "position": START}, states).values()
    parts = [first]
    for at in range(7, tokens.shape[1]):
        step = {name: tokens[:, at : at + 1], "position": torch.tensor(at)}
        parts += run(program.functions["decode"], step, states).values()
    return torch.cat(parts, 1)


def within(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("write", ["index_copy", "assignment"])
@pytest.mark.parametrize("attend", ["sdpa", "products"])
def test_a_decoder_written_by_hand(write, attend):
    model, tokens = Decoder(write, attend).eval(), ids()
    program = two_functions(model)
    with torch.no_grad():
        expected = model.clear()(tokens, START)
    within(generated(program, tokens), expected)
    for function in program.functions.values():
        assert len(function.calls("attention")) == 2 and len(function.calls("cache_update")) == 4
        assert list(function.inputs) == ["ids", "position"] and len(function.states) == 4
        assert not function.calls("permute"), "caches lie as attention reads them"
    assert program.states["attentions.0.keys"] == Value("float32", (1, ROOM, KV_HEADS * SIZE))
    attention = program.functions["decode"].calls("attention")[0]
    assert (attention.kwargs["heads"], attention.kwargs["kv_heads"]) == (HEADS, KV_HEADS)


def test_capture_leaves_the_model_as_it_was():
    model = Decoder().eval()
    two_functions(model)
    assert all(type(b) is torch.Tensor and not b.any() for b in model.buffers())
    with torch.no_grad():
        assert model(ids(), START).isfinite().all()


def test_parameters_are_shared():
    model = Decoder()
    alone = capture(model, {"ids": ids(1), "position": START})
    program = two_functions(model)
    assert program.parameters.keys() == alone.parameters.keys()
    assert program.parameters["head.weight"].storage == alone.parameters["head.weight"].storage


def llama(**options) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_with_a_static_cache(attention):
    model, tokens = llama(attn_implementation=attention), ids()
    with torch.no_grad():
        expected = model(tokens).logits
    cached = WithStaticCache(model, ROOM)
    with torch.no_grad():
        within(cached(tokens, START)["logits"], expected)
    for buffer in (cached.keys_0, cached.values_1):
        assert buffer.any()
    program = two_functions(WithStaticCache(model, ROOM), "input_ids")
    within(generated(program, tokens, "input_ids"), expected)
    for function in program.functions.values():
        assert len(function.calls("attention")) == 2 and not function.calls("permute", "matmul", "softmax")
        assert len(function.calls("rotary_embedding")) == 4
    assert program.states.keys() == {"keys_0", "values_0", "keys_1", "values_1"}
    assert model.config.use_cache is not False


def test_a_static_cache_needs_a_decoder_without_windows():
    config = MistralConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    with pytest.raises(InputError, match="sees 8 positions(.*\n)*.*room=8"):
        WithStaticCache(model, 16)
    tokens = ids(8)
    with torch.no_grad():
        expected = model(tokens).logits
    within(generated(two_functions(WithStaticCache(model, 8), "input_ids"), tokens, "input_ids"), expected)
    with pytest.raises(InputError, match="cannot be given a cache"):
        WithStaticCache(nn.Linear(2, 2), 4)


class Counter(nn.Module):
    """How often it was called, and the last inputs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("last", torch.zeros(3, 4))

    def forward(self, x):
        self.count += 1
        self.last[:2] = self.last[1:].clone()
        self.last[2] = x
        return self.last.sum(0) * self.count


def test_counters_and_windows():
    model = Counter()
    program = capture(model, (torch.ones(4),))
    states, inputs = program.zero_states(), torch.randn(5, 4)
    for x in inputs:
        torch.testing.assert_close(run(program.main, {"x": x}, states)["output"], model(x))
    assert states["count"] == 5 and torch.equal(states["last"], inputs[2:])


class Windowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(2, 6, 3))

    def forward(self, x):
        self.kept[:, 2:4] = x
        self.kept[-1, 5] = x[0, 0]
        return self.kept * 2


def test_slices_at_fixed_places_are_written_in_place():
    program, x = capture(Windowed(), (torch.ones(2, 2, 3),)), torch.randn(2, 2, 3)
    torch.testing.assert_close(program(x=x)["output"], Windowed()(x))
    assert program.main.calls("cache_update")[0].kwargs["dim"] == 1


class Reader(nn.Module):
    """The other half of `Counter`."""

    def __init__(self, counter: Counter):
        super().__init__()
        self.register_buffer("last", counter.last)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.last * (self.scale + x)


def test_a_function_may_only_read_a_state():
    counter = Counter()
    program = capture(counter, (torch.ones(4),), name="write")
    capture(Reader(counter), (torch.ones(4),), name="read", into=program)
    states, x = program.zero_states(), torch.randn(4)
    run(program.functions["write"], {"x": x}, states)
    seen = run(program.functions["read"], {"x": torch.ones(4)}, states)["output"]
    torch.testing.assert_close(seen[2], 3 * x)
    assert program.functions["read"].states == {"last": Value("float32", (3, 4))}
    assert not program.functions["read"].updates
    other = capture(Reader(Counter()), (torch.ones(4),), name="read")
    with pytest.raises(CaptureError, match="writes to last, parameters of the program(.*\n)*.*first"):
        capture(Counter(), (torch.ones(4),), name="write", into=other)
    assert list(other.functions) == ["read"]


class Tower(nn.Module):
    def __init__(self, shared: nn.Linear, width: int):
        super().__init__()
        self.inner, self.shared = nn.Linear(width, 6), shared

    def forward(self, x):
        return self.shared(self.inner(x).relu())


def test_two_towers():
    """Weights of one name and other contents stay apart; those that are the same are one."""
    shared = nn.Linear(6, 4)
    towers = Tower(shared, 3), Tower(shared, 5)
    program = capture(towers[0], (torch.ones(2, 3),), name="text")
    capture(towers[1], (torch.ones(2, 5),), name="image", into=program)
    verify(program)
    for name, tower, width in (("text", towers[0], 3), ("image", towers[1], 5)):
        x = torch.randn(2, width)
        torch.testing.assert_close(run(program.functions[name], {"x": x})["output"], tower(x))
    assert sorted(program.parameters) == [
        "inner.bias", "inner.bias_1", "inner.weight", "inner.weight_1", "shared.bias", "shared.weight",
    ]  # fmt: skip


def test_what_does_not_go_together_is_refused():
    program = two_functions(Decoder())
    before = program.digest()
    with pytest.raises(InputError, match="has a function 'decode' already"):
        capture(Decoder(), {"ids": ids(1), "position": START}, name="decode", into=program)

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.attentions = nn.ModuleList([nn.Module()])
            self.attentions[0].register_buffer("keys", torch.zeros(5))

        def forward(self, x):
            self.attentions[0].keys.add_(x)
            return x * 2

    with pytest.raises(
        ProgramError, match=r"'attentions.0.keys' is float32\[1, 16, 16\] here and float32\[5\]"
    ):
        capture(Other(), (torch.ones(5),), name="other", into=program)
    assert program.digest() == before
    with pytest.raises(InputError, match="into is a str"):
        capture(Decoder(), {"ids": ids(1), "position": START}, into="program")


def test_states_begin_as_zeros():
    model = Counter()
    model(torch.ones(4))
    with pytest.raises(CaptureError, match="'count'(.*\n)*.*begin as zeros(.*\n)*.*set it to zeros"):
        capture(model, (torch.ones(4),))


class Writes(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("kept", torch.zeros(4, 3))

    def forward(self, x, at):
        self.how(self.kept, x, at)
        return self.kept.sum() + x


def _mask(kept, x, at):
    kept[kept < x[0]] = 1.0


def _pairs(kept, x, at):
    kept[at, at] = x[:2]


def _rows(kept, x, at):
    kept[at] = x


def _adds(kept, x, at):
    kept.index_put_((at,), x.expand(2, 3), accumulate=True)


def _copies(kept, x, at):
    kept.copy_(kept.flip(0) + x)


@pytest.mark.parametrize("how", [_mask, _pairs, _rows, _adds, _copies], ids=lambda how: how.__name__[1:])
@pytest.mark.parametrize("at", [[2, 0], [-1, 0]], ids=str)
def test_every_kind_of_write(how, at):
    model, at = Writes(how), torch.tensor(at)
    program = capture(model, {"x": torch.ones(3), "at": at})
    states = program.zero_states()
    for _ in range(3):
        x = torch.randn(3)
        torch.testing.assert_close(run(program.main, {"x": x, "at": at}, states)["output"], model(x, at))
        torch.testing.assert_close(states["kept"], model.kept)


def test_writes_to_inputs_are_refused():
    def add(kept, x, at):
        x.add_(1)

    with pytest.raises(CaptureError, match="writes to its inputs: x(.*\n)*.*register_buffer"):
        capture(Writes(add), {"x": torch.ones(3), "at": torch.tensor([0, 2])})


class Hidden(nn.Module):
    """Writes to a tensor that is a buffer, but through another attribute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(3))
        self.holder = {"kept": self.kept}

    def forward(self, x):
        self.holder["kept"].add_(x)
        return self.holder["kept"] * self.kept


def test_a_tensor_that_is_no_buffer():
    with pytest.raises(CaptureError, match=r"register_buffer"):
        capture(Hidden(), (torch.ones(3),))
