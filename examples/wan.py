"""A denoising loop of the Wan video transformer, compiled with torch_fuse by one argument.

The diffusers model and scheduler are unmodified, and torch_fuse is not imported before they are compiled.

    python examples/wan.py
    python examples/wan.py --heads 12 --layers 30 --frames 21 --height 60 --width 104 --dtype bfloat16
    python examples/wan.py --checkpoint DIRECTORY_OF_THE_TRANSFORMER
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

TEXT_TOKENS = 64


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="local directory of a WanTransformer3DModel; random weights without")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4, help="attention heads of 128 each; 12 in Wan2.1 1.3B")
    parser.add_argument("--frames", type=int, default=3, help="latent frames; 21 for 81 frames")
    parser.add_argument("--height", type=int, default=16, help="latent rows, even; 60 for 480p")
    parser.add_argument("--width", type=int, default=16, help="latent columns, even; 104 for 480p")
    parser.add_argument("--steps", type=int, default=1, help="denoising steps")
    args = parser.parse_args()
    for name in ("layers", "heads", "frames", "height", "width", "steps"):
        value, least = getattr(args, name), 2 if name in ("height", "width") else 1
        if value < least or value % least:
            even = "even numbers from 2" if least == 2 else "1 and more"
            parser.error(f"--{name} is {value}; allowed: {even}")
    return args


def build(args: argparse.Namespace) -> WanTransformer3DModel:
    dtype = getattr(torch, args.dtype)
    if args.checkpoint:
        model = WanTransformer3DModel.from_pretrained(args.checkpoint, torch_dtype=dtype, local_files_only=True)
        return model.to(args.device).eval()
    torch.manual_seed(0)
    dim = 128 * args.heads
    model = WanTransformer3DModel(num_attention_heads=args.heads, num_layers=args.layers, ffn_dim=35 * dim // 6)
    for name, weight in model.named_parameters():  # from_pretrained keeps the same ones in float32
        if not any(part in name for part in model._keep_in_fp32_modules):
            weight.data = weight.data.to(dtype)
    return model.to(args.device).eval()


def denoise(
    model: Callable[..., tuple[torch.Tensor]], latents: torch.Tensor, text: torch.Tensor, steps: int
) -> torch.Tensor:
    """The loop of diffusers' Wan pipeline, without guidance."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps, device=latents.device)
    for t in scheduler.timesteps:
        (velocity,) = model(
            hidden_states=latents.to(text.dtype),
            timestep=t.expand(latents.shape[0]),
            encoder_hidden_states=text,
            return_dict=False,
        )
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def timed(call: Callable[[], torch.Tensor], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def main() -> int:
    args = arguments()
    print("building the model ...", flush=True)
    model = build(args)
    latents = torch.randn(1, model.config.in_channels, args.frames, args.height, args.width, device=args.device)
    text = torch.randn(1, TEXT_TOKENS, model.config.text_dim, device=args.device, dtype=getattr(torch, args.dtype))

    repeated = copy.deepcopy(model)
    repeated.compile_repeated_blocks(backend="fuse")
    ways: dict[str, Callable[..., tuple[torch.Tensor]]] = {
        "eager": model,
        "inductor, whole model": torch.compile(model),
        "fuse, whole model": torch.compile(model, backend="fuse"),
        "fuse, repeated blocks": repeated,
    }
    print("float64, for the check ...", flush=True)
    exact = denoise(copy.deepcopy(model).double(), latents.double(), text.double(), args.steps)
    errors = {}
    for name, way in ways.items():
        print(f"{name}: first call{'' if name == 'eager' else ' (compiles, up to a minute)'} ...", flush=True)
        errors[name] = (denoise(way, latents, text, args.steps).double() - exact).abs().max().item()
    print("timing in turns ...", flush=True)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            times[name].append(timed(lambda way=way: denoise(way, latents, text, args.steps), args.device))

    from torch_fuse import reports  # for the report alone

    print(f"\n{reports()}\n")
    tokens = args.frames * args.height * args.width // 4
    print(f"{tokens} tokens, {args.steps} step(s), {args.dtype}; median of 5, largest error against float64")
    allowed = 2 * max(errors["eager"], errors["inductor, whole model"]) + torch.finfo(getattr(torch, args.dtype)).eps
    right = True
    for name in ways:
        ok = errors[name] <= allowed
        right &= ok
        median = statistics.median(times[name])
        print(f"{name:22} {median:9.1f} ms  {errors[name]:.1e}  {'ok' if ok else 'WRONG'}")
    if args.device == "cpu":
        print("The fused kernels are GPU kernels; on a CPU such sites stay with Inductor, as the table says.")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
