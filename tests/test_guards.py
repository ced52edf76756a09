"""What Inductor compiles wrongly reaches it in another spelling, with the same result."""

import pytest
import torch

from torch_fuse.rewrite.guards import respell


def attention(q, k, v):
    scores = torch.matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1)) * 0.25
    return scores.softmax(-1) @ v.permute(0, 2, 1, 3)


@pytest.mark.parametrize(("version", "changes"), [((2, 11), 1), ((2, 13), 1), ((2, 15), 0)])
def test_a_key_permuted_into_place_is_respelled_for_versions_that_misread_it(version, changes):
    found = []

    def backend(gm, example_inputs):
        found.append(respell(gm, version))
        found.append(sum(list(node.args[1:]) == [0, 2, 3, 1] for node in gm.graph.nodes))
        return gm.forward

    inputs = [torch.randn(1, 16, 16, 16) for _ in range(3)]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(attention, backend=backend)(*inputs), attention(*inputs))
    assert found == [changes, 1 - changes]


def test_the_permuted_key_of_this_version_compiles_right():
    inputs = [torch.randn(1, 16, 16, 16) for _ in range(3)]
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(attention, backend="fuse")(*inputs)
    torch.testing.assert_close(found, attention(*inputs), atol=1e-5, rtol=1e-5)
