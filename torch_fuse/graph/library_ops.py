"""Products that quantisation libraries have as operators of their own, which show no operators: by name.

Where such an operator dequantises the weight and multiplies, it is spelled so; where it reads the codes itself, as a
fused op does, the reason why it stays is said. Names, arguments and meanings: optimum-quanto 0.2.7
(`library/qbytes_mm.py`), bitsandbytes 0.50 (`_ops.py`), torchao 0.18, diffusers 0.42.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Graph, Node

from torch_fuse._compat import unset_fake_temporarily
from torch_fuse.graph.miss import Kept
from torch_fuse.graph.values import tensor

_READS_CODES = "reads the codes itself, and is not measured to be the slower one"
_QUANTISES = "multiplies quantised activations, whose rounding a weight-only product would leave out"
_KEPT = {
    "bitsandbytes.gemm_4bit": _READS_CODES,
    "bitsandbytes.gemv_4bit": _READS_CODES,
    "bitsandbytes.int8_mixed_scaled_mm": _QUANTISES,
    "bitsandbytes.int8_scaled_mm": _QUANTISES,
    "bitsandbytes.int8_linear_matmul": _QUANTISES,
    "quanto.gemm_f16i4_awq": _READS_CODES,
    "quanto.gemm_f16i4_marlin": _READS_CODES,
    "quanto.gemm_f16f8_marlin": _READS_CODES,
    "aten._weight_int4pack_mm": _READS_CODES,
    "aten._weight_int4pack_mm_for_cpu": _READS_CODES,
    "aten._weight_int8pack_mm": _READS_CODES,
    "aten._scaled_mm": _QUANTISES,
    "aten._int_mm": _QUANTISES,
}


def library_product(node: Node) -> str | None:
    """The name of a library's product, without its overload; None for anything else."""
    if node.op != "call_function" or not isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return None
    name = ".".join(str(node.target).split(".")[:2])
    return name if name in _KEPT else None


def check_not_kept(node: Node) -> None:
    """Raises Kept for a product that stays as it is, with the reason."""
    name = library_product(node)
    if name is not None:
        raise Kept(f"{name.replace('.', '::')} {_KEPT[name]}", node)


@functools.cache
def _is_as_spelled(device: torch.device, kind: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the product with an identity gives the bits of the scaled codes, on a device."""
    with unset_fake_temporarily(), torch.no_grad():
        codes = torch.arange(-64.0, 64.0, device=device).view(4, 32).to(kind)
        scale = torch.linspace(0.013, 2, 4, device=device).to(dtype).view(4, 1)
        found = torch.ops.quanto.qbytes_mm(torch.eye(32, device=device, dtype=dtype), codes, scale)
        return torch.equal(found, (scale * codes.to(dtype)).t())


def spell_qbytes_mm(graph: Graph, node: Node) -> None:
    """Spells `quanto::qbytes_mm(x, codes, scale)` as it is defined: x @ (scale * codes).T in the scale's type.

    Activations that are quantised too, which it multiplies in integers, stay; so does what an installed version of the
    operator computes in another way.
    """
    x, codes, scale = node.args
    activation, weight, factor = (tensor(arg) for arg in (x, codes, scale))
    if activation is None or weight is None or factor is None or activation.dtype != factor.dtype:
        return
    if not _is_as_spelled(weight.device, weight.dtype, factor.dtype):
        return

    def emit(target: Any, *args: Any) -> Node:
        values = [tensor(arg) if isinstance(arg, Node) else arg for arg in args]
        if isinstance(target, str):
            new = graph.call_method(target, args)
            new.meta["val"] = getattr(values[0], target)(*values[1:])
        else:
            new = graph.call_function(target, args)
            new.meta["val"] = target(*values)
        return new

    with graph.inserting_before(node), torch.no_grad():
        cast = emit("to", codes, factor.dtype)
        whole = emit(torch.mul, scale, cast)
        product = emit(torch.matmul, x, emit("t", whole))
    node.replace_all_uses_with(product)
    graph.erase_node(node)
