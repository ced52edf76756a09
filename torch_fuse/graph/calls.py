"""What a node calls, whatever its spelling: `x + y`, `torch.add(x, y)`, `x.add(y)` and `x += y` are all `add`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

REQUIRED: Any = object()

# One line an operator: canonical name, canonical arguments, defaults. `*name` takes a tuple or varargs.
_SIGNATURES = """
add(input, other, *, alpha=1)
sub(input, other, *, alpha=1)
rsub(other, input, *, alpha=1)
mul(input, other)
div(input, other, *, rounding_mode=None)
floordiv(input, other)
neg(input)
abs(input)
pow(input, exponent)
square(input)
sqrt(input)
rsqrt(input)
reciprocal(input)
exp(input)
sigmoid(input)
tanh(input)
erf(input)
cos(input)
sin(input)
gelu(input, approximate='none')
silu(input, inplace=False)
relu(input, inplace=False)
mean(input, dim=None, keepdim=False, *, dtype=None)
sum(input, dim=None, keepdim=False, *, dtype=None)
softmax(input, dim=None, _stacklevel=3, dtype=None)
dropout(input, p=0.5, training=True, inplace=False)
lerp(input, end, weight)
addcmul(input, tensor1, tensor2, *, value=1)
linear(input, weight, bias=None)
matmul(input, other)
addmm(input, mat1, mat2, *, beta=1, alpha=1)
baddbmm(input, batch1, batch2, *, beta=1, alpha=1)
layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-05, cudnn_enable=True)
rms_norm(input, normalized_shape, weight=None, eps=None)
scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *,
    scale=None, enable_gqa=False)
contiguous(input, *, memory_format=None)
clone(input, *, memory_format=None)
view(input, *size)
reshape(input, *shape)
reshape_as(input, other)
view_as(input, other)
flatten(input, start_dim=0, end_dim=-1)
unflatten(input, dim, sizes)
transpose(input, dim0, dim1)
permute(input, *dims)
t(input)
numpy_T(input)
unsqueeze(input, dim)
squeeze(input, dim=None)
expand(input, *size)
expand_as(input, other)
repeat(input, *repeats)
repeat_interleave(input, repeats, dim=None, *, output_size=None)
chunk(input, chunks, dim=0)
split(input, split_size_or_sections, dim=0)
tensor_split(input, indices_or_sections, dim=0)
unbind(input, dim=0)
select(input, dim, index)
narrow(input, dim, start, length)
getitem(input, index)
setitem(input, index, value)
view_as_complex(input)
view_as_real(input)
complex(real, imag)
polar(abs, angle)
cat(tensors, dim=0)
stack(tensors, dim=0)
empty_like(input, *, dtype=None, layout=None, device=None, requires_grad=False, memory_format=None)
zeros_like(input, *, dtype=None, layout=None, device=None, requires_grad=False, memory_format=None)
ones_like(input, *, dtype=None, layout=None, device=None, requires_grad=False, memory_format=None)
full_like(input, fill_value, *, dtype=None, layout=None, device=None, requires_grad=False, memory_format=None)
empty(*size, dtype=None, layout=None, device=None, requires_grad=False, pin_memory=False, memory_format=None)
new_empty(input, *size, dtype=None, layout=None, device=None, requires_grad=False, pin_memory=False)
zeros(*size, dtype=None, layout=None, device=None, requires_grad=False, pin_memory=False)
ones(*size, dtype=None, layout=None, device=None, requires_grad=False, pin_memory=False)
full(size, fill_value, *, dtype=None, layout=None, device=None, requires_grad=False, pin_memory=False)
new_zeros(input, *size, dtype=None, layout=None, device=None, requires_grad=False, pin_memory=False)
new_ones(input, *size, dtype=None, layout=None, device=None, requires_grad=False, pin_memory=False)
new_full(input, size, fill_value, *, dtype=None, layout=None, device=None, requires_grad=False)
index_copy(input, dim, index, source)
where(condition, input, other)
masked_fill(input, mask, value)
tril(input, diagonal=0)
triu(input, diagonal=0)
diff(input, n=1, dim=-1, prepend=None, append=None)
cumsum(input, dim, *, dtype=None)
eq(input, other)
ne(input, other)
lt(input, other)
le(input, other)
gt(input, other)
ge(input, other)
and(input, other)
or(input, other)
xor(input, other)
not(input)
"""

# Names of arguments that differ between the function and the method.
_RENAMED = {"split_size": "split_size_or_sections"}

_CAST_METHODS = ("to", "type", "type_as", "float", "half", "bfloat16", "double", "bool", "int", "long")

# Spellings that are not simply torch.<name>, F.<name> or Tensor.<name>.
_ALIASES: dict[str, tuple[str | Callable[..., Any], ...]] = {
    "add": (operator.add,),
    "sub": (operator.sub, "subtract"),
    "mul": (operator.mul, "multiply"),
    "div": (operator.truediv, "divide", "true_divide"),
    "floordiv": (operator.floordiv, "floor_divide"),
    "neg": (operator.neg, "negative"),
    "abs": (operator.abs, abs, "absolute"),
    "pow": (operator.pow,),
    "matmul": (operator.matmul, "bmm", "mm"),
    "getitem": (operator.getitem,),
    "setitem": (operator.setitem,),
    "transpose": ("swapaxes", "swapdims"),
    "cat": ("concat", "concatenate"),
    "eq": (operator.eq,),
    "ne": (operator.ne, "not_equal"),
    "lt": (operator.lt, "less"),
    "le": (operator.le, "less_equal"),
    "gt": (operator.gt, "greater"),
    "ge": (operator.ge, "greater_equal"),
    "and": (operator.and_, "logical_and", "bitwise_and"),
    "or": (operator.or_, "logical_or", "bitwise_or"),
    "xor": (operator.xor, "logical_xor", "bitwise_xor"),
    "not": (operator.invert, operator.not_, "logical_not", "bitwise_not"),
}
_IN_PLACE: dict[Callable[..., Any], str] = {
    operator.iadd: "add",
    operator.isub: "sub",
    operator.imul: "mul",
    operator.itruediv: "div",
    operator.iand: "and",
    operator.ior: "or",
}


@dataclass(frozen=True)
class Call:
    """A node's operator and its arguments by canonical name, defaults filled in."""

    op: str
    args: Mapping[str, Any]
    inplace: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.args[name]


