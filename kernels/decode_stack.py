"""One token through all layers of a decoder in one launch: norms, projections, RoPE, cache, attention, MLP, lm_head.

    a = W_out attention(rope(W_in norm_a(x)) appended to the cache) + b_out
    m = W_down act(W_up norm_m(y) + b_up) + b_down           # gated: act(W_gate norm_m(y)) * (W_up norm_m(y))
    parallel:   x = x + a + m    with y = x          # GPT-NeoX
    otherwise:  y = x + a;  x = y + m                # Llama
    result:     W_head norm_head(x) + b_head         # or x, without head_weight

What the chain `norm_linear_gemv`, `decode_attention`, `linear_residual_gemv` computes, rounded to x's dtype where
that is: projections, the activation's result, attention's result, the stream after each residual sum. A batch of one
token is bound by reading the weights once; in one persistent kernel a warp of each multiprocessor reads them ahead
into shared memory, also while the others wait for what other multiprocessors computed (Spector et al. 2025, "Look Ma,
No Bubbles!").

- x [1, 1, K], fp16 or bf16 (reference: also fp32, fp64). Weights [N, K] of x's dtype, contiguous; biases [N] or None.
- Lists are layer-major. norm_weights, norm_biases: two a layer (attention's, MLP's), tensors [K] or None; in_weights:
  one (fused QKV) or three (q, k, v) a layer; up_weights: one a layer, two (gate, up) when gated; the rest one a layer.
- layout, nine numbers: for q, k, v the projection's index in the layer, first row, rows from head to head.
- cos, sin [1, 1, lanes], `cos_lanes`, `sin_lanes`: as in `decode_attention`; None when rotary_dim is 0.
- key_caches, value_caches [1, kv_heads, S, head_dim]: one a layer, written in place.
- lengths: one int64 without dimensions a layer, each a tensor of its own, in [0, S), counted up in place; or an empty
  list, and positions [1] of integers in [0, S).
- masks: one for all layers or one a layer, boolean [1, 1, 1, S], any strides: True attends.
- q_norm_weights, k_norm_weights: empty, or a tensor [head_dim] a layer: each head of q and k goes through an RMSNorm
  with qk_eps and the weight + qk_weight_offset before its angles turn it; rounded once, behind both.
- norm "layer" or "rms", activation "gelu", "gelu_tanh" or "silu".
- Returns [1, 1, V], or [1, 1, K] without head_weight: fp32 arithmetic. Bitwise the same in repeated runs. No gradient.
- Raises ValueError, naming the argument, its value and what is allowed. A position outside of the cache is not written
  (`index_copy_` fails an assertion on the device).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cuda
from . import _decode_stack_launch as _launch
from ._decode_stack_calls import found
from ._ops import define_opaque_op
from ._qk_common import Spec, check_tables, require
from .decode_attention import reference as attention
from .linear_residual_gemv import reference as linear_residual
from .norm_linear_gemv import reference as norm_linear

NORMS = ("layer", "rms")
Some = Sequence[Tensor]
SomeOrNone = Sequence[Tensor | None]


class Stack(NamedTuple):
    """The op's arguments, in its order."""

    x: Tensor
    norm_weights: SomeOrNone
    norm_biases: SomeOrNone
    in_weights: Some
    in_biases: SomeOrNone
    up_weights: Some
    up_biases: SomeOrNone
    out_weights: Some
    out_biases: SomeOrNone
    down_weights: Some
    down_biases: SomeOrNone
    cos: Tensor | None
    sin: Tensor | None
    key_caches: Some
    value_caches: Some
    lengths: Some
    positions: Tensor | None
    masks: Some
    head_norm_weight: Tensor | None
    head_norm_bias: Tensor | None
    head_weight: Tensor | None
    head_bias: Tensor | None
    parallel: bool
    norm: str
    eps: float
    weight_offset: float
    activation: str
    gated: bool
    heads: int
    kv_heads: int
    head_dim: int
    layout: Sequence[int]
    rotary_dim: int
    interleaved: bool
    cos_lanes: Sequence[int]
    sin_lanes: Sequence[int]
    scale: float
    q_norm_weights: Some = ()
    k_norm_weights: Some = ()
    qk_eps: float = 0.0
    qk_weight_offset: float = 0.0

    @property
    def layers(self) -> int:
        return len(self.out_weights)

    @property
    def tensors(self) -> tuple[Tensor | None | SomeOrNone, ...]:
        return (*self[:22], self.q_norm_weights, self.k_norm_weights)  # type: ignore[return-value]

    @property
    def options(self) -> tuple[object, ...]:
        return (*self[22:37], self.qk_eps, self.qk_weight_offset)

    @property
    def spec(self) -> Spec:
        return Spec("none", 0.0, 0.0, self.rotary_dim, self.interleaved, self.cos_lanes, self.sin_lanes)


