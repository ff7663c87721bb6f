"""EVODiff: a multistep method whose coefficients are made from the outputs themselves.

Li et al., "EVODiff: Entropy-aware Variance Optimized Diffusion Inference" (2025). With m_i the x0
prediction at node i, q = alpha / sigma, h = q_i - q_{i-1}, r the ratio of the last step to this in
log(alpha / sigma), and <a, b> the inner product over one sample (or one channel of it), the step
from node i - 1 to node i is

    e    = (sigma_i / sigma_{i-1}) x + sigma_i h m_{i-1}               first order
    D1   = m_{i-1} - b m_{i-2}
    x_i  = e + sigma_i h D1 / (2 r_i)                                  probe: m_i is evaluated there
    D2   = m_i - b' m_{i-1}
    x_i  = e + sigma_i h B / (2 zeta),   B = -eta D1 / r + (1 - eta) r D2

and the next step leaves the second x_i. The balances b, b' mix the root of a ratio of noise levels
with a projection, (1 - w) sqrt(s) + w <m, m'> / <m', m'>; r_i, eta and zeta are sigmoids of the
balance and of projections of B's parts. Where they come from is in the paper; the constants are those of
the authors' code. As the step is not linear in the outputs it is no tableau of its own: it
is that of the levels, and a control that makes the step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.arrays import is_concrete
from jaxdiff.grids import Grid
from jaxdiff.integrator import Carry, Control, RowInfo
from jaxdiff.solvers.clocks import carry as exact_carry
from jaxdiff.solvers.clocks import check_choice
from jaxdiff.solvers.tableau import Row, Tableau, Update, assemble, check_ends

_BOUND = 2.0  # of every projection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class EVODiff(Control):
    """The control of `evodiff`, which see.

    Attributes, [steps + 1] each but the first, those of the step that ends at the node:
      carry, gain: sigma_i / sigma_{i-1}, and sigma_i h; h itself is `h`.
      ratio: r, 1 for the first step; base: sqrt of the ratio of the noise level's last two ratios.
      weight: w, the share of the projection in a balance.
      last: (share of e, coefficient of m, of the m before) of the last step.
    """

    carry: Any
    gain: Any
    h: Any
    ratio: Any
    base: Any
    weight: Any
    last: Any
    per: str = dataclasses.field(default="sample", metadata={"static": True})
    adaptive: bool = dataclasses.field(default=True, metadata={"static": True})
    many: bool = dataclasses.field(default=False, metadata={"static": True})
    plain_end: bool = dataclasses.field(default=False, metadata={"static": True})

    def after(
        self, aux: Any, row: RowInfo, x: Any, out: Any, z: Any, carry: Carry, key: Any
    ) -> tuple[Carry, Any]:
        """Correct the step that led to the row's level, and make the next one's probe."""
        i, steps = row.index, self.carry.shape[0] - 1
        (history,) = carry.history
        m, m1, m2 = (jax.tree.map(lambda a, k=k: a[(i - k) % 3], history) for k in range(3))
        # The table left the last corrected state in register 1.
        state = x
        if self.adaptive and steps > 2:
            fixed = self._correct(i, carry.registers[1], m, m1, m2)
            state = jax.tree.map(lambda a, b: jnp.where(i >= 2, a, b), fixed, x)
        new = self._probe(i + 1, state, m, m1)
        end = self._end(state, m, m1)
        first = self._euler(i + 1, state, m)
        picked = jax.tree.map(
            lambda a, b, c: jnp.where(i == steps - 1, a, jnp.where(i == 0, b, c)), end, first, new
        )
        keep = row.active != 0
        registers = jax.tree.map(
            lambda a, b: jnp.where(keep, a, b), (picked, state), carry.registers
        )
        return carry._replace(registers=registers), aux

    def _at(self, values: Any, i: Any, like: Any) -> Any:
        return jnp.asarray(values)[jnp.clip(i, 0, self.carry.shape[0] - 1)].astype(like.dtype)

    def _euler(self, i: Any, x: Any, m: Any) -> Any:
        return jax.tree.map(
            lambda a, b: self._at(self.carry, i, a) * a + self._at(self.gain, i, a) * b, x, m
        )

    def _dot(self, a: Any, b: Any) -> Any:
        """<a, b> of every sample, as leaves that broadcast against a's."""

        def leaf(x, y):
            axes = range(1, x.ndim if self.per == "sample" else max(x.ndim - 1, 1))
            return jnp.sum(x * y, tuple(axes), keepdims=True)

        dots = jax.tree.map(leaf, a, b)
        if self.per == "channel":
            return dots
        flat = [d.reshape(-1) for d in jax.tree.leaves(dots)]
        return jax.tree.map(lambda d: sum(flat).reshape(d.shape), dots)

    def _project(self, a: Any, b: Any) -> Any:
        """<a, b> / <b, b>, bounded; 0 where b = 0."""

        def leaf(over, size):
            safe = jnp.where(size > 0, size, 1.0)
            return jnp.where(size > 0, jnp.clip(over / safe, -_BOUND, _BOUND), 0.0)

        return jax.tree.map(leaf, self._dot(a, b), self._dot(b, b))

    def _balance(self, i: Any, m: Any, before: Any) -> Any:
        if not self.adaptive:
            return jax.tree.map(lambda a: jnp.ones_like(a), self._dot(m, m))

        def leaf(projection):
            w, base = (self._at(a, i, projection) for a in (self.weight, self.base))
            return (1.0 - w) * base + w * projection

        return jax.tree.map(leaf, self._project(m, before))

    def _scaled(self, i: Any, balance: Any) -> Any:
        """r_i of the probe."""

        def leaf(b):
            r = self._at(self.ratio, i, b)
            if not self.adaptive:
                return r
            return jnp.clip(jax.nn.sigmoid(0.25 * jnp.abs(b)) * r, 0.25 * r, 1.5 * r)

        return jax.tree.map(leaf, balance)

    def _probe(self, i: Any, x: Any, m: Any, m1: Any) -> Any:
        b = self._balance(i, m, m1)

        def leaf(e, m, m1, b, r):
            return e + 0.5 * self._at(self.gain, i, e) / r * (m - b * m1)

        return jax.tree.map(leaf, self._euler(i, x, m), m, m1, b, self._scaled(i, b))

    def _correct(self, i: Any, x: Any, m: Any, m1: Any, m2: Any) -> Any:
        b1, b2 = self._balance(i, m1, m2), self._balance(i, m, m1)
        d1 = jax.tree.map(lambda a, b, c: a - c * b, m1, m2, b1)
        d2 = jax.tree.map(lambda a, b, c: a - c * b, m, m1, b2)

        def parts(sign):
            def leaf(a, b):
                r = self._at(self.ratio, i, a)
                return r * b + sign / r * a

            return jax.tree.map(leaf, d1, d2)

        star = self._project(parts(1.0), parts(-1.0))
        eta = jax.tree.map(lambda s: 0.5 * jax.nn.sigmoid(jnp.abs(0.5 * s)), star)

        def mixed(a, b, eta):
            r = self._at(self.ratio, i, a)
            return -eta / r * a + (1.0 - eta) * r * b

        mix = jax.tree.map(mixed, d1, d2, eta)
        scaled = self._scaled(i, b1)
        excess = jax.tree.map(
            lambda d, b, r: 0.5 * self._at(self.gain, i, d) / r * (d - b), d1, mix, scaled
        )

        def zeta(projection, consistency):
            shift = jnp.abs(projection / self._at(self.gain, i, projection)) - 0.5
            return jax.nn.sigmoid(shift if consistency is None else -shift * consistency)

        share = self._project(excess, d1)
        if self.many:
            slope = jax.tree.map(lambda a, b: (a - b) / self._at(self.h, i, a), m1, m2)
            level = self._project(m1, slope)
            steep = jax.tree.map(
                lambda p: jax.nn.sigmoid(p * (2.0 - self._at(self.carry, i, p) ** 2)), level
            )
            found = jax.tree.map(zeta, share, steep)
        else:
            found = jax.tree.map(lambda p: zeta(p, None), share)

        def leaf(e, b, zeta):
            return e + 0.5 * self._at(self.gain, i, e) / zeta * b

        return jax.tree.map(leaf, self._euler(i, x, m1), mix, found)

    def _end(self, x: Any, m: Any, m1: Any) -> Any:
        i = self.carry.shape[0] - 1
        euler = self._euler(i, x, m)
        if self.plain_end:
            return euler

        def leaf(e, m, m1):
            share, of_new, of_old = (self._at(self.last, k, e) for k in range(3))
            return share * e + of_new * m + of_old * m1

        return jax.tree.map(leaf, euler, m, m1)


