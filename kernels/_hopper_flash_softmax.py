"""The softmax of `_hopper_flash`, tile of scores by tile, in Triton's Gluon."""

from ._hopper_flash_tiles import MISSING, constexpr_function, gl, gluon


@gluon.jit
def shifted(s, shift, log2_scale, N: gl.constexpr, LAZY: gl.constexpr = True):
    """Scores less the shift, both in base 2; the shift; and what sums so far decay by.

    LAZY: the shift follows the largest score only when that has grown by 2**8 (as in FlashAttention-4): fp32 holds 2**8
    times the sums, the weights' rounding is relative, and in nearly all tiles nothing decays.
    """
    # Four chains a row: ptxas makes one of a row, of four clocks a step.
    top = gl.max(gl.max(gl.max(s.reshape([64, 4, N // 32, 4, 2]), 4), 2), 1)
    top = gl.convert_layout(gl.max(top, 1), gl.SliceLayout(1, s.type.layout)) * log2_scale
    new = gl.where(top > shift + 8.0, top, shift) if LAZY else gl.maximum(top, shift)
    finite = gl.where(new == -float("inf"), 0.0, new)  # no inf - inf before the first score
    return gl.fma(s, log2_scale, -finite[:, None]), new, gl.exp2(shift - finite)


@gluon.jit
def weights(x, N: gl.constexpr):
    """2**x, and of each row four sums, each of one thread's columns: the threads add theirs up once, at the end."""
    p = gl.exp2(x)
    return p, gl.sum(gl.sum(p.reshape([64, N // 8, 4, 2]), 3), 1)


@constexpr_function
def _decay_code(count):
    """PTX: multiplies unless no thread of the warp needs it. The first four elements have both rows of a thread."""
    need = [f"setp.neu.f32 p, ${2 * count + i}, 0f3F800000; or.pred any, any, p;" for i in range(min(count, 4))]
    copies = [f"mov.b32 ${i}, ${count + i};" for i in range(count)]
    products = [f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)]
    start = "{ .reg .pred p, any; setp.ne.u32 any, 0, 0;"
    vote = "vote.sync.any.pred any, any, 0xffffffff; @!any bra DONE;"
    return " ".join([start, *copies, *need, vote, *products, "DONE: }"])


@constexpr_function
def _decay_operands(count):
    return ",".join(["=&f"] * count + ["f"] * (2 * count))


@gluon.jit
def decayed(x, decay, COUNT: gl.constexpr, LAZY: gl.constexpr = True):
    """x * decay; COUNT: elements a thread."""
    decay = gl.convert_layout(decay, gl.SliceLayout(1, x.type.layout))[:, None]
    if LAZY:
        code: gl.constexpr = _decay_code(COUNT)
        operands: gl.constexpr = _decay_operands(COUNT)
        return gl.inline_asm_elementwise(code, operands, [x, decay], gl.float32, is_pure=False, pack=COUNT)
    else:  # noqa: RET505  # a jit function's other branch must not be compiled
        return x * decay


_ADD = (
    "fma.rn.f32 $0, $2, $4, $6; fma.rn.f32 $1, $3, $5, $7; { .reg .pred p; AGAIN: setp.lt.f32 p, $6, 0f00000000; "
    "@!p setp.lt.f32 p, $7, 0f00000000; vote.sync.any.pred p, p, 0xffffffff; @p bra AGAIN; }"
)
_ADD_CODE = None if MISSING else gl.constexpr(_ADD)


@gluon.jit
def add_before(total, decay, sums):
    """total * decay + sums, and a branch that waits for all exponentials: sums less than 0 do not exist.

    ptxas puts the exponentials behind a wait for products that follows, unless a branch between needs them.
    """
    decay = gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None]
    return gl.inline_asm_elementwise(_ADD_CODE, "=&f,=&f,f,f,f,f,f,f", [total, decay, sums], gl.float32,
                                     is_pure=False, pack=2)  # fmt: skip


@gluon.jit
def masked(s, tiles, t, first, index, col, N: gl.constexpr):
    """Scores of tile t from the end, of queries from `first` on: none of keys after them."""
    if (tiles - t) * N > first + 1:
        s = gl.where(((tiles - 1 - t) * N + col)[None, :] <= index[:, None], s, -float("inf"))
    return s
