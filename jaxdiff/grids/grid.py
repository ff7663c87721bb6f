"""Grids: the noise levels a sampler visits.

A grid is n + 1 nodes (t, alpha, sigma) from noise to data with lambda = log(alpha / sigma) strictly
increasing, for n steps. It is data: a solver never looks a timestep up or recomputes one. t may
repeat (discrete networks round it).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import ArrayLike

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.interpolation import pchip
from jaxdiff.processes import Process
from jaxdiff.processes.discrete import check_half_log_snr, check_times


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """n + 1 nodes from noise to data; see the functions of this module.

    Attributes:
      t, alpha, sigma: arrays [n + 1].
      process: whose levels the nodes are; None for a grid from arrays.
      ends: static; (alpha is 0 at the noise end, sigma is 0 at the data end).
      backward: static; True if the nodes run from data to noise (`reversed`).
    """

    t: Any
    alpha: Any
    sigma: Any
    process: Process | None = None
    ends: tuple[bool, bool] = dataclasses.field(default=(False, False), metadata={"static": True})
    backward: bool = dataclasses.field(default=False, metadata={"static": True})

    def __len__(self) -> int:
        return self.t.shape[0]

    @property
    def steps(self) -> int:
        """Number of steps, one less than the number of nodes."""
        return len(self) - 1

    @property
    def xp(self):
        """The array namespace the nodes live in: numpy, or jax.numpy when they are traced."""
        return namespace(self.t, self.alpha, self.sigma)

    @property
    def lam(self) -> Any:
        """The half-log-SNR of the nodes, [n + 1]; infinite at the ends that `ends` names."""
        xp = self.xp
        no_alpha, no_sigma = (xp.asarray(m) for m in self._end_masks())
        # A safe argument under the mask: the unused logarithm must not poison a gradient.
        lam = xp.log(xp.where(no_alpha, 1.0, self.alpha)) - xp.log(
            xp.where(no_sigma, 1.0, self.sigma)
        )
        return xp.where(no_alpha, -np.inf, xp.where(no_sigma, np.inf, lam))

    def _end_masks(self):
        nodes = np.arange(len(self))
        noise, data = (len(self) - 1, 0) if self.backward else (0, len(self) - 1)
        return (nodes == noise) & self.ends[0], (nodes == data) & self.ends[1]

    def node(self, i: int) -> tuple[Any, Any, Any]:
        """(t, alpha, sigma) of node i."""
        return self.t[i], self.alpha[i], self.sigma[i]

    def at(self, lam: ArrayLike) -> tuple[Any, Any, Any]:
        """(t, alpha, sigma) at half-log-SNR `lam`, within the grid's span.

        Exact if the grid came from a process. From arrays, t is interpolated by the monotone cubic
        of Fritsch & Butland (1984) in lambda, with three-point slopes at both ends (as scipy's
        PchipInterpolator), and alpha, sigma follow from alpha / sigma = exp(lambda) with whichever
        of alpha, alpha + sigma, alpha^2 + sigma^2 is constant over the nodes (else, or if the nodes
        are traced, log(alpha^2 + sigma^2) is interpolated too). Raises ValueError for a `lam`
        outside a grid from arrays, or one that a discrete process does not reach.
        """
        if self.process is not None:
            check_half_log_snr(self.process, lam)
            t = self.process.time(lam)
            return t, self.process.alpha(t), self.process.sigma(t)
        return _interpolate(self, lam)

    def rates(self) -> tuple[Any, Any]:
        """(f, g^2) of the forward SDE at the nodes. Raises ValueError for a grid from arrays."""
        if self.process is None:
            raise ValueError(
                "a grid from arrays has no process, so no drift and diffusion: build it from a "
                "process (jaxdiff.grids.from_times(process, t))"
            )
        return self.process.rates(self.t)

    def insert(self, lam: ArrayLike) -> Grid:
        """The grid with one more node at half-log-SNR `lam`, strictly between two nodes.

        Raises ValueError for a `lam` outside the span or at a node.
        """
        xp = namespace(self, lam)
        if is_concrete(self, lam):
            nodes = np.asarray(self.lam)
            if not nodes.min() < lam < nodes.max() or np.any(nodes == lam):
                raise ValueError(f"half-log-SNR {lam} is not between two nodes of {nodes}")
        where = xp.searchsorted(-self.lam if self.backward else self.lam,
                                -lam if self.backward else lam)  # fmt: skip
        new = [xp.insert(a, where, b) for a, b in zip(self.node(slice(None)), self.at(lam))]
        return make(*new, self.process, self.ends, self.backward)

    def reversed(self) -> Grid:
        """The same nodes from data to noise: an encoder's grid."""
        return dataclasses.replace(
            self, t=self.t[::-1], alpha=self.alpha[::-1], sigma=self.sigma[::-1],
            backward=not self.backward,
        )  # fmt: skip


