"""qk_norm_rope against float64, in the reference (CPU), the interpreted kernel and, where there is one, on the GPU.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernels; test_kernels_in_the_interpreter does so.
"""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_interpreter import passes_in_interpreter
from poisoning import poison_new_tensors

from torch_fuse.kernels import _ops, qk_norm_rope_backward
from torch_fuse.kernels.qk_norm_rope import qk_norm_rope, reference, supports

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
NORMS = ("none", "rms_head", "rms_full", "layer_head")
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}
if _ops.INTERPRETED:
    del ATOL[torch.bfloat16]  # the interpreter truncates where the GPU rounds to nearest
LANES = {  # interleaved, cos_lanes, sin_lanes as functions of the number of pairs
    "half": (False, lambda p: (1, 0, p), lambda p: (1, 0, p)),
    "half, one table for both lanes": (False, lambda p: (1, 0, 0), lambda p: (1, 0, 0)),
    "interleaved": (True, lambda p: (2, 0, 1), lambda p: (2, 0, 1)),
    "interleaved, half-width tables": (True, lambda p: (1, 0, 0), lambda p: (1, 0, 0)),
    "wan": (True, lambda p: (2, 0, 0), lambda p: (2, 1, 1)),
    "half, every third": (False, lambda p: (3, 2, 1), lambda p: (3, 0, 2)),
}


@dataclass
class Case:
    """One call: tensors in float64 and the options; `cast` gives the op's arguments in a dtype."""

    tensors: list
    options: tuple

    def cast(self, dtype: torch.dtype, grad: bool = False) -> list:
        inputs = [None if x is None else x.to(DEVICE, dtype) for x in self.tensors]
        return [x if x is None or i > 3 else x.detach().requires_grad_(grad) for i, x in enumerate(inputs)]


def strided(*shape: int, axis: int | None = None, step: int = 1) -> torch.Tensor:
    """Random values whose axis `axis` is the innermost in memory, and every `step`th of it used."""
    axis = len(shape) - 1 if axis is None else axis
    order = [i for i in range(len(shape)) if i != axis] + [axis]
    x = torch.randn([shape[i] for i in order[:-1]] + [shape[axis] * step], dtype=torch.float64)[..., ::step]
    return x.permute(*[order.index(i) for i in range(len(shape))])


def case(norm="none", lanes="half", batch=2, length=3, heads=(4, 2), dim=16, rotary=8, weight=None, packed=True,
         axis=3, step=1, seed=0) -> Case:  # fmt: skip
    """Inputs; `packed` are views of one projection, else each has its own layout."""
    torch.manual_seed(seed)
    hq, hk = heads
    if packed:
        qkv = torch.randn(batch, length, (hq + 2 * hk) * dim, dtype=torch.float64)
        q, k = (x.unflatten(-1, (-1, dim)) for x in qkv.split((hq * dim, hk * dim, hk * dim), -1)[:2])
    else:
        q, k = (strided(batch, length, h, dim, axis=axis, step=step) for h in heads)
    interleaved, cos_lanes, sin_lanes = LANES[lanes]
    pairs = rotary // 2
    cos = sin = None
    if rotary:
        cos = strided(batch, length, 3 * pairs, axis=1 + axis % 2, step=step)
        sin = strided(1, length, 3 * pairs, axis=2, step=step)
    weights = [None if weight is None else torch.randn(dim * (1 if weight == "shared" else h)) for h in heads]
    weights = [None if w is None else w.double() for w in weights]
    options = (norm, 1e-5, 1.0, rotary, interleaved, list(cos_lanes(pairs)), list(sin_lanes(pairs)))
    return Case([q, k, *weights, cos, sin], options)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    norm = draw(st.sampled_from(NORMS))
    dim = draw(st.sampled_from((2, 7, 16, 20, 33)))
    return case(
        norm, draw(st.sampled_from(sorted(LANES))), draw(st.integers(1, 3)), draw(st.integers(1, 5)),
        draw(st.sampled_from(((1, 1), (3, 3), (4, 1), (6, 2), (12, 12)))), dim,
        2 * draw(st.integers(0, dim // 2)),
        draw(st.sampled_from((None, "shared", "per_head"))) if norm != "none" else None,
        draw(st.booleans()), draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2**31)),
    )  # fmt: skip


