"""What a denoiser knows: classes, information, whether its field is a gradient, dimension of the data.

Each diagnostic evaluates a trained denoiser and changes nothing:

    classify, class_errors, fit_weights       a class-conditional denoiser as a classifier
    pointwise_information, partial_information  what conditions tell about an example, in nats
    asymmetry, line_integral, gauge_residual  is the score a gradient, and does it matter
    flipd, normal_bundle, flow_singular_values  the dimension of the data around an example
"""

from jaxdiff.diagnostics.classifier import Classified as Classified
from jaxdiff.diagnostics.classifier import class_errors as class_errors
from jaxdiff.diagnostics.classifier import classify as classify
from jaxdiff.diagnostics.classifier import even_times as even_times
from jaxdiff.diagnostics.classifier import fit_weights as fit_weights
from jaxdiff.diagnostics.classifier import log_posterior as log_posterior
from jaxdiff.diagnostics.classifier import time_weights as time_weights
from jaxdiff.diagnostics.conservativity import ScoreField as ScoreField
from jaxdiff.diagnostics.conservativity import VelocityField as VelocityField
from jaxdiff.diagnostics.conservativity import asymmetry as asymmetry
from jaxdiff.diagnostics.conservativity import conservative as conservative
from jaxdiff.diagnostics.conservativity import gauge_residual as gauge_residual
from jaxdiff.diagnostics.conservativity import jacobian as jacobian
from jaxdiff.diagnostics.conservativity import line_integral as line_integral
from jaxdiff.diagnostics.conservativity import loop_integral as loop_integral
from jaxdiff.diagnostics.conservativity import path_dependence as path_dependence
from jaxdiff.diagnostics.conservativity import rotated as rotated
from jaxdiff.diagnostics.dimension import NormalBundle as NormalBundle
from jaxdiff.diagnostics.dimension import flipd as flipd
from jaxdiff.diagnostics.dimension import flow_dimension as flow_dimension
from jaxdiff.diagnostics.dimension import flow_singular_values as flow_singular_values
from jaxdiff.diagnostics.dimension import normal_bundle as normal_bundle
from jaxdiff.diagnostics.information import Decomposition as Decomposition
from jaxdiff.diagnostics.information import LogSNRNodes as LogSNRNodes
from jaxdiff.diagnostics.information import decompose as decompose
from jaxdiff.diagnostics.information import logistic_nodes as logistic_nodes
from jaxdiff.diagnostics.information import partial_information as partial_information
from jaxdiff.diagnostics.information import pointwise_information as pointwise_information
from jaxdiff.diagnostics.information import uniform_nodes as uniform_nodes
from jaxdiff.diagnostics.manifolds import sphere as sphere
