"""What kernels write to starts as NaN, so that an element that nobody writes shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

__all__ = ["poison_new_tensors"]


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the floating-point tensors that `Tensor.new_empty` makes with NaN, but for fake ones."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        fake = isinstance(out, torch._subclasses.FakeTensor | torch._subclasses.functional_tensor.FunctionalTensor)
        return out if fake or not out.is_floating_point() else out.fill_(float("nan"))

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
