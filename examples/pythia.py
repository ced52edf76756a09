"""Pythia through transformers' own `generate`, compiled with torch_fuse by one argument.

The model is unmodified and torch_fuse is not imported before it is compiled: torch.compile finds the backend.

    python examples/pythia.py
    python examples/pythia.py --checkpoint DIRECTORY --device cuda --dtype bfloat16 --new-tokens 256
    python examples/pythia.py --decode --checkpoint DIRECTORY --device cuda --dtype float16    # fused decoding steps
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from _tables import captured, milliseconds
from transformers import AutoModelForCausalLM, CompileConfig, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="local directory of a Pythia; random weights without")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--mode", default=None, help="Inductor's mode; reduce-overhead on a GPU")
    parser.add_argument(
        "--decode", action="store_true",
        help="with the fused decoding steps (options={'unmeasured': True}), and one step alone as a CUDA graph",
    )  # fmt: skip
    args = parser.parse_args()
    for name in ("prompt_tokens", "new_tokens"):
        if getattr(args, name) < 2:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: 2 and more")
    args.mode = args.mode or ("reduce-overhead" if args.device.startswith("cuda") else "default")
    return args


def build(args: argparse.Namespace) -> torch.nn.Module:
    dtype = getattr(torch, args.dtype)
    if args.checkpoint:
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=dtype, local_files_only=True)
        return model.to(args.device).eval()
    torch.manual_seed(0)
    config = GPTNeoXConfig(  # the geometry of Pythia-31M
        hidden_size=256, num_hidden_layers=6, num_attention_heads=8, intermediate_size=1024, vocab_size=50304
    )  # fmt: skip
    return GPTNeoXForCausalLM._from_config(config, dtype=dtype).to(args.device).eval()


def generate(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int, **how: object) -> tuple[list[int], float]:
    """Greedy tokens, and the tokens generated in a second."""
    start = time.perf_counter()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        **how,
    )
    generated = tokens[0, prompt.shape[1] :].tolist()  # waits for the device
    return generated, new_tokens / (time.perf_counter() - start)


def decode_options(args: argparse.Namespace) -> dict[str, object]:
    """Fused decoding steps, with the CUDA graphs of `reduce-overhead`: torch.compile takes a mode or options."""
    graphs = {"inductor": {"triton.cudagraphs": True}} if args.mode == "reduce-overhead" else {}
    return {"unmeasured": True, **graphs}


def step_speed(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int, backend: str) -> float:
    """Tokens in a second of the decoding step alone: a static cache, a CUDA graph on a GPU, no sampling."""
    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + max(new_tokens, 8))
    options = {"unmeasured": True} if backend == "fuse" else None
    step = model if backend == "eager" else torch.compile(model, backend=backend, fullgraph=True, options=options)
    with torch.no_grad():
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)

        def take() -> None:
            token.copy_(step(token, past_key_values=cache).logits[:, -1:].argmax(-1))

        def rewind() -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(prompt.shape[1])

        for _ in range(2):  # compiles
            take()
        rewind()
        replay = take if backend == "eager" else captured(take, str(prompt.device))
        rewind()

        def run() -> None:
            for _ in range(new_tokens):
                replay()

        return 1e3 * new_tokens / milliseconds(run, str(prompt.device))


def main() -> int:
    args = arguments()
    print("building the model ...", flush=True)
    model = build(args)
    prompt = torch.randint(3, model.config.vocab_size, (1, args.prompt_tokens), device=args.device)

    ways: dict[str, dict[str, object]] = {"eager": {"disable_compile": True}}
    for backend in ("inductor", "fuse"):
        compile_config = CompileConfig(backend=backend, mode=args.mode)
        if args.decode and backend == "fuse":
            compile_config = CompileConfig(backend=backend, mode=None, options=decode_options(args))
        # transformers compiles the decoding step on GPUs only, unless told otherwise
        compile_config._compile_all_devices = True
        ways[backend] = {"cache_implementation": "static", "compile_config": compile_config}
    tokens, speeds = {}, {}
    for name, how in ways.items():
        print(f"{name}: first call{'' if name == 'eager' else ' (compiles, up to a minute)'} ...", flush=True)
        tokens[name], _ = generate(model, prompt, args.new_tokens, **how)
    print("timing ...", flush=True)
    for name in list(ways) * 5:
        _, speed = generate(model, prompt, args.new_tokens, **ways[name])
        speeds.setdefault(name, []).append(speed)

    from torch_fuse import reports  # for the report alone

    print(f"\n{reports()}\n")
    print("tokens/s with the prompt included: median of 5 runs, slowest to fastest")
    for name, values in speeds.items():
        slow, *_, fast = sorted(values)
        print(f"{name:8} {statistics.median(values):8.1f}   ({slow:.1f} - {fast:.1f})")
    if args.decode:
        print(
            "\ntokens/s of the decoding step alone"
            + ("" if args.device == "cpu" else ", but for eager in a CUDA graph")
        )
        for name in ways:
            print(f"{name:8} {step_speed(model, prompt, args.new_tokens, name):8.1f}", flush=True)
    same = tokens["eager"] == tokens["fuse"]
    agreeing = sum(a == b for a, b in zip(tokens["eager"], tokens["fuse"], strict=True))
    print(f"greedy tokens: {agreeing} of {args.new_tokens} as in eager")
    if args.device == "cpu":
        print("The fused kernels are GPU kernels; on a CPU most sites stay with Inductor, as the table says.")
    if not same and args.dtype != "float32":
        print("In 16 bits, ties between logits fall either way; compare in float32.")
    return 0 if same or args.dtype != "float32" else 1


if __name__ == "__main__":
    raise SystemExit(main())
