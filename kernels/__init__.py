"""GPU ops, one a file: each with its equation, reference in plain torch, gradient and Triton kernel."""
