"""What recognising and rewriting costs: seconds by layers, and the share of the whole compilation.

python benchmarks/matching.py --out benchmarks/results/matching.jsonl
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import Log

import torch_fuse


def model_of(name: str, layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A narrow model of so many layers, and its inputs: the graph, not the arithmetic, is what takes time."""
    import transformers

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 97}
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=layers, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    return model, {"input_ids": torch.randint(0, 97, (1, 128)), "use_cache": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON lines are appended to this file")
    parser.add_argument("--models", nargs="+", default=["GPTNeoX", "Llama"])
    parser.add_argument("--layers", nargs="+", type=int, default=[8, 16, 32, 64])
    given = parser.parse_args()
    log = Log(given.out)
    for name in given.models:
        for layers in given.layers:
            model, inputs = model_of(name, layers)
            torch._dynamo.reset()
            torch_fuse.reset_reports()
            start = time.perf_counter()
            with torch.no_grad():
                torch.compile(model, backend="fuse", options={"kernels": "reference"})(**inputs)
            total = time.perf_counter() - start
            report = torch_fuse.reports()
            nodes = sum(graph.nodes for graph in report.graphs)
            log.write(what="matching", model=name, layers=layers, nodes=nodes, counts=report.counts(),
                      match_s=report.seconds, compile_s=total, share=report.seconds / total)  # fmt: skip


if __name__ == "__main__":
    main()
