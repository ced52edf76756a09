"""`torch.compile(model, backend="fuse")`: fused Triton and CUDA ops for unmodified PyTorch models.

The backend is found through an entry point, so using it needs no import of this package. What is here is for
looking at what it did (`explain`, `reports`, `reset_reports`) and for adding fusions (`Pattern`, `register`).
"""

from torch_fuse._version import __version__
from torch_fuse.explain import explain
from torch_fuse.layerwise_casting import inline_layerwise_casting
from torch_fuse.options import OptionError, Options
from torch_fuse.report import Report, Site, reports, reset_reports
from torch_fuse.rewrite.pattern import Match, Pattern
from torch_fuse.rewrite.registry import register

__all__ = [
    "Match",
    "OptionError",
    "Options",
    "Pattern",
    "Report",
    "Site",
    "__version__",
    "explain",
    "inline_layerwise_casting",
    "register",
    "reports",
    "reset_reports",
]
