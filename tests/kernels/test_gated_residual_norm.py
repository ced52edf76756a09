"""gated_residual_norm against float64: the reference (CPU), the interpreted kernels and, where there is one, a GPU.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernels; test_kernels_in_the_interpreter does so.
"""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_interpreter import passes_in_interpreter
from poisoning import poison_new_tensors

from torch_fuse.kernels import _ops
from torch_fuse.kernels import gated_residual_norm_backward as backward_module
from torch_fuse.kernels._gated_residual_norm_common import Operands, Spec
from torch_fuse.kernels._gated_residual_norm_tile import Config, parts
from torch_fuse.kernels.gated_residual_norm import gated_residual_norm, reference, supports

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
HALF = torch.float16 if _ops.INTERPRETED else torch.bfloat16  # the interpreter truncates to bfloat16
ATOL = {torch.float32: 3e-6, torch.float16: 2e-5, torch.bfloat16: 2e-5}
EPS = 1e-5
GATES = (None, "channel", "sample", "token", "row", "number", "position")
FACTORS = (None, "channel", "sample", "token", "position")


def shape_of(kind: str, batch: int, length: int, width: int) -> tuple[int, int, int]:
    return {
        "channel": (1, 1, width), "sample": (batch, 1, width), "token": (batch, length, width),
        "row": (batch, length, 1), "number": (1, 1, 1), "position": (1, length, width),
    }[kind]  # fmt: skip


