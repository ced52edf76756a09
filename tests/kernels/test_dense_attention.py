"""dense_attention against float64, in the reference (CPU), the interpreted kernel and, where there is, on a GPU.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernel; test_kernels_in_the_interpreter does so.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from in_interpreter import passes_in_interpreter
from poisoning import poison_new_tensors
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from torch_fuse import Options
from torch_fuse.kernels import _ops
from torch_fuse.report import Report
from torch_fuse.rewrite.engine import rewrite
from torch_fuse.rewrite.registry import patterns

module = importlib.import_module("torch_fuse.kernels.dense_attention")
op, supports = module.dense_attention, module.supports

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
# The interpreter multiplies the bits of bfloat16 as integers.
DTYPES = [torch.float16] if _ops.INTERPRETED else [torch.bfloat16, torch.float16]
ATOL = {torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.float32: 2e-6}


def inputs(batch=1, heads=2, kv=2, length=65, keys=None, dim=80, dtype=torch.float16, scale=1.0) -> list[Tensor]:
    """q and k [B, S, H, D] in memory, v a view into a projection, as GPT-NeoX has it."""
    torch.manual_seed(0)
    keys = length if keys is None else keys
    q = torch.randn(batch, length, heads, dim).mul(scale).to(DEVICE, dtype).transpose(1, 2)
    k = torch.randn(batch, keys, kv, dim).mul(scale).to(DEVICE, dtype).transpose(1, 2)
    v = torch.randn(batch, keys, kv, 3 * dim).to(DEVICE, dtype).transpose(1, 2)[..., 2 * dim :]
    return [q, k, v]


def exact(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * scale
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -float("inf"))
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def assert_no_worse(tensors: list[Tensor], is_causal: bool, scale: float | None = None) -> None:
    args = (*tensors, is_causal, tensors[0].shape[-1] ** -0.5 if scale is None else scale)
    wanted, ours, theirs = exact(*args), op(*args), sdpa(*args)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert ours.transpose(1, 2).is_contiguous()
    for error in (lambda x: (x - wanted).abs().max(), lambda x: (x - wanted).pow(2).mean().sqrt()):
        assert error(ours.double()) <= 2 * error(theirs.double()) + ATOL[ours.dtype] * (1 + wanted.abs().max())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results start as NaN: an element nobody writes shows."""
    if _ops.INTERPRETED or DEVICE == "cuda":
        poison_new_tensors(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dim", module.HEAD_DIMS)
def test_error_is_at_most_twice_sdpas(dim: int, is_causal: bool, dtype: torch.dtype) -> None:
    assert_no_worse(inputs(dim=dim, length=129, dtype=dtype), is_causal)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 191])
def test_any_length(length: int) -> None:
    for dim in (48, 128):  # by Triton's kernel, and on Hopper by the other one
        assert_no_worse(inputs(length=length, heads=1, kv=1, dim=dim), True)
        assert_no_worse(inputs(length=length, heads=1, kv=1, dim=dim, keys=100), False)


@pytest.mark.parametrize(("block_m", "block_n", "wave"), [(128, 64, 0), (64, 128, 0), (64, 32, 3), (32, 32, 4)])
def test_any_configuration(block_m: int, block_n: int, wave: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.TRITON, 48, (module._flash.Config(block_m, block_n, 4, 2, wave),) * 2)
    module._launches.clear()
    for is_causal in (True, False):
        assert_no_worse(inputs(batch=2, length=150, dim=48), is_causal)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dim", [48, 64])
