"""Which of PyTorch's attention backends is fastest for the layouts that the rewrites produce.

Query and key are [B, S, H, D] in memory; the value is a view into the projection, as GPT-NeoX has it.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import Log, captured, interleaved_ms
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SHAPES = [  # batch, length, query heads, key heads, head_dim, causal
    (1, 2048, 32, 32, 80, True),
    (4, 1024, 16, 16, 128, True),
    (1, 4096, 32, 32, 128, True),
    (1, 4096, 32, 8, 128, True),
    (1, 2048, 12, 12, 64, True),
    (32, 512, 12, 12, 64, False),
    (1, 1560, 12, 12, 128, False),
    (1, 7800, 12, 12, 128, False),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    log = Log(parser.parse_args().out)
    for batch, length, heads, kv_heads, dim, causal in SHAPES:
        q = torch.randn(batch, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        k = torch.randn(batch, length, kv_heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        qkv = torch.randn(batch, length, kv_heads, 3 * dim, device="cuda", dtype=torch.bfloat16)
        v = qkv.transpose(1, 2)[..., 2 * dim :]
        gqa = heads != kv_heads
        calls = {}
        for name, backend in BACKENDS.items():

            def call(backend=backend, q=q, k=k, v=v, causal=causal, gqa=gqa):
                if backend is None:
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

            try:
                out = call()
                calls[name] = captured(call, inner=8)
                strides = out.stride()
                log.write(what="layout", backend=name, shape=[batch, length, heads, dim], strides=strides)
            except RuntimeError as error:
                log.write(what="refused", backend=name, shape=[batch, length, heads, dim], error=str(error)[:200])
        us = {name: round(ms * 1e3 / 8, 1) for name, ms in interleaved_ms(calls, 10).items()}
        log.write(what="sdpa", us=us, shape=[batch, length, heads, kv_heads, dim], causal=causal)


if __name__ == "__main__":
    main()
