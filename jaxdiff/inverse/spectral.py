"""What the samplers that work in an operator's singular basis share.

With A = U diag(s) V^T, in the coordinates V^T x a measurement is one number of each coordinate that
it sees: (U^T y)_i / s_i = (V^T x_0)_i + (noise_std / s_i) n.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.denoisers import Denoiser
from jaxdiff.grids import Grid
from jaxdiff.integrator import Control
from jaxdiff.inverse.measurement import Measurement, check_measurement, same_shape
from jaxdiff.inverse.spectra import Spectrum, reached, size
from jaxdiff.predictions import convert
from jaxdiff.solvers.travel import Ends


class Seen(NamedTuple):
    """A measurement in V's coordinates, n of them.

    `values` s [n], 0 where a coordinate is not seen; `y` [batch, n], U^T y / s, 0 there too; `std`
    [n], noise_std / s, infinite there.
    """

    values: Float[Array, " n"]
    y: Float[Array, "batch n"]
    std: Float[Array, " n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SpectralControl(Control):
    """Base of the controls that rewrite a row's step in V's coordinates.

    Attributes: the measurement and its operator's spectrum; where every row ends; the strengths of
    the method; what the denoiser predicts.
    """

    measurement: Measurement
    spectrum: Spectrum
    ends: Ends
    strengths: Any
    prediction: str | tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def init(self, x: Array) -> None:
        """Raise ValueError for a state of another shape than the operator takes."""
        same_shape(self.measurement, x, type(self).__name__)

    def seen(self, x: Array) -> Seen:
        """The measurement for a state's batch, in its dtype."""
        n, spectrum = size(self.measurement.operator.shape), self.spectrum
        padded = spectrum.padded(n)
        kept, values = reached(padded, x.dtype), padded.astype(x.dtype)
        inverse = jnp.where(kept, 1.0 / jnp.where(kept, values, 1.0), 0.0)
        y = spectrum.left(self.measurement.batched(x.shape[0]).astype(x.dtype))
        r = spectrum.values.shape[0]
        y = inverse * jnp.pad(y[:, :r], ((0, 0), (0, n - r)))
        std = jnp.where(kept, self.measurement.noise_std.astype(x.dtype) * inverse, jnp.inf)
        return Seen(jnp.where(kept, values, 0.0), y, std)

    def pair(self, out: Any, x: Array, alpha: Any, sigma: Any) -> tuple[Array, Array]:
        """V^T x_0 and V^T eps of the denoiser's output; of two outputs the first is x_0's."""
        single = isinstance(self.prediction, str)
        outs, names = ((out,), (self.prediction,)) if single else (out, self.prediction)
        found = (
            convert(outs[i].astype(x.dtype), x, names[i], name, alpha, sigma)
            for i, name in ((0, "x0"), (-1, "eps"))
        )
        return tuple(self.spectrum.right(a) for a in found)

    def levels(self, index: Any, x: Array) -> Ends:
        """Where row `index` ends."""
        return Ends(*(jnp.asarray(c, x.dtype)[index] for c in self.ends))


def check_spectral(denoiser: Any, grid: Any, measurement: Any, what: str) -> None:
    """Raise TypeError or ValueError for arguments that no spectral sampler takes."""
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"{what} takes a jaxdiff.Denoiser, got {type(denoiser).__name__}")
    if not isinstance(grid, Grid):
        raise TypeError(f"{what} takes a grid of jaxdiff.grids, got {type(grid).__name__}")
    if grid.backward:
        raise ValueError(f"{what} takes a grid from noise to data")
    check_measurement(measurement, what)