def _need(ok: bool, argument: str, value: object, allowed: str) -> None:
    require("decode_stack", ok, argument, value, allowed)


def check(s: Stack) -> None:
    """Raises ValueError naming the argument, its value and what is allowed."""
    _need(s.x.dim() == 3 and s.x.shape[0] == 1 and s.x.shape[1] == 1, "x.shape", tuple(s.x.shape), "[1, 1, K]")
    _need(s.layers > 0, "len(out_weights)", 0, "at least one layer")
    _need(s.norm in NORMS, "norm", repr(s.norm), ", ".join(NORMS))
    _need(s.activation in _launch.ACTIVATIONS, "activation", repr(s.activation), ", ".join(_launch.ACTIVATIONS))
    _need(s.kv_heads > 0 and s.heads % s.kv_heads == 0, "kv_heads", s.kv_heads, f"a divisor of heads = {s.heads}")
    _check_weights(s)
    _check_caches(s)
    _need(len(s.q_norm_weights) in (0, s.layers), "len(q_norm_weights)", len(s.q_norm_weights), f"0 or {s.layers}")
    _need(len(s.k_norm_weights) == len(s.q_norm_weights), "len(k_norm_weights)", len(s.k_norm_weights),
          f"as many as q_norm_weights: {len(s.q_norm_weights)}")  # fmt: skip
    for name, weights in (("q", s.q_norm_weights), ("k", s.k_norm_weights)):
        for weight in weights:
            _check_vectors(weight, None, s.head_dim, f"{name}_norm")
    rotary = s.rotary_dim
    _need(0 <= rotary <= s.head_dim and rotary % 2 == 0, "rotary_dim", rotary, f"even, 0 to head_dim = {s.head_dim}")
    check_tables("decode_stack", s.x.unsqueeze(2), s.cos, s.sin, s.spec)


def _check_weights(s: Stack) -> None:
    width = s.x.shape[2]
    projections = len(s.in_weights) // s.layers
    _need(projections in (1, 3), "len(in_weights)", len(s.in_weights), f"1 or 3 for each of {s.layers} layers")
    ups = 2 if s.gated else 1
    for name, count in (("norm", 2), ("in", projections), ("up", ups), ("out", 1), ("down", 1)):
        weights, biases = getattr(s, f"{name}_weights"), getattr(s, f"{name}_biases")
        for kind, given in ((f"{name}_weights", weights), (f"{name}_biases", biases)):
            _need(len(given) == count * s.layers, f"len({kind})", len(given), f"{count} for each of {s.layers} layers")
        for weight, bias in zip(weights, biases, strict=True):
            if name == "norm":
                _check_vectors(weight, bias, width, "norm")
                continue
            inner = {"out": s.heads * s.head_dim, "down": s.up_weights[0].shape[0]}.get(name, width)
            _need(weight.dim() == 2 and weight.shape[1] == inner, f"{name}_weights", tuple(weight.shape),
                  f"[N, {inner}]")  # fmt: skip
            rows = {"up": s.up_weights[0].shape[0], "in": weight.shape[0]}.get(name, width)
            _need(weight.shape[0] == rows, f"{name}_weights", tuple(weight.shape), f"[{rows}, {inner}]")
            _check_vectors(None, bias, weight.shape[0], name)
    _need(len(s.layout) == 9, "len(layout)", len(s.layout), "9")
    for i, count in enumerate((s.heads, s.kv_heads, s.kv_heads)):
        at, first, step = s.layout[3 * i : 3 * i + 3]
        _need(0 <= at < projections, "layout", list(s.layout), f"projections below {projections}")
        last = first + (count - 1) * step + s.head_dim
        rows = s.in_weights[at].shape[0]
        _need(first >= 0 and step >= 0 and last <= rows, "layout", list(s.layout), f"rows below {rows}")
    _check_vectors(s.head_norm_weight, s.head_norm_bias, width, "head_norm")
    if s.head_weight is not None:
        _need(s.head_weight.dim() == 2 and s.head_weight.shape[1] == width, "head_weight.shape",
              tuple(s.head_weight.shape), f"[V, {width}]")  # fmt: skip
        _check_vectors(None, s.head_bias, s.head_weight.shape[0], "head")
    else:
        given = [v is not None for v in (s.head_norm_weight, s.head_norm_bias, s.head_bias)]
        _need(not any(given), "head_norm or head_bias", "given", "None without head_weight")


