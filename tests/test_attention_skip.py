"""An attention's projection combined with a skip: what fires, what is kept or missed and why, and what it promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Rewriter, compare, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_fuse import Options
from torch_fuse.kernels import linear_skip
from torch_fuse.kernels._ops import INTERPRETED
from torch_fuse.patterns import _attention_skip_examples as examples
from torch_fuse.rewrite.engine import rewrite
from torch_fuse.rewrite.registry import patterns

PATTERN = "attention_skip"
OPTIONS = Options(kernels="reference", on_error="raise", only=(PATTERN,))
NOTES = {
    "rcm": ["(1 tensor) * x + (1 tensor) * projection [16, 16]"],
    "trigflow_divided": ["(1) * x + (1 tensor * -1) * projection [16, 16]"],
    "dit_gate": ["(1) * x + (1 tensor) * projection [16, 16]"],
    "full_gate": ["(1) * x + (1 tensor) * projection [16, 16]"],
    "addcmul_value": ["(0.5) * x + (1 tensor * -2) * projection [16, 16]"],
    "numbers": ["(0.7) * x + (0.3) * projection [16, 16]"],
    "halved": ["(0.5) * x + (0.5) * projection [16, 16]"],
    "difference": ["(1) * x + (1 tensor * -2) * projection [16, 16]", "(-1) * x + (-0.333333) * projection [16, 16]"],
    "nested_factors": ["(2 tensors * 0.5) * x + (2 tensors) * projection [16, 16]"],
    "lerp": ["lerp to the projection [16, 16]"],
    "lerp_back": ["lerp from the projection [16, 16]"],
    "written_out_lerp": ["lerp to the projection [16, 16]"] * 2,
    "written_out_lerp_back": ["lerp from the projection [16, 16]"],
    "flat": ["(1 tensor) * x + (-1) * projection [16, 16]"],
}
MISSED = {
    "plain_sum": "Inductor fuses it into one kernel",
    "norm_follows": "layer_norm follows: the sum goes into one kernel with the norm",
    "no_projection": "is no result of a linear layer that nothing else reads",
    "projection_read_again": "mean reads h, a step of the combination",
    "dropped": "is no result of a linear layer",
    "broadcast_skip": None,
    "gate_along_tokens": "is no result of a linear layer",
    "gate_by_projection": "sigmoid reads h, a step of the combination",
    "scaled_in_place": None,
    "lerp_of_broadcast": None,
    "rounded_below": "bfloat16 rounds to torch.bfloat16",
    "skip_written_between": "mul_ writes in place to a value of the region",
    "coefficient_written_between": "add_ writes in place to a value of the region",
    "integer_gate": "a coefficient is neither a number nor a tensor that broadcasts",
}


def build(spelling: Callable[..., Any], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    return examples.make(spelling, dtype)


def sites(model: nn.Module, inputs: Any, options: Options = OPTIONS, grad: bool = True) -> tuple[list[Any], list[Any]]:
    """The sites of combinations and the arguments of the op's calls; the fused graph is not run."""
    found, calls = [], []

    def backend(gm: Any, example_inputs: Any) -> Any:
        outcome = rewrite(gm, options, patterns())
        found.extend(site for site in outcome.report.sites if site.kind == "combine")
        for node in outcome.gm.graph.nodes:  # the op, or its reference
            if "linear_skip" in f"{node.target} {getattr(node.target, '__module__', '')}":
                calls.append(node.args)
        return (outcome.original or gm).forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend)(*inputs)
    return found, calls


# -- what is recognised ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTES)
def test_a_spelling_is_recognised_as_what_it_is(name: str) -> None:
    found, _ = sites(*build(getattr(examples, name)))
    assert [site.reason for site in found if site.status == "fused"] == NOTES[name]


def test_a_divisor_goes_into_the_coefficients_where_the_result_is_rounded_more_than_they_are() -> None:
    found, _ = sites(*build(examples.trigflow_divided, torch.bfloat16))
    assert [site.reason for site in found] == ["(1 tensor) * x + (2 tensors * -1) * projection [16, 16]"]


@pytest.mark.parametrize("name", MISSED)
def test_a_near_miss_stays_and_says_why(name: str) -> None:
    found, calls = sites(*build(getattr(examples, name)))
    assert not calls and not [site for site in found if site.status == "fused"]
    if MISSED[name] is not None:
        assert any(MISSED[name] in site.reason for site in found), [site.reason for site in found]