@dataclass
class Case:
    """One call: the tensors in float64 and the options; dtypes are those of the model's tensors and of its factors."""

    tensors: Operands
    norm: str = "layer"
    alphas: tuple[float, float] = (1.0, 1.0)
    offset: float = 0.0
    outputs: int = 1
    write_r: bool = True
    factors: torch.dtype | None = None  # of gates, scale and shift; None: the model's
    out: torch.dtype | None = None
    layouts: dict[str, str] = field(default_factory=dict)

    def spec(self, dtype: torch.dtype) -> Spec:
        out = torch.float64 if dtype == torch.float64 else self.out or dtype
        write = self.write_r and self.tensors.y1 is not None
        return Spec(list(self.alphas), self.norm, EPS, self.offset, self.outputs, dtype, out, write)

    def cast(self, dtype: torch.dtype, grad: bool = False) -> Operands:
        found = {}
        for name, x in self.tensors._asdict().items():
            if x is None:
                found[name] = None
                continue
            own = self.factors if name.startswith(("gate", "scale", "shift")) and self.factors else dtype
            x = x.to(DEVICE, torch.float64 if dtype == torch.float64 else own)
            found[name] = laid_out(x, self.layouts.get(name, "")).requires_grad_(grad)
        return Operands(**found)

    def rounded(self, dtype: torch.dtype) -> "Case":
        exact = Operands(*(None if x is None else x.double().cpu() for x in self.cast(dtype)))
        return Case(exact, self.norm, self.alphas, self.offset, self.outputs, self.write_r, self.factors, self.out,
                    self.layouts)  # fmt: skip


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides, as a leaf."""
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "slice":
        x = torch.cat((x, torch.full_like(x, float("nan"))), -1)[..., : x.shape[-1]]
    elif layout == "strided":
        x = torch.stack((x, x), -1)[..., 0]
    return x.detach()


def case(terms=1, gates=(None, None), affine=("weight", "bias"), scale=None, shift=None, batch=2, length=3, width=24,
         seed=0, **options) -> Case:  # fmt: skip
    torch.manual_seed(seed)
    outputs = options.get("outputs", 1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    def factor(kind: str | None) -> torch.Tensor | None:
        return None if kind is None else draw(*shape_of(kind, batch, length, width))

    x = draw(batch, length, width)
    y = [draw(batch, length, width) if i < terms else None for i in range(2)]
    g = [factor(kind) if i < terms else None for i, kind in enumerate(gates)]
    vectors = [draw(width) if "weight" in affine else None, draw(width) if "bias" in affine else None]
    second = [None if v is None or outputs == 1 else draw(width) for v in vectors]
    return Case(Operands(x, *y, *g, *vectors, *second, factor(scale), factor(shift)), **options)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    outputs = draw(st.integers(1, 2))
    layouts = st.sampled_from(("", "", "transposed", "slice", "strided"))
    return case(
        draw(st.integers(0, 2)), (draw(st.sampled_from(GATES)), draw(st.sampled_from(GATES))),
        draw(st.sampled_from(((), ("weight",), ("weight", "bias"), ("bias",)))),
        draw(st.sampled_from(FACTORS)) if outputs == 1 else None,
        draw(st.sampled_from(FACTORS)) if outputs == 1 else None,
        draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.sampled_from((8, 16, 24, 40, 7, 136))),
        draw(st.integers(0, 2**31)), norm=draw(st.sampled_from(("layer", "rms"))),
        alphas=(draw(st.sampled_from((1.0, -1.0, 2.5))), draw(st.sampled_from((1.0, 0.5)))),
        offset=draw(st.sampled_from((0.0, 1.0))), outputs=outputs, write_r=draw(st.booleans()),
        factors=draw(st.sampled_from((None, torch.float32))), out=draw(st.sampled_from((None, torch.float32))),
        layouts={name: draw(layouts) for name in ("x", "y1", "y2", "gate1", "scale", "shift")},
    )  # fmt: skip


def unfused(t: Operands, spec: Spec) -> tuple[torch.Tensor, ...]:
    """As models spell it, in their dtypes: the sum rounds after each term, the norm computes in fp32."""
    r = t.x
    for y, gate, alpha in ((t.y1, t.gate1, spec.alphas[0]), (t.y2, t.gate2, spec.alphas[1])):
        if y is not None:
            r = (r + (y if gate is None else y * gate) * alpha).to(spec.r_dtype)
    wide = r.to(torch.promote_types(r.dtype, torch.float32))
    if spec.norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    x_hat = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + spec.eps)).to(r.dtype)
    out = []
    for weight, bias in ((t.weight1, t.bias1), (t.weight2, t.bias2))[: spec.outputs]:
        h = x_hat if weight is None else x_hat * (weight + spec.weight_offset)
        h = h if bias is None else h + bias
        h = h if t.scale is None else h * (1 + t.scale)
        out.append((h if t.shift is None else h + t.shift).to(spec.out_dtype))
    return (r, *out) if spec.write_r else tuple(out)


def fused(t: Operands, spec: Spec) -> tuple[torch.Tensor, ...]:
    r, *outs = gated_residual_norm(*t, *spec)
    return (r, *outs[: spec.outputs]) if spec.write_r else tuple(outs[: spec.outputs])


def run(op, some: Case, dtype: torch.dtype, gradients: list) -> list[torch.Tensor]:
    """Results of `op` in `dtype` and the gradients of its inputs, in float64 on the CPU."""
    t, spec = some.cast(dtype, grad=True), some.spec(dtype)
    outputs = op(t, spec)
    grads = [g.to(DEVICE, out.dtype) for g, out in zip(gradients, outputs, strict=True)]
    found = torch.autograd.grad(outputs, [x for x in t if x is not None], grads)
    return [x.detach().double().cpu() for x in (*outputs, *found)]


def assert_no_worse(some: Case, dtype: torch.dtype) -> None:
    rounded = some.rounded(dtype)
    count = some.outputs + some.spec(dtype).write_r
    gradients = [torch.randn(some.tensors.x.shape).to(dtype).double() for _ in range(count)]
    exact = run(unfused, rounded, torch.float64, gradients)
    ours, theirs = (run(f, rounded, dtype, gradients) for f in (fused, unfused))
    for i, (ref, mine, other) in enumerate(zip(exact, ours, theirs, strict=True)):
        assert mine.shape == ref.shape
        for error in (lambda x: (x - ref).abs().max(), lambda x: (x - ref).pow(2).mean().sqrt()):  # noqa: B023
            assert error(mine) <= 2 * error(other) + ATOL[dtype] * (1 + ref.abs().max()), i


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and partial sums start as NaN: an element nobody writes shows."""
    if _ops.INTERPRETED or DEVICE == "cuda":
        poison_new_tensors(monkeypatch)


