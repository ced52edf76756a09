"""Linear layers with quantised weights: what is recognised, what it rests on, and what happens when weights change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import REFERENCE, Rewriter, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_fuse import Options
from torch_fuse.graph import values
from torch_fuse.patterns import _packed_formats as formats
from torch_fuse.patterns._dequant_examples import Quantised, gptq, gptq_forward, int8, make
from torch_fuse.rewrite.registry import patterns

PATTERN = "dequant_linear"


def run(
    module: nn.Module, x: Tensor, grad: bool = False, **options: Any
) -> tuple[Tensor, Rewriter, Callable[..., Any]]:
    """What a rewritten module returns, the rewriter, and the module."""
    rewriter = Rewriter(Options(kernels="reference", on_error="raise", **options))
    compiled = rewritten(module, rewriter)
    with torch.set_grad_enabled(grad):
        return compiled(x), rewriter, compiled


def form_of(rewriter: Rewriter) -> tuple[Any, ...]:
    """The format's fields in the only op of the only graph."""
    (graph,) = rewriter.graphs
    (node,) = [node for node in graph.graph.nodes if len(node.args) == 14]
    return node.args[6:]


@st.composite
def layers(draw: st.DrawFn) -> tuple[Quantised, Tensor, bool]:
    """A linear layer with int8 or uint8 codes in any arithmetic, the weight either way around, groups with a tail."""
    n, k = draw(st.integers(2, 9)), draw(st.integers(8, 40))
    group = draw(st.sampled_from([g for g in (16, 32, k) if g <= k]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    compute = draw(st.sampled_from([torch.float32, dtype]))
    codes = draw(st.sampled_from([torch.int8, torch.uint8]))
    zero, turned = draw(st.booleans()), draw(st.booleans())
    scales = -(-k // group)
    torch.manual_seed(draw(st.integers(0, 100)))
    buffers = {"q": torch.randint(0, 256, (n, k)).to(torch.uint8).view(codes), "s": torch.rand(n, scales).to(compute)}
    buffers["z"] = torch.randint(0, 9, (n, scales)).to(codes)
    if draw(st.booleans()):
        buffers["s"].fill_(torch.nan)
    if turned:
        buffers = {name: buffer.t().contiguous() for name, buffer in buffers.items()}

    def spread(x: Tensor) -> Tensor:
        axis = 0 if turned else 1
        return x.repeat_interleave(group, axis).narrow(axis, 0, k)

    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.q.to(compute)
        w = (w - spread(m.z.to(compute)) if zero else w) * spread(m.s)
        return x @ w.to(dtype) if turned else F.linear(x, w.to(dtype))

    rows = draw(st.sampled_from([0, 1, 3]))
    grouped = group < k
    return Quantised(forward, **buffers), torch.randn(rows, k).to(dtype), grouped


@settings(max_examples=12)
@given(layers())
def test_any_arithmetic_and_any_size_is_recognised_and_gives_the_same_bits(
    layer: tuple[Quantised, Tensor, bool],
) -> None:
    module, x, _ = layer
    with torch.no_grad():
        wanted = module(x)
    found, rewriter, _ = run(module, x)
    assert rewriter.statuses == {(PATTERN, "fused")}, str(rewriter.report)
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("change", ["load_state_dict", "in place", "data", "new tensor"])
def test_a_weight_that_is_changed_after_compilation_counts(change: str) -> None:
    module, (x,) = make(lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s), int8(16, 1))(torch.float32)
    x = x.detach()
    other, _ = make(lambda m, x: x, int8(16, 1))(torch.float32)
    _, rewriter, compiled = run(module, x)
    if change == "load_state_dict":
        module.load_state_dict(other.state_dict())
    elif change == "in place":
        module.q.copy_(other.q).add_(1)
    elif change == "data":
        module.q.data.copy_(other.q)
        module.s.data = other.s * 2
    else:
        module.q, module.s = other.q, other.s
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    assert rewriter.statuses == {(PATTERN, "fused")}


def test_groups_that_are_reordered_after_compilation_are_an_error() -> None:
    module, (x,) = make(gptq_forward, gptq)(torch.float32)
    _, rewriter, compiled = run(module, x.detach())
    assert rewriter.statuses == {(PATTERN, "fused")}
    module.shifts.copy_(module.shifts.flip(0))
    with torch.no_grad(), pytest.raises(RuntimeError, match="has changed since the model was compiled"):
        compiled(x.detach())


def test_reordered_groups_are_not_taken_for_ordered_ones() -> None:
    module, (x,) = make(gptq_forward, gptq)(torch.float32)
    module.shifts.copy_(module.shifts.flip(0))
    found, rewriter, _ = run(module, x.detach())
    assert rewriter.statuses == {(PATTERN, "missed")}
    assert torch.equal(found, module(x.detach()))


REASONS = {
    "two readers": (lambda m, x: (F.linear(x, w := m.q.to(x.dtype) * m.s), F.linear(2 * x, w)), "written out anyway"),
    "a scale of columns": (lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s.flatten()), "no known format"),
    "computed codes": (lambda m, x: F.linear(x, (m.q ^ 1).to(x.dtype) * m.s), "no known format"),
    "codes from activations": (lambda m, x: F.linear(x, (x * 9).to(torch.int8).float() * m.s), "computed in the graph"),
    "scales of rows of x": (lambda m, x: F.linear(x, m.q.to(x.dtype)) * x[:, :1], "differs from row to row"),
    "written to": (lambda m, x: F.linear(x, m.q.add_(1).to(x.dtype) * m.s), "not known"),
    "a LoRA in the weight": (lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s + m.c * m.s), "neither codes nor scales"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_recognised_says_why(name: str) -> None:
    forward, reason = REASONS[name]
    torch.manual_seed(0)
    module = Quantised(
        forward, q=torch.randint(-9, 9, (32, 32)).to(torch.int8), s=torch.rand(32, 1), c=torch.rand(32, 32)
    )
    _, rewriter, _ = run(module, torch.randn(32, 32))
    assert all(reason in site.reason and site.status != "fused" for site in rewriter.report.sites), str(rewriter.report)
    assert rewriter.report.sites


def test_a_gradient_of_the_input_and_the_bias_is_that_of_the_plain_layer() -> None:
    module, (x,) = make(lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s, m.b), int8(16, 1))(torch.float32)
    module.b = nn.Parameter(torch.randn(16))
    out, rewriter, _ = run(module, x, grad=True)
    assert rewriter.statuses == {(PATTERN, "fused")}
    out.square().sum().backward()
    found = (x.grad.clone(), module.b.grad.clone())
    x.grad = module.b.grad = None
    module(x).square().sum().backward()
    assert torch.equal(found[0], x.grad) and torch.equal(found[1], module.b.grad)


def test_leaves_of_one_shape_are_drawn_apart() -> None:
    graph = torch.fx.Graph()
    leaf = graph.placeholder("s")
    leaf.meta["val"] = torch.empty(4, 4)
    assert not torch.equal(formats._random(leaf, 0, 1), formats._random(leaf, 0, 2))


def test_a_format_is_looked_for_once_for_layers_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    search = formats._search
    monkeypatch.setattr(formats, "_known", {})
    monkeypatch.setattr(formats, "_search", lambda *args: searched.append(1) or search(*args))
    layer = make(lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s), int8(32, 1, of=(32, 32)))
    module = nn.Sequential(*(layer(torch.float32)[0] for _ in range(3)))
    _, rewriter, _ = run(module, torch.randn(2, 32))
    assert rewriter.report.counts()[PATTERN] == {"fused": 3} and len(searched) == 1