def _check_vectors(weight: Tensor | None, bias: Tensor | None, width: int, name: str) -> None:
    for kind, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _need(vector.dim() == 1 and vector.shape[0] == width, f"{name}_{kind}", tuple(vector.shape), f"[{width}]")


def _check_caches(s: Stack) -> None:
    for name in ("key_caches", "value_caches"):
        given = getattr(s, name)
        _need(len(given) == s.layers, f"len({name})", len(given), f"{s.layers}, one a layer")
        for cache, keys in zip(given, s.key_caches, strict=True):
            _need(cache.dim() == 4 and keys.dim() == 4, name, tuple(cache.shape), "four dimensions")
            wanted = (1, s.kv_heads, keys.shape[2], s.head_dim)
            _need(cache.shape == wanted, name, tuple(cache.shape), str(wanted))
            _need(cache.dtype == s.x.dtype, name, cache.dtype, f"x's {s.x.dtype}")
    _need(bool(s.lengths) == (s.positions is None), "lengths", len(s.lengths), "given, or else positions")
    _need(len(s.lengths) in (0, s.layers), "len(lengths)", len(s.lengths), f"0 or {s.layers}")
    for length in s.lengths:
        _need(length.dim() == 0 and length.dtype == torch.int64, "lengths", length.dtype, "int64 without dimensions")
    if s.positions is not None:
        _need(s.positions.shape == (1,), "positions.shape", tuple(s.positions.shape), "[1]")
    _need(len(s.masks) == 1 or len(s.masks) == s.layers, "len(masks)", len(s.masks), f"1 or {s.layers}")
    for i, keys in enumerate(s.key_caches):
        mask = s.masks[i if len(s.masks) > 1 else 0]
        _need(mask.dtype == torch.bool, "masks", mask.dtype, "bool")
        wanted_mask = (1, 1, 1, keys.shape[2])
        _need(mask.shape == wanted_mask, "masks", tuple(mask.shape), str(wanted_mask))


def reference(*arguments: object) -> Tensor:
    """The op in plain torch, with its arguments: the chain of three ops a layer."""
    s = Stack(*arguments)  # type: ignore[arg-type]
    x = s.x
    for layer in range(s.layers):
        x = _layer(s, layer, x)
    if s.head_weight is None:
        return x
    return _normed(s, x, [s.head_weight], [s.head_bias], s.head_norm_weight, s.head_norm_bias, "none", False)[0]


def _layer(s: Stack, layer: int, x: Tensor) -> Tensor:
    norms = [(s.norm_weights[i], s.norm_biases[i]) for i in (2 * layer, 2 * layer + 1)]
    count, ups = len(s.in_weights) // s.layers, 2 if s.gated else 1
    part, up = slice(count * layer, count * (layer + 1)), slice(ups * layer, ups * (layer + 1))
    projected = _normed(s, x, s.in_weights[part], s.in_biases[part], *norms[0], ",".join(["none"] * count), False)
    attended = _attended(s, layer, projected)
    activations = f"{s.activation},none" if s.gated else s.activation
    out = s.out_weights[layer], s.out_biases[layer]
    down = s.down_weights[layer], s.down_biases[layer]
    y = x if s.parallel else linear_residual(x, attended, *out, None, None, None)
    (h,) = _normed(s, y, s.up_weights[up], s.up_biases[up], *norms[1], activations, s.gated)
    return linear_residual(x, attended, *out, h, *down) if s.parallel else linear_residual(y, h, *down, *[None] * 3)