def test_a_vector_that_makes_the_projection_wider_is_no_bias() -> None:
    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.vector = nn.Linear(8, 1, bias=False), nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor, q: Tensor, gate: Tensor) -> Tensor:
            attention = F.scaled_dot_product_attention(q, q, q).flatten(0, 1)
            return x + gate * (self.one(attention) + self.vector)

    torch.manual_seed(0)
    found, calls = sites(Widened(), (torch.randn(2, 5, 16), torch.randn(2, 1, 5, 8), torch.randn(16)))
    assert not found and not calls, found


def test_a_projection_that_autocast_computes_in_another_type_stays_and_says_why() -> None:
    model, inputs = build(examples.rcm)
    found: list[Any] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        outcome = rewrite(gm, OPTIONS, patterns())
        found.extend(site for site in outcome.report.sites if site.kind == "combine")
        return gm.forward

    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend=backend)(*inputs)
    assert [site.status for site in found] == ["missed"] and "(autocast)" in found[0].reason, found


def test_where_a_norm_follows_the_other_pattern_takes_the_sum() -> None:
    result = compare(*build(examples.norm_follows), draws=1)
    assert (result.fused("gated_residual_norm"), result.fused(PATTERN)) == (1, 0)


def test_what_is_fused_reads_the_attention_and_writes_the_result_once() -> None:
    rewriter = Rewriter(OPTIONS)
    model, inputs = build(examples.rcm, torch.bfloat16)
    rewritten(model, rewriter)(*inputs)
    calls = [node for node in rewriter.graphs[0].graph.nodes if node.op in ("call_function", "call_method")]
    (op,) = [node for node in calls if "linear_skip" in getattr(node.target, "__module__", "")]
    attention, x, result = op.args[0], op.args[3], next(iter(op.users))
    assert (attention.name, x.op) == ("attention", "placeholder")
    assert [user.op for user in result.users] == ["output"]


@pytest.mark.parametrize("unmeasured", [False, True])
def test_the_gradient_is_taken_in_one_pass_only_where_unmeasured_is_asked(unmeasured: bool) -> None:
    _, (call,) = sites(*build(examples.rcm), dataclasses.replace(OPTIONS, unmeasured=unmeasured))
    assert linear_skip.Spec(*call[linear_skip.OPERANDS :]).one_pass is unmeasured


# -- what the combination promises -------------------------------------------------------------------------------------


