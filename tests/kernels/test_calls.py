"""Which calls of an opaque op are made again, and with what."""

import importlib
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from torch_fuse.kernels import _calls, _ops

norm_linear = importlib.import_module("torch_fuse.kernels.norm_linear_gemv")
residual = importlib.import_module("torch_fuse.kernels.linear_residual_gemv")
decode = importlib.import_module("torch_fuse.kernels.decode_attention")
masked = importlib.import_module("torch_fuse.kernels.masked_attention")


class Recorded:
    """In place of `Launch`: keeps what kernels are launched with, tensors as their addresses."""

    current_device, stream = staticmethod(lambda: -1), staticmethod(lambda _: 0)
    first: ClassVar[list[list[Any]]] = []
    again: ClassVar[list[list[Any]]] = []

    def __init__(self, kernel: Any, grid: int, arguments: Any, constants: dict[str, Any]) -> None:
        self._constants = [grid, *map(str, constants.values())]
        self.first.append([x.data_ptr() if isinstance(x, Tensor) else x for x in self.arguments(arguments)])

    def arguments(self, given: Any) -> list[Any]:
        return [*given, *self._constants]

    def start(self, arguments: Any, stream: int) -> None:
        self.again.append(list(arguments))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorded]]:
    if not _ops.HAS_TRITON:
        pytest.skip("needs Triton")
    monkeypatch.setattr(_calls, "launch", Recorded)
    monkeypatch.setattr(_calls, "INTERPRETED", False)
    monkeypatch.setattr(_calls, "hooked", lambda: False)
    for module in (norm_linear, residual, decode, masked):
        monkeypatch.setattr(module, "supports", lambda *_: None)
        monkeypatch.setattr(module, "_calls", _calls.Calls())
    monkeypatch.setattr(Recorded, "first", [])
    monkeypatch.setattr(Recorded, "again", [])
    yield Recorded


def half(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float16)


def norm_linear_call(rows: int, shared: bool = False) -> tuple[Any, ...]:
    weights, biases = [half(8, 32), half(24, 32)], [half(8), None]
    scales, shifts = ([half(32)] * 2 if shared else [half(32), half(32)] for _ in range(2))
    return norm_linear, (half(rows, 32), weights, biases, scales, shifts, "layer", 1e-5, 0.0, "none,gelu", False)


def residual_call(rows: int) -> tuple[Any, ...]:
    return residual, (half(rows, 8), half(rows, 16), half(8, 16), half(8), half(rows, 32), half(8, 32), None)


def decode_call(size: int) -> tuple[Any, ...]:
    q, k, v = half(1, 1, 2, 48).chunk(3, -1)
    caches, mask = [half(1, 2, size, 16) for _ in range(2)], torch.ones(1, 1, 1, size, dtype=torch.bool)
    tables = [half(1, 1, 4) for _ in range(2)]
    return decode, (q, k, v, *tables, *caches, torch.tensor(3), None, mask, 4, False, [1, 0, 2], [1, 0, 2], 0.25)


def masked_call() -> tuple[Any, ...]:
    q, k, v = (x.transpose(1, 2) for x in half(1, 64, 3, 2, 32).unbind(2))
    return masked, (q, k, v, torch.ones(1, 64, dtype=torch.bool), torch.zeros(1, 3), 3, 0, 0.25, 0.0, half(2))


MAKE: dict[str, Callable[[], tuple[Any, ...]]] = {
    "norm_linear": lambda: norm_linear_call(1),
    "norm_linear, one norm": lambda: norm_linear_call(1, True),
    "norm_linear, rows": lambda: norm_linear_call(3),
    "norm_linear, rows of one norm": lambda: norm_linear_call(3, True),
    "linear_residual": lambda: residual_call(1),
    "linear_residual, rows": lambda: residual_call(2),
    "decode, few keys": lambda: decode_call(16),
    "decode, many keys": lambda: decode_call(1024),
    "masked": masked_call,
}


@pytest.mark.parametrize("name", MAKE)
def test_a_call_that_is_made_again_launches_what_it_would_have_the_first_time(name: str, recorded: Any) -> None:
    """But for the addresses of what it allocates, which are the results' and those of memory between launches."""
    keep = [MAKE[name]() for _ in range(2)]
    module, arguments = keep[1]
    module._forward(*keep[0][1])
    recorded.first.clear()
    results = module._forward(*arguments)
    assert recorded.again and not recorded.first, "made again"
    module._calls = _calls.Calls()
    wanted = module._forward(*arguments)
    assert len(recorded.first) == len(recorded.again)
    allocated: dict[Any, Any] = {}
    for first, again in zip(recorded.first, recorded.again, strict=True):
        assert len(first) == len(again)
        for x, y in zip(first, again, strict=True):
            if x != y:
                assert allocated.setdefault(x, y) == y, "the same memory in each place"
    assert len(set(allocated.values())) == len(allocated)

    flat, flat_wanted = ([r] if isinstance(r, Tensor) else [*r] for r in (results, wanted))
    assert type(results) is type(wanted)
    for x, y in zip(flat, flat_wanted, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        assert allocated[y.data_ptr()] == x.data_ptr()
    given = {x.data_ptr() for x in _tensors(arguments)}
    assert not given & {*allocated, *allocated.values()}, "what is given is read where it is"


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list):
            yield from _tensors(x)