@settings(max_examples=25 if _ops.INTERPRETED else 80, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(cases(), st.sampled_from((torch.float32, HALF)))
def test_error_is_at_most_twice_the_unfused_spellings(some: Case, dtype: torch.dtype) -> None:
    assert_no_worse(some, dtype)


@pytest.mark.parametrize("gate", GATES)
def test_every_broadcast_of_gate_scale_and_shift(gate: str | None) -> None:
    factor = {None: "sample", "row": "channel", "number": "token"}.get(gate, gate)
    assert_no_worse(case(2, (gate, None), (), factor, factor), torch.float32)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_two_norms_of_one_sum(norm: str) -> None:
    assert_no_worse(case(2, outputs=2, norm=norm, length=5), torch.float32)
    assert_no_worse(case(2, outputs=2, norm=norm, length=5), HALF)


@pytest.mark.parametrize(("width", "split"), [(16, True), (24, False), (24, True), (40, True), (56, True)])
def test_rows_in_two_parts_and_several_rows_a_program(width: int, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gated_residual_norm", "gated_residual_norm_backward"):
        monkeypatch.setattr(f"torch_fuse.kernels.{module}.config", lambda w: Config(1, split))
    monkeypatch.setattr(backward_module, "PROGRAMS", 4)
    assert_no_worse(case(2, ("sample", "row"), scale="sample", shift="sample", length=5, width=width), torch.float32)


def test_a_row_is_cut_into_the_powers_of_two_that_hold_it() -> None:
    for width, expected in ((2560, (2048, 512)), (4096, (4096, 0)), (1536, (1024, 512)), (768, (512, 256)),
                            (5120, (4096, 1024)), (3584, (4096, 0)), (1152, (1024, 128)), (8, (8, 0))):  # fmt: skip
        found = parts(width, True)
        assert (found["MAIN"], found["REST"]) == expected
        assert (found["MASK_MAIN"] or found["MASK_REST"]) == (sum(expected) != width)
    assert parts(2560, False)["MAIN"] == 4096 and parts(2560, False)["REST"] == 0


def test_the_norm_reads_the_rounded_sum() -> None:
    x, y = torch.full((1, 1, 8), 256.0), torch.zeros(1, 1, 8)
    y[..., 0], y[..., 1] = 0.4, 1.1  # bfloat16 has 256 and 258 only
    t = Operands(*[v.to(DEVICE, torch.bfloat16) for v in (x, y)], *[None] * 9)
    spec = Spec([1.0, 1.0], "layer", 1e-5, 0.0, 1, torch.bfloat16, torch.float32, True)
    r, out, _ = gated_residual_norm(*t, *spec)
    again, _ = torch.ops.aten.native_layer_norm(r.float(), [8], None, None, 1e-5)[:2]
    torch.testing.assert_close(out, again)
    if not _ops.INTERPRETED:
        assert r.flatten().tolist() == [256.0, 258.0] + [256.0] * 6


def test_results_are_contiguous_and_what_is_not_asked_is_empty() -> None:
    some = case(1, layouts={"x": "transposed"}, write_r=False)
    r, out1, out2 = gated_residual_norm(*some.cast(torch.bfloat16), *some.spec(torch.bfloat16))
    assert (r.numel(), out2.numel(), out1.is_contiguous(), out1.dtype) == (0, 0, True, torch.bfloat16)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3)])
def test_empty_inputs_give_empty_results_and_gradients(batch: int, length: int) -> None:
    empty = case(1, ("sample", None), scale="sample", shift="sample", batch=batch, length=length)
    t = empty.cast(torch.float32, grad=True)
    r, out = fused(t, empty.spec(torch.float32))
    (r.sum() + out.sum()).backward()
    assert out.shape == t.x.shape and t.x.grad.shape == t.x.shape
    assert torch.equal(t.weight1.grad, torch.zeros_like(t.weight1)) and t.gate1.grad.shape == t.gate1.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_come_out_where_the_unfused_spelling_has_them(value: float) -> None:
    bad = case(2)
    bad.tensors.x[0, 1, 2] = value
    bad.tensors.y2[1, 0, -1] = value
    t, spec = bad.cast(torch.float32), bad.spec(torch.float32)
    for x, y in zip(fused(t, spec), unfused(t, spec), strict=True):
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())


