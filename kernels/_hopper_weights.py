"""Attention weights in registers, as the FP8 operand of a product that runs under other work, in Triton's Gluon."""

from ._hopper_flash_tiles import gl, gluon


@gluon.jit
def pack(p, N: gl.constexpr):
    """Four weights as FP8 in 32 bits, each where it is: the values' keys are in this order (`_quantise`)."""
    even, odd = gl.split(p.reshape([64, N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)))
    even1, even2 = gl.split(even)
    odd1, odd2 = gl.split(odd)
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""", "=r,f,f,f,f", [even1, odd1, even2, odd2], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def operand(packed, layout: gl.constexpr, N: gl.constexpr):
    """The packed weights as an operand. Carried as 8-bit values, the compiler would take each out of its register."""
    pairs = gl.join(packed, packed)
    bits = gl.convert_layout(gl.join(pairs, pairs).reshape([64, N]), layout, assert_trivial=True)
    return gl.inline_asm_elementwise(
        "", "=r,0,r,r,r", [bits], dtype=gl.float8e4nv, is_pure=False, pack=4
    )  # fmt: skip


@gluon.jit
def after(packed, nothing):
    """The same, written here: a register of a product's operand written under another one makes both wait."""
    return gl.inline_asm_elementwise(
        "xor.b32 $0, $1, $2;", "=r,r,r", [packed, nothing], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def keep(packed):
    """Uses weights, so that their registers are not written before: the wait for products takes no 8-bit values."""
    gl.inline_asm_elementwise("", "=r,0", [packed], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def sums_of_threads(p, N: gl.constexpr):
    """Sums of each thread's own weights of a row; the four threads of a row are summed at the end."""
    return gl.sum(gl.sum(gl.sum(p.reshape([64, 4, N // 32, 4, 2]), 4), 2), 1)


@gluon.jit
def largest_of_rows(s, N: gl.constexpr):
    """The largest score of each row. In four chains: the assembler makes one of a row, of four clocks a step."""
    s = s.reshape([64, 4, N // 32, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([64, 4, 4, N // 16])
    return gl.max(gl.max(gl.max(s, 3), 1), 1)


@gluon.jit
def before_products(total):
    """Puts the exponentials before the wait for products under which they run: the assembler would wait first.

    The store, which never happens (sums are not negative), is what it does not move across a wait.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred never;
        .reg .b32 at;
        mov.b32 at, 0;
        setp.lt.f32 never, $1, 0f00000000;
        @never st.shared.f32 [at], $1;
        mov.b32 $0, $1;
        }""", "=f,f", [total], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip
