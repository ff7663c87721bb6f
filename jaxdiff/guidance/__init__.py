"""Guidance: functions from denoisers to denoisers.

One convention everywhere: uncond + s (cond - uncond); s = 1 is the conditional denoiser.
"""

from jaxdiff.guidance import schedules as schedules
from jaxdiff.guidance.adaptive import Adaptive as Adaptive
from jaxdiff.guidance.adaptive import adaptive_guidance as adaptive_guidance
from jaxdiff.guidance.autoguidance import autoguidance as autoguidance
from jaxdiff.guidance.black_scholes import black_scholes as black_scholes
from jaxdiff.guidance.black_scholes import option_value as option_value
from jaxdiff.guidance.black_scholes import step_volatility as step_volatility
from jaxdiff.guidance.classifier import classifier_guidance as classifier_guidance
from jaxdiff.guidance.classifier import mixture_classifier as mixture_classifier
from jaxdiff.guidance.classifier import noisy_cross_entropy as noisy_cross_entropy
from jaxdiff.guidance.classifier_free import cfg_plus_plus as cfg_plus_plus
from jaxdiff.guidance.classifier_free import cfg_zero_star as cfg_zero_star
from jaxdiff.guidance.classifier_free import classifier_free as classifier_free
from jaxdiff.guidance.classifier_free import limited as limited
from jaxdiff.guidance.composition import Experts as Experts
from jaxdiff.guidance.composition import compose as compose
from jaxdiff.guidance.composition import product as product
from jaxdiff.guidance.energy import backward_guidance as backward_guidance
from jaxdiff.guidance.energy import energy_guidance as energy_guidance
from jaxdiff.guidance.high_frequency import high_frequency_guidance as high_frequency_guidance
from jaxdiff.guidance.high_frequency import high_frequency_loss as high_frequency_loss
from jaxdiff.guidance.invariant import group_losses as group_losses
from jaxdiff.guidance.invariant import infer_groups as infer_groups
from jaxdiff.guidance.invariant import invariant_loss as invariant_loss
from jaxdiff.guidance.invariant import train_module as train_module
from jaxdiff.guidance.invariant import with_module as with_module
from jaxdiff.guidance.linear_ag import LinearAG as LinearAG
from jaxdiff.guidance.linear_ag import fit_linear_ag as fit_linear_ag
from jaxdiff.guidance.linear_ag import linear_guidance as linear_guidance
from jaxdiff.guidance.linear_ag import linear_residuals as linear_residuals
from jaxdiff.guidance.linear_ag import record_guidance as record_guidance
from jaxdiff.guidance.multi import multi_conditional as multi_conditional
from jaxdiff.guidance.off_the_shelf import EluCD as EluCD
from jaxdiff.guidance.off_the_shelf import Softplus as Softplus
from jaxdiff.guidance.off_the_shelf import calibration as calibration
from jaxdiff.guidance.off_the_shelf import elucd as elucd
from jaxdiff.guidance.off_the_shelf import expected_calibration_error as expected_calibration_error
from jaxdiff.guidance.off_the_shelf import off_the_shelf as off_the_shelf
from jaxdiff.guidance.projected import adaptive_projected as adaptive_projected


def __getattr__(name: str):
    # On first use: adapters import flax, which the core does without.
    if name in ("expert_classifier", "train_experts", "trainable_share"):
        from jaxdiff.guidance import experts

        return getattr(experts, name)
    if name in (
        "attention_blocks", "identity_attention", "perturbed_attention", "self_attention_guidance",
    ):  # fmt: skip
        from jaxdiff.guidance import attention

        return getattr(attention, name)
    raise AttributeError(f"module 'jaxdiff.guidance' has no attribute {name!r}")