def evodiff(
    grid: Grid, adaptive: bool = True, end: str = "published", per: str = "sample",
    many: bool | None = None,
) -> tuple[Tableau, EVODiff]:  # fmt: skip
    """(tableau, control) of EVODiff, one evaluation a step:

        tableau, control = evodiff(grid)
        sample(denoiser, tableau, x_T, control=control)

    The first step is of first order. The tableau without its control is the first-order method
    (DDIM). Any prediction; the half-log-SNR must be finite at the noise end.

    Arguments:
      adaptive: False sets b = 1 and r_i = r and corrects nothing: DPM-Solver++(2M) with
        `lower_order_final`, if `end` is "first_order".
      end: "published", the authors' last step (1 - sqrt(sigma sigma')) e + sigma' h (m - b m') / 2,
        where b = 1 - sqrt(s) / 2, s the ratio sigma' / sigma, less 1/2 if that is not below 1/2;
        or "first_order". The published one supposes that sigma is small there, with sigma near 1 it
        takes much of the state away; on exact denoisers "first_order" is nearly always nearer.
      per: what an inner product is over: one "sample", or each "channel" (last axis) of it, as in
        the authors' code.
      many: the authors' other rule for zeta, theirs above 20 steps (None does so).

    In the weight w = (1 - ((t + t_n) / (t_0 + t_n))^2) / 2 the time is the grid's, sigma in the
    authors' code, which is for alpha = 1. The method converges at order 1: it is one for few steps,
    and whether its error is then below DPM-Solver++(2M)'s depends on the data and the grid.
    Raises ValueError for other options, fewer than 2 steps, a grid with alpha = 0, or one from data
    to noise.
    """
    check_choice("end", end, ("published", "first_order"))
    check_choice("per", per, ("sample", "channel"))
    check_ends(grid, "evodiff", noise=False, data=True)
    steps, xp = grid.steps, grid.xp
    if grid.backward or steps < 2:
        raise ValueError(f"evodiff needs at least 2 steps from noise to data, got {steps}")
    t, alpha, sigma = grid.node(slice(None))
    with np.errstate(divide="ignore", invalid="ignore"):
        carry = sigma[1:] / sigma[:-1]
        gain = alpha[1:] - carry * alpha[:-1]
        # What the last step has not, because it is made otherwise, may be infinite there.
        lam = grid.lam[:-1] if grid.ends[1] else grid.lam
        ratio = (lam[1:-1] - lam[:-2]) / (lam[2:] - lam[1:-1])
        h = xp.exp(lam[1:]) - xp.exp(lam[:-1])
    if grid.ends[1]:
        ratio, h = (xp.concatenate([a, xp.ones(1)]) for a in (ratio, h))
    base = xp.sqrt(carry[1:] / carry[:-1])
    if is_concrete(t) and not t[0] + t[-1] > 0:
        raise ValueError(f"evodiff needs positive times, got {t[0]} to {t[-1]}")
    weight = 0.5 * (1.0 - ((t + t[-1]) / (t[0] + t[-1])) ** 2)
    part = xp.where(carry[-1] < 0.5, carry[-1], xp.abs(carry[-1] - 0.5))
    half = 0.5 * gain[-1]
    last = xp.stack([
        1.0 - xp.sqrt(sigma[-1] * sigma[-2]), half, -half * (1.0 - 0.5 * xp.sqrt(part))
    ])  # fmt: skip
    one = xp.ones(1)
    control = EVODiff(
        xp.concatenate([one, carry]), xp.concatenate([one, gain]), xp.concatenate([one, h]),
        xp.concatenate([one, one, ratio]), xp.concatenate([one, one, base]), weight, last,
        per, adaptive, steps > 20 if many is None else many, end == "first_order",
    )  # fmt: skip
    rows = []
    for i in range(steps):
        level, to = grid.node(i), grid.node(i + 1)
        # Three integrands are kept, and register 1 keeps the corrected state.
        kept = exact_carry(xp, "x0", level, to)
        rows.append(Row(level, [Update([kept], [gain[i], 0.0, 0.0]), Update([0.0, 1.0])]))
    nodes = [(0, 0), *((i + 1, 1) for i in range(1, steps)), (steps, 0)]
    return assemble(rows, "x0", xp, nodes=nodes), control
