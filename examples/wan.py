"""Few-step video sampling with the Wan transformer, compiled with torch_fuse by one argument.

diffusers' model is unmodified, and torch_fuse is not imported before it is compiled. The loop is rCM's (one to four
steps, no guidance). Without weights the model is random: times are those of the real one, pictures are noise.

    python examples/wan.py                          # tiny; under a minute on a CPU
    python examples/wan.py --compare                # eager, Inductor and fuse, with their errors
    python examples/wan.py --compare --heads 12 --layers 30 --frames 21 --height 60 --width 104   # 1.3B, 480p
    python examples/wan.py --pipeline DIRECTORY --prompt "a cat on a skateboard" --steps 4

--pipeline takes a directory with a WanPipeline (`hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir DIRECTORY`);
its own weights were not distilled to few steps: put those of a distilled transformer into it for a video to watch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _tables import milliseconds, show
from _wan_frames import DECODED, PROJECTED, contact_sheet, frames_of
from _wan_sampling import TIMES, Denoise, Denoiser, noises, psnr, sample
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor

TEXT_TOKENS = 64
WAYS = ("eager", "inductor", "fuse")
ALLOWED_DB = 0.5  # fuse may be this much below Inductor


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="fuse", choices=WAYS)
    parser.add_argument("--compare", action="store_true", help="all backends, and a reference in higher precision")
    parser.add_argument("--lossy", action="append", default=[], metavar="FAMILY",
                        help="lossy rewrites that fuse may do, such as attention")  # fmt: skip
    parser.add_argument("--repeated-blocks", action="store_true", help="compile one block, as diffusers recommends")
    parser.add_argument("--checkpoint", help="local directory of a WanTransformer3DModel")
    parser.add_argument("--pipeline", help="local directory of a WanPipeline")
    parser.add_argument("--prompt", default="a cat on a skateboard", help="for --pipeline")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2, help="attention heads of 128 each; 12 in Wan2.1 1.3B")
    parser.add_argument("--frames", type=int, default=3, help="latent frames; 21 for 81 frames")
    parser.add_argument("--height", type=int, default=16, help="latent rows, even; 60 for 480p")
    parser.add_argument("--width", type=int, default=16, help="latent columns, even; 104 for 480p")
    parser.add_argument("--steps", type=int, default=len(TIMES), help=f"1 to {len(TIMES)}")
    parser.add_argument("--rounds", type=int, default=3, help="timed samples of each backend, in turns")
    parser.add_argument("--sheet", type=Path, help="PNG of the frames; a row for each backend")
    args = parser.parse_args(given)
    for name in ("layers", "heads", "frames", "height", "width", "steps", "rounds"):
        value, least = getattr(args, name), 2 if name in ("height", "width") else 1
        if value < least or value % least:
            even = "even numbers from 2" if least == 2 else "1 and more"
            parser.error(f"--{name} is {value}; allowed: {even}")
    if args.steps > len(TIMES):
        parser.error(f"--steps is {args.steps}; allowed: 1 to {len(TIMES)}")
    if args.checkpoint and args.pipeline:
        parser.error("--checkpoint and --pipeline exclude each other")
    return args


def build(args: argparse.Namespace) -> tuple[WanTransformer3DModel, Tensor, Any]:
    """The transformer, the prompt's embedding, and the VAE or None."""
    dtype = getattr(torch, args.dtype)
    if args.pipeline:
        pipeline = WanPipeline.from_pretrained(args.pipeline, torch_dtype=dtype, local_files_only=True).to(args.device)
        text, _ = pipeline.encode_prompt(args.prompt, do_classifier_free_guidance=False, device=args.device)
        return pipeline.transformer.eval(), text.to(dtype), pipeline.vae
    torch.manual_seed(0)
    if args.checkpoint:
        model = WanTransformer3DModel.from_pretrained(args.checkpoint, torch_dtype=dtype, local_files_only=True)
    else:
        dim = 128 * args.heads
        model = WanTransformer3DModel(num_attention_heads=args.heads, num_layers=args.layers, ffn_dim=35 * dim // 6)
        for name, weight in model.named_parameters():  # from_pretrained keeps the same ones in float32
            if not any(part in name for part in model._keep_in_fp32_modules):
                weight.data = weight.data.to(dtype)
    text = torch.randn(1, TEXT_TOKENS, model.config.text_dim).to(args.device, dtype)
    return model.to(args.device).eval(), text, None


def compiled(model: WanTransformer3DModel, backend: str, args: argparse.Namespace) -> Denoise:
    """The model as a consistency model, compiled; this is all that a user of torch_fuse changes."""
    if backend == "eager":
        return Denoiser(model)
    options = {"lossy": args.lossy} if backend == "fuse" and args.lossy else None
    if not args.repeated_blocks:
        return torch.compile(Denoiser(model), backend=backend, options=options, dynamic=False)
    model = copy.deepcopy(model)
    model.compile_repeated_blocks(backend=backend, options=options, dynamic=False)
    return Denoiser(model)


def plainly(step: Callable[[], Tensor]) -> Tensor:
    return step()


def reference(model: WanTransformer3DModel, noise: list[Tensor], text: Tensor, dtype: torch.dtype) -> Tensor:
    print(f"reference, in {dtype} ...", flush=True)
    wide = copy.deepcopy(model).to(dtype)
    return sample(Denoiser(wide), [n.to(dtype) for n in noise], text.to(dtype), plainly)


def timed(ways: dict[str, Denoise], noise: list[Tensor], text: Tensor, args: argparse.Namespace) -> dict[str, list]:
    """The median milliseconds of each step."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in noise] for name in ways}
    for done in range(args.rounds):
        print(f"timing in turns, {done + 1} of {args.rounds} ...", flush=True)
        for name, way in ways.items():
            steps = iter(times[name])

            def around(step: Callable[[], Tensor], steps: Any = steps) -> Tensor:
                kept = []
                next(steps).append(milliseconds(lambda: kept.append(step()), args.device))
                return kept[0]

            sample(way, noise, text, around)
    return {name: [statistics.median(step) for step in steps] for name, steps in times.items()}


@torch.no_grad()
def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    print("building the model ...", flush=True)
    model, text, vae = build(args)
    shape = (1, model.config.in_channels, args.frames, args.height, args.width)
    noise = noises(shape, args.steps, args.device)
    samples: dict[str, Tensor] = {}
    if args.compare:
        dtype = torch.float64 if args.dtype == "float32" else torch.float32
        samples["reference"] = reference(model, noise, text, dtype)
    ways = {name: compiled(model, name, args) for name in (WAYS if args.compare else (args.backend,))}
    for name, way in ways.items():
        print(f"{name}: first sample{'' if name == 'eager' else ' (compiles, up to a minute)'} ...", flush=True)
        samples[name] = sample(way, noise, text, plainly)
    times = timed(ways, noise, text, args)

    if "fuse" in ways:
        from torch_fuse import reports  # for the report alone

        print(f"\n{reports()}")
    quality = {name: psnr(samples[name], samples["reference"]) for name in ways if args.compare}
    columns = ["", *(f"step {i + 1}, ms" for i in range(args.steps)), "all, ms", *(["PSNR, dB"] if quality else [])]
    rows = [
        [name, *(f"{ms:.1f}" for ms in steps), f"{sum(steps):.1f}", *([f"{quality[name]:.2f}"] if quality else [])]
        for name, steps in times.items()
    ]
    tokens = args.frames * args.height * args.width // 4
    show(f"{tokens} tokens, {args.dtype} on {args.device}, median of {args.rounds}", columns, rows)
    if args.sheet:
        contact_sheet({name: frames_of(latents, vae) for name, latents in samples.items()}, args.sheet)
        print(f"{args.sheet}: {', '.join(samples)}, from above; {PROJECTED if vae is None else DECODED}")
    if args.device == "cpu":
        print("The fused kernels are GPU kernels; on a CPU such sites stay with Inductor, as the table says.")
    if not all(bool(latents.isfinite().all()) for latents in samples.values()):
        print("WRONG: a sample is not finite")
        return 1
    if quality and not args.lossy and not quality["fuse"] >= quality["inductor"] - ALLOWED_DB:
        print(f"WRONG: fuse is more than {ALLOWED_DB} dB below Inductor")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
