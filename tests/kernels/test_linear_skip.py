"""linear_skip against float64: the reference (CPU), the interpreted kernel and, where there is one, a GPU.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernel; test_kernel_in_the_interpreter does so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_interpreter import passes_in_interpreter
from poisoning import poison_new_tensors
from torch import Tensor

from torch_fuse._compat import FakeTensorMode
from torch_fuse.kernels import _linear_skip_hopper, _ops
from torch_fuse.kernels import linear_skip as module
from torch_fuse.kernels._linear_skip_common import MODES, Operands, Spec
from torch_fuse.kernels.linear_skip import CONFIGS, Config, config, linear_skip, reference, supports

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
HALF = torch.float16 if _ops.INTERPRETED else torch.bfloat16  # the interpreter truncates to bfloat16
KINDS = ("none", "number", "sample", "token", "channel", "channels", "full")
TINY = Config(16, 16, 16, 1, 1)


def factor(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    batch, length, width = shape
    sizes = {"number": (), "sample": (batch, 1, 1), "token": (batch, length, 1), "channel": (width,),
             "channels": (batch, 1, width), "full": shape}  # fmt: skip
    return None if kind == "none" else torch.randn(sizes[kind]) + 0.5


def case(a: str = "sample", b: str = "sample", mode: str = "sum", *, batch: int = 2, length: int = 9, width: int = 32,
         inner: int = 48, bias: bool = True, alpha: float = 1.0, beta: float = 1.0, save: bool = True,
         seed: int = 0) -> tuple[Operands, Spec]:  # fmt: skip
    """Operands in float32 and options; a lerp has no a."""
    torch.manual_seed(seed)
    shape = (batch, length, width)
    y, x = torch.randn(batch, length, inner), torch.randn(shape)
    weight = torch.randn(width, inner) / inner**0.5
    a, alpha = ("none", 1.0) if mode != "sum" else (a, alpha)
    t = Operands(y, weight, torch.randn(width) if bias else None, x, factor(a, shape), factor(b, shape))
    return t, Spec(alpha, beta, mode, save, torch.float32)


def cast(t: Operands, dtype: torch.dtype, factors: torch.dtype | None = None, grad: bool = False) -> Operands:
    """Fresh operands in a dtype, a and b in one of their own."""
    found = {name: x if x is None else x.to(DEVICE, (factors or dtype) if name in "ab" else dtype).clone()
             for name, x in t._asdict().items()}  # fmt: skip
    return Operands(**{name: x if x is None else x.requires_grad_(grad) for name, x in found.items()})


def unfused(t: Operands, spec: Spec) -> Tensor:
    """As models spell it, in their dtypes."""
    linear = F.linear(t.y, t.weight, t.bias).reshape(t.x.shape)
    b = spec.beta if t.b is None else t.b * spec.beta
    if spec.mode == "sum":
        a = spec.alpha if t.a is None else t.a * spec.alpha
        return (t.x * a + linear * b).to(spec.out_dtype)
    ends = (linear, t.x) if spec.mode.endswith("back") else (t.x, linear)
    return (ends[0] + b * (ends[1] - ends[0])).to(spec.out_dtype)


def fused(t: Operands, spec: Spec) -> Tensor:
    return linear_skip(*t, *spec)[0]


def run(
    op: Any, t: Operands, spec: Spec, dtype: torch.dtype, factors: torch.dtype | None, grad: Tensor
) -> list[Tensor]:
    """Result and gradients of all operands, in float64."""
    given = cast(t, dtype, factors, grad=True)
    out = op(given, spec._replace(out_dtype=torch.float64 if dtype == torch.float64 else spec.out_dtype))
    leaves = [x for x in given if x is not None]
    found = torch.autograd.grad(out, leaves, grad.to(DEVICE, out.dtype))
    assert [x.dtype for x in found] == [x.dtype for x in leaves]
    return [x.detach().double().cpu() for x in (out, *found)]


def assert_no_worse(t: Operands, spec: Spec, dtype: torch.dtype, factors: torch.dtype | None = None) -> None:
    rounded = Operands(*(None if x is None else x.double().cpu() for x in cast(t, dtype, factors)))
    grad = torch.randn(t.x.shape).to(dtype)
    exact = run(unfused, rounded, spec, torch.float64, torch.float64, grad)
    ours, theirs = (run(f, rounded, spec._replace(out_dtype=dtype), dtype, factors, grad) for f in (fused, unfused))
    for i, (wanted, mine, other) in enumerate(zip(exact, ours, theirs, strict=True)):
        assert mine.shape == wanted.shape
        # of few values, or the largest of many, one comes out right by chance: a rounding more is allowed
        size = 1 + float(wanted.abs().max())
        rounding = torch.finfo(dtype).eps * size
        for error, slack in ((lambda x: (x - wanted).abs().max(), rounding),  # noqa: B023
                             (lambda x: (x - wanted).pow(2).mean().sqrt(),  # noqa: B023
                              3e-6 * size if wanted.numel() > 64 else rounding)):  # fmt: skip
            assert error(mine) <= 2 * error(other) + max(slack, 3e-6 * size), (i, error(mine), error(other))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results start as NaN: an element nobody writes shows."""
    if _ops.INTERPRETED or DEVICE == "cuda":
        poison_new_tensors(monkeypatch)
        monkeypatch.setattr(module, "config", lambda *_: TINY)