def test_grouped_queries(dim: int, is_causal: bool) -> None:
    assert_no_worse(inputs(batch=2, heads=6, kv=2, length=70, dim=dim), is_causal)
    assert_no_worse(inputs(heads=3, kv=1, length=70, dim=dim), is_causal, scale=0.3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda" or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize(("dim", "length"), [(64, 1000), (80, 4500), (128, 1000), (128, 4500)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_hopper_kernel_takes_several_tiles_and_several_batches(dim: int, length: int, is_causal: bool) -> None:
    tensors = inputs(batch=2, heads=4, kv=2, length=length, dim=dim, dtype=torch.bfloat16)
    assert (module.hopper_config(*tensors, is_causal)[0] is None) == (is_causal and dim == 64)
    for scale in (1.0, 0.7):  # the second by the same launch with other tensors, and by one of its own
        assert_no_worse([x * scale for x in tensors[:2]] + tensors[2:], is_causal)
    assert_no_worse(tensors, is_causal, scale=0.2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda" or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(
    "config",
    [
        {"groups": 1, "maxnreg": 128, "programs": 2},
        {"programs": 1, "turns": True},
        {"block_n": 64, "stages": 2, "programs": 1},
        {"groups": 3, "block_n": 64, "stages": 3, "registers": 160, "programs": 1, "turns": True},
    ],
)
def test_any_hopper_configuration(config: dict, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one tile of keys, groups past the last query, fewer tiles than programs, and more."""
    for is_causal in (True, False):
        monkeypatch.setitem(module.HOPPER, (dim, is_causal), (module._hopper_flash.Config(**config),) * 2)
    module._launches.clear()
    for batch, length, keys in ((1, 64, 64), (1, 65, 100), (2, 129, 320), (3, 1000, 1000), (24, 777, 200)):
        tensors = inputs(batch=batch, heads=8, kv=4, length=length, keys=keys, dim=dim, dtype=torch.bfloat16)
        assert_no_worse(tensors, False)
        if length == keys:
            assert_no_worse(tensors, True)
    q, k, v = inputs(batch=2, heads=4, kv=4, length=700, dim=dim, dtype=torch.bfloat16)
    rising = torch.linspace(40.0, 0.1, 700, device=q.device).to(q.dtype)[:, None]  # keys are taken from the last one
    assert_no_worse([q, k * rising, v], False, scale=0.3)
    q, k = q.abs(), k.clone()
    k[:, :, 300:], q[:, :, 5] = -float("inf"), -1.0  # the first scores are minus infinity, of one row infinity
    wanted = exact(q, k, v, False, 0.2)
    torch.testing.assert_close(op(q, k, v, False, 0.2).double(), wanted, atol=1e-2, rtol=1e-2, equal_nan=True)
    module._launches.clear()


def test_any_strides() -> None:
    q, k, v = inputs(batch=2, length=66, dim=48)
    for change in (
        lambda x: x.contiguous(),
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda x: x[:1].expand(x.shape),
        lambda x: F.pad(x, (1, 2))[..., 1:-2],
    ):
        assert_no_worse([change(q), k, change(v)], True)
        assert_no_worse([q, change(k), v], False)


def test_large_scores_do_not_overflow() -> None:
    assert_no_worse(inputs(length=130, scale=12.0, dim=48), True, scale=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_inf_come_out_where_sdpa_has_them(which: int, value: float) -> None:
    tensors = inputs(length=130, dim=48)
    tensors[which][0, 1, 70, 5] = value
    for is_causal in (True, False):
        args = (*tensors, is_causal, 48**-0.5)
        ours, theirs = op(*args), (exact if supports(*args) is None else sdpa)(*args)
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


def test_scores_of_minus_infinity_come_first() -> None:
    q, k, v = (x.clone() for x in inputs(length=130, dim=48))
    q[..., 0] = 1.0
    k[:, :, :80, 0] = -float("inf")  # the first tile of keys and a part of the second count for nothing
    wanted = exact(q, k, v, False, 0.2)
    assert wanted.isfinite().all()
    torch.testing.assert_close(op(q, k, v, False, 0.2).double(), wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("batch", "length", "keys"), [(0, 5, 5), (2, 0, 0), (2, 0, 7)])
def test_empty_inputs_give_empty_results(batch: int, length: int, keys: int) -> None:
    tensors = inputs(batch=batch, length=length, keys=keys)
    assert op(*tensors, False, 1.0).shape == tensors[0].shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(op, (*inputs(length=65, dtype=dtype, kv=1), True, 0.1))


def test_a_gradient_is_refused_in_words() -> None:
    q, k, v = inputs(length=64)
    with pytest.raises(NotImplementedError, match="dense_attention has no gradient"):
        op(q.detach().requires_grad_(), k, v, True, 0.1)
    with torch.no_grad():
        assert not op(q.detach().requires_grad_(), k, v, True, 0.1).requires_grad


def test_another_call_of_the_same_kind_reads_its_own_tensors() -> None:
    module._launches.clear()
    for seed in range(3):
        tensors = [x + seed for x in inputs(dim=48, length=70)]
        assert_no_worse(tensors, True)
        assert_no_worse(tensors, False)
        assert_no_worse(tensors, True, scale=0.3)
    launched = supports(*inputs(dim=48, length=70), True, 0.3) is None
    assert len(module._launches) == (3 if launched else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 65, 80)}, r"q.shape is \(2, 65, 80\); allowed: four dimensions"),
        ({"v": torch.ones(1, 2, 65, 80, dtype=torch.float64)}, "v.dtype is torch.float64; allowed: q's torch.float16"),
        ({"k": torch.ones(1, 3, 65, 80).half()}, r"k.shape is \(1, 3, 65, 80\); allowed: .* divisor of q's H"),
        ({"v": torch.ones(1, 2, 64, 80).half()}, r"v.shape is \(1, 2, 64, 80\); allowed: k's"),
        ({x: torch.ones(1, 2, 64, 80).half() for x in "kv"}, r"k.shape\[2\] is 64; allowed: q's 65 when is_causal"),
    ],
)
def test_errors_name_argument_value_and_what_is_allowed(change: dict, message: str) -> None:
    given = dict(zip("qkv", inputs(), strict=True)) | {name: x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        op(*given.values(), True, 0.1)


def test_supports_says_why_not() -> None:
    q, k, v = inputs()
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        assert supports(q, k, v, True, 0.1) == "Triton has no backend for device 'cpu'"
        return
    assert supports(q, k, v, True, 0.1) is None
    assert supports(q.double(), k, v, True, 0.1) == "dtype is torch.float64; allowed: bfloat16, float16"
    assert "head_dim is 72" in supports(q[..., :72], k, v, True, 0.1)
    assert "scale is -1.0" in supports(q, k, v, True, -1.0)
    assert "there are 63 keys" in supports(q, k[:, :, :63], v, True, 0.1)
    assert "v.stride(3) is 65" in supports(q, k, v.mT.contiguous().mT, True, 0.1)


class Attends(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.dim = nn.Linear(32, 6 * dim), dim

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 2, 3 * self.dim).transpose(1, 2).chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("dim", "grad", "fuses"), [(80, False, True), (64, False, True), (80, True, False), (72, False, False)]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_pattern_fires_where_no_gradient_is_needed(dim: int, grad: bool, fuses: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    report = Report()

    def backend(gm: torch.fx.GraphModule, _: object):
        outcome = rewrite(gm, Options(kernels="reference", on_error="raise"), patterns())
        report.graphs.append(outcome.report)
        return outcome.gm.forward

    model, x = Attends(dim), torch.randn(2, 9, 32)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.compile(model, backend=backend, dynamic=dynamic)(x), model(x))
    assert (report.counts().get("dense_attention") == {"fused": 1}) == fuses, str(report)


def test_inductor_copies_nothing_for_it() -> None:
    torch._dynamo.reset()
    model = Attends(80).requires_grad_(False)

    def forward(x: Tensor) -> Tensor:
        q, k, v = model.qkv(x).view(*x.shape[:2], 2, 240).transpose(1, 2).chunk(3, -1)
        return op(q, k, v, True, 0.1).transpose(1, 2).flatten(2)

    x = torch.randn(2, 70, 32)
    found, (code,) = run_and_get_code(torch.compile(forward), x)
    torch.testing.assert_close(found, forward(x))
    assert "async_compile.triton" not in code and "async_compile.cpp_pybinding" not in code, code


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The kernel's arithmetic on a machine without a GPU: this file again, in a process that interprets it."""
    passes_in_interpreter(__file__, select="not opcheck and not pattern and not inductor")
