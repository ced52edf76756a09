"""norm_linear_gemv and linear_residual_gemv against float64.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernels; test_kernels_in_the_interpreter does so.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_interpreter import passes_in_interpreter
from torch import Tensor
from torch.utils._pytree import tree_map

from torch_fuse.kernels import _calls, _ops

norm_linear = importlib.import_module("torch_fuse.kernels.norm_linear_gemv")
residual = importlib.import_module("torch_fuse.kernels.linear_residual_gemv")
DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def norm_linear_arguments(
    dtype: torch.dtype, rows: int, width: int, sizes: list[int], norm: str, activations: str, gated: bool = False
) -> tuple[Any, ...]:
    torch.manual_seed(0)
    weights = [random(n, width, dtype=dtype) / width**0.5 for n in sizes]
    biases = [None if j == 1 else random(n, dtype=dtype) for j, n in enumerate(sizes)]
    scales = [None if norm == "none" else random(width, dtype=dtype) for _ in sizes]
    shifts = [random(width, dtype=dtype) if norm == "layer" else None for _ in sizes]
    offset = 1.0 if norm == "rms" else 0.0
    x = random(1, rows, width, dtype=dtype)
    return x, weights, biases, scales, shifts, norm, 1e-5, offset, activations, gated


NORM_LINEAR: dict[str, tuple[Any, ...]] = {
    "two_norms_and_gelu": (1, 48, [10, 33], "layer", "none,gelu"),
    "three_weights": (3, 64, [9, 8, 7], "rms", "none,silu,gelu_tanh"),
    "gated": (2, 1040, [12, 12], "rms", "silu,none", True),
    "no_norm": (1, 32, [5], "none", "gelu"),
    "eight_rows": (8, 80, [17], "layer", "none"),
    "five_rows_of_two_norms": (5, 144, [40, 10], "layer", "gelu,none"),
    "two_rows_gated": (2, 48, [20, 20], "layer", "gelu_tanh,none", True),
    "four_rows_as_they_are": (4, 32, [5, 16, 17], "none", "none,none,silu"),
}


def check(op: Any, reference: Any, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    wide = tree_map(lambda x: x.double() if isinstance(x, Tensor) else x, arguments)
    found, theirs, exact = ([y] if isinstance(y, Tensor) else y for y in
                            (op(*arguments), reference(*arguments), reference(*wide)))  # fmt: skip
    assert len(found) == len(theirs)
    # the interpreter truncates to bfloat16, a GPU rounds
    slack = 10.0 if dtype == torch.bfloat16 and _ops.INTERPRETED else 1.0
    for a, b, c in zip(found, theirs, exact, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        for measure in (lambda x: float(x.max()), lambda x: float(x.square().mean().sqrt())):
            mine, other = (measure((y.double() - c).abs()) for y in (a, b))
            assert mine <= slack * 2 * other + 2e-6, (mine, other)


@pytest.mark.parametrize(("programs", "dtype"), [*((0, dtype) for dtype in DTYPES), (3, torch.float16)], ids=str)
@pytest.mark.parametrize("case", NORM_LINEAR.values(), ids=NORM_LINEAR)
def test_norm_linear(case: Any, programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_linear, "config", lambda *_: norm_linear.Config(4, 4, programs))
    check(norm_linear.norm_linear_gemv, norm_linear.reference, norm_linear_arguments(dtype, *case), dtype)


def compiled(kernel: Any, arguments: list[Any], constants: dict[str, Any]) -> Any:
    """A launch's kernel, compiled for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {torch.float16: "*fp16", torch.float32: "*fp32", torch.bool: "*i1"}
    kinds |= {torch.int64: "*i64", torch.int32: "*i32"}
    names, signature, attributes, known = kernel.arg_names, {}, {}, {}
    for i, (name, x) in enumerate(zip(names, arguments, strict=False)):
        signature[name] = kinds[x.dtype] if isinstance(x, Tensor) else "fp32" if isinstance(x, float) else "i32"
        if isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    for i, name in list(enumerate(names))[len(arguments) :]:
        signature[name], known[i,] = "constexpr", constants[name]
    options = {name: value for name, value in constants.items() if name not in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    return _ops.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def residual_arguments(dtype: torch.dtype, rows: int, n: int, k1: int, k2: int, biased: bool) -> tuple[Any, ...]:
    torch.manual_seed(0)
    base, first = random(1, rows, n, dtype=dtype), random(1, rows, k1, dtype=dtype)
    bias = random(n, dtype=dtype) if biased else None
    w1 = random(n, k1, dtype=dtype) / k1**0.5
    if k2 == 0:
        return base, first, w1, bias, None, None, None
    return base, first, w1, bias, random(1, rows, k2, dtype=dtype), random(n, k2, dtype=dtype) / k2**0.5, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(1, 11, 48, 1040, True), (1, 6, 4112, 0, False), (3, 16, 64, 0, True),
                                  (8, 5, 512, 80, True), (2, 20, 16, 1040, False),
                                  (5, 17, 208, 48, True), (1, 3, 16400, 14352, True)], ids=str)  # fmt: skip
