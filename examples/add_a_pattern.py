"""Adds a fusion of one's own: silu(gate) * up in one op, recognised in an unmodified Llama MLP."""

import torch
import torch.nn.functional as F

import torch_fuse
from torch_fuse.graph.calls import call_of


@torch.library.custom_op("example::silu_mul", mutates_args=())
def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The op; a Triton kernel would go here. Shapes and dtypes of `gate` and `up` are the same."""
    return F.silu(gate) * up


@silu_mul.register_fake
def _(gate, up):
    return torch.empty_like(up)


@torch_fuse.register
class SiluMul(torch_fuse.Pattern):
    """silu(gate) * up becomes one op."""

    name = "silu_mul"
    op = "example::silu_mul"

    def anchors(self, view):
        return [node for node in view.nodes if (call := call_of(node)) is not None and call.op == "mul"]

    def match(self, view, anchor):
        product = call_of(anchor)
        for gate, up in ((product["input"], product["other"]), (product["other"], product["input"])):
            silu = call_of(gate)
            if silu is not None and silu.op == "silu" and not silu.inplace:
                region, inputs = frozenset({anchor, gate}), (silu["input"], up)
                return torch_fuse.Match(anchor, {"inputs": inputs}, (anchor,), region, inputs, "gated SiLU")
        return None

    def rewrite(self, match, builder, options):
        return {match.anchor: builder.call(silu_mul, *match.bindings["inputs"])}


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


if __name__ == "__main__":
    model, x = MLP(), torch.randn(4, 64)
    with torch.no_grad():
        found = torch.compile(model, backend="fuse")(x)
        torch.testing.assert_close(found, model(x))
    print(torch_fuse.reports())
