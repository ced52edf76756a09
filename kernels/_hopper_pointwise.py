"""The functions of `_pointwise` in Triton's Gluon: a program's text is taken apart while the kernel compiles."""

from ._hopper_flash_tiles import constexpr_function, gl, gluon


@constexpr_function
def _root(program):
    return program.split(" ")[0].partition(":")[0]


@constexpr_function
def _number(program):
    """The number of the first token, or None."""
    text = program.split(" ")[0].partition(":")[2]
    return float(text) if text else None


@constexpr_function
def _operand(program, index):
    """The program of an operand of the first token, "" where it has fewer."""
    tokens = program.split(" ")[1:]
    for _ in range(index + 1):
        missing, end = 1, 0
        while missing and end < len(tokens):
            token = tokens[end]
            missing += -1 if token == "x" else 1 if token in ("add", "sub", "mul", "div") else 0
            end += 1
        found, tokens = tokens[:end], tokens[end:]
    return " ".join(found)


@gluon.jit
def function(x, PROGRAM: gl.constexpr):
    """A program's value for numbers in fp32."""
    ROOT: gl.constexpr = _root(PROGRAM)
    NUMBER: gl.constexpr = _number(PROGRAM)
    if ROOT == "x":
        return x
    else:  # noqa: RET505  # a jit function's other branch must not be compiled
        SECOND: gl.constexpr = _operand(PROGRAM, 1)
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
                y = gl.div_rn(y, z)
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
            y = gl.sqrt_rn(y)
        elif ROOT == "rsqrt":
            y = _over(1.0, gl.sqrt_rn(y))
        elif ROOT == "reciprocal":
            y = _over(1.0, y)
        elif ROOT == "exp":
            y = gl.exp(y)
        elif ROOT == "sigmoid":
            y = 1.0 / (1.0 + gl.exp(-y))
        elif ROOT == "cos":
            y = gl.cos(y)
        elif ROOT == "sin":
            y = gl.sin(y)
        else:
            y = _tanh(y)
        return y


@gluon.jit
def _over(number: gl.constexpr, y):
    """number / y, rounded once: Triton's own division would make 1 of 1 / 1 but for one bit."""
    return gl.div_rn(gl.full(y.shape, number, gl.float32, y.type.layout), y)


@gluon.jit
def _tanh(x):
    """To 1e-6 of its value: near 0 the quotient of differences would lose what the series keeps."""
    e = gl.exp(-2.0 * gl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1.0 + square * (-0.33333333 + square * 0.13333333))
    return gl.where(gl.abs(x) < 0.1, near, gl.where(x < 0, -far, far))
