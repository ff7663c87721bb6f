"""DPM-Solver-12 and -23: embedded pairs of exponential Runge-Kutta methods, as diffrax solvers.

With h the step in half-log-SNR lambda and phi_k as in `jaxdiff.solvers.phi`, from (alpha, sigma) to
(alpha', sigma'), m the integrand and D_r = m(lambda + r h) - m(lambda),

    x0    x' = (sigma' / sigma) x + alpha' h [phi_1(-h) m + ...]
    eps   x' = (alpha' / alpha) x - sigma' h [phi_1(h) m + ...]

    DPM-Solver-1     nothing more
    DPM-Solver-2     + phi_1 D_r / (2 r)                  D_r at the solution of DPM-Solver-1
    DPM-Solver-3     + phi_2 D_{2/3} / (2 / 3)            D_{2/3} at the solution that D_{1/3} gives

(Lu et al., "DPM-Solver" and "DPM-Solver++", 2022). A pair takes the step of the higher member; the
difference of the two is the error estimate, of the higher one's order.
"""

from __future__ import annotations

from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.ode.terms import Problem, probability_flow
from jaxdiff.predictions import affine
from jaxdiff.rows import like
from jaxdiff.solvers.clocks import check_choice
from jaxdiff.solvers.phi import phis

INTEGRANDS = ("x0", "eps")
SOLVER_TYPES = ("dpm_solver", "taylor")
_FLOW = probability_flow("lambda")


