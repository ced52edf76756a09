"""The functions of `_pointwise` in Triton: a program's text is taken apart while the kernel compiles."""

from ._hopper_pointwise import _number, _operand, _root
from ._ops import tl, triton


@triton.jit
def function(x, PROGRAM: tl.constexpr):
    """A program's value for numbers in fp32, quotients and roots rounded once."""
    ROOT: tl.constexpr = _root(PROGRAM)
    NUMBER: tl.constexpr = _number(PROGRAM)
    if ROOT == "x":
        return x
    else:  # noqa: RET505  # a jit function's other branch must not be compiled
        SECOND: tl.constexpr = _operand(PROGRAM, 1)
        y = function(x, _operand(PROGRAM, 0))
        if SECOND != "":
            z = function(x, SECOND)
            if ROOT == "add":
                y = y + z
            elif ROOT == "sub":
                y = y - z
            elif ROOT == "mul":
                y = y * z
            else:
                y = tl.div_rn(y, z)
        elif ROOT == "add":
            y = y + NUMBER
        elif ROOT == "mul":
            y = y * NUMBER
        elif ROOT == "rsub":
            y = NUMBER - y
        elif ROOT == "rdiv":
            y = _over(NUMBER, y)
        elif ROOT == "neg":
            y = -y
        elif ROOT == "square":
            y = y * y
        elif ROOT == "sqrt":
            y = tl.sqrt_rn(y)
        elif ROOT == "rsqrt":
            y = _over(1.0, tl.sqrt_rn(y))
        elif ROOT == "reciprocal":
            y = _over(1.0, y)
        elif ROOT == "exp":
            y = tl.exp(y)
        elif ROOT == "sigmoid":
            y = 1.0 / (1.0 + tl.exp(-y))
        elif ROOT == "cos":
            y = tl.cos(y)
        elif ROOT == "sin":
            y = tl.sin(y)
        else:
            y = _tanh(y)
        return y


@triton.jit
def _over(number: tl.constexpr, y):
    """number / y, rounded once."""
    return tl.div_rn(tl.full(y.shape, number, tl.float32), y)


@triton.jit
def _tanh(x):
    """To 1e-6 of its value: near 0 the quotient of differences would lose what the series keeps."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1.0 + square * (-0.33333333 + square * 0.13333333))
    return tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))
