"""Every private or version-dependent part of torch that the package relies on, in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

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
    "any_tangent",
    "below_autograd",
    "cache_tag",
    "compile_with_inductor",
    "fake_mode_of",
    "is_plain",
    "is_traceable_wrapper_subclass",
    "known_true",
    "likely",
    "no_guards",
    "op_overload",
    "real_input",
    "trace_artifact",
    "trace_operators",
    "unset_fake_temporarily",
]


below_autograd = torch._C._AutoDispatchBelowAutograd  # a context: ops are dispatched as if autograd was done with them


def is_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no mode, function transform or subclass has a say in what an op on these tensors does."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(x) is torch.Tensor or type(x) is torch.nn.Parameter for x in tensors)


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


def trace_operators(fn: Any, inputs: Sequence[torch.Tensor]) -> GraphModule:
    """The ATen operators that a function calls on fake tensors, which stand in their nodes' `meta["val"]`."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(fn)(*inputs)