def shifted(x: Tensor) -> Tensor:
    """The same at an address that is no multiple of 16."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


CHANGES: dict[str, Callable[[Tensor, Tensor], tuple[Any, ...]]] = {
    "shape of the first": lambda x, w: (x[:2], w),
    "shape": lambda x, w: (x, w[:, :8]),
    "strides": lambda x, w: (x, w.t().contiguous().t()),
    "strides of the first": lambda x, w: (x.t().contiguous().t(), w),
    "dtype": lambda x, w: (x, w.bfloat16()),
    "device": lambda x, w: (x, w.to("meta")),
    "alignment": lambda x, w: (x, shifted(w)),
    "absent": lambda x, w: (x, None),
    "the same tensor twice": lambda x, w: (x, x),
}


@pytest.mark.parametrize("name", [*CHANGES, "option"])
def test_a_call_that_differs_in_a_fact_is_made_for_the_first_time(name: str, recorded: Any) -> None:
    calls, made = _calls.Calls(), []

    def first(call: _calls.Call, *given: Tensor | None) -> Tensor:
        made.append(given)
        out = call.empty((4,), torch.float16)
        call.launch(None, 1, [*[x for x in given if x is not None], out], {})
        return out

    x, w = half(16, 16), half(16, 16)
    for given in ((x, w), (x.clone(), w.clone())):
        calls.make(given, (1,), first, *given)
    assert len(made) == 1
    changed = (x, w) if name == "option" else CHANGES[name](x, w)
    calls.make(changed, (2 if name == "option" else 1,), first, *changed)
    assert len(made) == 2
    calls.make((x, w), (1,), first, x, w)
    assert len(made) == 2, "the first kind is still known"


def test_what_reads_a_copy_of_an_argument_is_not_made_again(recorded: Any) -> None:
    module, (x, *rest) = norm_linear_call(2)
    spread = half(32, 2).t()
    for _ in range(2):
        module._forward(spread, *rest)
    assert len(recorded.first) == 4 and not recorded.again
    assert x.shape == spread.shape


def test_lists_of_other_lengths_are_refused_though_the_tensors_are_the_same(recorded: Any) -> None:
    w, v = [half(32, 32) for _ in range(2)], [half(32) for _ in range(6)]
    options = ("layer", 1e-5, 0.0, "none,none", False)
    norm_linear._forward(half(1, 32), w, v[:2], v[2:4], v[4:], *options)
    with pytest.raises(ValueError, match="len"):
        norm_linear._forward(half(1, 32), w, v[:1], v[1:4], v[4:], *options)


def test_a_changed_configuration_is_used(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, arguments = norm_linear_call(1)
    norm_linear._forward(*arguments)
    monkeypatch.setattr(norm_linear, "config", lambda *_: norm_linear.Config(2, 8))
    norm_linear._forward(*arguments)
    assert len(recorded.first) == 2 and not recorded.again


def test_no_tensor_is_kept_alive(recorded: Any) -> None:
    module, arguments = residual_call(1)
    result = module._forward(*arguments)
    alive = [weakref.ref(x) for x in (result, *_tensors(arguments))]
    del result, arguments
    assert module._calls._known and not any(x() is not None for x in alive)


def test_a_launch_that_someone_wants_to_be_told_of_goes_through_triton(recorded: Any, monkeypatch: Any) -> None:
    told: list[Any] = []
    monkeypatch.setattr(recorded, "slow", lambda _, *arguments: told.append(arguments), raising=False)
    for hooks in (False, True):
        monkeypatch.setattr(_calls, "hooked", lambda hooks=hooks: hooks)
        for _ in range(2):
            residual._forward(*residual_call(1)[1])
    assert (len(recorded.first), len(recorded.again), len(told)) == (1, 1, 2)
    chain = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=None)
    monkeypatch.setattr(_ops, "_runtime", chain)
    assert not _ops.hooked()
    chain.launch_enter_hook.calls.append(print)
    assert _ops.hooked()


def test_results_of_inference_mode_are_as_torch_makes_them(recorded: Any) -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for _ in range(2):
                out = residual._forward(*residual_call(1)[1])
                assert out.is_inference() == torch.is_inference_mode_enabled() and not out.requires_grad


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_call_goes_to_the_gpu_of_its_tensors() -> None:
    module, arguments = residual_call(1)
    wanted = module.reference(*arguments)
    for device in ("cuda:0", "cuda:1") * 2:
        found = module.linear_residual_gemv(*(None if x is None else x.to(device) for x in arguments))
        assert found.device == torch.device(device)
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not (torch.cuda.is_available() or _ops.INTERPRETED), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("name", MAKE)
def test_another_call_computes_what_the_first_one_of_its_kind_would(name: str) -> None:
    device = "cpu" if _ops.INTERPRETED else "cuda"

    def copied(x: Any) -> Any:
        return x.to(device, copy=True) if isinstance(x, Tensor) else [*map(copied, x)] if isinstance(x, list) else x

    (module, first), (_, second) = MAKE[name](), MAKE[name]()
    if module is masked:
        first, second = ((*x[:4], masked.key_range(x[3]), *x[5:]) for x in (first, second))
    op = getattr(module, module.__name__.rpartition(".")[2])
    module._calls._known.clear()
    op(*copied([*first]))
    found, known = op(*copied([*second])), len(module._calls._known)
    module._calls._known.clear()
    wanted = op(*copied([*second]))
    assert known == 1
    for x, y in zip(*([r] if isinstance(r, Tensor) else r for r in (found, wanted)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The test above on a machine without a GPU, in a process that interprets the kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", "computes", __file__]
    found = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
