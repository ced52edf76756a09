"""A language model with int8 and int4 weights: memory, tokens a second and perplexity, before and after.

The linear layers of an unmodified transformers model are replaced by modules that hold codes and write the
dequantisation out in `forward`, as many quantisation libraries do; or by torchao, where it is installed. torch.compile
with backend="fuse" reads the codes inside of the product; Inductor writes the weight out at each step.

    python examples/quantized.py
    python examples/quantized.py --checkpoint DIRECTORY --device cuda --dtype float16 --text FILE

Without a checkpoint it takes the tiny GPT-NeoX of this repository's tests, whose tokens are bytes, or random weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _tables import show
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache

TINY = Path(__file__).parents[1] / "tests" / "data" / "tiny_neox"
GROUPS = (128, 64, 32)  # columns that share a scale: the most that divide a row


class Int8Linear(nn.Module):
    """A linear layer that holds its weight as int8, with a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


class Int4Linear(nn.Module):
    """A linear layer that holds two codes of its weight a byte, with a scale and a zero point a group of columns."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        size = next(size for size in GROUPS if columns % size == 0)
        groups = linear.weight.detach().float().view(rows, -1, size)
        least, most = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = (most - least).clamp(min=1e-8) / 15
        zero = (-least / scale).round()
        codes = (groups / scale + zero).round().clamp(0, 15).to(torch.uint8).view(rows, columns)
        self.register_buffer("codes", codes[:, ::2] | (codes[:, 1::2] << 4))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.register_buffer("zero", zero.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, groups = self.scale.shape[:2]
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).view(rows, groups, -1).to(x.dtype)
        return F.linear(x, ((codes - self.zero) * self.scale).view(rows, -1), self.bias)


def by_hand(layer: type[nn.Module]) -> Callable[[nn.Module], None]:
    """Replaces a model's linear layers."""

    def replace(model: nn.Module) -> None:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, layer(child))

    return replace


def by_torchao(model: nn.Module) -> None:
    """torchao's int8, weight only: tensor subclasses in place of the weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


FORMATS: dict[str, Callable[[nn.Module], None]] = {
    "as it is": lambda model: None,
    "int8": by_hand(Int8Linear),
    "int4": by_hand(Int4Linear),
    "int8, torchao": by_torchao,
}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="local directory of a model of transformers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float16 on a GPU, else float32")
    parser.add_argument("--text", help="file that the perplexity is of; Python's own help texts without")
    parser.add_argument("--tokens", type=int, default=192, help="of the text, each a decoding step")
    parser.add_argument("--formats", default="as it is,int8,int4", help="names parted by commas; also: int8 torchao")
    parser.add_argument("--compare", action="store_true", help="with Inductor too")
    args = parser.parse_args(given)
    if args.tokens < 16:
        parser.error(f"--tokens is {args.tokens}; allowed: 16 and more")
    args.formats = ["int8, torchao" if name == "int8 torchao" else name for name in args.formats.split(",")]
    unknown = [name for name in args.formats if name not in FORMATS]
    if unknown:
        parser.error(f"--formats has {unknown[0]!r}; allowed: as it is, int8, int4, int8 torchao")
    args.dtype = getattr(torch, args.dtype or ("float16" if args.device.startswith("cuda") else "float32"))
    return args


def build(args: argparse.Namespace) -> nn.Module:
    source = args.checkpoint or (str(TINY) if TINY.is_dir() else None)
    if source is None:
        torch.manual_seed(0)
        config = GPTNeoXConfig(
            hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, vocab_size=128
        )
        return GPTNeoXForCausalLM._from_config(config, dtype=args.dtype).to(args.device).eval()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=args.dtype, local_files_only=True)
    return model.to(args.device).eval()


def text(args: argparse.Namespace) -> Tensor:
    """Tokens [1, n + 2]: a checkpoint's tokenizer's, or bytes."""
    if args.text:
        written = Path(args.text).read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics

        written = topics["lambda"] + topics["numbers"] + topics["compound"]
    if args.checkpoint:
        ids = AutoTokenizer.from_pretrained(args.checkpoint, local_files_only=True)(written)["input_ids"]
    else:
        ids = list(written.encode("ascii", "ignore"))
    if len(ids) < args.tokens + 2:
        raise SystemExit(f"the text has {len(ids)} tokens; allowed: at least two more than --tokens, {args.tokens}")
    return torch.tensor([ids[: args.tokens + 2]], device=args.device)


def stored_bytes(model: nn.Module) -> int:
    """What the model's weights take in memory."""
    found = 0
    for part in {id(part): part for part in itertools.chain(model.parameters(), model.buffers())}.values():
        names = part.__tensor_flatten__()[0] if hasattr(part, "__tensor_flatten__") else ()
        found += sum(x.numel() * x.element_size() for x in [getattr(part, name) for name in names] or [part])
    return found


