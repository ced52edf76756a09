"""How this package defines an op: Inductor sees through it on a GPU; Triton's interpreter runs it opaque."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torch_fuse._compat import any_tangent, below_autograd, is_plain

try:
    import triton
    import triton.language as tl
    from triton.knobs import runtime as _runtime

    HAS_TRITON = True
except ImportError:  # macOS, Windows, CPU builds of torch: modules still import, ops run their references

    class _NoTriton:
        """Lets `@triton.jit def kernel(..., BLOCK: tl.constexpr)` be read; nothing calls such a kernel."""

        constexpr = object

        @staticmethod
        def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
            return _NoTriton.jit if fn is None else fn

    triton = tl = _NoTriton()
    HAS_TRITON = False

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

if HAS_TRITON and not INTERPRETED:
    from torch.library import wrap_triton
else:

    def wrap_triton(kernel: Any) -> Any:
        """The kernel itself: there is no compiled kernel for torch to see."""
        return kernel


def define_op(name: str, fn: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """Registers `fn`, which writes to the arguments named in `mutates`, as the op `name`.

    Call `register_fake` and `register_autograd` on the result.

    `fn` must pick kernel or reference by the tensors' device *inside its body*: torch decomposes a
    `triton_op` into `fn`'s body wherever it functionalises, also for CPU tensors, so `register_kernel("cpu")`
    alone would not keep a compiled CPU graph away from the launch. Interpreted kernels cannot be traced: they
    are launched from an opaque `custom_op`.

    What is written to is not copied, also when it is an input of the graph. But Inductor may compute what the graph
    makes of the old value after the op, from the new one: let nothing else read the argument before the op does.
    """
    if HAS_TRITON and not INTERPRETED:
        return torch.library.triton_op(name, fn, mutates_args=mutates)
    return torch.library.custom_op(name, fn, mutates_args=mutates)


def define_opaque_op(
    name: str, fn: Callable[..., Any], fake: Callable[..., Any], backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None, mutates: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """Registers `fn` as the op `name` that Inductor only calls; it does not see through it.

    Its launch keeps options that Inductor drops, such as `maxnreg`, and its kernel is not analysed at each launch while
    a model compiles. A call costs a third of one of `torch.library.custom_op`.

    Args:
        name: "namespace::op".
        fn: the op, annotated.
        fake: the results' shapes, strides and dtypes, from fake tensors.
        backward: the gradient, as `torch.library.register_autograd` takes it; without one the op raises
            NotImplementedError where a gradient would be needed: torch would give zeros, or none.
        setup_context: likewise.
        mutates: the arguments, tensors or None, that `fn` writes to. As with `define_op` they are not copied.
    """
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    torch.library.define(name, torch.library.infer_schema(fn, mutates_args=mutates), tags=tags)
    torch.library.impl(name, "CompositeExplicitAutograd")(fn)
    torch.library.register_fake(name)(fake)
    namespace, _, short = name.partition("::")
    op = getattr(getattr(torch.ops, namespace), short).default
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context)
        return op

    written = [list(inspect.signature(fn).parameters).index(argument) for argument in mutates]

    kinds = [str(argument.type) for argument in op._schema.arguments]
    count, singles = len(kinds), [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
    lists = [i for i, kind in enumerate(kinds) if "Tensor" in kind and i not in singles]

    def without_gradients(*args: Any) -> Any:
        given = args if len(args) == count else (*args, *[None] * (count - len(args)))  # what is left to its default
        tensors = [x for i in singles if (x := given[i]) is not None]
        for i in lists:
            tensors += [x for x in given[i] or () if x is not None]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise NotImplementedError(f"{short} has no gradient")
        if any_tangent(tensors):
            raise NotImplementedError(f"{short} has no forward-mode gradient")
        if written:
            increment_version([x for i in written for x in _tensors(args[i]) if not x.is_inference()])
        with below_autograd():  # nothing between here and `fn` for plain tensors: torch need not look for it again
            return fn(*args) if is_plain(tensors) else op(*args)

    torch.library.impl(name, "Autograd")(without_gradients)
    return op


def _tensors(argument: Any) -> Sequence[Tensor]:
    """Those of an argument that is a tensor, None or a list."""
    if isinstance(argument, Tensor):
        return (argument,)
    return [x for x in argument or () if x is not None]


class Launch:
    """A launch of a Triton kernel that can be made again with other tensors, without Triton's 20 us of work on each.

    Everything that is no tensor stays as it is; tensors have to have the shapes, strides, dtypes, devices and
    alignments (to 16 bytes) of those before. Making one launches the kernel.

    Args:
        kernel: a `triton.jit` or `gluon.jit` function, its constants last.
        grid: number of programs.
        arguments: what it is called with, in order, without the constants: tensors, descriptors of tensors, numbers.
        constants: the kernel's constants, and options of the compiler.
    """

    def __init__(self, kernel: Any, grid: int, arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        self._kernel, self._grid = kernel, grid  # the kernel is kept, as its id is a part of `launch`'s keys
        compiled = kernel[(grid,)](*arguments, **constants)
        self._constants = [constants[name] for name in kernel.arg_names[len(arguments) :]]
        self._arguments = self.arguments(arguments)
        self._slots: list[tuple[int, dict[str, Any] | None]] = []
        for i, x in enumerate(arguments):
            if isinstance(x, Tensor) or isinstance(getattr(x, "base", None), Tensor):
                described = None if isinstance(x, Tensor) else {**x.__dict__, "base": None}
                self._slots.append((i, described))
                self._arguments[i] = None if described is None else type(x)  # keeps no tensor alive
        self.slow = kernel[(grid,)] if INTERPRETED else compiled[(grid, 1, 1)]
        if not INTERPRETED:
            self._start, self._function, self._packed = compiled.run, compiled.function, compiled.packed_metadata
            active = triton.runtime.driver.active
            self.current_device, self.stream = active.get_current_device, active.get_current_stream

    def arguments(self, given: Sequence[Any]) -> list[Any]:
        """The arguments with the constants, as `run` takes them."""
        return [*given, *self._constants]

    def again(self, *tensors: Tensor) -> None:
        """Launches the kernel on other tensors, in the order of the first ones, on the current device."""
        arguments = self._arguments.copy()
        for (slot, described), tensor in zip(self._slots, tensors, strict=True):
            arguments[slot] = tensor if described is None else _described(arguments[slot], described, tensor)
        if INTERPRETED or hooked():
            self.slow(*arguments)
        else:
            self.start(arguments, self.stream(self.current_device()))

    def start(self, arguments: Sequence[Any], stream: int) -> None:
        """Launches the kernel on the current device, where nobody wants to be told of it, else `slow` does.

        A tensor may be given by its address: the launcher then calls neither Python nor the driver to find it.
        """
        self._start(self._grid, 1, 1, stream, self._function, self._packed, None, None, None, *arguments)


def hooked() -> bool:
    """Whether someone (a profiler) wants to be told of launches; without, Triton would still prepare to tell it."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


