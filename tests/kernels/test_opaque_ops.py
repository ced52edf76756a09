"""What every opaque op does with gradients, transforms and modes, and when a launch is made again."""

import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fuse import Options
from torch_fuse._compat import fake_mode_of, no_guards
from torch_fuse.kernels import _ops
from torch_fuse.report import Report
from torch_fuse.rewrite.engine import rewrite
from torch_fuse.rewrite.registry import patterns

masked = importlib.import_module("torch_fuse.kernels.masked_attention")
dense = importlib.import_module("torch_fuse.kernels.dense_attention")
in_memory = importlib.import_module("torch_fuse.kernels.in_memory")


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 2, 9, 80) for _ in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense.dense_attention(q, k, v, True, 0.1)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_gradient_through_a_compiled_call_is_refused_not_lost(backend: str) -> None:
    q, k, v = tensors()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="dense_attention has no gradient"):
        torch.compile(attend, backend=backend)(q.requires_grad_(), k, v).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(attend, backend=backend)(q, k, v), attend(q, k, v))


def test_function_transforms_do_not_get_a_gradient_of_zero() -> None:
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match="dense_attention has no gradient"):
        torch.func.grad(lambda x: attend(x, k, v).sum())(q)
    with pytest.raises(NotImplementedError, match="dense_attention has no forward-mode gradient"):
        torch.func.jvp(lambda x: attend(x, k, v), (q,), (torch.ones_like(q),))
    with pytest.raises(NotImplementedError, match="in_memory has no forward-mode gradient"):
        torch.func.jvp(in_memory.in_memory, (q,), (torch.ones_like(q),))
    many = torch.stack([q, 2 * q])
    torch.testing.assert_close(
        torch.vmap(lambda x: attend(x, k, v))(many), torch.stack([attend(x, k, v) for x in many])
    )


def test_all_kinds_of_tensors_take_the_same_way() -> None:
    q, k, v = tensors()
    wanted = attend(q, k, v)
    with torch.inference_mode():
        assert torch.equal(attend(*(x.clone() for x in (q, k, v))), wanted)
    with torch.no_grad():
        assert torch.equal(attend(torch.nn.Parameter(q), k, v), wanted)
    assert attend(*(x.to("meta") for x in (q, k, v))).shape == wanted.shape
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert attend(*(mode.from_tensor(x) for x in (q, k, v))).stride() == wanted.stride()


def test_a_negative_bit_is_not_lost() -> None:
    """The imaginary part of a conjugate lies in memory with the other sign; only torch's dispatcher sees to it."""
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x.is_neg())
        return x.clone()

    op = _ops.define_opaque_op("torch_fuse_tests::look", look, torch.empty_like)
    z = torch.complex(torch.zeros(3), torch.arange(3.0))
    assert op(z.conj().imag).tolist() == [0, -1, -2] and op(z.imag).tolist() == [0, 1, 2]
    assert seen == [False, False]


def test_the_memory_engine_is_not_asked_to_read_from_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptors begin at multiples of 16 bytes; which a tensor's first element does, only the call knows."""
    monkeypatch.setattr(dense, "hopper_config", lambda *_: (dense._TWO_A_SM, ""))
    for offset, found in ((0, True), (8, True), (1, False), (4, False)):
        x = torch.empty(offset + 2 * 64 * 80, dtype=torch.float16)[offset:].view(1, 2, 64, 80)
        aligned = torch.empty(1, 2, 64, 80, dtype=torch.float16)
        for arguments in ((x, aligned, aligned), (aligned, x, aligned), (aligned, aligned, x)):
            assert (dense.hopper_config_now(*arguments, True) is not None) == found


