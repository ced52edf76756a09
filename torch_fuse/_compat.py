"""Every private or version-dependent part of torch that the package relies on, in one place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import sympy
import torch
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_or_false, statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "FakeTensorMode",
    "ShapeEnv",
    "allocator",
    "any_tangent",
    "below_autograd",
    "cache_directory",
    "cache_tag",
    "compile_with_inductor",
    "cudnn_attention",
    "fake_mode_of",
    "flash_attention",
    "is_plain",
    "is_traceable_wrapper_subclass",
    "known_true",
    "likely",
    "no_guards",
    "op_overload",
    "outside_tracing",
    "real_input",
    "same_metadata",
    "sdpa_pick",
    "sdpa_settings",
    "trace_artifact",
    "trace_operators",
    "unset_fake_temporarily",
    "uses_cuda_graphs",
]


below_autograd = torch._C._AutoDispatchBelowAutograd  # a context: ops are dispatched as if autograd was done with them

# The operators that SDPA becomes on a GPU; the result is the first of what they return.
cudnn_attention = torch.ops.aten._scaled_dot_product_cudnn_attention.default
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention.default


def allocator(device: torch.device) -> Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]:
    """`torch.empty_strided` on a device, the current one, as Inductor's code calls it: in a third of the time."""
    found = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if device.type in ("cpu", "cuda") and found is not None:
        return cast("Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor]", found)
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def is_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no mode, function transform, subclass or negative bit has a say in what an op on these tensors does."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return _PLAIN.issuperset(map(type, tensors)) and not any(map(torch.Tensor.is_neg, tensors))


def same_metadata(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Tells whether as many other tensors have the same types, shapes, strides, dtypes and devices in turn.

    None may be there twice. Dynamo's own check, which takes a tenth of the time of comparing them in Python. It also
    tells tensors with `requires_grad` from those without, and does not keep the tensors.
    """
    sizes: Any = [list(x.shape) for x in tensors]
    strides: Any = [list(x.stride()) for x in tensors]
    checks = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return cast("Callable[..., bool]", checks.check)


def any_tangent(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a forward-mode derivative is asked for."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def fake_mode_of(gm: GraphModule) -> FakeTensorMode | None:
    """The fake mode that a graph's example values belong to (Dynamo gives the backend another one)."""
    for node in gm.graph.nodes:
        value = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def real_input(node: torch.fx.Node) -> torch.Tensor | None:
    """The tensor that an input of a Dynamo graph has while it is compiled, or None when it is not known."""
    found = getattr(node.meta.get("grapharg"), "example", None)
    known = isinstance(found, torch.Tensor) and not isinstance(found, FakeTensor) and not found.is_meta
    return found if known else None


def op_overload(target: Any) -> Any:
    """What a graph calls for a custom op's definition; anything else as it is."""
    return target._opoverload if isinstance(target, CustomOpDef) else target


def known_true(condition: Any, shape_env: ShapeEnv | None) -> bool:
    """Whether a sympy condition over size symbols holds for all sizes; never installs a guard."""
    if condition in (True, sympy.true):
        return True
    if condition in (False, sympy.false):
        return False
    if shape_env is None:
        return False
    return statically_known_true(shape_env.create_symboolnode(condition))


def likely(condition: Any) -> bool:
    """Whether a condition over sizes holds for those that were traced; not if nothing is known of them.

    Call it in `no_guards` where sizes are symbols.
    """
    return condition if isinstance(condition, bool) else guard_or_false(condition)


@contextlib.contextmanager
def no_guards(mode: FakeTensorMode | None) -> Iterator[None]:
    """Runs fake tensors without recording guards."""
    with contextlib.ExitStack() as stack:
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
        yield


@contextlib.contextmanager
def cache_tag(tag: str) -> Iterator[None]:
    """Adds `tag` to the keys of torch's compile caches, so that changed sources never meet stale entries."""
    config = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag}{tag}"):  # type: ignore[attr-defined]
        yield


def compile_with_inductor(gm: GraphModule, example_inputs: list[Any], patches: dict[str, Any]) -> Any:
    """Compiles a Dynamo graph with Inductor."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs, config_patches=patches or None)


def trace_artifact(name: str, payload: Any) -> None:
    """Writes a JSON artifact to torch's structured trace (`TORCH_TRACE`, read by tlparse)."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=lambda: payload)


def cache_directory() -> Path:
    """Inductor's cache directory: `TORCHINDUCTOR_CACHE_DIR`, or the user's among the system's temporary files."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()).absolute()


def uses_cuda_graphs(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor records CUDA graphs, with these options on top of its configuration."""
    import torch._inductor.config as config

    return bool(patches.get("triton.cudagraphs", config.triton.cudagraphs))


def sdpa_pick(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float, gqa: bool) -> str:
    """The backend that SDPA takes for these tensors: "math", "flash_attention", "cudnn_attention", ..."""
    number: Any = torch._fused_sdp_choice(q, k, v, None, 0.0, is_causal, scale=scale, enable_gqa=gqa)
    names = {int(cast(Any, member)): name for name, member in torch._C._SDPBackend.__members__.items()}
    return names.get(int(number), str(number)).lower()


def sdpa_settings() -> str:
    """What the user has set of SDPA's choice: the backends that are on, their order, another flash-attention."""
    import torch.nn.attention as attention

    order: list[int] = getattr(torch._C, "_get_sdp_priority_order", list)()
    on = [name for name in ("flash", "mem_efficient", "cudnn", "math") if _sdpa_backend_is_on(name)]
    flash = getattr(attention, "current_flash_attention_impl", lambda: None)()
    deterministic = torch.are_deterministic_algorithms_enabled()
    return f"{'+'.join(on)} {order} {flash} {'deterministic' if deterministic else ''}".strip()


def _sdpa_backend_is_on(name: str) -> bool:
    return bool(getattr(torch.backends.cuda, f"{name}_sdp_enabled")())


@contextlib.contextmanager
def outside_tracing(gradients: bool) -> Iterator[None]:
    """Ops compute, whatever is being traced: no fake mode, no inference mode, no autocast; gradients if wanted."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast("cuda", enabled=False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        yield


def trace_operators(fn: Any, inputs: Sequence[torch.Tensor]) -> GraphModule:
    """The ATen operators that a function calls on fake tensors, which stand in their nodes' `meta["val"]`."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(fn)(*inputs)
