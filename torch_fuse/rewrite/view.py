"""The read-only view of one graph that patterns are matched on."""

from __future__ import annotations

from functools import cached_property

from torch.fx import GraphModule, Node

from torch_fuse._compat import FakeTensorMode, ShapeEnv, fake_mode_of
from torch_fuse.graph.attention import Attention, attentions
from torch_fuse.graph.calls import Call, call_of
from torch_fuse.graph.closure_walk import packed_products
from torch_fuse.graph.effects import Order
from torch_fuse.graph.library_ops import library_product
from torch_fuse.graph.linear import match_linear
from torch_fuse.graph.mask import Mask, match_mask
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.norm import match_norm, strip_casts
from torch_fuse.graph.residual import match_residual
from torch_fuse.graph.skip import reads_projected
from torch_fuse.graph.subclass import packed_source
from torch_fuse.graph.values import tensor
from torch_fuse.options import Options

KINDS = ("attention", "norm_linear", "combine", "dequant")
_VIEWS = {
    "view",
    "reshape",
    "flatten",
    "transpose",
    "permute",
    "contiguous",
    "dropout",
    "cast",
    "clone",
    "linear",
}


class GraphView:
    """What the recognisers see of a graph; computed on demand, once.

    Args:
        gm: the graph module.
        inner: it is called by another graph.
        writes: what earlier views of it have found of its nodes' mutations; added to.
        options: the backend's; a pattern may recognise more where more is asked for.
    """

    def __init__(
        self,
        gm: GraphModule,
        inner: bool = False,
        writes: dict[Node, bool] | None = None,
        options: Options | None = None,
    ) -> None:
        self.gm = gm
        self.options = options or Options()
        self._inner = inner
        self._writes = writes
        self.nodes = list(gm.graph.nodes)
        self._masks: dict[tuple[Node, bool, bool], Mask | Miss] = {}

    @cached_property
    def order(self) -> Order:
        """Positions, mutations and mode switches."""
        return Order(self.gm.graph, self._inner, self._writes)

    @cached_property
    def fake_mode(self) -> FakeTensorMode | None:
        """The fake mode of the example values."""
        return fake_mode_of(self.gm)

    @property
    def shape_env(self) -> ShapeEnv | None:
        """What is known of the symbolic sizes."""
        return None if self.fake_mode is None else self.fake_mode.shape_env

    @cached_property
    def attentions(self) -> dict[Node, Attention]:
        """All attentions, by their result."""
        return {found.node: found for found in attentions(self.nodes)}

    def candidates(self, kind: str) -> list[Node]:
        """The nodes where a fusion of a kind could start, whether or not one does."""
        if kind == "attention":
            return list(self.attentions)
        if kind == "norm_linear":
            return self._norm_linears
        if kind == "combine":
            return self._combines
        if kind == "dequant":
            return self._dequants
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")

    def mask_meaning(self, mask: Node, before: Node, *, inverted: bool = False, any_row: bool = False) -> Mask:
        """What a mask keeps; many layers share one mask, so the answer is remembered. The options are `match_mask`'s.

        Raises:
            Miss: with the reason why its meaning is not proven.
        """
        question = (mask, inverted, any_row)
        if question not in self._masks:
            try:
                self._masks[question] = match_mask(
                    mask, self.order, before, self.shape_env, inverted=inverted, any_row=any_row
                )
            except Miss as miss:
                self._masks[question] = miss
        answer = self._masks[question]
        if isinstance(answer, Miss):
            raise type(answer)(answer.reason, answer.node)
        self.order.check_unwritten([mask], self.order.index[before])
        return answer

    @cached_property
    def _norm_linears(self) -> list[Node]:
        """Norms whose result goes into linear layers, one candidate a norm."""
        found: dict[Node, None] = {}
        for node in self.nodes:
            linear = match_linear(node)
            if linear is None:
                continue
            source = strip_casts(linear.input)
            if source not in found and isinstance(source, Node) and match_norm(source) is not None:
                found[source] = None
        return list(found)

    @cached_property
    def projected(self) -> set[Node]:
        """Results of attention, and what views, casts, dropouts and linear layers make of them."""
        found = set(self.attentions)
        for node in self.nodes:
            call = call_of(node)
            if call is None or node in found:
                continue
            sources, linear = node.all_input_nodes, match_linear(node)
            if (linear is not None and linear.input in found) or (
                call.op in _VIEWS and sources and sources[0] in found
            ):
                found.add(node)
        return found

    @cached_property
    def _combines(self) -> list[Node]:
        """Sums of an attention's (projected) result and something else; products with one that go into a projection."""
        found = []
        for node in self.nodes:
            call = call_of(node)
            if call is None or node in self.projected:
                continue
            if call.op == "mul" and self._gates_attention(node, call):
                found.append(node)
            if call.op not in ("add", "sub", "rsub", "addcmul", "lerp"):
                continue
            residual = match_residual(node)
            if residual is not None and any(reads_projected(term, self.projected) for term in residual.terms):
                found.append(node)
        return found

    def _gates_attention(self, node: Node, call: Call) -> bool:
        """Whether a product is an attention's result times a tensor, on its way into a linear layer."""
        sides = [call["input"], call["other"]]
        if all(side not in self.projected for side in sides) or any(tensor(side) is None for side in sides):
            return False
        while len(node.users) == 1:
            user = next(iter(node.users))
            linear, behind = match_linear(user), call_of(user)
            if linear is not None and linear.input is node:
                return True
            if behind is None or behind.op not in _VIEWS:
                break
            node = user
        return False

    @cached_property
    def _dequants(self) -> list[Node]:
        """Linear layers whose weight is computed from integers or 8-bit floats."""
        computed = set(packed_products(self.nodes))
        return [node for node in self.nodes if node in computed or _reads_subclass(node) or library_product(node)]


def _reads_subclass(node: Node) -> bool:
    call = call_of(node)
    return call is not None and call.op == "linear" and packed_source(call["weight"]) is not None
