"""A decoding step's layers become one op: it agrees with eager, in its caches and counters too, or is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from harness import Rewriter, rewritten
from test_decode import contents, prefilled, same_steps
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from torch_fuse import Options
from torch_fuse.kernels import decode_stack
from torch_fuse.kernels.decode_stack import Stack
from torch_fuse.patterns._decode_stack_examples import step

PATTERN = "decode_stack"
INSIDE = ("decode_attention", "decode_norm_linear", "decode_linear_residual")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 97,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
# Architecture, sizes, whether attention and MLP are parallel, whether the MLP is gated, products for q, k and v.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[bool, bool, int]]] = {
    "GPT-NeoX": ("GPTNeoX", SIZES, (True, False, 1)),
    "GPT-NeoX, sequential": ("GPTNeoX", {**SIZES, "use_parallel_residual": False}, (False, False, 1)),
    "Llama": ("Llama", GROUPED, (False, True, 3)),
    "Mistral": ("Mistral", {**GROUPED, "sliding_window": None, "num_hidden_layers": 3}, (False, True, 3)),
    "Qwen2": ("Qwen2", GROUPED, (False, True, 3)),  # with biases of query, key and value
    "Qwen3": ("Qwen3", {**GROUPED, "head_dim": 16}, (False, True, 3)),
    "Phi": ("Phi", SIZES, (True, False, 3)),  # one norm for attention and MLP, and a bias of the lm_head
}


def build(name: str, **changes: Any) -> nn.Module:
    """A small model by name, whose norms and biases are random too."""
    torch.manual_seed(0)
    architecture, sizes, _ = MODELS[name]
    model = getattr(transformers, f"{architecture}ForCausalLM")
    made = model(model.config_class(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def stacks(rewriter: Rewriter) -> list[Stack]:
    """The arguments, as nodes, of the ops of the graphs."""
    nodes = [node for graph in rewriter.graphs for node in graph.graph.nodes]
    return [Stack(*node.args) for node in nodes if node.target is decode_stack.decode_stack]


def left(rewriter: Rewriter) -> list[str]:
    """The calls of single ops of decoding in the graphs."""
    names = [f"{getattr(n.target, '__module__', '')}.{n.target}" for g in rewriter.graphs for n in g.graph.nodes]
    return [name for name in names if any(op in name for op in ("decode_attention", "norm_linear", "linear_residual"))]


@pytest.mark.parametrize("name", MODELS)
def test_a_models_step_is_one_op_and_agrees_for_two_caches_in_turn(name: str) -> None:
    model, rewriter = build(name), Rewriter()
    same_steps(model, rewritten(model, rewriter), batch=1, new=1, prompts=(7, 4))
    (stack,) = stacks(rewriter)
    assert stack.layers == model.config.num_hidden_layers
    found = (stack.parallel, stack.gated, len(stack.in_weights) // stack.layers)
    assert found == MODELS[name][2] and stack.head_weight is not None
    assert not left(rewriter), rewriter.report


def test_norms_of_query_and_key_belong_to_the_stack() -> None:
    model, rewriter = build("Qwen3"), Rewriter()
    same_steps(model, rewritten(model, rewriter), batch=1, new=1, prompts=(7, 4), steps=1)
    (stack,) = stacks(rewriter)
    layers = model.config.num_hidden_layers
    assert len(stack.q_norm_weights) == len(stack.k_norm_weights) == layers
    assert len({*stack.q_norm_weights, *stack.k_norm_weights}) == 2 * layers
    assert stack.qk_eps == model.config.rms_norm_eps and stack.qk_weight_offset == 0.0


def test_the_sites_of_the_ops_inside_are_reported_as_parts_of_the_stack() -> None:
    model, rewriter = build("GPT-NeoX"), Rewriter()
    same_steps(model, rewritten(model, rewriter), batch=1, new=1, prompts=(3,), steps=1)
    counts = rewriter.report.counts()
    assert counts[PATTERN] == {"fused": 1}
    sites = [site for site in rewriter.report.sites if site.pattern in INSIDE]
    assert {pattern: counts[pattern] for pattern in INSIDE} == {pattern: {"fused": 2} for pattern in INSIDE}
    assert all(site.op == "torch_fuse::decode_stack" for site in sites)
    assert all(site.reason.endswith("; inside decode_stack") for site in sites)


def test_inductor_takes_the_step_as_it_is() -> None:
    """The op writes to the caches themselves, as CUDA graphs need: no result has the size of one."""
    model = build("Llama")
    torch._dynamo.reset()
    options = {"kernels": "reference", "on_error": "raise"}
    compiled = torch.compile(model, backend="fuse", fullgraph=True, options=options)
    _, codes = run_and_get_code(lambda: same_steps(model, compiled, batch=1, new=1, prompts=(5, 3)))
    code = "\n".join(codes)
    assert code.count("torch.ops.torch_fuse.decode_stack.default(") == 1
    config = model.config
    shape = (1, config.num_key_value_heads, 32, config.hidden_size // config.num_attention_heads)
    assert f"rand_strided({shape}, " in code
    assert f"empty_strided_cpu({shape}" not in code


def given_form(model: nn.Module, compiled: Any, cache: Any, token: Tensor, length: int) -> Tensor:
    """A step as `generate` takes it: the mask and the position are inputs."""
    mask = (torch.arange(32) <= length)[None, None, None]
    position = torch.tensor([[length]])
    return compiled(token, past_key_values=cache, attention_mask=mask, position_ids=position).logits


def test_mask_and_position_may_be_inputs_as_generate_gives_them() -> None:
    model, rewriter = build("Llama"), Rewriter()
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(5))
    mine, theirs = (prefilled(model, ids[:, :6]) for _ in range(2))
    compiled = rewritten(model, rewriter)
    with torch.no_grad():
        for i in range(6, 9):
            found, wanted = (
                given_form(model, call, cache, ids[:, i : i + 1], i)
                for call, cache in ((compiled, mine), (model, theirs))
            )
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(contents(mine), contents(theirs), atol=2e-5, rtol=2e-5)
    (stack,) = stacks(rewriter)
    assert stack.positions is None and len(stack.masks) == 1
    assert all(node.op == "placeholder" for node in stack.lengths)  # type: ignore[attr-defined]


def test_caches_of_other_sizes_become_one_op_too() -> None:
    model, rewriter = build("Llama"), Rewriter()
    compiled = rewritten(model, rewriter)
    ids = torch.randint(0, 97, (1, 6), generator=torch.Generator().manual_seed(5))
    for size in (16, 24, 40):
        mine, theirs = (prefilled(model, ids, size) for _ in range(2))
        with torch.no_grad():
            found, wanted = (
                call(ids[:, :1], past_key_values=x).logits for call, x in ((compiled, mine), (model, theirs))
            )
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(contents(mine), contents(theirs), atol=2e-5, rtol=2e-5)
    assert len(rewriter.graphs) == len(stacks(rewriter)) == 2, rewriter.report


def test_steps_that_are_not_measured_stay_as_they_are() -> None:
    model, rewriter = build("Llama"), Rewriter(Options())
    same_steps(model, rewritten(model, rewriter), batch=1, new=1, prompts=(3,), steps=1)
    assert not stacks(rewriter) and PATTERN not in rewriter.report.counts()


def test_steps_of_several_sequences_keep_the_single_ops() -> None:
    model, rewriter = build("Llama"), Rewriter()
    same_steps(model, rewritten(model, rewriter), batch=2, new=1, prompts=(4,), steps=1)
    reasons = {site.reason for site in rewriter.report.sites if site.pattern == PATTERN}
    assert reasons == {"a step of 2 sequence(s) and 1 token(s): the stack takes one token of one"}
    assert not stacks(rewriter)


# -- one thing changed ---------------------------------------------------------------------------------------------

# What a decoder does, how many layers of it are in a stack, and whether its lm_head is.
FOUND: dict[str, tuple[dict[str, Any], list[tuple[int, bool]]]] = {
    "positions_are_given": ({"how": "positions"}, [(2, True)]),
    "first_position_is_computed_before": ({"how": "position_counted_first"}, [(2, True)]),
    "masks_of_their_own": ({"masks": 2}, [(2, True)]),
    "no_head": ({"how": "no_head", "kind": "gated"}, [(2, False)]),
    "last_row": ({"how": "last_row"}, [(2, True)]),
    "head_without_slices": ({"how": "whole"}, [(2, True)]),
    "last_hidden_state_is_read": ({"how": "last_read"}, [(2, False)]),
    "final_norm_of_another_epsilon": ({"how": "other_eps"}, [(2, False)]),
    "one_of_four_is_wider": ({"how": "other_width", "layers": 4}, [(2, True)]),
    "one_of_five_is_scaled": ({"how": "hook_at_2", "layers": 5}, [(3, False), (2, True)]),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two_tokens": ({"tokens": 2}, "a step of 1 sequence(s) and 2 token(s)"),
    "one_layer": ({"layers": 1}, "no layer in front of it or behind it"),
    "scaled_between_layers": ({"how": "hook"}, "no layer in front of it or behind it"),
    "layers_of_other_widths": ({"how": "other_width"}, "layers differ in the shape or type of up_weights"),
    "tables_of_their_own": ({"how": "other_table"}, "layers differ in their tables"),
    "norms_of_their_own": ({"how": "other_norm"}, "the norms of a layer differ in kind or epsilon"),
    "scales_of_their_own": ({"how": "other_scale"}, "layers differ in scale"),
    "cache_of_two_layers": ({"how": "shared_cache"}, "share memory"),
    "cache_read_between": ({"how": "cache_read"}, "reads a cache or its counter"),
    "cache_written_between": ({"how": "cache_written"}, "reads a cache or its counter"),
    "count_read_between": ({"how": "length_read"}, "reads a cache or its counter"),
    "mask_written_between": ({"how": "mask_written"}, "writes in place"),
    "weight_written_between": ({"how": "weight_written"}, "writes in place"),
    "attention_is_read": ({"how": "attention_read"}, "inside of a layer"),
    "mlp_is_read": ({"how": "mlp_read"}, "which a stack does not return"),
    "heads_in_another_order": ({"how": "heads_flipped", "kind": "gated"}, "is no view"),
    "attended_in_another_order": ({"how": "attended_transposed"}, "in another order"),
    "mlp_of_another_value": ({"how": "mlp_of_input", "kind": "sequential"}, ""),
}


def both(changes: dict[str, Any], grad: bool = False) -> Rewriter:
    """Runs a decoder eagerly and rewritten; results, inputs and parameters have to be the same afterwards."""
    torch.manual_seed(0)
    model, inputs = step(**changes)(torch.float32)
    other, given = copy.deepcopy((model, inputs))
    rewriter = Rewriter()
    with torch.set_grad_enabled(grad):
        found = rewritten(other, rewriter)(*given), given, list(other.parameters())
        wanted = model(*inputs), inputs, list(model.parameters())
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    return rewriter


@pytest.mark.parametrize("name", FOUND)
def test_what_layers_share_decides_which_become_one(name: str) -> None:
    changes, expected = FOUND[name]
    rewriter = both(changes)
    found = [(stack.layers, stack.head_weight is not None) for stack in stacks(rewriter)]
    assert found == expected, rewriter.report
    attended = [name for name in left(rewriter) if "decode_attention" in name]
    assert len(attended) == changes.get("layers", 2) - sum(layers for layers, _ in expected)  # none appends twice


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_would_compute_otherwise_stays(name: str) -> None:
    changes, reason = REFUSED[name]
    rewriter = both(changes)
    assert not stacks(rewriter), rewriter.report
    reasons = [site.reason for site in rewriter.report.sites if site.pattern == PATTERN]
    assert reasons and all(reasons) and any(reason in found for found in reasons), rewriter.report


def test_with_gradients_there_is_no_stack() -> None:
    rewriter = both({"grad": True, "how": "positions"}, grad=True)
    assert not stacks(rewriter)