def compiled(model: nn.Module, backend: str, args: argparse.Namespace) -> Callable[..., Any]:
    """The model, compiled by a backend, or as it is for "eager"."""
    if backend == "eager":
        return model
    graphs = torch._inductor.list_mode_options("reduce-overhead")
    if backend == "inductor":
        return torch.compile(model, options=graphs if args.device.startswith("cuda") else None)
    if args.device.startswith("cuda"):
        return torch.compile(model, backend="fuse", options={"unmeasured": True, "inductor": graphs})
    # a CPU has no kernels of ours: it shows what is replaced, with plain torch in its place
    return torch.compile(model, backend="fuse", options={"kernels": "reference"})


def decode(model: nn.Module, step: Callable[..., Any], ids: Tensor) -> tuple[float, float]:
    """(perplexity of a text but for its second token, tokens a second), a decoding step a token."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    losses: list[Tensor] = []
    warm = 8  # steps that compile, and that a CUDA graph is captured in
    start = 0.0
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)  # makes the cache
        for i in range(1, ids.shape[1] - 1):
            if len(losses) == warm:
                float(losses[-1])  # waits for the device
                start = time.perf_counter()
            logits = step(ids[:, i : i + 1].clone(), past_key_values=cache).logits[:, -1]
            losses.append(F.cross_entropy(logits.float(), ids[:, i + 1]))
        perplexity = math.exp(float(torch.stack(losses).mean()))
    return perplexity, (len(losses) - warm) / (time.perf_counter() - start)


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    if "int8, torchao" in args.formats and importlib.util.find_spec("torchao") is None:
        print("torchao is not installed: left out")
        args.formats.remove("int8, torchao")
    if not args.checkpoint and not TINY.is_dir():
        print("No trained model is at hand: random weights, whose perplexity says only whether they are the same.")
    ids, rows, wrong = text(args), [], []
    backends = ("eager", "inductor", "fuse") if args.compare else ("eager", "fuse")
    for name in args.formats:
        model = build(args)
        FORMATS[name](model)
        found = {}
        for backend in backends:
            print(f"{name}, {backend} ...", flush=True)
            torch._dynamo.reset()
            found[backend] = decode(model, compiled(model, backend, args), ids)
        eager, fused = found["eager"][0], found["fuse"][0]
        if not abs(fused / eager - 1) <= (1e-3 if args.dtype == torch.float32 else 2e-2):
            wrong.append(f"{name}: perplexity is {fused:.4f} with fuse and {eager:.4f} in eager")
        speeds = [f"{speed:.0f}" for _, speed in found.values()]
        rows.append([name, f"{stored_bytes(model) / 1e6:.3f}", *speeds, f"{eager:.3f}", f"{fused:.3f}"])

    from torch_fuse import reports  # for the report alone

    print(f"\n{reports()}\n")
    middle = [f"{backend}, tokens/s" for backend in backends]
    columns = ["weights", "MB", *middle, "perplexity, eager", "perplexity, fuse"]
    show(f"{args.tokens} decoding steps on {args.device} in {str(args.dtype).removeprefix('torch.')}", columns, rows)
    if args.device == "cpu":
        print("The kernel that reads codes is a GPU kernel; here its place is taken by plain torch.")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
