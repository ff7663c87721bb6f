"""Networks (Flax Linen) and adapters that make denoisers of them.

Every network is called `apply(variables, x, t, cond=None, train=False, keep=None)` and returns x's
shape; `keep` masks its blocks.
"""

from jaxdiff.models.adapters import from_linen, from_nnx, skip_blocks
from jaxdiff.models.dit import DiT
from jaxdiff.models.embeddings import Rows, check_labels
from jaxdiff.models.lora import add_lora, lora
from jaxdiff.models.mlp import MLP
from jaxdiff.models.song_unet import SongUNet
from jaxdiff.models.unet import UNet

__all__ = [
    "DiT",
    "MLP",
    "Rows",
    "SongUNet",
    "UNet",
    "add_lora",
    "check_labels",
    "from_linen",
    "from_nnx",
    "lora",
    "skip_blocks",
]