@pytest.mark.parametrize("tiles", [False, True])
def test_linear_residual(case: Any, tiles: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiles:
        monkeypatch.setattr(residual, "config", residual.in_tiles)
    check(residual.linear_residual_gemv, residual.reference, residual_arguments(dtype, *case), dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("which", ["bias", "norm weight", "norm bias"])
def test_vectors_may_lie_in_memory_in_any_way(which: str, rows: int) -> None:
    """A column of a table, and one number for all; the kernels would read what lies next to it."""
    x, weights, biases, scales, shifts, *rest = norm_linear_arguments(torch.float16, rows, 48, [10], "layer", "none")
    vectors = {"bias": biases, "norm weight": scales, "norm bias": shifts}[which]
    size = vectors[0].shape[0]
    for other in (random(size, 3, dtype=torch.float16)[:, 1], random(1, dtype=torch.float16).expand(size)):
        vectors[0] = other
        arguments = (x, weights, biases, scales, shifts, *rest)
        check(norm_linear.norm_linear_gemv, norm_linear.reference, arguments, torch.float16)
        if which == "bias":
            given = (random(1, rows, size, dtype=torch.float16), x, weights[0], other, x, weights[0], other)
            check(residual.linear_residual_gemv, residual.reference, given, torch.float16)


@pytest.mark.parametrize("rows", [1, 3])
def test_another_call_of_the_same_kind_reads_its_own_tensors(rows: int) -> None:
    for seed in range(3):
        x, *rest = norm_linear_arguments(torch.float16, rows, 48, [10, 33], "layer", "none,gelu")
        check(norm_linear.norm_linear_gemv, norm_linear.reference, (x + seed, *rest), torch.float16)
        x, *rest = residual_arguments(torch.float16, rows, 16, 64, 0, True)
        check(residual.linear_residual_gemv, residual.reference, (x + seed, *rest), torch.float16)


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="compiles for a GPU")
@pytest.mark.parametrize("rows", [1, 4])
def test_the_launches_compile_for_hopper(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: loads of 16 bytes, tensor cores for several rows, and every program waits for its inputs once."""
    launches: list[Any] = []
    not_kept = SimpleNamespace(arguments=lambda _: [object()])
    monkeypatch.setattr(_calls, "launch", lambda *given: launches.append(given) or not_kept)
    for module in (norm_linear, residual):
        monkeypatch.setattr(module, "supports", lambda *_: None)
        monkeypatch.setattr(module, "starts_early", lambda _, asked: asked)
    norm_linear._forward(*norm_linear_arguments(torch.float16, rows, 1024, [64, 32], "layer", "none,gelu"), True)
    residual._forward(*residual_arguments(torch.float16, rows, 64, 1024, 2048, True), True)
    assert len(launches) == (2 if rows == 1 else 3)
    for kernel, _, arguments, constants in launches:
        ptx = compiled(kernel, arguments, constants).asm["ptx"]
        assert ("griddepcontrol.wait" in ptx) == (rows == 1) == ("griddepcontrol.launch_dependents" in ptx)
        if kernel is not norm_linear.normalise:
            assert ("mma.sync" in ptx) == (rows > 1)
            assert "ld.global.L1::evict_first.L2::cache_hint.v4" in ptx or "cp.async.cg.shared.global" in ptx


def test_opcheck() -> None:
    arguments = norm_linear_arguments(torch.float16, 2, 32, [8, 16], "layer", "none,gelu")
    torch.library.opcheck(norm_linear.norm_linear_gemv, arguments)
    torch.library.opcheck(residual.linear_residual_gemv, residual_arguments(torch.float16, 1, 8, 32, 16, True))


def test_a_gradient_is_refused_in_words() -> None:
    x, *rest = norm_linear_arguments(torch.float32, 1, 32, [8], "rms", "none")
    with pytest.raises(NotImplementedError, match="gemv has no gradient"):
        norm_linear.norm_linear_gemv(x.requires_grad_(), *rest)[0].sum().backward()
    x, *rest = residual_arguments(torch.float32, 1, 8, 32, 0, True)
    with pytest.raises(NotImplementedError, match="gemv has no gradient"):
        residual.linear_residual_gemv(x.requires_grad_(), *rest).sum().backward()


def test_errors_name_argument_value_and_what_is_allowed() -> None:
    given = norm_linear_arguments(torch.float32, 1, 32, [8, 16], "layer", "none,gelu")
    with pytest.raises(ValueError, match="activations is 'none'; allowed: 2 names of none, gelu"):
        norm_linear.norm_linear_gemv(*given[:8], "none", False)
    with pytest.raises(ValueError, match="gated is True; allowed: False, or two weights of one shape"):
        norm_linear.norm_linear_gemv(*given[:9], True)
    with pytest.raises(ValueError, match="norm is 'batch'; allowed: none, layer, rms"):
        norm_linear.norm_linear_gemv(*given[:5], "batch", *given[6:])
    base, x1, w1, *_ = residual_arguments(torch.float32, 1, 8, 32, 0, True)
    with pytest.raises(ValueError, match=r"w1.shape is \(8, 31\); allowed: \[8, 32\]"):
        residual.linear_residual_gemv(base, x1, w1[:, 1:], None, None, None, None)
    with pytest.raises(ValueError, match="x2 is given; allowed: given together with w2"):
        residual.linear_residual_gemv(base, x1, w1, None, x1, None, None)


def test_supports_says_why_not() -> None:
    x, w = torch.ones(1, 32, device=DEVICE), torch.ones(8, 32, device=DEVICE)
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        assert norm_linear.supports(x, [w]) == "Triton has no backend for device 'cpu'"
        return
    assert norm_linear.supports(x, [w]) is None and residual.supports(x, x, w, None, None) is None
    assert "9 rows" in norm_linear.supports(x.expand(9, 32), [w])
    assert "float64" in norm_linear.supports(x.double(), [w])
    assert "4 weights" in norm_linear.supports(x, [w] * 4)
    assert "multiple of 16" in norm_linear.supports(x[:, :30], [w[:, :30]])
    assert "the weight is torch.float32" in norm_linear.supports(x.half(), [w])


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The kernels' arithmetic on a machine without a GPU: this file again, in a process that interprets them."""
    passes_in_interpreter(__file__, select="not opcheck")