@dataclass(frozen=True)
class _Signature:
    positional: tuple[str, ...]
    variadic: str | None
    defaults: Mapping[str, Any]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        bound = dict(self.defaults)
        fixed = len(self.positional)
        bound.update(zip(self.positional, args[:fixed], strict=False))
        rest = args[fixed:]
        if rest:
            if self.variadic is None:
                return None
            bound[self.variadic] = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        for given, value in kwargs.items():
            name = _RENAMED.get(given, given)
            if name not in bound:
                return None
            bound[name] = value
        return None if any(value is REQUIRED for value in bound.values()) else bound


@cache
def _signatures() -> dict[str, _Signature]:
    table: dict[str, _Signature] = {}
    text = _SIGNATURES.strip().replace(",\n    ", ", ")
    for line in text.splitlines():
        name, _, rest = line.partition("(")
        function = ast.parse(f"def _({rest}: pass").body[0]
        assert isinstance(function, ast.FunctionDef)
        spec = function.args
        positional = tuple(a.arg for a in spec.args)
        defaults = dict.fromkeys(positional, REQUIRED)
        for argument, default in zip(spec.args[::-1], spec.defaults[::-1], strict=False):
            defaults[argument.arg] = ast.literal_eval(default)
        for argument, default_or_none in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
            defaults[argument.arg] = ast.literal_eval(default_or_none) if default_or_none else REQUIRED
        if spec.vararg:
            defaults[spec.vararg.arg] = REQUIRED
        table[name] = _Signature(positional, spec.vararg.arg if spec.vararg else None, defaults)
    return table


@cache
def _functions() -> dict[Any, str]:
    """Every known callable, and every known method name, with its canonical operator."""
    table: dict[Any, str] = {}
    for op in _signatures():
        for spelling in (op, *_ALIASES.get(op, ())):
            if not isinstance(spelling, str):
                table[spelling] = op
                continue
            for namespace in (torch, F, torch._C._nn, torch.functional):
                if callable(function := getattr(namespace, spelling, None)):
                    table[function] = op
            if hasattr(torch.Tensor, spelling):
                table[spelling] = op
                table[getattr(torch.Tensor, spelling)] = op
    for name in _CAST_METHODS:
        table[name] = "cast"
    for unusable in (torch.dropout,):
        table.pop(unusable, None)
    return table


def _method(name: str) -> tuple[str | None, bool, bool]:
    """The operator of a method name, whether it is in place, and whether its operands are swapped (`__rsub__`)."""
    if name.startswith("__") and name.endswith("__"):
        bare = {"setitem": "setitem", "getitem": "getitem", "truediv": "div", "invert": "not"}
        inner = name[2:-2]
        op = _functions().get(bare.get(inner, inner)) or (inner if inner in ("and", "or", "xor") else None)
        if op is not None or len(inner) < 2 or inner[0] not in "ir":
            return op, False, False
        op, _, _ = _method(f"__{inner[1:]}__")
        return op, inner[0] == "i", inner[0] == "r"
    op = _functions().get(name)
    if op is None and name.endswith("_"):
        return _functions().get(name[:-1]), True, False
    return op, False, False


def _changes_meaning(op: str, bound: Mapping[str, Any]) -> bool:
    """Whether an argument makes it another operator: a division that rounds, a view as another dtype."""
    if op == "div":
        return bound["rounding_mode"] is not None
    size = bound.get("size")
    return op == "view" and any(isinstance(s, torch.dtype) for s in (size if isinstance(size, tuple) else (size,)))


def call_of(node: Any) -> Call | None:
    """The canonical call of `node`; None for inputs, constants and everything that is not understood."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    target, args = node.target, tuple(node.args)
    inplace = False
    op = None
    if node.op == "call_method":
        op, inplace, swapped = _method(str(target))
        if swapped and len(args) == 2:
            args = (args[1], args[0])
        if op == "softmax":
            args = (*args[:2], 3, *args[2:])
    elif isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace, _, name = str(target).partition(".")
        name = name.partition(".")[0]
        op = name if namespace == "aten" and name in _signatures() else None
    elif callable(target):
        try:
            op = _functions().get(target)
        except TypeError:  # unhashable callable
            op = None
        if op is None and target in _IN_PLACE:
            op, inplace = _IN_PLACE[target], True
    if op is None:
        return None
    if op == "cast":
        return Call(op, {"input": args[0]}) if args else None
    bound = _signatures()[op].bind(args, node.kwargs)
    if bound is None or _changes_meaning(op, bound):
        return None
    return Call(op, bound, inplace or bound.get("inplace") is True)