def _normed(s: Stack, x: Tensor, weights: Some, biases: SomeOrNone, scale: Tensor | None, shift: Tensor | None,
            activations: str, gated: bool) -> list[Tensor]:  # fmt: skip
    count = len(weights)
    return norm_linear(x, weights, biases, [scale] * count, [shift] * count, s.norm, s.eps, s.weight_offset,
                       activations, gated)  # fmt: skip


def _attended(s: Stack, layer: int, projected: Some) -> Tensor:
    q, k, v = (
        projected[s.layout[3 * i]].as_strided((1, 1, count, s.head_dim), (1, 1, s.layout[3 * i + 2], 1),
                                              s.layout[3 * i + 1])
        for i, count in enumerate((s.heads, s.kv_heads, s.kv_heads))
    )  # fmt: skip
    out = attention(
        q, k, v, s.cos, s.sin, s.key_caches[layer], s.value_caches[layer], s.lengths[layer] if s.lengths else None,
        s.positions, s.masks[layer if len(s.masks) > 1 else 0], s.rotary_dim, s.interleaved, s.cos_lanes, s.sin_lanes,
        s.scale, False, s.q_norm_weights[layer] if s.q_norm_weights else None,
        s.k_norm_weights[layer] if s.k_norm_weights else None, s.qk_eps, s.qk_weight_offset,
    )  # fmt: skip
    return out.reshape(1, 1, s.heads * s.head_dim)


def supports(*arguments: object) -> str | None:
    """Why the kernel cannot take the op's arguments, also fake ones (the op then runs its reference), or None.

    What is known only from addresses or from compiling the kernel, the op's log tells.
    """
    s = Stack(*arguments)  # type: ignore[arg-type]
    if reason := _cuda.unavailable(s.x.device):
        return reason
    return _launch.supports(s, _launch.device_of(s.x.device.index or 0))


def supports_device(device: torch.device) -> str | None:
    """Why the kernel does not run on a device, or None."""
    return _cuda.unavailable(device)


def _fake(*arguments: object) -> Tensor:
    s = Stack(*arguments)  # type: ignore[arg-type]
    check(s)
    return s.x.new_empty(1, 1, s.x.shape[2] if s.head_weight is None else s.head_weight.shape[0])


def _forward(x: Tensor, norm_weights: Sequence[Tensor | None], norm_biases: Sequence[Tensor | None],
             in_weights: Sequence[Tensor], in_biases: Sequence[Tensor | None], up_weights: Sequence[Tensor],
             up_biases: Sequence[Tensor | None], out_weights: Sequence[Tensor], out_biases: Sequence[Tensor | None],
             down_weights: Sequence[Tensor], down_biases: Sequence[Tensor | None], cos: Tensor | None,
             sin: Tensor | None, key_caches: Sequence[Tensor], value_caches: Sequence[Tensor],
             lengths: Sequence[Tensor], positions: Tensor | None, masks: Sequence[Tensor],
             head_norm_weight: Tensor | None, head_norm_bias: Tensor | None, head_weight: Tensor | None,
             head_bias: Tensor | None, parallel: bool, norm: str, eps: float, weight_offset: float, activation: str,
             gated: bool, heads: int, kv_heads: int, head_dim: int, layout: Sequence[int], rotary_dim: int,
             interleaved: bool, cos_lanes: Sequence[int], sin_lanes: Sequence[int], scale: float,
             q_norm_weights: Sequence[Tensor], k_norm_weights: Sequence[Tensor], qk_eps: float,
             qk_weight_offset: float) -> Tensor:  # fmt: skip
    s = Stack(**locals())
    kernel = found(s, check)
    return reference(*s) if kernel is None else kernel.launch(s)


decode_stack = define_opaque_op(
    "torch_fuse::decode_stack", _forward, _fake, mutates=("key_caches", "value_caches", "lengths")
)
