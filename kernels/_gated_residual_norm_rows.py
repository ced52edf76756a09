"""gated_residual_norm_backward's Triton kernel: the gradients of one row after another, and sums over rows."""

from ._gated_residual_norm_tile import load, load_factor, normalised, row_mean, store
from ._ops import tl, triton


@triton.jit
def _through_results(x_hat, g1, g1_b, g1_s, g2, g2_b, g2_s, weight1, bias1, weight2, scale, scale_b, scale_s, dscale,
                     totals, row, b, s, col, keep, C: tl.constexpr, OFFSET: tl.constexpr, DW1: tl.constexpr,
                     DB1: tl.constexpr, DW2: tl.constexpr, DB2: tl.constexpr, DSCALE: tl.constexpr,
                     DSHIFT: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """dx_hat of one part of a row, and its shares of the sums over rows."""
    dw1, db1, dw2, db2, dg1, dg2, ds, dt = totals
    g = load(g1 + (b * g1_b + s * g1_s) + col, keep, MASK)
    w = 1.0
    if weight1 is not None:
        w = load(weight1 + col, keep, MASK) + OFFSET
    if DSHIFT:
        dt += g
    if scale is not None:
        if DSCALE != "none":
            h = x_hat * w
            if bias1 is not None:
                h += load(bias1 + col, keep, MASK)
            if DSCALE == "sum":
                ds += g * h
            else:
                store(dscale + row * C + col, g * h, keep, MASK)
        g *= 1.0 + load_factor(scale, scale_b, scale_s, b, s, col, keep, True, MASK)
    if DW1:
        dw1 += g * x_hat
    if DB1:
        db1 += g
    dx_hat = g * w
    if g2 is not None:
        g = load(g2 + (b * g2_b + s * g2_s) + col, keep, MASK)
        if DW2:
            dw2 += g * x_hat
        if DB2:
            db2 += g
        if weight2 is not None:
            g *= load(weight2 + col, keep, MASK) + OFFSET
        dx_hat += g
    return dx_hat, (dw1, db1, dw2, db2, dg1, dg2, ds, dt)


@triton.jit
def _through_term(dr, y, y_b, y_s, gate, gate_b, gate_s, dy, dgate, dg, row, b, s, col, keep, ALPHA: tl.constexpr,
                  LANES: tl.constexpr, DGATE: tl.constexpr, C: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """Stores the gradient of a term; returns its share of the gate's sum over rows, and of this row's sum."""
    of_row = 0.0
    if ALPHA != 1.0:
        dr *= ALPHA
    if DGATE != "none":
        product = dr * load(y + (b * y_b + s * y_s) + col, keep, MASK)
        if DGATE == "sum":
            dg += product
        elif DGATE == "row":
            of_row = tl.sum(product, axis=0)
        else:
            store(dgate + row * C + col, product, keep, MASK)
    if dy is not None:
        if gate is not None:
            dr *= load_factor(gate, gate_b, gate_s, b, s, col, keep, LANES, MASK)
        store(dy + row * C + col, dr, keep, MASK)
    return dg, of_row


@triton.jit
def _through_sum(dx_hat, x_hat, rstd, inner, mean, gr, gr_b, gr_s, y1, y1_b, y1_s, y2, y2_b, y2_s, gate1, gate1_b,
                 gate1_s, gate2, gate2_b, gate2_s, dr_out, dy1, dy2, dgate1, dgate2, totals, row, b, s, col, keep,
                 ALPHA1: tl.constexpr, ALPHA2: tl.constexpr, LANES1: tl.constexpr, LANES2: tl.constexpr,
                 DGATE1: tl.constexpr, DGATE2: tl.constexpr, C: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """The gradients of x and of the terms, of one part of a row."""
    dw1, db1, dw2, db2, dg1, dg2, ds, dt = totals
    dr = (dx_hat - mean - x_hat * inner) * rstd
    if gr is not None:
        dr += load(gr + (b * gr_b + s * gr_s) + col, keep, MASK)
    store(dr_out + row * C + col, dr, keep, MASK)
    dg1, row1 = _through_term(dr, y1, y1_b, y1_s, gate1, gate1_b, gate1_s, dy1, dgate1, dg1, row, b, s, col, keep,
                              ALPHA1, LANES1, DGATE1, C, MASK)  # fmt: skip
    dg2, row2 = _through_term(dr, y2, y2_b, y2_s, gate2, gate2_b, gate2_s, dy2, dgate2, dg2, row, b, s, col, keep,
                              ALPHA2, LANES2, DGATE2, C, MASK)  # fmt: skip
    return (dw1, db1, dw2, db2, dg1, dg2, ds, dt), row1, row2


@triton.jit
def _store_totals(totals, p_dw1, p_db1, p_dw2, p_db2, p_dg1, p_dg2, p_ds, p_dt, program, col, C: tl.constexpr):
    """This program's rows of the partial sums [programs, C]."""
    dw1, db1, dw2, db2, dg1, dg2, ds, dt = totals
    at = program.to(tl.int64) * C + col
    if p_dw1 is not None:
        tl.store(p_dw1 + at, dw1, mask=col < C)
    if p_db1 is not None:
        tl.store(p_db1 + at, db1, mask=col < C)
    if p_dw2 is not None:
        tl.store(p_dw2 + at, dw2, mask=col < C)
    if p_db2 is not None:
        tl.store(p_db2 + at, db2, mask=col < C)
    if p_dg1 is not None:
        tl.store(p_dg1 + at, dg1, mask=col < C)
    if p_dg2 is not None:
        tl.store(p_dg2 + at, dg2, mask=col < C)
    if p_ds is not None:
        tl.store(p_ds + at, ds, mask=col < C)
    if p_dt is not None:
        tl.store(p_dt + at, dt, mask=col < C)


@triton.jit
def _zeros(LANES: tl.constexpr):
    zero = tl.zeros((LANES,), tl.float32)
    return zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def backward_kernel(gr, gr_b, gr_s, g1, g1_b, g1_s, g2, g2_b, g2_s, r, r_b, r_s, y1, y1_b, y1_s, y2, y2_b, y2_s,
                     gate1, gate1_b, gate1_s, gate2, gate2_b, gate2_s, weight1, bias1, weight2, scale, scale_b, scale_s,
                     dr, dy1, dy2, dgate1, dgate2, dscale, p_dw1, p_db1, p_dw2, p_db2, p_dg1, p_dg2, p_ds, p_dt,
                     group_rows, group_programs, length, ALPHA1: tl.constexpr, ALPHA2: tl.constexpr,
                     LANES1: tl.constexpr, LANES2: tl.constexpr, DGATE1: tl.constexpr, DGATE2: tl.constexpr,
                     DSCALE: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
                     C: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASK_MAIN: tl.constexpr,
                     MASK_REST: tl.constexpr):  # fmt: skip
    """A program takes every group_programs'th row of its group, one after the other."""
    program = tl.program_id(0)
    group = (program // group_programs).to(tl.int64)
    DW1: tl.constexpr = p_dw1 is not None
    DB1: tl.constexpr = p_db1 is not None
    DW2: tl.constexpr = p_dw2 is not None
    DB2: tl.constexpr = p_db2 is not None
    DSHIFT: tl.constexpr = p_dt is not None
    totals_a = _zeros(MAIN)
    totals_b = _zeros(REST if REST else 1)
    col_a = tl.arange(0, MAIN)
    col_b = col_a
    if REST:
        col_b = MAIN + tl.arange(0, REST)
    keep_a, keep_b = col_a < C, col_b < C
    index = program % group_programs
    while index < group_rows:  # not range(): Triton 3.6's interpreter cannot take its bounds from NumPy 2.5
        row = group * group_rows + index
        b, s = row // length, row % length
        r_row = r + (b * r_b + s * r_s)
        x_a = load(r_row + col_a, keep_a, MASK_MAIN)
        x_b = x_a
        if REST:
            x_b = load(r_row + col_b, keep_b, MASK_REST)
        x_a, x_b, rstd = normalised(x_a, x_b, keep_a, keep_b, C, REST, MASK_MAIN, MASK_REST, LAYER, EPS)
        d_a, totals_a = _through_results(
            x_a, g1, g1_b, g1_s, g2, g2_b, g2_s, weight1, bias1, weight2, scale, scale_b, scale_s, dscale, totals_a,
            row, b, s, col_a, keep_a, C, OFFSET, DW1, DB1, DW2, DB2, DSCALE, DSHIFT, MASK_MAIN,
        )  # fmt: skip
        d_b = d_a
        if REST:
            d_b, totals_b = _through_results(
                x_b, g1, g1_b, g1_s, g2, g2_b, g2_s, weight1, bias1, weight2, scale, scale_b, scale_s, dscale,
                totals_b, row, b, s, col_b, keep_b, C, OFFSET, DW1, DB1, DW2, DB2, DSCALE, DSHIFT, MASK_REST,
            )  # fmt: skip
        inner = row_mean(d_a * x_a, d_b * x_b, C, REST)
        mean = 0.0
        if LAYER:
            mean = row_mean(d_a, d_b, C, REST)
        totals_a, row1, row2 = _through_sum(
            d_a, x_a, rstd, inner, mean, gr, gr_b, gr_s, y1, y1_b, y1_s, y2, y2_b, y2_s, gate1, gate1_b, gate1_s,
            gate2, gate2_b, gate2_s, dr, dy1, dy2, dgate1, dgate2, totals_a, row, b, s, col_a, keep_a, ALPHA1, ALPHA2,
            LANES1, LANES2, DGATE1, DGATE2, C, MASK_MAIN,
        )  # fmt: skip
        if REST:
            totals_b, more1, more2 = _through_sum(
                d_b, x_b, rstd, inner, mean, gr, gr_b, gr_s, y1, y1_b, y1_s, y2, y2_b, y2_s, gate1, gate1_b, gate1_s,
                gate2, gate2_b, gate2_s, dr, dy1, dy2, dgate1, dgate2, totals_b, row, b, s, col_b, keep_b, ALPHA1,
                ALPHA2, LANES1, LANES2, DGATE1, DGATE2, C, MASK_REST,
            )  # fmt: skip
            row1 += more1
            row2 += more2
        if DGATE1 == "row":
            tl.store(dgate1 + row, row1)
        if DGATE2 == "row":
            tl.store(dgate2 + row, row2)
        index += group_programs
    _store_totals(totals_a, p_dw1, p_db1, p_dw2, p_db2, p_dg1, p_dg2, p_ds, p_dt, program, col_a, C)
    if REST:
        _store_totals(totals_b, p_dw1, p_db1, p_dw2, p_db2, p_dg1, p_dg2, p_ds, p_dt, program, col_b, C)