class _Exponential(diffrax.AbstractERK):
    """A pair whose `tableau` is the Runge-Kutta method that it becomes as h -> 0.

    diffrax and `jaxdiff.ode` take the number of stages from it; the step is `_pair`'s.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation
    calculate_jacobian: ClassVar = diffrax.CalculateJacobian.never

    integrand: str
    solver_type: str

    def __init__(self, integrand: str = "x0", solver_type: str = "dpm_solver"):
        check_choice("integrand", integrand, INTEGRANDS)
        check_choice("solver_type", solver_type, SOLVER_TYPES)
        self.integrand, self.solver_type, self.scan_kind = integrand, solver_type, None

    def order(self, terms):
        return self.tableau.num_stages

    def init(self, terms, t0, t1, y0, args):
        _direction(self, terms, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        step = _Step(self.integrand, _direction(self, terms, args), t0, t1, y0, args)
        m0 = step.evaluate(0.0, y0)
        lower, higher = self._pair(step, m0)
        error = jax.tree.map(jnp.subtract, higher, lower)
        # Through both ends with the slope at the first, which is all that is known for free:
        # wrong by O(h^3) inside the step, like the solution of a method of order 3.
        k0 = step.slope(m0)
        k1 = jax.tree.map(lambda a, b, k: 2.0 * (b - a) - k, y0, higher, k0)
        dense = dict(y0=y0, y1=higher, k0=k0, k1=k1)
        return higher, error, dense, None, diffrax.RESULTS.successful


class DPMSolver12(_Exponential):
    """DPM-Solver-12: DPM-Solver-2 with r = 1/2, DPM-Solver-1 inside it. Two evaluations a step.

    For `jaxdiff.ode.solve`, or `diffrax.diffeqsolve` with `jaxdiff.ode.probability_flow("lambda")`,
    in either direction, under any controller. Lu et al. (2022), `dpm_solver_adaptive` of the
    official code; k-diffusion's sample_dpm_adaptive with order=2. Their controllers are
    `diffrax.PIDController(rtol=0.05, atol=0.0078)` but for constants: an error is at most
    max(atol, rtol |x|) there, atol + rtol |x| here. A rejected step costs as much as an accepted
    one. At small tolerances `diffrax.Tsit5` needs far fewer evaluations.

    Arguments:
      integrand: "x0" (DPM-Solver++), or "eps".
      solver_type: "dpm_solver" as published, or "taylor", with phi_2 D_r / r for the second term,
        exact for an integrand linear in lambda.

    Raises ValueError for others, for a form of the flow but "lambda", and under `BacksolveAdjoint`.
    """

    tableau: ClassVar = diffrax.Midpoint.tableau

    def _pair(self, step: _Step, m0: Any) -> tuple[Any, Any]:
        lower = step.to(1.0, (1, m0))
        d = step.difference(0.5, step.to(0.5, (1, m0)), m0)
        return lower, step.to(1.0, (1, m0), _second(self.solver_type, 0.5, d))


class DPMSolver23(_Exponential):
    """DPM-Solver-23: DPM-Solver-3 (r = 1/3, 2/3), DPM-Solver-2 (r = 1/3) inside it.

    Three evaluations a step; else as `DPMSolver12` (order=3 there). "taylor" takes the second
    difference of the three evaluations too.
    """

    tableau: ClassVar = diffrax.ButcherTableau(
        c=np.array([1 / 3, 2 / 3]), a_lower=(np.array([1 / 3]), np.array([0.0, 2 / 3])),
        b_sol=np.array([1 / 4, 0.0, 3 / 4]), b_error=np.array([3 / 4, -3 / 2, 3 / 4]),
    )  # fmt: skip

    def _pair(self, step: _Step, m0: Any) -> tuple[Any, Any]:
        r1, r2 = 1.0 / 3.0, 2.0 / 3.0
        m = (1, m0)
        d1 = step.difference(r1, step.to(r1, m), m0)
        lower = step.to(1.0, m, _second(self.solver_type, r1, d1))
        middle = step.to(r2, m, (2, jax.tree.map(lambda a: r2 / r1 * a, d1)))
        d2 = step.difference(r2, middle, m0)
        if self.solver_type == "dpm_solver":
            return lower, step.to(1.0, m, (2, jax.tree.map(lambda a: a / r2, d2)))
        # m' and m'' in units of the step, from the two divided differences.
        slope = jax.tree.map(lambda a, b: (a * r2 / r1 - b * r1 / r2) / (r2 - r1), d1, d2)
        bend = jax.tree.map(lambda a, b: 2.0 * (b / r2 - a / r1) / (r2 - r1), d1, d2)
        return lower, step.to(1.0, m, (2, slope), (3, bend))


def _second(solver_type: str, r: float, d: Any) -> tuple[int, Any]:
    """(k, m) of the second term phi_k m of DPM-Solver-2."""
    k, factor = (1, 0.5 / r) if solver_type == "dpm_solver" else (2, 1.0 / r)
    return k, jax.tree.map(lambda a: factor * a, d)


def _direction(solver: Any, terms: Any, args: Any) -> Any:
    """1, or -1 where diffrax runs in -lambda; ValueError unless the term is the lambda flow."""
    term, direction = terms, 1
    while hasattr(term, "direction"):
        term, direction = term.term, direction * term.direction
    flow = getattr(term, "vector_field", None) is _FLOW.vector_field
    if not flow or not isinstance(args, Problem):
        raise ValueError(
            f"{type(solver).__name__} solves the probability flow in lambda only: form='lambda' of "
            "jaxdiff.ode.solve, or jaxdiff.ode.probability_flow('lambda') with a Problem as args, "
            "and no BacksolveAdjoint"
        )
    return direction


class _Step:
    """One step: the levels, the exact linear parts, and evaluations."""

    def __init__(self, integrand: str, direction: Any, t0: Any, t1: Any, x: Any, args: Problem):
        self.integrand, self.args, self.x = integrand, args, x
        self.dtype = jnp.result_type(*jax.tree.leaves(x))
        self.lam, self.h = direction * t0, direction * (t1 - t0)
        self.start = self.level(0.0)

    def level(self, r: float) -> tuple[Any, Any, Any]:
        """(t, alpha, sigma) at lambda + r h; alpha / sigma is lambda's to rounding."""
        lam = self.lam + r * self.h
        t = self.args.process.time(lam)
        alpha = self.args.process.alpha(t)
        return tuple(jnp.asarray(a, self.dtype) for a in (t, alpha, jnp.exp(-lam) * alpha))

    def evaluate(self, r: float, x: Any) -> Any:
        """The integrand at lambda + r h."""
        denoiser, level = self.args.denoiser, self.level(r)
        out = like(x, denoiser(x, *level, self.args.cond))
        u, w = affine(denoiser.prediction, self.integrand, *level[1:])
        return jax.tree.map(lambda o, a: u * o + w * a, out, x)

    def difference(self, r: float, x: Any, m0: Any) -> Any:
        """m(lambda + r h) - m(lambda)."""
        return jax.tree.map(jnp.subtract, self.evaluate(r, x), m0)

    def to(self, r: float, *terms: tuple[int, Any]) -> Any:
        """carry x + (alpha' or -sigma') r h sum phi_k m, over the terms (k, m), at lambda + r h."""
        (_, alpha0, sigma0), (_, alpha, sigma) = self.start, self.level(r)
        h = jnp.asarray(r * self.h, self.dtype)
        data = self.integrand == "x0"
        carry, outer = (sigma / sigma0, alpha) if data else (alpha / alpha0, -sigma)
        phi = phis(max(k for k, _ in terms), -h if data else h)
        parts = [(outer * h * phi[k - 1], m) for k, m in terms]
        return jax.tree.map(
            lambda x, *m: carry * x + sum(c * a for (c, _), a in zip(parts, m)),
            self.x, *(m for _, m in parts),
        )  # fmt: skip

    def slope(self, m: Any) -> Any:
        """h dx/dlambda at the start."""
        t, alpha, sigma = self.start
        f, g2 = self.args.process.rates(t)
        c = jnp.asarray(-2.0 * f / g2, self.dtype) * sigma**2
        h = jnp.asarray(self.h, self.dtype)
        # dx/dlambda = c x - sigma eps, and sigma eps = x - alpha x0.
        of_x, of_m = (c - 1.0, alpha) if self.integrand == "x0" else (c, -sigma)
        return jax.tree.map(lambda x, a: h * (of_x * x + of_m * a), self.x, m)
