"""quantised_attention against float64: its reference (CPU), the interpreted kernels and, where there is, a GPU.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernels; test_kernels_in_the_interpreter does so.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_fuse.kernels import _ops

module = importlib.import_module("torch_fuse.kernels.quantised_attention")
quantise = importlib.import_module("torch_fuse.kernels._quantise")
op = module.quantised_attention

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
DTYPES = [torch.float16] if _ops.INTERPRETED else [torch.bfloat16, torch.float16]


def inputs(batch=1, heads=2, kv=2, length=65, keys=None, dim=64, dtype=torch.float16, outliers=True) -> list[Tensor]:
    """q and k [B, S, H, D] in memory, v a view into a projection; outliers in other lanes of q than of k."""
    torch.manual_seed(0)
    keys = length if keys is None else keys
    q, k = torch.randn(batch, length, heads, dim), torch.randn(batch, keys, kv, dim)
    v = torch.randn(batch, keys, kv, 3 * dim)[..., 2 * dim :]
    if outliers:
        q[..., [3, 17]] *= torch.tensor([10.0, 30.0])
        k[..., [5, 40]] *= torch.tensor([30.0, 10.0])
        k[..., [9, 33]] += 20
    return [x.to(DEVICE, dtype).transpose(1, 2) for x in (q, k, v)]


def exact(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * scale
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -float("inf"))
    return scores.softmax(-1) @ v


def assert_close(tensors: list[Tensor], is_causal: bool, scale: float | None = None) -> Tensor:
    args = (*tensors, is_causal, tensors[0].shape[-1] ** -0.5 if scale is None else scale)
    wanted, found = exact(*args), op(*args)
    assert (found.shape, found.dtype, found.device) == (wanted.shape, tensors[0].dtype, tensors[0].device)
    assert found.transpose(1, 2).is_contiguous() and found.isfinite().all()
    error = found.double() - wanted
    assert F.cosine_similarity(found.double().flatten(), wanted.flatten(), 0) >= 0.999
    assert error.abs().sum() <= 0.05 * wanted.abs().sum()
    return found


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory starts as NaN: an element nobody writes, or something read that nobody wrote, shows."""
    new_empty = torch.Tensor.new_empty

    def poison(self: Tensor, *args, **kwargs) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        fake = isinstance(out, torch._subclasses.FakeTensor | torch._subclasses.functional_tensor.FunctionalTensor)
        if not fake and out.numel():
            out.view(torch.uint8).fill_(255)
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dim", module.HEAD_DIMS)
def test_outliers_cost_no_accuracy(dim: int, is_causal: bool, dtype: torch.dtype) -> None:
    assert_close(inputs(dim=dim, heads=2, kv=1, length=130, dtype=dtype), is_causal)
    assert_close(inputs(dim=dim, length=33, dtype=dtype, outliers=False), is_causal, scale=0.2)


@pytest.mark.parametrize(("length", "keys"), [(1, 1), (1, 200), (63, 64), (64, 65), (65, 63), (130, 129), (200, 1)])
def test_any_length(length: int, keys: int) -> None:
    assert_close(inputs(length=length, keys=keys, heads=2, kv=1), False)
    if length < 100:
        assert_close(inputs(length=length, heads=1, kv=1, dim=96), True)


LONGEST = 100 if _ops.INTERPRETED else 300


@settings(max_examples=4 if _ops.INTERPRETED else 30, deadline=None)
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    kv, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    length, causal = data.draw(st.integers(1, LONGEST)), data.draw(st.booleans())
    keys = length if causal else data.draw(st.integers(1, LONGEST))
    dim = data.draw(st.sampled_from(module.HEAD_DIMS))
    outliers = data.draw(st.booleans())
    assert_close(inputs(data.draw(st.integers(1, 2)), kv * group, kv, length, keys, dim, outliers=outliers), causal)


def test_a_result_is_the_same_every_time_and_reads_its_own_tensors() -> None:
    first = assert_close(inputs(length=70), True)
    assert_close([x * 0.5 for x in inputs(length=70)], True)
    assert torch.equal(first, assert_close(inputs(length=70), True))


