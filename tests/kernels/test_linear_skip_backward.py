"""linear_skip's gradient in one pass, against float64 and against the same gradient taken apart.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernel; test_kernel_in_the_interpreter does so.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_interpreter import passes_in_interpreter
from test_linear_skip import DEVICE, HALF, assert_no_worse, case, cast, fused, unfused
from torch import Tensor

from torch_fuse.kernels import _ops
from torch_fuse.kernels._linear_skip_common import MODES, Operands, Spec
from torch_fuse.kernels.linear_skip import linear_skip
from torch_fuse.kernels.linear_skip_backward import linear_skip_backward, parts_of, tiles

module = importlib.import_module("torch_fuse.kernels.linear_skip_backward")
FUNCTIONS = {"a_of": "rdiv:0.25 add:0.25 square x", "b_of": "div mul:0.5 x sqrt add:0.25 square x"}


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The one pass for few rows, too, and its calls; memory that nobody writes to is NaN."""
    monkeypatch.setattr(module, "MIN_LENGTH", 1)
    monkeypatch.setattr(module, "CONFIG", module.Config(8, 4, 6))
    calls: list[tuple[Any, ...]] = []
    op, new_empty = module.linear_skip_backward, torch.Tensor.new_empty

    def counted(*given: Any) -> Any:
        calls.append(given)
        return op(*given)

    def poison(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        fake = isinstance(out, torch._subclasses.FakeTensor | torch._subclasses.functional_tensor.FunctionalTensor)
        return out if fake or not out.is_floating_point() else out.fill_(float("nan"))

    monkeypatch.setattr(module, "linear_skip_backward", counted)
    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    return calls


def gradients(t: Operands, spec: Spec, names: list[str], seed: Tensor) -> list[Tensor]:
    fresh = Operands(*(None if x is None else x.detach().clone() for x in t))
    leaves = [getattr(fresh, name).requires_grad_() for name in names]
    return list(torch.autograd.grad(fused(fresh, spec), leaves, seed))


def named(t: Operands) -> list[str]:
    return [name for name, x in t._asdict().items() if x is not None]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["none", "number", "sample", "channel", "channels"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gradients_of_every_broadcast_are_no_worse_than_unfused(
    kind: str, mode: str, dtype: torch.dtype, passes: list[Any]
) -> None:
    t, spec = case(kind, kind, mode, alpha=-0.5, beta=0.25, length=21, width=144, inner=16)
    assert_no_worse(t, spec._replace(one_pass=True), dtype, torch.float32)
    assert passes


@pytest.mark.parametrize("kinds", [("token", "sample"), ("sample", "token"), ("full", "full"), ("sample", "full")])
def test_what_has_a_number_for_each_row_is_taken_apart(kinds: tuple[str, str], passes: list[Any]) -> None:
    t, spec = case(*kinds)
    assert_no_worse(t, spec._replace(one_pass=True), torch.float32)
    assert not passes


@pytest.mark.parametrize("kind", ["token", "full", "channels"])
@pytest.mark.parametrize("mode", ["sum", "step_back"])
def test_such_a_coefficient_without_a_gradient_is_read_in_the_pass(kind: str, mode: str, passes: list[Any]) -> None:
    t, spec = case("sample", kind, mode, beta=0.5, width=32)
    spec = spec._replace(b_of=FUNCTIONS["b_of"])
    t, seed = cast(t, torch.float32), torch.randn(t.x.shape, device=DEVICE)
    names = [name for name in named(t) if name != "b"]
    apart, found = (gradients(t, spec._replace(one_pass=one), names, seed) for one in (False, True))
    assert len(passes) == 1
    torch.testing.assert_close(found, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(
    "wanted", [["y"], ["y", "bias"], ["weight", "a"], ["y", "b"], ["x", "a", "b"], ["y", "a", "b"]]
)
def test_only_the_gradients_that_are_asked(mode: str, save: bool, wanted: list[str], passes: list[Any]) -> None:
    t, spec = case("sample", "sample", mode, save=save, beta=0.5)
    t = cast(t, torch.float32)
    wanted = [name for name in wanted if getattr(t, name) is not None]
    seed = torch.randn(t.x.shape, device=DEVICE)
    apart, found = (gradients(t, spec._replace(one_pass=one), wanted, seed) for one in (False, True))
    torch.testing.assert_close(found, apart, rtol=1e-5, atol=1e-5)
    assert len(passes) == (len(wanted) > 1 and ("y" in wanted or "weight" in wanted))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["sample", "channel", "channels"])
def test_functions_of_the_coefficients(kind: str, mode: str, passes: list[Any]) -> None:
    t, spec = case(kind, kind, mode, beta=0.25)
    spec = spec._replace(one_pass=True, **FUNCTIONS)
    given = cast(t, torch.float32, grad=True)
    a = None if given.a is None else 0.25 / (given.a**2 + 0.25)
    plain = given._replace(a=a, b=0.5 * given.b / (given.b**2 + 0.25).sqrt())
    seed = torch.randn(t.x.shape, device=DEVICE)
    leaves = [x for x in given if x is not None]
    ours, theirs = (torch.autograd.grad(out, leaves, seed) for out in (fused(given, spec), unfused(plain, spec)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(passes) == 1


def test_one_time_for_both_coefficients_as_a_model_has_it() -> None:
    t, spec = case("sample", "sample", batch=3, length=40)
    time = torch.rand(3, 1, 1, device=DEVICE)

    def into_time(one_pass: bool | None) -> Tensor:
        leaf, given = time.clone().requires_grad_(), cast(t, torch.float32, grad=True)
        if one_pass is None:
            a, b = 0.25 / (leaf**2 + 0.25), 0.5 * leaf / (leaf**2 + 0.25).sqrt()
            out = unfused(given._replace(a=a, b=b), spec)
        else:
            out = fused(given._replace(a=leaf, b=leaf), spec._replace(one_pass=one_pass, **FUNCTIONS))
        return torch.autograd.grad((out * out).sum() + out.sum(), leaf)[0]  # the result is used twice

    exact = into_time(None)
    torch.testing.assert_close(into_time(True), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(into_time(False), exact, rtol=1e-4, atol=1e-4)


OTHERS = ("div neg sin x add cos x sin x", "tanh x", "sigmoid x", "rsqrt add:1.0 exp x", "rsub:1.0 mul:0.1 x",
          "mul reciprocal x sub x square x")  # fmt: skip


@pytest.mark.parametrize("program", [*FUNCTIONS.values(), *OTHERS])
def test_the_kernel_computes_the_functions(program: str) -> None:
    t = torch.rand(2, 1, 1, device=DEVICE) + 0.05
    grad = torch.ones(2, 9, 16, device=DEVICE)
    scaled = linear_skip_backward(grad, None, None, t, 1.0, "sum", program, torch.float32, False, "none", "none", 1)[0]
    wanted = module.evaluate(program, t.double()).float().expand(grad.shape)
    torch.testing.assert_close(scaled, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "a part", "rank 2", "x in another type"])
def test_gradients_of_any_layout(layout: str, passes: list[Any]) -> None:
    t, spec = case("sample", "channel", batch=2, length=19)
    t, seed = cast(t, torch.float32), torch.randn(2, 19, 64, device=DEVICE)
    if layout == "rank 2":
        t = Operands(t.y[0], t.weight, t.bias, t.x[0], t.a[0], t.b)
    if layout == "x in another type":
        t = t._replace(x=t.x.half())
    seed = {"expanded": seed[0, 0, 0].expand(2, 19, 32), "transposed": seed[..., :32].transpose(0, 1).contiguous()
            .transpose(0, 1), "a part": seed[..., ::2]}.get(layout, seed[..., :32])  # fmt: skip
    seed = seed[0] if layout == "rank 2" else seed
    apart, found = (gradients(t, spec._replace(one_pass=one), named(t), seed) for one in (False, True))
    torch.testing.assert_close(found, apart, rtol=1e-5, atol=1e-5)
    assert len(passes) == 1


@pytest.mark.parametrize("wide", ["x", "y weight bias", "b"])
def test_float64_is_taken_apart(wide: str, passes: list[Any]) -> None:
    t, spec = case("sample", "sample")
    t = cast(t, torch.float32)
    t = t._replace(**{name: getattr(t, name).double() for name in wide.split()})
    gradients(t, spec._replace(one_pass=True), ["y", "bias"], torch.ones(t.x.shape, device=DEVICE))
    assert not passes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_where_they_are_taken_apart(value: float, mode: str, passes: list[Any]) -> None:
    t, spec = case("sample", "sample", mode, batch=3, length=21)
    t = cast(t, torch.float32)
    seed = torch.rand(t.x.shape, device=DEVICE) + 0.5
    seed[0, 3, 5] = value
    t.x[1, 2, 7] = value
    t.b[2] = value
    apart, found = (gradients(t, spec._replace(one_pass=one), named(t), seed) for one in (False, True))
    assert len(passes) == 1
    for x, y in zip(found, apart, strict=True):
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isposinf(), y.isposinf())
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_the_same_bits_in_each_run() -> None:
    t, spec = case("sample", "channel", length=70)
    t, seed = cast(t, torch.float32), torch.randn(t.x.shape, device=DEVICE)
    first, second = (gradients(t, spec._replace(one_pass=True), named(t), seed) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_gradient_of_the_gradient_is_taken_apart_and_that_of_the_pass_refused(passes: list[Any]) -> None:
    t, spec = case("sample", "sample")

    def twice(one_pass: bool) -> list[Tensor]:
        fresh = cast(t, torch.float32, grad=True)
        out = fused(fresh, spec._replace(one_pass=one_pass))
        first = torch.autograd.grad(out.square().sum(), (fresh.y, fresh.b), create_graph=True)
        assert not passes
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), list(fresh)))

    apart = twice(False)
    torch.testing.assert_close(twice(True), apart)
    grad = torch.ones(1, 9, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(NotImplementedError, match="linear_skip_backward has no gradient"):
        linear_skip_backward(grad, None, None, None, 2.0, "sum", "x", torch.float32, True, "none", "none", 1)


@pytest.mark.skipif(_ops.INTERPRETED, reason="compiled")
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", True), ("inductor", False)])
def test_compiled(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def model(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return linear_skip(y, weight, bias, x, t, t, 1.0, 0.5, "sum", True, torch.float32, *FUNCTIONS.values(), True)[0]

    compiled = torch.compile(model, dynamic=dynamic, fullgraph=True, backend=backend)
    for batch, length in ((2, 9), (3, 17)) if dynamic else ((2, 9),):
        t = cast(case(batch=batch, length=length)[0], torch.float32, grad=True)
        given = (t.y, t.weight, t.bias, t.x, t.a)
        ours, theirs = (torch.autograd.grad(f(*given).relu().square().sum(), given) for f in (compiled, model))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    t, _ = case("sample", "sample")
    t = cast(t, torch.float32)
    linear = F.linear(t.y, t.weight)
    for a_sums, b_sums in (("all", "lanes"), ("none", "all")):
        given = (t.x, t.x + 1, linear, t.b, 0.5, "lerp", "x", HALF, True, a_sums, b_sums, 2)
        torch.library.opcheck(linear_skip_backward, given, test_utils=("test_schema", "test_faketensor"))


def test_programs_fill_the_gpu_and_share_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for batch, length, width in ((8, 512, 512), (16, 2048, 768), (4, 128, 256), (1, 32760, 1536), (4096, 64, 128)):
        parts = parts_of(batch, length, width)
        programs = batch * parts * tiles(width)
        assert programs <= 528 or parts == 1
        assert programs >= 264 or -(-length // parts) <= module.CONFIG.block_m


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernel_in_the_interpreter() -> None:
    passes_in_interpreter(__file__, select="not opcheck and not asked and not float32 and not gradient_of_the_gradient")