def make(t, alpha, sigma, process=None, ends=(False, False), backward=False) -> Grid:
    """Check the nodes where the host can see them, and build the grid."""
    if not (np.ndim(t) == 1 and np.shape(t) == np.shape(alpha) == np.shape(sigma)):
        raise ValueError(
            "t, alpha and sigma must be vectors of one length, got shapes "
            f"{np.shape(t)}, {np.shape(alpha)}, {np.shape(sigma)}"
        )
    if np.shape(t)[0] < 2:
        raise ValueError(f"a grid needs at least 2 nodes (1 step), got {np.shape(t)[0]}")
    if is_concrete(t, alpha, sigma):
        nodes = np.asarray(t, np.float64), np.asarray(alpha, np.float64), np.asarray(sigma, float)
        bad = np.flatnonzero(~np.all(np.isfinite(nodes), 0))
        if bad.size:
            at = ", ".join(f"{a[bad[0]]}" for a in nodes)
            raise ValueError(f"t, alpha and sigma must be finite, got {at} at node {bad[0]}")
        noise, data = (-1, 0) if backward else (0, -1)
        ends = (bool(nodes[1][noise] == 0), bool(nodes[2][data] == 0))
        t, alpha, sigma = nodes  # on the host, also where they came as JAX arrays
    grid = Grid(t, alpha, sigma, process, ends, backward)
    if is_concrete(t, alpha, sigma):
        inner_alpha, inner_sigma = np.delete(nodes[1], noise), np.delete(nodes[2], data)
        if np.any(inner_alpha <= 0) or np.any(inner_sigma <= 0) or min(map(np.min, nodes[1:])) < 0:
            raise ValueError(
                "alpha and sigma must be positive; only the first node may have alpha = 0 and only "
                f"the last sigma = 0. Got alpha={nodes[1]}, sigma={nodes[2]}"
            )
        lam = np.asarray(grid.lam)
        bad = np.flatnonzero(~(np.diff(-lam if backward else lam) > 0))
        if bad.size:
            i = bad[0]
            raise ValueError(
                "half-log-SNR log(alpha / sigma) must strictly increase from noise to data, but "
                f"nodes {i} and {i + 1} have {lam[i]:.6g} and {lam[i + 1]:.6g}"
            )
    return grid


def on_host(tree: Any) -> Any:
    """JAX arrays with known values as float64 NumPy arrays; tracers and the rest unchanged."""
    known = lambda a: isinstance(a, jax.Array) and is_concrete(a)  # noqa: E731
    return jax.tree.map(lambda a: np.asarray(a, np.float64) if known(a) else a, tree)