_launches: dict[tuple[Any, ...], Launch] = {}


def launch(kernel: Any, grid: int, arguments: Sequence[Any], constants: dict[str, Any]) -> Launch:
    """Launches a kernel from an opaque op, as a `Launch`, which is kept for all calls of its kind."""
    key = (id(kernel), grid, *map(_kind, arguments), *constants.values())
    known = _launches.get(key)
    if known is not None:
        bases = (x if isinstance(x, Tensor) else getattr(x, "base", None) for x in arguments)
        known.again(*(x for x in bases if isinstance(x, Tensor)))
        return known
    if len(_launches) == 1024:
        _launches.clear()
    _launches[key] = made = Launch(kernel, grid, arguments, constants)
    return made


def _kind(argument: Any) -> Any:
    """What a launch depends on: all but the addresses. A descriptor's other fields say how its tensor is read."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.device, argument.data_ptr() % 16
    base = getattr(argument, "base", None)
    if not isinstance(base, Tensor):
        return argument
    fields = (tuple(x) if isinstance(x, list) else x for name, x in argument.__dict__.items() if name != "base")
    return base.dtype, base.device, *fields


def _described(kind: type, fields: dict[str, Any], base: Tensor) -> Any:
    """A descriptor like another one, of another tensor; its constructor would check all again."""
    new: Any = object.__new__(kind)
    new.__dict__.update(fields)
    new.base = base
    return new


def no_triton(x: Tensor) -> str | None:
    """Why Triton cannot compute on `x`'s device, or None if it can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if INTERPRETED or x.device.type == "cuda":
        return None
    return f"Triton has no backend for device {x.device.type!r}"


def on_device_of(x: Tensor) -> Any:
    """Context in which a launch goes to `x`'s GPU: Triton launches on the *current* device."""
    return torch.cuda.device_of(x)
