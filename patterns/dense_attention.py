"""Attention without a mask by the fastest exact kernel that was measured for its shape.

Before: scaled_dot_product_attention(q, k, v, is_causal=True)
After:  torch_fuse.dense_attention(q, k, v, True, scale)
        or one of PyTorch's own backends, or FlashAttention-4, pinned: options={"attention": "measure"}

For inference with head_dim 48, 80, 96 or 160 (Pythia-2.8B, Phi-2, StableLM), which libraries pad to the next power of
two; and on Hopper with 128 (Llama, Qwen, Wan) from some length on. Repeated key and value heads (grouped-query
attention) are read unrepeated. In bfloat16 and float16; the least lengths are those from which it was measured to win.
With "measure", other head dims and attention with gradients too: `_attention_choice` times all backends for the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.fx import Node

from torch_fuse._compat import no_guards, uses_cuda_graphs
from torch_fuse.graph.attention import unrepeated_heads
from torch_fuse.graph.values import equal, same_shape, size_hint, static_int, tensor
from torch_fuse.kernels import dense_attention
from torch_fuse.options import Options
from torch_fuse.rewrite.builder import Builder
from torch_fuse.rewrite.pattern import Example, Match, Pattern
from torch_fuse.rewrite.registry import register
from torch_fuse.rewrite.view import GraphView

from ._attention_choice import Choice, Unmeasured, choose
from ._attention_site import Layout, Site

# From how many queries and keys on it wins over PyTorch's fastest backend, by head dim and whether it is causal: by
# more than its launch costs (20 us more than SDPA's for Hopper's kernel), which models bound by launches would pay.
# Of head_dim 64 that leaves the cases with many tiles: 466 against 476 us for 16 x 12 heads of 2,048 and 445 against
# 456 for 4 x 12 of 4,096, but 119 against 115 for 4 x 12 of 2,048 (causal: 90.7 against 99.3 for 4 x 16 of 2,048 only).
MIN_LENGTH = {
    (48, True): 512, (64, False): 2048, (80, True): 512, (96, True): 512, (128, True): 2048, (128, False): 4096,
    (160, True): 512,
}  # fmt: skip
MIN_TILES_64 = 1024  # of 192 queries: eight for each multiprocessor of an H200


@register
class DenseAttention(Pattern):
    """Attention over all keys or causal, where no gradient is needed."""

    name = "dense_attention"
    kind = "attention"
    op = "torch_fuse::dense_attention"
    stage = "attend"

    def match(self, view: GraphView, anchor: Node) -> Match | None:
        attention = view.attentions[anchor]
        plain = attention.mask is None and attention.dropout_p == 0 and attention.written is None
        if not plain or attention.is_causal not in (True, False):
            return None
        query, key, value = attention.query, attention.key, attention.value
        if not _same_kind(query, key, value):
            return None
        q = tensor(query)
        assert q is not None
        dim, heads = (static_int(q.shape[i]) for i in (3, 1))
        scale = dim**-0.5 if dim and attention.scale is None else attention.scale
        if not dim or heads is None or not isinstance(scale, (int, float)):
            return None
        gradients = _need_gradients(query, key, value)
        measures = view.options.attention == "measure" and not _picks_backends(view)
        if (gradients or dim not in dense_attention.HEAD_DIMS) and not measures:
            return None
        repeated, repetition = key, set[Node]()
        if not gradients:
            key, value, repetition = unrepeated_heads(key, value)
        if not _fits(query, key, value, heads, attention.is_causal):
            return None
        arguments = (query, key, value, attention.is_causal, float(scale))
        region = frozenset({anchor, *repetition})
        site = _site(arguments, repeated, gradients) if measures else None
        bindings = {"arguments": arguments, "fake_mode": view.fake_mode, "gradients": gradients, "site": site}
        return Match(anchor, bindings, (anchor,), region, (query, key, value), f"head_dim {dim}")

    def check(self, match: Match, options: Options) -> str | None:
        covered = not match.bindings["gradients"] and _head_dim(match) in dense_attention.HEAD_DIMS
        if options.kernels == "reference":
            return None if covered else "the op's reference is not for this head_dim, or has no gradient"
        choice = _choice(match, options)
        if isinstance(choice, Choice):
            return choice.reason if choice.candidate is None else None
        if not covered:
            return f"PyTorch's pick stays: {choice}"
        reason = _by_table(match)
        return f"{reason} ({choice})" if reason and choice else reason

    def settle(self, match: Match, options: Options) -> Match:
        choice = None if options.kernels == "reference" else _choice(match, options)
        if not isinstance(choice, Choice) or choice.candidate is None:
            return match
        bindings = {**match.bindings, "candidate": choice.candidate}
        return replace(match, bindings=bindings, op=choice.candidate.op, note=f"{match.note}: {choice.reason}")

    def rewrite(self, match: Match, builder: Builder, options: Options) -> dict[Node, Node]:
        candidate = match.bindings.get("candidate")
        query, key, value, is_causal, scale = match.bindings["arguments"]
        if candidate is not None:
            return {match.anchor: candidate.emit(builder, (query, key, value), match.bindings["site"])}
        op = dense_attention
        target = op.reference if options.kernels == "reference" else op.dense_attention
        return {match.anchor: builder.call(target, query, key, value, is_causal, scale)}

    def spellings(self) -> Iterator[Example]:
        yield Example("causal", _example(lambda q, k, v: _sdpa(q, k, v, is_causal=True)))
        yield Example("all_keys", _example(_sdpa, keys=5))
        yield Example("own_scale", _example(lambda q, k, v: _sdpa(q, k, v, is_causal=True, scale=0.3), dim=48))
        yield Example("enable_gqa", _example(lambda q, k, v: _sdpa(q, k, v, is_causal=True, enable_gqa=True), kv=2))
        yield Example("repeated_by_expand", _example(_repeated_by_expand, kv=2))
        yield Example("repeat_interleave", _example(_repeat_interleave, kv=2))
        yield Example("gradients_off", _example(_without_gradients, grad=True))

    def near_misses(self) -> Iterator[Example]:
        yield Example("head_dim_without_a_kernel", _example(_sdpa, dim=72), fuses=False)
        yield Example("gradients", _example(_sdpa, grad=True), fuses=False)
        yield Example("masked", _example(_masked), fuses=False)
        yield Example("causal_with_fewer_keys", _example(lambda q, k, v: _sdpa(q, k, v, is_causal=True), keys=5), False)
        yield Example("heads_in_other_order", _example(_tiled, kv=2), fuses=False)
        yield Example("heads_permuted", _example(_permuted, kv=2), fuses=False)
        yield Example("repeated_unevenly", _example(_unevenly, kv=2), fuses=False)


def _by_table(match: Match) -> str | None:
    """Why this package's kernel is not used where nothing was measured for the shape itself, or None."""
    *nodes, is_causal, scale = match.bindings["arguments"]
    q, k, v = (tensor(node) for node in nodes)
    assert q is not None and k is not None and v is not None
    with no_guards(match.bindings["fake_mode"]):
        reason = dense_attention.supports(q, k, v, is_causal, scale)
        hopper, why = dense_attention.hopper_config(q, k, v, is_causal)
    if reason is not None:
        return f"the kernel cannot run: {reason}"
    if q.device.type == "cuda":
        capability = torch.cuda.get_device_capability(q.device)
        if torch.version.hip is not None or capability < (9, 0):
            return "the GPU is older than Hopper (compute capability 9.0), where the kernels were measured"
    kind = (int(q.shape[3]), is_causal)
    if kind not in MIN_LENGTH:
        return f"head_dim {kind[0]}, {'causal' if is_causal else 'not causal'}: PyTorch's kernel is as fast"
    if hopper is None and kind[0] in (64, 128):
        return f"PyTorch's kernel is faster: {why}"
    least = MIN_LENGTH[kind]
    length = min(size_hint(x.shape[2], least) for x in (q, k))
    if length < least:
        return f"length {length}: PyTorch's kernel is as fast; it pays from {least} on"
    tiles = -(-size_hint(q.shape[2], least) // 192) * size_hint(q.shape[0], 1) * int(q.shape[1])
    if kind[0] == 64 and tiles < MIN_TILES_64:
        return f"{tiles} tiles of queries: PyTorch's kernel is as fast; it pays from {MIN_TILES_64} on"
    return None


def _choice(match: Match, options: Options) -> Choice | str:
    """What was measured for the site, or why nothing was; "" where nothing is to be."""
    if options.attention != "measure":
        return ""
    site = match.bindings["site"]
    if site is None:
        return "not measured: its sizes are dynamic, or the model picks backends itself"
    try:
        return choose(site, uses_cuda_graphs(options.inductor))
    except Unmeasured as error:
        return f"not measured: {error}"


def _site(arguments: tuple[Node, Node, Node, bool, float], repeated: Node, gradients: bool) -> Site | None:
    """The attention's sizes and strides, or None where they are dynamic."""
    *nodes, is_causal, scale = arguments
    q, k, v = (tensor(node) for node in nodes)
    whole = tensor(repeated)
    assert q is not None and k is not None and v is not None and whole is not None
    layouts = [Layout.of(x) for x in (q, k, v)]
    heads = static_int(whole.shape[1])
    if any(x is None for x in layouts) or heads is None:
        return None
    query, key, value = layouts
    assert query is not None and key is not None and value is not None
    repetition = heads // key.shape[1]
    return Site(q.device, q.dtype, query, key, value, repetition, is_causal, scale, gradients)


def _picks_backends(view: GraphView) -> bool:
    """Whether the model enters `torch.nn.attention.sdpa_kernel`."""
    return any("_sdpa_kernel" in getattr(node.target, "__name__", "") for node in view.nodes)


def _head_dim(match: Match) -> int | None:
    q = tensor(match.bindings["arguments"][0])
    return None if q is None else static_int(q.shape[3])


def _need_gradients(*nodes: Node) -> bool:
    return any(x is not None and x.requires_grad for x in map(tensor, nodes))


def _same_kind(*nodes: Node) -> bool:
    """Whether all are four-dimensional, of one dtype, device and batch."""
    found = [tensor(node) for node in nodes]
    first = found[0]
    return first is not None and all(
        x is not None and x.dim() == 4 and x.dtype == first.dtype and x.device == first.device
        and equal(x.shape[0], first.shape[0]) for x in found
    )  # fmt: skip


def _fits(query: Node, key: Node, value: Node, heads: int, is_causal: bool) -> bool:
    """Whether shapes are known to be what the op takes."""
    q, k, v = tensor(query), tensor(key), tensor(value)
    assert q is not None and k is not None and v is not None
    kv_heads = static_int(k.shape[1])
    if not kv_heads or heads % kv_heads or not same_shape(k.shape, v.shape) or not equal(k.shape[3], q.shape[3]):
        return False
    return not is_causal or equal(q.shape[2], k.shape[2])


# -- examples ------------------------------------------------------------------------------------------------------

_sdpa = F.scaled_dot_product_attention
Attend = Callable[..., torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _example(
    attention: Attend, dim: int = 80, kv: int = 4, keys: int = 9, grad: bool = False
) -> Callable[[torch.dtype], tuple[Attend, Inputs]]:
    def make(dtype: torch.dtype) -> tuple[Attend, Inputs]:
        def random(heads: int, length: int) -> torch.Tensor:
            x = torch.randn(2, length, heads, 2 * dim, dtype=dtype)[..., dim:].transpose(1, 2)
            return x.detach().requires_grad_(grad)

        return attention, (random(4, 9), random(kv, keys), random(kv, keys))

    return make


def _repeated_by_expand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    b, h, s, d = k.shape
    k, v = (x[:, :, None, :, :].expand(b, h, 2, s, d).reshape(b, 2 * h, s, d) for x in (k, v))
    return _sdpa(q, k, v, is_causal=True)


def _repeat_interleave(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _sdpa(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), is_causal=True)


def _without_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return _sdpa(q * 2, k * 2, v * 2, is_causal=True)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _sdpa(q, k, v, attn_mask=q[..., 0, 0, None, None] > k[..., None, :, 0])


def _tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _sdpa(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), is_causal=True)


def _permuted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    b, h, s, d = k.shape
    order = torch.arange(h - 1, -1, -1, device=k.device)
    k, v = (x[:, order, None].expand(b, h, 2, s, d).reshape(b, 2 * h, s, d) for x in (k, v))
    return _sdpa(q, k, v, is_causal=True)


def _unevenly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    repeats = torch.tensor([1, 3], device=k.device)
    k, v = (x.repeat_interleave(repeats, dim=1, output_size=4) for x in (k, v))
    return _sdpa(q, k, v, is_causal=True)
