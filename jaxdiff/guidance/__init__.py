"""Guidance: functions from denoisers to denoisers.

One convention everywhere: uncond + s (cond - uncond); s = 1 is the conditional denoiser.
"""

from jaxdiff.guidance.classifier_free import classifier_free as classifier_free