def _interpolate(grid: Grid, lam: ArrayLike) -> tuple[Any, Any, Any]:
    xp = namespace(grid, lam)
    keep = slice(int(grid.ends[0]), len(grid) - int(grid.ends[1]))
    order = slice(None, None, -1) if grid.backward else slice(None)
    t, alpha, sigma, nodes = (
        a[order][keep] for a in (grid.t, grid.alpha, grid.sigma, grid.lam)
    )  # fmt: skip
    if nodes.shape[0] < 2:
        raise ValueError("interpolation needs two nodes with finite half-log-SNR")
    if is_concrete(nodes, lam) and not np.all((lam >= nodes[0] - 1e-9) & (lam <= nodes[-1] + 1e-9)):
        raise ValueError(f"half-log-SNR {lam} lies outside the grid's [{nodes[0]}, {nodes[-1]}]")
    new_t = pchip(xp, nodes, t, lam)
    softplus = xp.logaddexp(xp.zeros_like(lam * 1.0), lam)  # log(1 + alpha / sigma)
    unit_sigma = {
        "alpha": -lam,
        "sum": -softplus,
        "square": -0.5 * xp.logaddexp(xp.zeros_like(lam * 1.0), 2.0 * lam),
    }
    kind, log_size = "square", 0.5 * xp.log(alpha**2 + sigma**2)
    if is_concrete(alpha, sigma):
        for name, size in (("alpha", alpha), ("sum", alpha + sigma)):
            if np.ptp(np.log(size)) < 1e-12:
                kind, log_size = name, xp.log(size)
    new_sigma = xp.exp(unit_sigma[kind] + pchip(xp, nodes, log_size, lam))
    return new_t, new_sigma * xp.exp(lam), new_sigma


def from_arrays(
    t: ArrayLike, alpha: ArrayLike, sigma: ArrayLike, ends: tuple[bool, bool] = (False, False)
) -> Grid:
    """A grid of any nodes, noise to data, each a vector [n + 1].

    `ends` is for traced nodes, whose values the host cannot see: whether alpha is 0 at the first
    and sigma is 0 at the last. Otherwise the values tell.

    Raises ValueError if log(alpha / sigma) does not strictly increase, or alpha or sigma is not
    positive (the first node may have alpha = 0, the last sigma = 0).
    """
    xp = namespace(t, alpha, sigma)
    return make(xp.asarray(t), xp.asarray(alpha), xp.asarray(sigma), ends=tuple(ends))


def from_times(
    process: Process, t: ArrayLike, end: str = "t_min", ends: tuple[bool, bool] | None = None
) -> Grid:
    """The nodes of `process` at the times `t`, noise to data.

    `end="zero"` appends a last node with sigma = 0, alpha = 1: a final step to the data itself.
    Times may be traced, to differentiate with respect to them; then `ends` says whether alpha is 0
    at the first node and sigma is 0 at the last. By default they are not (but for `end="zero"`):
    give `ends=(True, True)` for traced times that reach both, or solvers meet infinities inside.
    Raises TypeError or ValueError for anything but a process and valid, ordered times, in [0,
    num_steps - 1] if it is discrete.
    """
    check(process, end)
    process, t = on_host(process), np.asarray(t, np.float64) if is_concrete(t) else t
    if t.ndim != 1 or t.shape[0] < (2 if end == "t_min" else 1):
        raise ValueError(f"times must be a vector of at least 2 nodes, got shape {t.shape}")
    check_times(process, t)
    ends = span_ends(process, t[0], t[-1], end) if ends is None else tuple(ends)
    xp = namespace(t, process)
    t = xp.asarray(t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    last = process.t_min if process.data_time is None else process.data_time
    if end == "zero":
        t, alpha, sigma = (
            xp.concatenate([a, xp.full((1,), b, dtype=a.dtype)])
            for a, b in ((t * 1.0, last), (alpha, 1.0), (sigma, 0.0))
        )
    return make(t, alpha, sigma, process, ends)


def span_ends(process: Process, t_max: Any, t_min: Any, end: str) -> tuple[bool, bool]:
    """`Grid.ends` of a span; an end that is traced itself is taken to lie inside."""
    return (
        is_concrete(t_max) and bool(t_max == process.noise_time),
        end == "zero" or (is_concrete(t_min) and bool(t_min == process.data_time)),
    )


def check_steps(steps: Any) -> None:
    """Raise ValueError unless `steps` is an integer of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"the number of steps must be an integer of at least 1, got {steps!r}")


def check(process: Any, end: str) -> None:
    """Raise ValueError for an unknown `end`, TypeError for anything but a process."""
    if end not in ("t_min", "zero"):
        raise ValueError(f"end must be 't_min' or 'zero', got {end!r}")
    if not isinstance(process, Process):
        raise TypeError(f"expected a process of jaxdiff.processes, got {type(process).__name__}")
