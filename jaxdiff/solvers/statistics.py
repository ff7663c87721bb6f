"""Empirical model statistics: the per-dimension coefficients l, s, b of DPM-Solver-v3.

Along the probability flow, with the half-log-SNR lambda as time, a noise network eps(x, lambda) and

    f = (sigma eps - l x) / alpha,      f' ~ s f + b,

a step is integrated exactly but for what (l, s, b) do not explain (Zheng et al., "DPM-Solver-v3",
2023). l = 1, s = b = 0 is the data prediction and l = 0, s = -1, b = 0 the noise prediction. Here they
are kept as data on bins of lambda; `jaxdiff.calibration` estimates them.
"""

import dataclasses
import functools
from math import factorial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdiff.arrays import is_concrete, namespace
from jaxdiff.files import replacing
from jaxdiff.grids import Grid

_FIELDS = ("lam", "l", "s", "b")
# Constants are put on bins of this width, over all half-log-SNRs that float64 alphas reach.
_CONSTANT_BINS = np.linspace(-40.0, 40.0, 161)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ModelStatistics:
    """l, s and b on bins of the half-log-SNR, linear between them.

    Attributes:
      lam: [bins + 1], increasing.
      l, s, b: [bins + 1, *shape], where shape broadcasts against one sample's: a number a dimension
        (the paper's), a channel, or one for all.
    """

    lam: Any
    l: Any  # noqa: E741
    s: Any
    b: Any

    def save(self, path: str | Path) -> None:
        """Write one .npz file, whole or not at all; the folder must exist."""
        if Path(path).suffix != ".npz":
            raise ValueError(f"model statistics are an .npz file, got {str(path)!r}")
        with replacing(path) as temporary:
            np.savez(temporary, **{name: np.asarray(getattr(self, name)) for name in _FIELDS})

    @staticmethod
    def load(path: str | Path) -> "ModelStatistics":
        """What `save` wrote. Raises ValueError for a file that does not hold model statistics."""
        try:
            with np.load(path) as arrays:
                found = ModelStatistics(*(np.asarray(arrays[n], np.float64) for n in _FIELDS))
        except FileNotFoundError:
            raise ValueError(f"no file of model statistics at {str(path)!r}") from None
        except (KeyError, OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} is no file of model statistics, an .npz of {_FIELDS}: {error}"
            ) from error
        check(found)
        return found


def check(statistics: ModelStatistics) -> None:
    """Raise ValueError for shapes that do not fit, or values that are not finite or increasing."""
    shapes = [np.shape(getattr(statistics, name)) for name in _FIELDS]
    bins, *others = shapes
    if len(bins) != 1 or bins[0] < 2 or len(set(others)) != 1 or others[0][:1] != bins:
        raise ValueError(
            "model statistics need lam [bins + 1] with at least 1 bin and l, s, b of one shape "
            f"[bins + 1, ...], got {shapes}"
        )
    if is_concrete(statistics):
        if not all(np.all(np.isfinite(np.asarray(getattr(statistics, n)))) for n in _FIELDS):
            raise ValueError("model statistics must be finite")
        if not np.all(np.diff(np.asarray(statistics.lam)) > 0):
            raise ValueError(f"the bins lam of model statistics must increase, got {statistics.lam}")


def as_statistics(statistics: Any) -> ModelStatistics:
    """Statistics from themselves, from the path of a file, or from three numbers (l, s, b)."""
    if isinstance(statistics, (str, Path)):
        return ModelStatistics.load(statistics)
    if isinstance(statistics, (tuple, list)) and len(statistics) == 3:
        if all(np.ndim(value) == 0 and not isinstance(value, str) for value in statistics):
            xp = namespace(statistics)
            constants = (xp.full(_CONSTANT_BINS.shape, value * 1.0) for value in statistics)
            statistics = ModelStatistics(_CONSTANT_BINS, *constants)
    if not isinstance(statistics, ModelStatistics):
        raise TypeError(
            "statistics must be ModelStatistics, the path of their file, or three numbers (l, s, b), "
            f"got {statistics!r}"
        )
    check(statistics)
    return statistics


class Integrals(NamedTuple):
    """Of one step from lambda_0 to lambda_1, each of shape [*shape]; all vanish at lambda_0.

    L = int l, S = int s, B = int e^{-S} b, C = int e^{L+S} B over the step, and
    E_k = int e^{L+S} (lambda - lambda_0)^k / k! for k = 0, 1, ...; E_0 is the paper's I.
    """

    L: Any
    S: Any
    B: Any
    C: Any
    E: tuple[Any, ...]