@settings(max_examples=12 if _ops.INTERPRETED else 60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(st.data())
def test_error_is_at_most_twice_the_unfused_spelling(data: st.DataObject) -> None:
    draw = data.draw
    t, spec = case(
        draw(st.sampled_from(KINDS)), draw(st.sampled_from(KINDS)), draw(st.sampled_from(MODES)),
        batch=draw(st.integers(1, 3)), length=draw(st.sampled_from((1, 7, 16, 33))),
        width=draw(st.sampled_from((16, 32, 48))), inner=draw(st.sampled_from((16, 48, 64))), bias=draw(st.booleans()),
        alpha=draw(st.sampled_from((1.0, -0.5))), beta=draw(st.sampled_from((1.0, 0.25))), save=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip
    dtype = draw(st.sampled_from((torch.float32, HALF)))
    assert_no_worse(t, spec, dtype, draw(st.sampled_from((None, torch.float32))))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_broadcast_of_the_coefficients(kind: str, mode: str) -> None:
    assert_no_worse(*case(kind, kind, mode, alpha=-0.5, beta=0.25), torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["sample", "channel", "full"])
def test_functions_of_the_coefficients_and_their_gradients(kind: str, mode: str) -> None:
    t, spec = case(kind, kind, mode, beta=0.25)
    spec = spec._replace(a_of="rdiv:0.25 add:0.25 square x", b_of="div mul:0.5 x sqrt add:0.25 square x")
    given = cast(t, torch.float32, grad=True)
    leaves = [x for x in given if x is not None]
    a = None if given.a is None else 0.25 / (given.a**2 + 0.25)
    plain = given._replace(a=a, b=0.5 * given.b / (given.b**2 + 0.25).sqrt())
    seed = torch.randn(t.x.shape, device=DEVICE)
    ours, theirs = fused(given, spec), unfused(plain, spec)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for x, y in zip(*(torch.autograd.grad(out, leaves, seed) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"b_of is 'log x': 'log'; allowed"):
        fused(given, spec._replace(b_of="log x"))


@pytest.mark.parametrize("how", CONFIGS, ids=str)
@pytest.mark.parametrize("early", [False, True])
def test_every_tile(how: Config, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "config", lambda *_: how._replace(early=early, group=2))
    assert_no_worse(*case("token", "channel", length=77, width=80, inner=80), HALF, torch.float32)


@pytest.mark.parametrize(
    "name", ["y", "x", "x transposed", "weight transposed", "bias", "a", "a lanes", "b", "rows", "rank 2"]
)
def test_operands_of_any_layout(name: str) -> None:
    t, spec = case("channels", "full")
    changed = {
        "y": lambda: t._replace(y=torch.cat([t.y, t.y], 2)[..., :48]),
        "x": lambda: t._replace(x=torch.cat([t.x, t.x], 2)[..., 32:]),
        "x transposed": lambda: t._replace(x=t.x.transpose(0, 1).contiguous().transpose(0, 1)),
        "weight transposed": lambda: t._replace(weight=t.weight.t().contiguous().t()),
        "bias": lambda: t._replace(bias=torch.stack([t.bias, t.bias], 1)[:, 0]),
        "a": lambda: t._replace(a=t.a.transpose(0, 2).contiguous().transpose(0, 2)),
        "a lanes": lambda: t._replace(a=torch.randn(64)[::2]),
        "b": lambda: t._replace(b=torch.cat([t.b, t.b], 2)[..., ::2]),
        "rows": lambda: t._replace(y=t.y.flatten(0, 1)),
        "rank 2": lambda: Operands(t.y[0], t.weight, t.bias, t.x[0], t.a[0], t.b[0, :, :1]),
    }[name]()
    given = Operands(*(x.to(DEVICE) for x in changed))
    out, linear = linear_skip(*given, *spec)
    assert out.is_contiguous() and out.shape == given.x.shape == linear.shape
    torch.testing.assert_close(out, unfused(given, spec), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear, F.linear(given.y, given.weight, given.bias).reshape(out.shape), rtol=1e-5,
                               atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_skip_of_one_and_nothing_is_x_bit_for_bit(dtype: torch.dtype) -> None:
    t, spec = case("sample", "sample")
    t = cast(t, dtype, torch.float32)
    t.a.fill_(1.0)
    t.b.fill_(0.0)
    out = fused(t, spec._replace(out_dtype=dtype))
    assert torch.equal(out, t.x)
    t.a[1], t.b[1] = 0.0, 1.0  # the other sample is the projection alone
    out = fused(t, spec._replace(out_dtype=dtype))
    assert torch.equal(out[0], t.x[0])
    torch.testing.assert_close(out[1], F.linear(t.y, t.weight, t.bias)[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_come_out_where_the_unfused_graph_has_them(value: float, mode: str) -> None:
    t, spec = case("token", "token", mode)
    t = cast(t, torch.float32)
    if t.a is not None:
        t.a[0, 1] = 0.0
    t.b[1, 2] = 0.0
    t.b[0, 3] = 1.0
    for tensor, at in ((t.x, (0, 1, 2)), (t.x, (1, 2, 3)), (t.y, (1, 2, 0)), (t.y, (0, 3, 1)), (t.x, (0, 3, 3))):
        tensor[at] = value
    out = fused(t, spec)
    if not mode.startswith("lerp"):
        wanted = unfused(t, spec)
    else:
        linear = F.linear(t.y, t.weight, t.bias)
        wanted = torch.lerp(*((t.x, linear) if mode == "lerp" else (linear, t.x)), t.b)
    assert torch.equal(out.isnan(), wanted.isnan()) and torch.equal(out.isinf(), wanted.isinf())
    torch.testing.assert_close(out, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert out.isnan().any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [["x"], ["y"], ["weight"], ["bias"], ["a"], ["b"], ["a", "b"], ["x", "b"]], ids=str)
@pytest.mark.parametrize("save", [False, True])
def test_only_the_gradients_that_are_asked(wanted: list[str], mode: str, save: bool) -> None:
    t, spec = case("sample", "sample", mode, save=save)
    wanted = [name for name in wanted if getattr(t, name) is not None]
    if not wanted:
        return
    t = cast(t, torch.float32)
    leaves = [getattr(t, name).requires_grad_() for name in wanted]
    seed = torch.randn(t.x.shape, device=DEVICE)
    ours, theirs = (torch.autograd.grad(op(t, spec), leaves, seed) for op in (fused, unfused))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_the_linear_result_is_kept_for_the_gradient_of_its_coefficient_only() -> None:
    def saved(needs: str, save: bool) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        t, spec = case(save=save)
        t = cast(t, torch.float32)
        for name in needs.split():
            getattr(t, name).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
            fused(t, spec)
        return shapes

    full, inner = (2, 9, 32), (2, 9, 48)
    assert full not in saved("x", True) and inner not in saved("x", True)
    assert full in saved("b", True) and inner in saved("b", True)  # y: for a gradient of the gradient
    assert full not in saved("b", False) and inner in saved("b", False)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3)])
def test_empty_inputs_give_empty_results_and_zero_gradients(batch: int, length: int) -> None:
    t, spec = case(batch=batch, length=length)
    t = cast(t, torch.float32, grad=True)
    out = fused(t, spec)
    out.sum().backward()
    assert out.shape == t.x.shape and torch.equal(t.weight.grad, torch.zeros_like(t.weight))


@pytest.mark.skipif(DEVICE == "cuda" or _ops.INTERPRETED, reason="float64 is the reference's, the same everywhere")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("save", [False, True])
def test_gradcheck(mode: str, save: bool) -> None:
    t, spec = case("sample", "channel", mode, length=2, width=4, inner=3, beta=0.5, alpha=-2.0, save=save)
    t, spec = cast(t, torch.float64, grad=True), spec._replace(out_dtype=torch.float64)
    leaves = [x for x in t if x is not None]

    def of_leaves(*given: Tensor) -> Tensor:
        remaining = iter(given)
        return fused(Operands(*(None if x is None else next(remaining) for x in t)), spec)

    assert torch.autograd.gradcheck(of_leaves, leaves)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(mode: str, save: bool) -> None:
    t, spec = case("sample", "channel", mode, save=save)
    torch.library.opcheck(linear_skip, (*cast(t, HALF, torch.float32, grad=True), *spec._replace(out_dtype=HALF)))


def test_compiled_with_dynamic_shapes_forward_and_backward() -> None:
    torch._dynamo.reset()

    def model(y: Tensor, weight: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_skip(y, weight, None, x, a, b, 1.0, 0.5, "sum", True, torch.float32)[0].relu()

    compiled = torch.compile(
        model, dynamic=True, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor"
    )
    for batch, length in ((2, 9), (3, 17)):
        t, _ = case(batch=batch, length=length, bias=False)
        t = cast(t, torch.float32, grad=True)
        given = (t.y, t.weight, t.x, t.a, t.b)
        ours, theirs = (torch.autograd.grad(f(*given).square().sum(), given) for f in (compiled, model))
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_tiles_are_chosen_so_that_every_multiprocessor_gets_one() -> None:
    for rows, columns in ((512, 256), (1024, 512), (4096, 512), (8192, 768), (32768, 768), (8, 16)):
        found = config(rows, columns, torch.bfloat16)
        tiles = -(-rows // found.block_m) * -(-columns // found.block_n)
        assert tiles >= 120 or found == CONFIGS[-1]
    assert config(32768, 768, torch.bfloat16) == CONFIGS[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(32)}, r"x.shape is \(32,\); allowed: \[B, S, N\] or \[S, N\]"),
        ({"weight": torch.ones(48, 32)}, r"weight.shape is \(48, 32\); allowed: \[32, K\]"),
        ({"y": torch.ones(2, 8, 48)}, r"y.shape is \(2, 8, 48\); allowed: 18 rows of 48"),
        ({"bias": torch.ones(1, 32)}, r"bias.shape is \(1, 32\); allowed: \[32\]"),
        ({"weight": torch.ones(32, 48).half()}, r"weight.dtype is torch.float16; allowed: y's, torch.float32"),
        ({"a": torch.ones(9)}, r"a.shape is \(9,\); allowed: what broadcasts to x's \(2, 9, 32\)"),
        ({"b": torch.ones(2, 1, 1, 1)}, r"b.shape is .*; allowed: what broadcasts to x's \(2, 9, 32\)"),
        ({"b": torch.ones(1, dtype=torch.int64)}, "b.dtype is torch.int64; allowed: floating-point types"),
        ({"mode": "difference"}, "mode is 'difference'; allowed: sum, lerp, lerp_back, step, step_back"),
        ({"mode": "lerp"}, "a or alpha is given; allowed: None and 1 but for the mode sum"),
    ],
)
def test_errors_name_argument_value_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    t, spec = case()
    given = {**cast(t, torch.float32)._asdict(), **spec._asdict()}
    change = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        linear_skip(*(given | change).values())


def test_supports_says_why_not() -> None:
    t, spec = case()
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        assert supports(t, spec) == "Triton has no backend for device 'cpu'"
        with FakeTensorMode():
            t = Operands(*(torch.empty(x.shape, device="cuda:0") for x in t))
    else:
        t = cast(t, torch.float32)
    assert supports(t, spec) is None
    assert "y.dtype is torch.float64" in supports(t._replace(y=t.y.double()), spec)
    assert "out_dtype is torch.float64" in supports(t, spec._replace(out_dtype=torch.float64))
    assert "multiples of 16" in supports(t._replace(weight=t.weight[:, :40]), spec)
    assert "x.stride(-1) is 32" in supports(t._replace(x=t.x.transpose(1, 2)), spec)


def test_reference_takes_the_ops_arguments_and_is_differentiable() -> None:
    t, spec = case(bias=False)
    t = cast(t, torch.float32, grad=True)
    for x, y in zip(reference(*t, *spec), linear_skip(*t, *spec), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert reference(*t, *spec)[0].requires_grad


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernel_in_the_interpreter() -> None:
    """The kernel's arithmetic on a machine without a GPU: this file again, in a process that interprets it."""
    passes_in_interpreter(__file__, select="not gradcheck and not compiled and not opcheck")


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_gradients_know_what_a_kept_product_was_made_of(mode: str, save: bool) -> None:
    t, spec = case("none", "sample", mode, save=save)
    spec = spec._replace(out_dtype=torch.float64)

    def twice(op: Any) -> list[Tensor]:
        fresh = cast(t, torch.float64, grad=True)
        first = torch.autograd.grad(op(*fresh, *spec)[0].square().sum(), (fresh.y, fresh.b), create_graph=True)
        leaves = (fresh.y, fresh.weight, fresh.bias, fresh.x, fresh.b)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))

    for found, wanted in zip(twice(linear_skip), twice(reference), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_launch_that_another_thread_forgets_is_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgotten(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            pass

    monkeypatch.setattr(_linear_skip_hopper, "_launches", Forgotten())
    monkeypatch.setattr(_linear_skip_hopper, "_first", lambda *args: object())
    t, spec = case()
    assert _linear_skip_hopper.launch(t, spec, torch.empty_like(t.x), None)
