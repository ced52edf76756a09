"""A consistency model's skip combination around attention, compiled with torch_fuse by one argument.

out = c_skip(t) * x + c_out(t) * Attn(x) as in rCM and EDM, c_skip = s^2 / (t^2 + s^2), c_out = s * t / sqrt(s^2 + t^2),
t for each sample. The module is plain PyTorch, and torch_fuse is not imported before it is compiled. Forward, and a
training step with gradients of x, t and all weights, each checked against float64; on a GPU both are timed as CUDA
graphs.

    python examples/rcm.py
    python examples/rcm.py --device cuda --dtype bfloat16 --shapes 4x128x256x4 8x512x512x8 16x2048x768x12
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _tables import captured, milliseconds, show
from torch import Tensor, nn

# batch x tokens x width x heads: small, medium and large, as the method was first measured
SHAPES = ["4x128x256x4", "8x512x512x8", "16x2048x768x12"]


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32",
                        choices=("float32", "bfloat16", "float16"))  # fmt: skip
    parser.add_argument("--shapes", nargs="+", default=SHAPES if cuda else SHAPES[:1],
                        help="batch x tokens x width x heads")  # fmt: skip
    parser.add_argument("--sigma", type=float, default=1.0, help="sigma_data")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    for shape in args.shapes:
        sizes = shape.split("x")
        if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
            parser.error(f"--shapes has {shape!r}; allowed: four positive numbers such as 4x128x256x4")
        if int(sizes[2]) % int(sizes[3]):
            parser.error(f"--shapes has {shape!r}; allowed: a width that the number of heads divides")
    return args


class SkippedAttention(nn.Module):
    def __init__(self, width: int, heads: int, sigma: float) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.sigma = heads, sigma

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = self.sigma**2 / (t**2 + self.sigma**2)
        out = self.sigma * t / (t**2 + self.sigma**2) ** 0.5
        return (skip[:, None, None] * x + out[:, None, None] * self.attend(x)).to(x.dtype)


def forward(call: Callable[..., Tensor], x: Tensor, t: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [call(x, t)]


def train(call: Callable[..., Tensor], x: Tensor, t: Tensor) -> list[Tensor]:
    """A loss's gradients, of x, t and the weights."""
    model = getattr(call, "_orig_mod", call)
    leaves = [x, t, *model.parameters()]
    return list(torch.autograd.grad(call(x, t).float().square().mean(), leaves))


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error of all results, each against its own size."""
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, exact, strict=True))


def compared(args: argparse.Namespace, shape: str) -> bool:
    """Prints a table of one shape; whether fuse is as near to float64 as the others."""
    batch, length, width, heads = map(int, shape.split("x"))
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    model = SkippedAttention(width, heads, args.sigma).to(args.device, dtype)
    x = torch.randn(batch, length, width, device=args.device).to(dtype).requires_grad_()
    t = torch.rand(batch, device=args.device).requires_grad_()
    torch._dynamo.reset()
    options = {"unmeasured": True}  # right, but measured to win on Hopper only
    ways: dict[str, Callable[..., Tensor]] = {
        "eager": model,
        "inductor": torch.compile(model, dynamic=False),
        "fuse": torch.compile(model, backend="fuse", options=options, dynamic=False),
    }
    wide = copy.deepcopy(model).double()
    right, rows = True, []
    for name, step in (("forward", forward), ("training step", train)):
        exact = step(wide, x.detach().double().requires_grad_(), t.detach().double().requires_grad_())
        errors = {way: worst(step(call, x, t), exact) for way, call in ways.items()}
        calls = {way: captured(lambda call=call, step=step: step(call, x, t), args.device)
                 for way, call in ways.items()}  # fmt: skip
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, call in calls.items():
                times[way].append(milliseconds(call, args.device))
        medians = {way: statistics.median(found) for way, found in times.items()}
        allowed = 2 * max(errors["eager"], errors["inductor"]) + torch.finfo(dtype).eps / 8
        for way in ways:
            ok = errors[way] <= allowed
            right &= ok
            rows.append([name, way, f"{medians[way]:.3f}", f"{medians['inductor'] / medians[way]:.2f}",
                         f"{errors[way]:.1e}", "ok" if ok else "WRONG"])  # fmt: skip
    show(f"{shape}, {args.dtype} on {args.device}, median of {args.rounds}",
         ["", "", "ms", "times Inductor", "error", ""], rows)  # fmt: skip
    return right


def main() -> int:
    args = arguments()
    print("errors are the largest relative ones against float64, of the result or of any gradient", flush=True)
    right = [compared(args, shape) for shape in args.shapes]

    from torch_fuse import reports  # for the report alone

    print(f"\n{reports()}")
    if args.device == "cpu":
        print("The fused kernels are GPU kernels; on a CPU such sites stay with Inductor, as the table says.")
    return 0 if all(right) else 1


if __name__ == "__main__":
    raise SystemExit(main())