def unfused(q, k, q_weight, k_weight, cos, sin, norm, eps, offset, rotary, interleaved, cos_lanes, sin_lanes):
    """As models spell it: the norm in fp32 and rounded, then the rotation in the model's dtype."""

    def one(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        dtype = x.dtype
        if norm != "none":
            y = x.to(torch.promote_types(dtype, torch.float32))
            y = y.flatten(2) if norm == "rms_full" else y
            y = y - y.mean(-1, keepdim=True) if norm == "layer_head" else y
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
            x = y.to(dtype).view(x.shape)
        if weight is not None:
            x = (x.reshape(*x.shape[:2], -1, weight.numel()) * (weight + offset)).view(x.shape)
        if not rotary:
            return x
        rot, rest = x[..., :rotary], x[..., rotary:]
        x1, x2 = (rot[..., 0::2], rot[..., 1::2]) if interleaved else rot.chunk(2, -1)
        p = torch.arange(rotary // 2, device=x.device)
        c1, c2 = (cos[..., cos_lanes[0] * p + at].unsqueeze(2) for at in cos_lanes[1:])
        s1, s2 = (sin[..., sin_lanes[0] * p + at].unsqueeze(2) for at in sin_lanes[1:])
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
        rot = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
        return torch.cat((rot, rest), -1)

    return one(q, q_weight), one(k, k_weight)


def run(op, case: Case, dtype: torch.dtype, gradients: list) -> list[torch.Tensor]:
    """Results of `op` in `dtype` and the gradients of its inputs, in float64 on the CPU."""
    inputs = case.cast(dtype, grad=True)
    outputs = op(*inputs, *case.options)
    wanted = [x for x in inputs[:4] if x is not None]
    grads = torch.autograd.grad(outputs, wanted, [g.to(DEVICE, dtype) for g in gradients])
    return [x.detach().double().cpu() for x in (*outputs, *grads)]


def op(*arguments):
    return qk_norm_rope(*arguments, None)


def assert_no_worse(case: Case, dtype: torch.dtype) -> None:
    rounded = Case([None if x is None else x.to(dtype).double() for x in case.tensors], case.options)
    gradients = [torch.randn(x.shape).to(dtype).double() for x in case.tensors[:2]]
    exact = run(unfused, rounded, torch.float64, gradients)
    ours, theirs = (run(f, rounded, dtype, gradients) for f in (op, unfused))
    for ref, mine, other in zip(exact, ours, theirs, strict=True):
        for error in (lambda x: (x - ref).abs().max(), lambda x: (x - ref).pow(2).mean().sqrt()):  # noqa: B023
            assert error(mine) <= 2 * error(other) + ATOL[dtype] * (1 + ref.abs().max())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and partial sums start as NaN: an element nobody writes shows."""
    if _ops.INTERPRETED or DEVICE == "cuda":
        poison_new_tensors(monkeypatch)


@settings(max_examples=15 if _ops.INTERPRETED else 60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(cases(), st.sampled_from(sorted(ATOL, key=str)))
def test_error_is_at_most_twice_the_unfused_spellings(case: Case, dtype: torch.dtype) -> None:
    assert_no_worse(case, dtype)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("lanes", LANES)
def test_every_norm_with_every_lane_map(norm: str, lanes: str) -> None:
    assert_no_worse(case(norm, lanes, weight=None if norm == "none" else "per_head"), torch.float32)


def test_several_tiles_of_tokens_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("qk_norm_rope", "qk_norm_rope_backward"):
        monkeypatch.setattr(f"torch_fuse.kernels.{module}.TILE", 64)
    monkeypatch.setattr("torch_fuse.kernels.qk_norm_rope_backward.PARTIALS", 4)
    for norm, weight in (("layer_head", "per_head"), ("rms_head", "shared"), ("rms_full", "per_head")):
        assert_no_worse(case(norm, length=7, heads=(6, 3), weight=weight), torch.float32)


def test_results_are_contiguous_in_the_asked_dtype() -> None:
    inputs = case("rms_head").cast(torch.bfloat16)
    for dtype in (None, torch.float32):
        for x, y in zip(inputs, qk_norm_rope(*inputs, *case("rms_head").options, dtype), strict=False):
            assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, dtype or torch.bfloat16, True)


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3)])
def test_empty_inputs_give_empty_results_and_gradients(batch: int, length: int) -> None:
    empty = case("rms_head", batch=batch, length=length, weight="shared")
    inputs = empty.cast(torch.float32, grad=True)
    q, k = op(*inputs, *empty.options)
    (q.sum() + k.sum()).backward()
    assert q.shape == inputs[0].shape and inputs[0].grad.shape == inputs[0].shape
    assert torch.equal(inputs[2].grad, torch.zeros_like(inputs[2]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_come_out_where_the_unfused_spelling_has_them(norm: str, value: float) -> None:
    bad = case(norm)
    bad.tensors[0][0, 1, 2, 3] = value
    bad.tensors[1][1, 0, 0, -1] = value
    inputs = bad.cast(torch.float32)
    for x, y in zip(op(*inputs, *bad.options), unfused(*inputs, *bad.options), strict=True):
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())


@pytest.mark.parametrize("norm", ["none", "layer_head"])
def test_gradients_of_any_layout_and_missing_ones(norm: str) -> None:
    some = case(norm, weight="shared" if norm != "none" else None)
    inputs = some.cast(torch.float32, grad=True)
    wanted = [x for x in inputs[:4] if x is not None]
    q, k = op(*inputs, *some.options)
    expanded = torch.tensor(2.0, device=DEVICE).expand(q.shape)
    transposed = torch.randn(*k.shape[::-1], device=DEVICE).permute(3, 2, 1, 0)
    exact = torch.autograd.grad(unfused(*inputs, *some.options), wanted, [expanded, transposed])
    ours = torch.autograd.grad((q, k), wanted, [expanded, transposed], retain_graph=True)
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    for result, index in ((q, 0), (k, 1)):
        only = torch.autograd.grad(result.sum(), wanted, allow_unused=True, retain_graph=True)
        assert only[index] is not None and only[1 - index] is None


def test_a_rotation_saves_no_activations() -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        op(*case().cast(torch.float32, grad=True), *case().options)
    assert all(len(shape) == 3 for shape in saved) and saved  # the tables


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is the reference's, the same on every device")
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm: str) -> None:
    small = case(norm, dim=6, rotary=4, length=2, weight=None if norm == "none" else "shared")
    inputs = small.cast(torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *x: op(*x, *inputs[4:], *small.options), inputs[:4])


@pytest.mark.parametrize("norm", ["none", "rms_full"])
def test_opcheck(norm: str) -> None:
    some = case(norm, weight="per_head" if norm != "none" else None)
    torch.library.opcheck(qk_norm_rope, (*some.cast(torch.float32, grad=True), *some.options, None))
    q, k, *rest = some.cast(torch.float32)
    saved = (None, None) if norm == "none" else (q, k)
    torch.library.opcheck(
        qk_norm_rope_backward.qk_norm_rope_backward, (q, k, *saved, *rest, *some.options, torch.float32)
    )


def test_compiled_with_dynamic_shapes_forward_and_backward() -> None:
    torch._dynamo.reset()

    def model(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = (x * 2).view(*x.shape[:2], 3, 4, 16).unbind(2)
        lanes = [1, 0, 4]
        q, k = torch.ops.torch_fuse.qk_norm_rope(
            q, k, weight, weight, cos, sin, "rms_head", 1e-6, 0.0, 8, False, lanes, lanes, None
        )
        return torch.nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))

    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    for batch, length in ((2, 5), (3, 9)):
        inputs = [torch.randn(*s, device=DEVICE) for s in ((batch, length, 192), (16,), (1, length, 8), (1, length, 8))]
        grads = []
        for f in (model, compiled):
            leaves = [inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()]
            out = f(*leaves, *inputs[2:])
            grads.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "norm is 'batch'; allowed: none, rms_head, rms_full, layer_head"),
        ({"rotary_dim": 7}, "rotary_dim is 7; allowed: an even number, 0 to D = 16"),
        ({"rotary_dim": 18}, "rotary_dim is 18; allowed: an even number, 0 to D = 16"),
        ({"rotary_dim": 0}, "cos is given; allowed: None when rotary_dim is 0"),
        ({"sin": None}, "sin is None; allowed: a .* table when rotary_dim is 8"),
        ({"cos_lanes": [4, 0, 1]}, r"cos_lanes is \[4, 0, 1\]; allowed: lanes below cos.shape\[2\] = 12"),
        ({"q_weight": torch.ones(5)}, r"q_weight.numel\(\) is 5; allowed: D or H \* D: \(16, 64\)"),
        ({"k": torch.ones(2, 4, 2, 16)}, r"k.shape is \(2, 4, 2, 16\); allowed: q's but for"),
        ({"k": torch.ones(2, 3, 2, 16, dtype=torch.float64)}, "k.dtype is torch.float64; allowed: q's"),
        ({"q": torch.ones(2, 3, 64)}, r"q.shape is \(2, 3, 64\); allowed: four dimensions"),
        ({"cos": torch.ones(1, 5, 12)}, r"cos.shape\[1\] is 5; allowed: the heads' length 3"),
    ],
)
def test_errors_name_argument_value_and_what_is_allowed(change: dict, message: str) -> None:
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin", "norm", "eps", "weight_offset", "rotary_dim",
             "interleaved", "cos_lanes", "sin_lanes")  # fmt: skip
    good = case("rms_head")
    given = dict(zip(names, (*good.cast(torch.float32), *good.options), strict=True))
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*(given | change).values(), None)


def test_supports_says_why_not() -> None:
    q = torch.empty(1, 1, 64, 1024, dtype=torch.bfloat16, device=DEVICE)
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        assert supports(q, q, "none", 0) == "Triton has no backend for device 'cpu'"
        return
    assert supports(q, q, "rms_head", 64) is None
    assert "needs 65536 > 16384 elements" in supports(q, q, "rms_full", 0)
    assert "float64" in supports(q.double(), q.double(), "none", 0)


def test_reference_takes_the_ops_arguments_and_is_differentiable() -> None:
    some = case("rms_full", weight="per_head")
    inputs = some.cast(torch.float64, grad=True)
    for x, y in zip(reference(*inputs, *some.options, None), op(*inputs, *some.options), strict=True):
        torch.testing.assert_close(x, y)
        assert x.requires_grad


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The kernels' arithmetic on a machine without a GPU: this file again, in a process that interprets them."""
    passes_in_interpreter(__file__, select="not gradcheck and not compiled and not opcheck")


def test_without_triton_the_op_runs_its_reference() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from torch_fuse.kernels.qk_norm_rope import qk_norm_rope, supports\n"
        "q = torch.randn(1, 2, 3, 4, requires_grad=True)\n"
        "f = torch.compile(lambda q: qk_norm_rope(\n"
        "    q, q, None, None, None, None, 'rms_head', 1e-6, 0.0, 0, False, [], [], None)[0], backend='aot_eager')\n"
        "f(q).sum().backward()\n"
        "assert supports(q, q, 'none', 0) == 'Triton is not installed'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