@pytest.mark.parametrize("name, block", [("Q8_0", 34), ("Q4_0", 18)])
def test_scales_among_codes_are_viewed_before_they_are_sliced(name: str, block: int) -> None:
    """Inductor would copy a slice of bytes that is viewed as floats."""
    example = next(example for example in patterns()[PATTERN].spellings() if example.name == name)
    module, (x,) = example.make(torch.float16)
    found, rewriter, _ = run(module, x.detach())
    with torch.no_grad():
        assert torch.equal(found, module(x))
    calls = [node for node in rewriter.graphs[0].graph.nodes if node.target == "view" and node.users]
    views = [node for node in calls if node.args[1] == torch.float16]
    assert [values.tensor(node.args[0]).shape[-1] for node in views] == [block]


def test_without_a_kernel_or_a_measurement_the_graph_stays() -> None:
    module, (x,) = make(lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s), int8(16, 1))(torch.float32)
    rewriter = Rewriter(Options(on_error="raise"))
    rewritten(module, rewriter)(x)
    assert rewriter.statuses == {(PATTERN, "kept")}


def test_compiled_by_inductor_the_op_gives_the_same_and_follows_the_batch() -> None:
    module, (x,) = make(lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s), int8(16, 1))(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="fuse", dynamic=True, options={"kernels": "reference"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
        torch.testing.assert_close(compiled(x[:, :2]), module(x[:, :2]))


def test_inductor_keeps_the_check_of_reordered_groups() -> None:
    module, (x,) = make(gptq_forward, gptq)(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="fuse", options={"kernels": "reference"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
        module.shifts.copy_(module.shifts.flip(0))
        with pytest.raises(RuntimeError, match="has changed since the model was compiled"):
            compiled(x)


class Packed(Tensor):
    """An int8 weight as a tensor subclass, as quantisation libraries have them."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, halve: bool = False) -> Packed:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor, halve: bool = False) -> None:
        self.codes, self.scale, self.halve = codes, scale, halve

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.halve

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], halve: bool, size: Any, stride: Any) -> Packed:
        return cls(inner["codes"], inner["scale"], halve)

    def __repr__(self, **kwargs: Any) -> str:
        return f"Packed({self.shape})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, w = args[0] / 2 if args[1].halve else args[0], args[1]
            return F.linear(x, w.codes.to(w.dtype) * w.scale, *args[2:])
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale, args[0].halve)
        raise NotImplementedError(str(func))


@pytest.mark.parametrize("executor", ["eager", "aot_eager"])
def test_a_weight_that_is_a_tensor_subclass_is_read_by_its_parts(executor: Any) -> None:
    layer = nn.Linear(32, 16)
    layer.weight = nn.Parameter(
        Packed(torch.randint(-128, 128, (16, 32)).to(torch.int8), torch.rand(16, 1)), requires_grad=False
    )
    x = torch.randn(3, 32)
    rewriter = Rewriter(REFERENCE, executor)
    with torch.no_grad():
        torch.testing.assert_close(rewritten(layer, rewriter)(x), layer(x))
    assert rewriter.statuses == {(PATTERN, "fused")}, str(rewriter.report)
    assert form_of(rewriter)[:4] == (8, "int", 1, 32)


@pytest.mark.parametrize("shape", [(3, 2), (1, 1)])
def test_a_tensor_subclass_takes_activations_of_any_strides(shape: tuple[int, int]) -> None:
    layer = nn.Linear(32, 16, bias=False)
    codes = torch.randint(-128, 128, (16, 32)).to(torch.int8)
    layer.weight = nn.Parameter(Packed(codes, torch.rand(16, 1)), requires_grad=False)
    x = torch.randn(*shape, 64)[..., ::2].transpose(0, 1)
    with torch.no_grad():
        found, rewriter, _ = run(layer, x)
        torch.testing.assert_close(found, layer(x))
    assert rewriter.statuses == {(PATTERN, "fused")}, str(rewriter.report)


def test_a_tensor_subclass_that_changes_the_activations_is_left_alone() -> None:
    layer = nn.Linear(32, 16)
    codes = torch.randint(-128, 128, (16, 32)).to(torch.int8)
    layer.weight = nn.Parameter(Packed(codes, torch.rand(16, 1), halve=True), requires_grad=False)
    x = torch.randn(3, 32)
    with torch.no_grad():
        found, rewriter, _ = run(layer, x)
        torch.testing.assert_close(found, layer(x))
    assert rewriter.statuses == {(PATTERN, "missed")}
    assert "changes the activations" in rewriter.report.sites[0].reason


def test_few_decoders_run_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    agree = formats._agree
    monkeypatch.setattr(formats, "_known", {})
    monkeypatch.setattr(formats, "_agree", lambda *args: decoded.append(1) or agree(*args))
    example = next(example for example in patterns()[PATTERN].spellings() if example.name == "int4 high first")
    module, (x,) = example.make(torch.bfloat16)
    _, rewriter, _ = run(module, x.detach())
    assert rewriter.statuses == {(PATTERN, "fused")} and len(decoded) <= 40