@functools.cache
def _rule(quadrature: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes c in [0, 1] of a bin's rule, int_0^{c_j} as a matrix, int_0^1 as weights."""
    if quadrature == "trapezoid":
        c = np.array([0.0, 1.0])
    else:
        c = 0.5 * (1.0 + np.polynomial.legendre.leggauss(6)[0])
    # Interpolation at the nodes, integrated: exact for polynomials of degree len(c) - 1.
    powers = np.arange(len(c))
    inverse = np.linalg.inv(c[:, None] ** powers)
    to_node = c[:, None] ** (powers + 1) / (powers + 1) @ inverse
    return c, to_node, (1.0 / (powers + 1)) @ inverse


def integrals(
    statistics: ModelStatistics, first: Any, last: Any, count: int, quadrature: str
) -> Integrals:
    """The integrals of a step over the bins it crosses, with E_0 ... E_{count - 1}.

    l, s, b are linear within a bin, so no rule sees their kinks. "gauss" has six nodes a bin,
    "trapezoid" the bin's two ends, as the authors' code; a step's own ends cut the bins they are in.
    """
    xp = namespace(statistics, first, last)
    lam = statistics.lam
    lower, upper = xp.minimum(first, last), xp.maximum(first, last)
    inner = xp.clip(lam, lower, upper)
    inner = xp.where(last < first, inner[::-1], inner)
    edges = xp.concatenate([xp.asarray(first)[None], inner, xp.asarray(last)[None]])
    if is_concrete(edges):  # cells of no width count for nothing; traced, they stay
        edges = edges[np.concatenate([[True], np.diff(np.asarray(edges)) != 0])]
    c, to_node, whole = _rule(quadrature)
    width = edges[1:] - edges[:-1]
    left = xp.clip(xp.searchsorted(lam, edges, side="right") - 1, 0, lam.shape[0] - 2)
    share = (edges - lam[left]) / (lam[left + 1] - lam[left])
    tail = (1,) * (np.ndim(statistics.l) - 1)

    def wide(a: Any) -> Any:
        return a.reshape(a.shape + tail)

    def at_nodes(values: Any) -> Any:
        ends = values[left] + wide(share) * (values[left + 1] - values[left])
        inside = wide(xp.asarray(c)[None])
        return (1.0 - inside) * ends[:-1, None] + inside * ends[1:, None]

    def total(values: Any) -> Any:
        return xp.einsum("j,cj...->c...", whole, values) * wide(width)

    def running(values: Any) -> tuple[Any, Any]:
        """The integral from the step's start to each node, and over the step."""
        cells = total(values)
        ends = xp.cumsum(cells, 0)
        within = xp.einsum("qj,cj...->cq...", to_node, values) * wide(width)[:, None]
        return (ends - cells)[:, None] + within, ends[-1]

    (l_node, l_step), (s_node, s_step) = (running(at_nodes(a)) for a in (statistics.l, statistics.s))
    b_node, b_step = running(xp.exp(-s_node) * at_nodes(statistics.b))
    factor = xp.exp(l_node + s_node)
    offset = wide(edges[:-1, None] + width[:, None] * c - first)
    powers = tuple(xp.sum(total(factor * offset**k / factorial(k)), 0) for k in range(count))
    return Integrals(l_step, s_step, b_step, xp.sum(total(factor * b_node), 0), powers)


def l_at(statistics: ModelStatistics, lam: Any) -> Any:
    """l at half-log-SNRs within the bins, [len(lam), *shape]."""
    xp = namespace(statistics, lam)
    bins, values = statistics.lam, statistics.l
    left = xp.clip(xp.searchsorted(bins, lam, side="right") - 1, 0, bins.shape[0] - 2)
    share = (lam - bins[left]) / (bins[left + 1] - bins[left])
    share = share.reshape(share.shape + (1,) * (np.ndim(values) - 1))
    return values[left] + share * (values[left + 1] - values[left])


def check_covers(statistics: ModelStatistics, grid: Grid) -> None:
    """Raise ValueError where a grid's finite half-log-SNRs leave the bins, by more than rounding."""
    if is_concrete(statistics.lam, grid.alpha, grid.sigma):
        lam, bins = np.asarray(grid.lam), np.asarray(statistics.lam)
        lam = lam[np.isfinite(lam)]
        slack = 1e-3 * (bins[-1] - bins[0]) / (len(bins) - 1)
        if lam.min() < bins[0] - slack or lam.max() > bins[-1] + slack:
            raise ValueError(
                f"the model statistics cover half-log-SNRs {bins[0]:.4g} to {bins[-1]:.4g}, the grid "
                f"runs from {lam.min():.4g} to {lam.max():.4g}"
            )
