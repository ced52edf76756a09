"""A trained GPT-NeoX decodes fused as it does eager: its tokens, its logits at any position, and its cache.

The weights in `data/tiny_neox` were made by `data/train_tiny_neox.py`. Tests marked `gpu` run the kernels on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Rewriter, rewritten
from numerics import disagreement
from torch import Tensor
from transformers import CompileConfig, GPTNeoXForCausalLM, StaticCache

from torch_fuse import Options

DATA = Path(__file__).parent / "data" / "tiny_neox"
OPS = ("decode_attention", "decode_norm_linear", "decode_linear_residual")
SIZE = 2048
ON_GPU = Options(unmeasured=True, on_error="raise")
TEXT = "The following is a list of the operators of the language, with the methods that they call. "
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def trained(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    model = GPTNeoXForCausalLM.from_pretrained(DATA, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def tokens(length: int, device: str = "cpu", first: int = 0) -> Tensor:
    repeated = (TEXT * (SIZE // len(TEXT) + 2)).encode()[first : first + length]
    return torch.tensor(list(repeated), device=device)[None]


def generated(model: Any, prompt: Tensor, new: int, keep: Tensor | None = None, **how: Any) -> Tensor:
    mask = torch.ones_like(prompt) if keep is None else keep
    asked = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=mask, **asked, **how)[:, prompt.shape[1] :]


def fused_way(backend: Any) -> dict[str, Any]:
    """Arguments of `generate` that compile its decoding step."""
    torch._dynamo.reset()
    if isinstance(backend, Rewriter):  # of which generate would make a copy
        backend = lambda gm, inputs, rewriter=backend: rewriter(gm, inputs)  # noqa: E731
    config = CompileConfig(backend=backend, fullgraph=True, mode=None, dynamic=False)
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
    return {"cache_implementation": "static", "compile_config": config}


def check_fused(rewriter: Rewriter, ops: tuple[str, ...] = OPS) -> None:
    for op in ops:
        assert (op, "fused") in rewriter.statuses, rewriter.report


def test_512_greedy_tokens_of_generate_are_eagers() -> None:
    model, rewriter = trained(), Rewriter()
    prompt = tokens(91)
    found = generated(model, prompt, 512, **fused_way(rewriter))
    wanted = generated(trained(), prompt, 512)
    check_fused(rewriter)
    assert torch.equal(found, wanted)
    assert len(set(found[0].tolist())) > 10, "a text that says nothing shows nothing"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("early", [False, True])
def test_512_greedy_tokens_of_compiled_kernels_are_eagers(early: bool) -> None:
    import torch_fuse

    torch_fuse.reset_reports()
    model, prompt = trained(device="cuda"), tokens(91, "cuda")
    how = fused_way("fuse")
    how["compile_config"].options = {"unmeasured": True, "early_launch": early}
    found = generated(model, prompt, 512, **how)
    assert torch.equal(found, generated(trained(device="cuda"), prompt, 512))
    counts = torch_fuse.reports().counts()
    assert all(counts[op]["fused"] == 3 for op in OPS), counts


@pytest.mark.parametrize("batch", [3, 8])
def test_rows_of_any_length_and_number(batch: int) -> None:
    compare_rows(batch, "cpu", Rewriter())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batch", range(1, 9))
def test_rows_of_any_length_and_number_with_the_kernels(batch: int) -> None:
    compare_rows(batch, "cuda", Rewriter(ON_GPU))


def compare_rows(batch: int, device: str, rewriter: Rewriter) -> None:
    """Prompts of 1 to 150 tokens, padded on the left to the longest: the mask leaves out what was padded."""
    lengths = [150, 1, 64, 63, 65, 2, 128, 7][:batch]
    prompt, keep = (torch.zeros(batch, max(lengths), dtype=torch.int64, device=device) for _ in range(2))
    for row, length in enumerate(lengths):
        prompt[row, -length:] = tokens(length, device, first=row)
        keep[row, -length:] = 1
    model = trained(device=device)
    wanted = generated(model, prompt, 12, keep)
    found = generated(model, prompt, 12, keep, **fused_way(rewriter))
    check_fused(rewriter, OPS[:1])
    assert torch.equal(found, wanted)


class Decoder:
    """Greedy steps with a static cache of its own."""

    def __init__(self, model: Any, step: Any, prompt: Tensor, size: int) -> None:
        self.step, self.cache = step, StaticCache(config=model.config, max_cache_len=size)
        with torch.no_grad():
            logits = model(prompt, past_key_values=self.cache).logits
        self.found = [logits[:, -1:].argmax(-1)]

    def take(self) -> None:
        with torch.no_grad():
            self.found.append(self.step(self.found[-1], past_key_values=self.cache).logits[:, -1:].argmax(-1))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_two_generations_in_turn_do_not_see_each_other(device: str) -> None:
    model, rewriter = trained(device=device), Rewriter(*[ON_GPU] if device == "cuda" else [])
    prompts = [tokens(33, device), tokens(120, device, first=40)]
    step = rewritten(model, rewriter)
    decoders = [Decoder(model, step, prompt, 256) for prompt in prompts]
    for i in range(60):  # one token of the first, then two of the second
        decoders[i % 3 > 0].take()
    check_fused(rewriter)
    for decoder, prompt in zip(decoders, prompts, strict=True):
        found = torch.cat(decoder.found, 1)
        assert torch.equal(found, generated(model, prompt, found.shape[1]))


def filled(model: Any, ids: Tensor) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=SIZE)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def copied(model: Any, cache: StaticCache, dtype: torch.dtype) -> StaticCache:
    other = StaticCache(config=model.config, max_cache_len=SIZE)
    for new, layer in zip(other.layers, cache.layers, strict=True):
        new.lazy_initialization(layer.keys.to(dtype), layer.values.to(dtype))
        new.keys.copy_(layer.keys)
        new.values.copy_(layer.values)
    return other


def step_at(step: Any, cache: StaticCache, token: Tensor, at: int) -> Tensor:
    """The logits of the token at a position; what the cache holds from there on is from before, and not seen."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(at)
    with torch.no_grad():
        return step(token, past_key_values=cache).logits[:, -1].clone()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_and_cache_in_16_bits_are_no_worse_than_eagers_at_any_position(dtype: torch.dtype) -> None:
    compare_positions(dtype, "cpu", [1, 2, 7, 31, 63, 64, 65, 255, 511, 1023, 1024, 1800, 2046, 2047], Rewriter())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_and_cache_of_the_kernels_at_every_position(dtype: torch.dtype, early: bool) -> None:
    options = Options(unmeasured=True, early_launch=early, on_error="raise")
    compare_positions(dtype, "cuda", list(range(1, SIZE)), Rewriter(options))


def compare_positions(dtype: torch.dtype, device: str, positions: list[int], rewriter: Rewriter) -> None:
    """Applies the numerics rule to all logits, and to what each step appends to the cache."""
    ids = tokens(SIZE, device)
    model, exact = trained(dtype, device), trained(torch.float64, device)
    start = filled(model, ids[:, : SIZE - 1])
    step = rewritten(model, rewriter)
    ways = ((exact, copied(model, start, torch.float64)), (model, copied(model, start, dtype)), (step, start))
    logits = [torch.stack([step_at(f, cache, ids[:, i : i + 1], i) for i in positions]) for f, cache in ways]
    check_fused(rewriter)
    assert not disagreement(*logits), disagreement(*logits)
    for layers in zip(*(cache.layers for _, cache in ways), strict=True):
        for name in ("keys", "values"):
            contents = [getattr(layer, name) for layer in layers]
            assert not disagreement(*contents), disagreement(*contents)