class RcmBlock(nn.Module):
    """As mission A1 has it: c_skip(t) * x + c_out(t) * Attn(x), t for each sample."""

    def __init__(self, width: int = 32, heads: int = 2, sigma: float = 1.0, mask: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads, self.sigma = nn.Linear(width, 3 * width), nn.Linear(width, width), heads, sigma
        self.mask = mask

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keep = None
        if self.mask:
            keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
            keep[1] = False
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.sigma**2 / (t**2 + self.sigma**2)
        out = self.sigma * t / (t**2 + self.sigma**2) ** 0.5
        return (skip[:, None, None] * x + out[:, None, None] * self.attend(x)).to(x.dtype)


def fused_block(model: nn.Module) -> Callable[..., Tensor]:
    rewriter = Rewriter(OPTIONS)
    compiled = rewritten(model, rewriter)

    def call(*inputs: Tensor) -> Tensor:
        out = compiled(*inputs)
        assert (PATTERN, "fused") in rewriter.statuses, str(rewriter.report)
        return out

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_at_time_zero_the_result_is_x_bit_for_bit_and_late_it_is_the_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = RcmBlock().to(dtype)
    x = torch.randn(3, 7, 32).to(dtype)
    with torch.no_grad():
        out = fused_block(model)(x, torch.tensor([0.0, 1e6, 0.0]))
        wanted = model.attend(x)
    assert torch.equal(out[0], x[0]) and torch.equal(out[2], x[2])
    torch.testing.assert_close(out[1], wanted[1], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_in_fp32_forward_and_gradients_are_those_of_the_unfused_block() -> None:
    torch.manual_seed(0)
    model = RcmBlock(sigma=0.5)
    x, t = torch.randn(3, 7, 32, requires_grad=True), torch.tensor([0.1, 1.0, 80.0], requires_grad=True)
    leaves = [x, t, *model.parameters()]
    seed = torch.randn(x.shape)
    found = [(out := f(x, t), *torch.autograd.grad(out, leaves, seed)) for f in (fused_block(model), model)]
    for i, (mine, wanted) in enumerate(zip(*found, strict=True)):
        tolerance = 1e-5 if i == 0 else 1e-4
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


def test_nan_inf_and_fully_masked_rows_come_out_as_in_the_unfused_block() -> None:
    torch.manual_seed(0)
    for mask in (True, False):
        model = RcmBlock(mask=mask)
        x = torch.randn(3, 7, 32)
        if not mask:
            x[0, 2, 3], x[1, 4, 5], x[2, 0, 0] = float("nan"), float("inf"), -float("inf")
        t = torch.tensor([0.0, 0.5, 0.0])
        with torch.no_grad():
            out, wanted = fused_block(model)(x, t), model(x, t)
        assert torch.equal(out.isnan(), wanted.isnan()) and torch.equal(out.isinf(), wanted.isinf())
        torch.testing.assert_close(out, wanted, equal_nan=True)


@pytest.mark.parametrize("executor", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["rcm", "wan_gate", "lerp", "written_out_lerp", "full_gate", "per_token"])
def test_the_op_itself_agrees_under_autograd_and_aot(name: str, executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op runs its reference where there is no GPU, its own backward, and what Inductor would get."""
    monkeypatch.setattr("torch_fuse.patterns.attention_skip.AttentionSkip.check", lambda *_: None)
    options = Options(on_error="raise", only=(PATTERN,))
    result = compare(*build(getattr(examples, name)), options=options, executor=executor, draws=2)
    assert result.fused(PATTERN) >= 1 and not result.problems


@pytest.mark.parametrize("name", ["rcm", "conv1d", "nested_factors", "lerp", "flat"])
def test_one_dynamic_graph_serves_all_batches_and_lengths(name: str) -> None:
    model, _ = build(getattr(examples, name))
    rewriter = Rewriter(OPTIONS)
    compiled = rewritten(model, rewriter, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 5), (3, 7), (4, 2)):
            inputs = torch.randn(batch, length, examples.C), torch.rand(batch) + 0.25
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    assert [report.rewrites for report in rewriter.report.graphs] == [1]


# -- where it replaces -------------------------------------------------------------------------------------------------

AUTO = Options(on_error="raise", only=(PATTERN,))
UNMEASURED = dataclasses.replace(AUTO, unmeasured=True)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton could run on the CPU; nothing is launched."""
    monkeypatch.setattr("torch_fuse.kernels._linear_skip_common.no_triton", lambda x: None)


def decision(spelling: Callable[..., Any], options: Options = UNMEASURED, dtype: torch.dtype = torch.bfloat16,
             rows: int = 256, grad: bool = False) -> tuple[str, str, list[Any]]:  # fmt: skip
    model, _ = build(spelling, dtype)
    inputs = torch.randn(2, rows // 2, examples.C, dtype=dtype), torch.rand(2, dtype=dtype)
    found, calls = sites(model, inputs, options, grad)
    (site,) = [site for site in found if site.pattern == PATTERN]
    return site.status, site.reason, calls


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_without_a_gpu_it_is_kept() -> None:
    status, reason, _ = decision(examples.rcm, AUTO)
    assert (status, reason) == ("kept", "the kernel cannot run: Triton has no backend for device 'cpu'")


@pytest.mark.usefixtures("kernel")
def test_where_it_is_not_measured_it_wants_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured = "the combination in the product's epilogue is not measured to win: "
    status, reason, _ = decision(examples.rcm, AUTO)
    assert (status, reason) == ("kept", unmeasured + "the device is no NVIDIA GPU")
    assert decision(examples.rcm)[0] == "fused"
    monkeypatch.setattr("torch_fuse.kernels._linear_skip_hopper.cannot_take", lambda *_: None)
    # The kernel computes c_skip(t) and c_out(t) itself, where no gradient is wanted; a gate of lanes is in memory.
    for spelling, grad, least in ((examples.rcm, False, 1 << 19), (examples.rcm, True, 1 << 21),
                                  (examples.layer_scale, False, 1 << 21)):  # fmt: skip
        small = f"{256 * examples.C} elements; it pays from {least} on"
        assert decision(spelling, AUTO, grad=grad)[1] == unmeasured + small
    for limit in ("MIN_SIZE", "MIN_SIZE_INSIDE"):
        monkeypatch.setattr(f"torch_fuse.patterns.attention_skip.{limit}", 1)
    assert decision(examples.rcm, AUTO)[0] == "fused"
    for spelling in (examples.dit_gate, examples.nested_factors):  # the second: of a sample times one of a lane
        status, reason, _ = decision(spelling, AUTO)
        assert (status, reason) == ("kept", unmeasured + "a coefficient has a value for each sample or token and lane")


@pytest.mark.usefixtures("kernel")
def test_the_linear_result_is_kept_only_where_the_gradient_of_its_coefficient_needs_it() -> None:
    saved = 9
    for grad in (False, True):
        assert decision(examples.rcm, grad=grad)[2][0][saved] is False  # t needs no gradient here
        assert decision(examples.layer_scale, grad=grad)[2][0][saved] is grad


def elementwise_skip(m: Any, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x.sin() + t[:, None, None] * m.proj(y)


def elementwise_reader(m: Any, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return m.next((x + t[:, None, None] * m.proj(y)).sin())


def gates_of_two_sizes(m: Any, x: Tensor, y: Tensor, t: Tensor) -> Any:
    return x + m.gates(x)[..., :1] * (m.scale * m.proj(y)) * t[:, None, None]


KEPT = {
    elementwise_skip: "sin is computed elementwise",
    elementwise_reader: "what reads add is elementwise",
    examples.full_gate: "has a value for each element and is computed elementwise",
    gates_of_two_sizes: "the product of its coefficients has a value for each element",
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("spelling", KEPT, ids=lambda f: f.__name__)
def test_where_inductor_would_fuse_more_it_is_kept_with_the_reason(spelling: Callable[..., Any]) -> None:
    status, reason, _ = decision(spelling)
    assert status == "kept" and KEPT[spelling] in reason, reason


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["rcm", "conv1d", "per_token", "nested_factors", "lerp"])
def test_the_decision_for_a_kernel_installs_no_guard(name: str) -> None:
    model, _ = build(getattr(examples, name), torch.bfloat16)
    found: list[Any] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        outcome = rewrite(gm, UNMEASURED, patterns())
        found.append([site.status for site in outcome.report.sites if site.pattern == PATTERN])
        return (outcome.original or gm).forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 200), (3, 140), (7, 90)):
            compiled(torch.randn(batch, length, examples.C).bfloat16(), torch.rand(batch).bfloat16())
    assert found == [["fused"]]


@pytest.mark.usefixtures("kernel")
def test_a_gate_of_each_element_of_one_sample_is_one_too() -> None:
    model, _ = build(gates_of_two_sizes, torch.bfloat16)
    found, _ = sites(model, (torch.randn(1, 300, examples.C).bfloat16(), torch.rand(1).bfloat16()), UNMEASURED, False)
    assert "the product of its coefficients" in next(site.reason for site in found if site.pattern == PATTERN)


@pytest.mark.usefixtures("kernel")
def test_few_rows_wide_products_and_fp32_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "254 rows: bound by the launch" in decision(examples.rcm, rows=254)[1]
    assert "in fp32 the product takes longer" in decision(examples.rcm, dtype=torch.float32)[1]
    assert "torch.float64; allowed" in decision(examples.rcm, dtype=torch.float64)[1]
    monkeypatch.setattr("torch_fuse.patterns.attention_skip.MAX_INNER", 8)
    assert "a product of 16 lanes" in decision(examples.rcm)[1]


# -- however it is written ---------------------------------------------------------------------------------------------

# Each breaks the equation, the order of effects or the numerics that the pattern stands on, in one place.
MUTATIONS = [
    "alpha_2", "sub_for_add", "projection_read_again", "sum_returned_unrounded", "other_samples_coefficients",
    "coefficient_along_tokens", "projection_written", "skip_written", "coefficient_written", "projection_detached",
    "rounded_between", "grad_off_inside", "product_returned", "skip_from_other_position",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How a combination is written, and the one thing that is wrong or unusual."""

    a: str = "sample"
    b: str = "sample"
    how: str = "sum"
    swapped: bool = False
    cast: str = "none"
    bias: bool = True
    dropout: bool = False
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    mutation: str = ""


class Written(nn.Module):
    """Attention and projection, combined as a `Spelling` says."""

    def __init__(self, spelled: Spelling, width: int = 8) -> None:
        super().__init__()
        self.s = spelled
        self.qkv, self.gates = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.proj = nn.Linear(width, width, bias=spelled.bias)
        self.scale = nn.Parameter(torch.randn(width))

    def coefficient(self, kind: str, x: Tensor, t: Tensor) -> Any:
        sample = t[:, None, None]
        return {
            "number": lambda: 0.75, "sample": lambda: sample, "token": lambda: torch.sigmoid(self.gates(x)[..., :1]),
            "channel": lambda: self.scale, "tanh": lambda: self.scale[0].tanh(), "two": lambda: sample * self.scale,
            "none": lambda: 1.0,
        }[kind]()  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Any:
        s, mutation, x, t = self.s, self.s.mutation, x * 1, t * 1
        q, k, v = self.qkv(x)[:, :, None].chunk(3, -1)
        attended = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2).flatten(2)
        y = self.proj(attended)
        a, b = self.coefficient(s.a, x, t), self.coefficient(s.b, x, t)
        extra = [y.mean()] if mutation == "projection_read_again" else []
        if mutation == "other_samples_coefficients" and isinstance(b, Tensor) and b.dim() == 3:
            b = b.flip(0)
        if mutation == "coefficient_along_tokens":
            b = self.gates(x)[:1, :1].transpose(1, 2)[:, : x.shape[1]]
        if mutation == "projection_written":
            y.mul_(2)
        if mutation == "projection_detached":
            y = y.detach()
        if mutation == "rounded_between":
            y = y.bfloat16().to(y.dtype)
        if mutation == "skip_from_other_position":
            x = x.roll(1, 1)
        if s.dropout:
            y = F.dropout(y, 0.1, training=False)
        if s.cast == "inside":
            x, y = x.float(), y.float()
        left, right = x * a if s.a != "none" else x, y * b
        if mutation in ("skip_written", "coefficient_written"):
            (x if mutation == "skip_written" else t).mul_(2)
        if mutation == "grad_off_inside":
            with torch.no_grad():
                right = right * 1
        if mutation == "product_returned":
            extra = [right]
        if s.swapped:
            left, right = right, left
        sub = (s.how == "sub") != (mutation == "sub_for_add")
        alpha = 2 if mutation == "alpha_2" else 1
        if s.how == "addcmul" and mutation != "sub_for_add":
            r = torch.addcmul(left, right, torch.full_like(t, 0.5)[:, None, None], value=alpha)
        else:
            r = torch.sub(left, right, alpha=alpha) if sub else torch.add(left, right, alpha=alpha)
        if s.how == "scaled":
            r = r / 1.5
        if mutation == "sum_returned_unrounded":
            extra = [r]
        out = r.type_as(t) if s.cast != "none" else r
        return out, x, t, *extra


def spellings(**fixed: Any) -> st.SearchStrategy[Spelling]:
    kinds = ["number", "sample", "token", "channel", "tanh", "two"]
    return st.builds(
        lambda **chosen: Spelling(**(chosen | fixed)),
        a=st.sampled_from([*kinds, "none"]), b=st.sampled_from(kinds),
        how=st.sampled_from(["sum", "sub", "addcmul", "scaled"]), swapped=st.booleans(),
        cast=st.sampled_from(["none", "inside", "behind"]), bias=st.booleans(), dropout=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), dynamic=st.booleans(),
    )  # fmt: skip


def compared(spelled: Spelling, grad: bool = True) -> Any:
    torch.manual_seed(0)
    model = Written(spelled).to(spelled.dtype)
    inputs = torch.randn(3, 3, 8).to(spelled.dtype), (torch.rand(3) + 0.5).to(spelled.dtype)
    return compare(model, [x.requires_grad_(grad) for x in inputs], grad=grad, options=OPTIONS, dynamic=spelled.dynamic)


@settings(max_examples=16, deadline=None)
@given(spellings())
def test_every_spelling_fires_and_agrees(spelled: Spelling) -> None:
    result = compared(spelled)
    assert result.fused(PATTERN) == 1, f"{spelled}\n{result.reasons}"
    assert not result.problems


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_one_change_of_meaning_is_never_lost(mutation: str) -> None:
    writes = mutation.endswith("_written")  # a backward pass would want the values as they were

    @settings(max_examples=2, deadline=None)
    @given(spellings(dynamic=False))
    def check(spelled: Spelling) -> None:
        result = compared(dataclasses.replace(spelled, mutation=mutation), grad=not writes)
        assert not result.problems, f"{spelled}\n{result.problems}\n{result.reasons}"
        assert all(site.reason for site in result.report.sites)

    check()