@pytest.mark.skipif(not _ops.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    ("parts", "config", "is_causal"),
    [
        ((64, 16), {"groups": 1, "maxnreg": 128}, True),
        ((64, 0), {"groups": 2, "block_n": 64, "stages": 4}, False),
        ((128, 0), {"turns": True}, True),
        ((64, 16), {"groups": 1, "maxnreg": 128, "lazy": False, "order": False}, True),
    ],
)
def test_the_hopper_kernel_compiles_with_this_triton(parts: tuple[int, int], config: dict, is_causal: bool) -> None:
    """Without a GPU; a name that Gluon no longer has would otherwise be noticed at the first call on one.

    All exponentials of a tile are to be between the wait for its scores and the wait for the products with the values
    before, or they do not run under these products: ptxas moves the second wait, and only the machine code shows it.
    """
    kernel = importlib.import_module("torch_fuse.kernels._hopper_flash_kernel")
    if kernel.MISSING or _ops.INTERPRETED:
        pytest.skip(kernel.MISSING or "interpreted")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    module = importlib.import_module("torch_fuse.kernels._hopper_flash")
    chosen, gl, (d1, d2) = module.Config(**config), module.gl, parts

    def descriptor(rows: int, lanes: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, lanes], gl.bfloat16)
        return f"tensordesc<bf16[1, 1, {rows}, {lanes}],{layout!r}>"

    known = {"H": 4, "HEADS_OF_KEY": 2, "CAUSAL": is_causal, "D1": d1, "D2": d2, **module.constants(chosen)}
    options = {name: known.pop(name) for name in ("num_warps", "maxnreg") if name in known}
    if not d2:
        known |= {"q2": None, "k2": None, "v2": None}
    kinds = {"out": "*bf16", "log2_scale": "fp32"}
    for name, rows in (("q", 64), ("k", chosen.block_n), ("v", chosen.block_n)):
        kinds |= {f"{name}1": descriptor(rows, d1), f"{name}2": descriptor(rows, d2 or d1)}
    names = module.kernel.arg_names
    signature = {name: "constexpr" if name in known else kinds.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in known.items()}
    source = GluonASTSource(fn=module.kernel, signature=signature, constexprs=constants)
    assert source.hash()
    compiled = _ops.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    if not chosen.order:
        assert "STL" not in compiled.asm["sass"]
        return
    found = re.findall(r"DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2|STL|LDL", compiled.asm["sass"])
    kinds = {"M": "e", "S": "s", "L": "s"}
    events = "".join(kinds.get(x[0], "0" if x[-1] == "0" else "n") for x in found)
    under = [re.sub(".*n", "", span, count=1) for span in events.split("0")]
    under = [span for span in under if span.count("e") >= chosen.block_n // 2]
    assert len(under) == chosen.groups, events
    assert not any("s" in span for span in under), events  # a spill


@pytest.mark.parametrize("unbacked", [False, True])
@pytest.mark.parametrize("dim", [48, 80, 128])
def test_a_length_that_is_not_known_yet_is_no_error(dim: int, unbacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither whether it is long nor whether it is at least a tile; the call finds out. No guard is installed."""
    monkeypatch.setattr(dense._hopper_flash, "MISSING", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    linear = nn.Linear(32, 6 * dim, dtype=torch.bfloat16)
    guards, report = [], Report()

    def backend(gm: torch.fx.GraphModule, _: object):
        mode = fake_mode_of(gm)
        before = len(mode.shape_env.guards)
        with monkeypatch.context() as patched:
            patched.setattr("torch_fuse.kernels._attention_arguments.no_triton", lambda _: None)
            outcome = rewrite(gm, Options(on_error="raise"), patterns())
        guards.append(len(mode.shape_env.guards) - before)
        report.graphs.append(outcome.report)
        for node in gm.graph.nodes:
            if node.target is F.scaled_dot_product_attention:
                q, k, v = (arg.meta["example_value"] for arg in node.args)
                with no_guards(mode), monkeypatch.context() as patched:
                    patched.setattr(type(q), "is_cuda", True)
                    assert (dense.hopper_config(q, k, v, True)[0] is not None) == (dim == 128)
                    patched.setattr("torch_fuse.kernels._attention_arguments.no_triton", lambda _: None)
                    assert masked.supports(q, k, v) is None
        return outcome.gm.forward

    def forward(x: Tensor) -> Tensor:
        q, k, v = linear(x).view(x.shape[0], x.shape[1], 2, 3 * dim).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch._dynamo.reset()
    x = torch.randn(2, 600, 32, dtype=torch.bfloat16)
    if unbacked:
        torch._dynamo.decorators.mark_unbacked(x, 1)
    with torch.no_grad():
        torch.compile(forward, backend=backend, dynamic=None if unbacked else True)(x)
    assert guards == [0] and not any(graph.error for graph in report.graphs), str(report)


def test_what_an_op_writes_to_is_seen_to_have_changed() -> None:
    decode = importlib.import_module("torch_fuse.kernels.decode_attention").decode_attention
    q, cache = torch.randn(1, 1, 2, 16), [torch.zeros(1, 2, 8, 16) for _ in range(2)]
    length, mask = torch.tensor(3), torch.ones(1, 1, 1, 8, dtype=torch.bool)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            written = [x.clone() for x in (*cache, length)]
            before = None if written[0].is_inference() else [x._version for x in written]
            decode(q, q, q, None, None, *written, None, mask, 0, False, [], [], 1.0)
            assert torch.equal(written[0][:, :, 3], q[:, 0]) and written[2] == 4
            assert before is None or all(x._version > old for x, old in zip(written, before, strict=True))
    with pytest.raises(NotImplementedError, match="decode_attention has no gradient"):
        decode(q.requires_grad_(), q, q, None, None, *cache, length, None, mask, 0, False, [], [], 1.0)
    assert length == 3, "refused before anything is written"
