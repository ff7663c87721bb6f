"""BELM: two-step samplers with an exact inverse and the least local error."""

from jaxdiff.grids import Grid
from jaxdiff.solvers.clocks import carry, check_choice, own_clock, scale, weights
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

INTEGRANDS = ("eps", "flow", "v")


def belm(grid: Grid, integrand: str = "eps", start: str = "step") -> Tableau:
    """O-BELM: the bidirectional explicit linear two-step method of least local error.

    Wang, Yin, Dong, Zhu, Zhang, Zhao, Qian & Li, "BELM: Bidirectional Explicit Linear Multi-step
    Sampler for Exact Inversion in Diffusion Models" (2024). In y = x / alpha and rho = sigma / alpha
    (dy / drho = eps), with h = rho_i - rho_{i-1} and h' = rho_{i+1} - rho_i,

        y_{i+1} = (h' / h)^2 y_{i-1} + (1 - (h' / h)^2) y_i + h' (h + h') / h eps(x_i)

    after a first step of DDIM: the only two-step formula with this one evaluation that is exact for
    quadratic y (with equal steps, the leapfrog rule). One evaluation a step, order 2. The formula is
    its own inverse with the grid reversed: `belm(grid).inverse()`, or by hand as in `bdia`,

        state = sample(denoiser, belm(grid), x_T, save="state")
        pair = state._replace(registers=state.registers[::-1])
        x_T = sample(denoiser, belm(grid.reversed(), start="pair"), None, state=pair)

    Rounding errors alternate in sign and, in y, are multiplied by (h' / h)^2 a step: by the square of
    the last step over the first in a run, of the first over the last in its inverse. In rho steps
    shrink towards the data: runs are as exact as float32 is, and a round trip of 50 steps on vp_linear
    errs by 4e-6 with uniform times, by 8e-4 with half-log-SNR's. The clocks of "flow" and "v" have
    round trips within 2e-6 on both, but their steps grow on uniform times: runs differ from float64 by
    7e-4 (1e-6 with half-log-SNR's).

    Arguments:
      integrand: "eps", the paper's, or the same formula in the clock of another prediction (see
        `jaxdiff.solvers.clocks`): "flow", y = x / (alpha + sigma), or "v", y = x / sqrt(alpha^2 +
        sigma^2) with the angle.
      start: "step"; "pair", from a `State` with (z_1, z_0) in its registers: one row less.

    "eps" supports sigma = 0 at the end, "flow" and "v" both ends; backward, sigma = 0 is an end to
    leave from a pair. Raises ValueError for other options, ends, and a pair with fewer than 2 steps.
    """
    check_choice("integrand", integrand, INTEGRANDS)
    check_choice("start", start, ("step", "pair"))
    pair = start == "pair"
    if pair and grid.steps < 2:
        raise ValueError("start='pair' needs a grid of at least 2 steps, got 1")
    if not grid.backward:
        check_ends(grid, f"belm over {integrand}", noise=integrand != "eps", data=True)
    elif grid.ends[0] and integrand == "eps":
        raise ValueError("belm over eps cannot run to a noise end with alpha = 0: use flow or v")
    elif grid.ends[1] and not pair:
        raise ValueError(
            "belm runs backward from sigma = 0 only from a pair (start='pair'): a single sample says "
            "nothing there about its noise; end the grid at sigma > 0"
        )
    xp, rows, keep = grid.xp, [], Update([1.0])
    y_scale = [scale(xp, integrand, grid.node(i)) for i in range(len(grid))]
    clock = [own_clock(xp, integrand, grid.node(i))[1] for i in range(len(grid))]
    for i in range(1 if pair else 0, grid.steps):
        level, end = grid.node(i), grid.node(i + 1)
        if i == 0:
            ends = (grid.ends[0], grid.ends[1] and grid.steps == 1)
            w = weights(grid, level, end, [level], integrand, ends=ends)[0]
            rows.append(Row(level, [Update([carry(xp, integrand, level, end)], [w]), keep]))
            continue
        h, step = clock[i] - clock[i - 1], clock[i + 1] - clock[i]
        share = (step / h) ** 2
        whole = y_scale[i + 1] * step * (h + step) / h
        if integrand == "v":
            whole = whole / y_scale[i]
        state = [(1.0 - share) * y_scale[i + 1] / y_scale[i], share * y_scale[i + 1] / y_scale[i - 1]]
        rows.append(Row(level, [Update(state, [whole]), keep]))
    return assemble(rows, integrand, xp)