@pytest.mark.skipif(_ops.INTERPRETED, reason="takes minutes")
def test_weights_far_below_the_largest_still_count() -> None:
    """Many weights of exp(-14): against one scale for all, FP8 would round each to nothing."""
    q, k, v = torch.zeros(1, 1, 1, 64), torch.randn(1, 1, 40000, 64) * 0.01, torch.ones(1, 1, 40000, 64)
    q[..., 0], k[..., 0, 0], v[..., 0, :] = 8.0, 14.0, -1.0
    tensors = [x.to(DEVICE, torch.float16) for x in (q, k, v)]
    share = (exact(*tensors, False, 0.125) + 1).mean()  # of all the others
    assert share > 0.05
    assert ((op(*tensors, False, 0.125).double() + 1).mean() - share).abs() <= 0.1 * share


def test_values_of_very_different_tiles() -> None:
    q, k, v = inputs(length=200, outliers=False)
    v = v.clone()
    v[:, :, :100] *= 1e-3
    assert_close([q, k, v], False)
    assert_close([q, k, torch.cat([v[:, :, :128] * 0, v[:, :, 128:]], 2)], False)
    assert op(q * 0, k * 0, v * 0, False, 0.1).eq(0).all()


def test_nothing_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in memory before: 0xFF is NaN in fp32 and FP8, 0x7F also the largest int8."""
    new_empty, found = torch.Tensor.new_empty, []
    for byte in (0, 0x7F):

        def poison(self: Tensor, *args, byte: int = byte, **kwargs) -> Tensor:
            out = new_empty(self, *args, **kwargs)
            out.view(torch.uint8).fill_(byte)
            return out

        monkeypatch.setattr(torch.Tensor, "new_empty", poison)
        found.append(
            [assert_close(inputs(length=n, keys=m, dim=80, heads=1, kv=1), False) for n, m in ((130, 1), (3, 70))]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_any_strides() -> None:
    q, k, v = inputs(batch=2, length=66)
    assert_close([q.contiguous(), k.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), v.contiguous()], True)
    assert_close([q, k[:1].expand(k.shape), F.pad(v, (1, 2))[..., 1:-2]], False)
    assert_close([q, k, v.mT.contiguous().mT], False)  # not what the kernels read: by the reference


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_is_not_hidden(which: int, value: float) -> None:
    tensors = inputs(length=70)
    tensors[which] = tensors[which].clone()
    tensors[which][0, 1, 69, 5] = value
    wanted = exact(*tensors, False, 0.1)
    found = op(*tensors, False, 0.1)
    assert not found[~wanted.isfinite()].isfinite().any()
    assert found[:, 0].isfinite().all()  # the other head


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_empty_inputs_give_empty_results(batch: int, length: int) -> None:
    tensors = inputs(batch=batch, length=length, keys=5)
    assert op(*tensors, False, 1.0).shape == tensors[0].shape


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients_are_exact_attentions(is_causal: bool) -> None:
    tensors = [x.to(torch.float16) for x in inputs(length=40, heads=4, kv=2, outliers=False)]
    found, wanted = ([x.detach().clone().requires_grad_() for x in tensors] for _ in range(2))
    grad = torch.randn_like(tensors[0])
    op(*found, is_causal, 0.2).backward(grad)
    exact(*wanted, is_causal, 0.2).backward(grad.double())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=4e-3, rtol=4e-3)


def test_opcheck() -> None:
    tensors = inputs(length=65, heads=2, kv=1)
    torch.library.opcheck(op, (*tensors, True, 0.1))
    torch.library.opcheck(op, (*(x.requires_grad_() for x in tensors), True, 0.1), test_utils="test_faketensor")
    torch.library.opcheck(
        module.quantised_attention_backward, (tensors[0].detach(), *(x.detach() for x in tensors), True, 0.1)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.ones(1, 2, 65, 64, dtype=torch.float64)}, "v.dtype is torch.float64; allowed: q's torch.float16"),
        ({"k": torch.ones(1, 3, 65, 64).half()}, r"k.shape is \(1, 3, 65, 64\); allowed: .* divisor of q's H"),
        ({x: torch.ones(1, 2, 64, 64).half() for x in "kv"}, r"k.shape\[2\] is 64; allowed: q's 65 when is_causal"),
    ],
)
def test_errors_name_argument_value_and_what_is_allowed(change: dict, message: str) -> None:
    given = dict(zip("qkv", inputs(), strict=True)) | {name: x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        op(*given.values(), True, 0.1)


def test_supports_says_why_not() -> None:
    q, k, v = inputs()
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        assert module.supports(q, k, v, True, 0.1) == "Triton has no backend for device 'cpu'"
        return
    assert module.supports(q, k, v, True, 0.1) is None
    assert module.supports(q.double(), k, v, True, 0.1) == "dtype is torch.float64; allowed: bfloat16, float16"
    assert "head_dim is 48" in module.supports(q[..., :48], k, v, True, 0.1)


def _target(capability: int):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", capability, 32)


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize("dim", [80, 128])
def test_the_hopper_kernel_compiles_with_products_that_overlap(dim: int) -> None:
    """Without a GPU: both kinds of 8-bit products, no write to an operand under one that runs, weights not moved."""
    hopper = importlib.import_module("torch_fuse.kernels._hopper_quantised")
    if hopper.MISSING:
        pytest.skip(hopper.MISSING)
    from triton.experimental.gluon._runtime import GluonASTSource

    gl, (d1, d2), config = hopper.gl, hopper.PARTS[dim], module.HOPPER[dim]

    def descriptor(rows: int, lanes: int, kind: str) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([rows, lanes], getattr(gl, kind))
        return f"tensordesc<{ {'int8': 'i8', 'float8e4nv': 'fp8e4nv'}[kind] }[{rows}, {lanes}],{layout!r}>"

    known = {
        "H": 4, "HEADS_OF_KEY": 2, "CAUSAL": True, "D1": d1, "D2": d2, "GROUPS": config.groups, "N": config.block_n,
        "STAGES": config.stages, "REGISTERS": config.registers, **({} if d2 else {"q2": None, "k2": None, "v2": None}),
    }  # fmt: skip
    kinds = {"out": "*bf16", "q_scale": "*fp32", "kv_scale": "*fp32"}
    for i, lanes, values in (("1", d1, d1), ("2", 32, d2)):
        kinds |= {f"q{i}": descriptor(64, lanes, "int8"), f"k{i}": descriptor(config.block_n, lanes, "int8")}
        kinds |= {f"v{i}": descriptor(values or d1, config.block_n, "float8e4nv")}
    names = hopper.kernel.arg_names
    signature = {name: "constexpr" if name in known else kinds.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in known.items()}
    source = GluonASTSource(fn=hopper.kernel, signature=signature, constexprs=constants)
    ptx = _ops.triton.compile(source, target=_target(90), options={"num_warps": 4}).asm["ptx"]
    assert ".s32.s8.s8" in ptx and ".f32.e4m3.e4m3" in ptx
    assert ptx.count("prmt") <= 8 * 64  # a byte at a time would be some 600


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize(
    ("file", "name"),
    [("_hopper_quantised", "kernel"), ("_quantised_flash", "kernel"), ("_quantise", "quantise_kernel")],
)
def test_one_key_is_no_constant_of_a_kernel(file: str, name: str) -> None:
    """As a constant it makes masked weights the same register, whose conversions ptxas merges wrongly: not finite."""
    kernels = importlib.import_module(f"torch_fuse.kernels.{file}")
    if getattr(kernels, "MISSING", ""):
        pytest.skip(kernels.MISSING)
    (length,) = (x for x in getattr(kernels, name).params if x.name == "length")
    assert length.do_not_specialize


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize("capability", [89, 90])
def test_the_other_kernels_compile(capability: int) -> None:
    flash = importlib.import_module("torch_fuse.kernels._quantised_flash")
    q, k, v = (torch.randn(1, 2, 70, 80, dtype=torch.bfloat16) for _ in range(3))
    to, found = quantise.empty(q, k, 64, 64), quantise.statistics(q, k)
    grid_less = [(x[0], x[2], x[3]) for x in quantise.calls(q, k, v, 0.1, 64, found, to)]
    grid_less.append((flash.kernel, *flash.call(q, k, True, to, q)[1:]))
    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv"}
    for kernel, arguments, constants in grid_less:
        signature = dict.fromkeys(kernel.arg_names, "constexpr") | {
            name: types[x.dtype] if isinstance(x, Tensor) else "fp32" if isinstance(x, float) else "i32"
            for name, x in zip(kernel.arg_names, arguments, strict=False)
        }
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = _ops.triton.compiler.ASTSource(kernel, signature, places)
        assert _ops.triton.compile(source, target=_target(capability), options=options).asm["ptx"]


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The kernels' arithmetic on a machine without a GPU: this file again, in a process that interprets them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", __file__,
               "-k", "not opcheck and not gradients"]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