@pytest.mark.parametrize("wanted", [["x"], ["y1"], ["gate1"], ["weight1"], ["scale", "shift"], ["bias1", "y2"]])
def test_only_the_gradients_that_are_asked(wanted: list[str]) -> None:
    some = case(2, ("sample", None), scale="sample", shift="token")
    t, spec = some.cast(torch.float32), some.spec(torch.float32)
    leaves = [getattr(t, name).requires_grad_() for name in wanted]
    seeds = [torch.randn(t.x.shape, device=DEVICE) for _ in range(2)]
    used = slice(0 if {"x", "y1", "y2", "gate1"} & {*wanted} else 1, 2)  # the sum has no gradient of a weight
    ours, theirs = (torch.autograd.grad(op(t, spec)[used], leaves, seeds[used]) for op in (fused, unfused))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_results_that_nothing_used_have_no_gradient(used: tuple[int, ...]) -> None:
    some = case(2, outputs=2)
    grads = []
    for op in (fused, unfused):
        t = some.cast(torch.float32, grad=True)
        outputs = op(t, some.spec(torch.float32))
        sum((outputs[i] * (i + 1)).square().sum() for i in used).backward()
        grads.append([torch.zeros_like(x) if x.grad is None else x.grad for x in t if x is not None])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)


def test_gradients_of_any_layout() -> None:
    some = case(1)
    t, spec = some.cast(torch.float32, grad=True), some.spec(torch.float32)
    leaves = [x for x in t if x is not None]
    expanded = torch.tensor(2.0, device=DEVICE).expand(t.x.shape)
    transposed = torch.randn(t.x.shape[::-1], device=DEVICE).permute(2, 1, 0)
    ours, theirs = (torch.autograd.grad(op(t, spec), leaves, [expanded, transposed]) for op in (fused, unfused))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_gradients_have_the_same_bits_in_each_run() -> None:
    some = case(2, ("sample", "row"), scale="sample", shift="sample", length=5)
    first, second = (run(fused, some, HALF, [torch.ones(2, 5, 24)] * 2) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_terms_are_kept_for_the_gradients_of_gates_only() -> None:
    for gate, expected in ((None, 1), ("sample", 2)):
        saved: list = []
        some = case(1, (gate, None))
        t = some.cast(torch.float32, grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):  # noqa: B023
            fused(t, some.spec(torch.float32))
        assert sum(shape == t.x.shape for shape in saved) == expected


@pytest.mark.skipif(DEVICE == "cuda" or _ops.INTERPRETED, reason="float64 is the reference's, the same everywhere")
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_gradcheck(norm: str, outputs: int) -> None:
    factor = "sample" if outputs == 1 else None
    some = case(2, ("row", "sample"), scale=factor, shift=factor, width=6, length=2, norm=norm, outputs=outputs,
                alphas=(1.0, -0.5), offset=1.0)  # fmt: skip
    t, spec = some.cast(torch.float64, grad=True), some.spec(torch.float64)
    leaves = [x for x in t if x is not None]

    def of_leaves(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        remaining = iter(given)
        return fused(Operands(*(None if x is None else next(remaining) for x in t)), spec)

    assert torch.autograd.gradcheck(of_leaves, leaves)


@pytest.mark.parametrize(
    "options",
    [
        {"terms": 2, "outputs": 2}, {"terms": 0, "scale": "sample", "shift": "token"},
        {"terms": 1, "gates": ("sample", None), "scale": "sample", "shift": "sample", "affine": ()},
        {"terms": 2, "gates": ("row", "position"), "write_r": False, "factors": torch.float32},
    ],
    ids=["two norms", "no terms", "adaLN", "unwritten sum"],
)  # fmt: skip
def test_opcheck(options: dict) -> None:
    some = case(**options)
    torch.library.opcheck(gated_residual_norm, (*some.cast(HALF, grad=True), *some.spec(HALF)))
    t, spec = some.cast(HALF), some.spec(HALF)
    grads = [torch.randn(t.x.shape, device=DEVICE, dtype=HALF) for _ in range(3)]
    wanted = [x is not None for x in t]
    torch.library.opcheck(
        backward_module.gated_residual_norm_backward,
        (grads[0], grads[1], grads[2] if spec.outputs == 2 else None, t.x, t.y1, t.y2, t.gate1, t.gate2, t.weight1,
         t.bias1, t.weight2, t.scale, spec.alphas, spec.norm, spec.eps, spec.weight_offset, HALF, HALF, torch.float32,
         wanted, None if t.shift is None else list(t.shift.shape)),
    )  # fmt: skip


def test_compiled_with_dynamic_shapes_forward_and_backward() -> None:
    torch._dynamo.reset()

    def model(x, y, gate, weight, scale):
        r, out, _ = torch.ops.torch_fuse.gated_residual_norm(
            x * 2, y, None, gate, None, weight, None, None, None, scale, None, [1.0, 1.0], "layer", 1e-5, 0.0, 1,
            torch.float32, torch.float32, True,
        )  # fmt: skip
        return r + out.sin()

    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    for batch, length in ((2, 5), (3, 9)):
        shapes = ((batch, length, 32), (batch, length, 32), (batch, 1, 32), (32,), (batch, 1, 32))
        inputs = [torch.randn(*s, device=DEVICE) for s in shapes]
        grads = []
        for f in (model, compiled):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = f(*leaves)
            grads.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "norm is 'batch'; allowed: layer, rms"),
        ({"x": torch.ones(3, 24)}, r"x.shape is \(3, 24\); allowed: three dimensions"),
        ({"y1": torch.ones(2, 3, 8)}, r"y1.shape is \(2, 3, 8\); allowed: x's, \(2, 3, 24\)"),
        ({"y1": None}, "gate1 is given; allowed: None without y1"),
        ({"gate1": torch.ones(2, 2, 24)}, r"gate1.shape is \(2, 2, 24\); allowed: \[1 or 2, 1 or 3, 24 or 1\]"),
        ({"scale": torch.ones(2, 1, 1)}, r"scale.shape is \(2, 1, 1\); allowed: \[1 or 2, 1 or 3, 24\]"),
        ({"weight1": torch.ones(5)}, r"weight1.shape is \(5,\); allowed: \[24\]"),
        ({"bias2": torch.ones(24)}, "weight2 or bias2 is given; allowed: None when outputs is 1"),
        ({"outputs": 3}, "outputs is 3; allowed: 1, 2"),
        ({"outputs": 2}, "outputs is 2; allowed: 1 with scale or shift"),
        ({"alphas": [1.0]}, r"alphas is \[1.0\]; allowed: two numbers, one a term"),
        ({"y1": torch.ones(2, 3, 24, dtype=torch.int32)}, "y1.dtype is torch.int32; allowed: fp32, bf16, fp16 or fp64"),
    ],
)
def test_errors_name_argument_value_and_what_is_allowed(change: dict, message: str) -> None:
    good = case(1, ("sample", None), scale="sample")
    given = {**good.cast(torch.float32)._asdict(), **good.spec(torch.float32)._asdict()}
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        gated_residual_norm(*(given | change).values())


def test_supports_says_why_not() -> None:
    some = case(1)
    t, spec = some.cast(HALF), some.spec(HALF)
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        assert supports(t, spec) == "Triton has no backend for device 'cpu'"
        return
    assert supports(t, spec) is None
    assert "C is 12" in supports(case(1, width=12).cast(HALF), spec)
    assert "y1.stride(-1) is 2" in supports(case(1, layouts={"y1": "strided"}).cast(HALF), spec)
    assert "x.dtype is torch.float64" in supports(some.cast(torch.float64), spec)


def test_reference_takes_the_ops_arguments_and_is_differentiable() -> None:
    some = case(2, outputs=2)
    t, spec = some.cast(torch.float64, grad=True), some.spec(torch.float64)
    for x, y in zip(reference(*t, *spec), gated_residual_norm(*t, *spec), strict=True):
        torch.testing.assert_close(x, y)
        assert x.requires_grad


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The kernels' arithmetic on a machine without a GPU: this file again, in a process that interprets them."""
    passes_in_interpreter(__file__, select="not gradcheck and not compiled and not opcheck")
