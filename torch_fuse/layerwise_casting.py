"""Diffusers' layerwise casting without its graph breaks: the weights stay in 8 bits, and the graph sees the cast.

`apply_layerwise_casting` of diffusers casts a layer's weights in place before each call and back after it. Dynamo
cannot trace that: it compiles each layer for itself, with weights that have been written out. Here a linear layer reads
its weight as `weight.to(compute_dtype)` instead, which computes the same bits and which `dequant_linear` recognises.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_HOOK = "layerwise_casting"


def inline_layerwise_casting(model: nn.Module) -> int:
    """Makes the linear layers of a model cast their weights in their product; call it once, before `torch.compile`.

    Other layers (convolutions, embeddings, norms) keep diffusers' hook, and so do subclasses of `nn.Linear`.

    Args:
        model: a model after diffusers' `apply_layerwise_casting` or `enable_layerwise_casting`; changed in place.

    Returns:
        The number of linear layers that were changed.

    Example:
        >>> model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        >>> inline_layerwise_casting(model)
        >>> model = torch.compile(model, backend="fuse")
    """
    changed = 0
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(_HOOK)
        if hook is None or type(module) is not nn.Linear or getattr(hook.fn_ref, "original_forward", None) is not None:
            continue
        hook.fn_ref.pre_forward = _as_they_are
        hook.fn_ref.post_forward = _as_it_is
        hook.fn_ref.forward = functools.partial(_cast_linear, module, hook.compute_dtype)
        changed += 1
    return changed


def _as_they_are(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _as_it_is(module: nn.Module, output: Any) -> Any:
    return output


def _cast_linear(module: nn.Linear, dtype: Any, input: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(dtype)
    return F.linear(input, module.weight.to(dtype), bias)
