"""Normalization Propagation for PyTorch: keep every hidden layer at mean 0, variance 1 by formulas.

Read in this order:

    gaussian      E, Var and E[phi'^2] of a function of a Gaussian
    activations   the table of activations; ``moments`` of any of them
    functional    ``NormRule`` and the layer maths, stateless
    modules       the layers
    merges        what stands between layers
    data_norm     the data, normalised once
    projection    training aids
    testing       the promises, as checks
    recipes, cli  users of the above (extra: pip install 'normprop[recipes]')
"""

from normprop import functional as functional, testing as testing
from normprop.activations import Moments as Moments, moments as moments
from normprop.data_norm import BatchDataNorm as BatchDataNorm, GlobalDataNorm as GlobalDataNorm
from normprop.functional import (
    PAPER as PAPER,
    RECOMMENDED as RECOMMENDED,
    NormRule as NormRule,
)
from normprop.merges import NormalizedAdd as NormalizedAdd
from normprop.modules import (
    NormalizedActivation as NormalizedActivation,
    NormPropConv1d as NormPropConv1d,
    NormPropConv2d as NormPropConv2d,
    NormPropConv3d as NormPropConv3d,
    NormPropConvTranspose1d as NormPropConvTranspose1d,
    NormPropConvTranspose2d as NormPropConvTranspose2d,
    NormPropConvTranspose3d as NormPropConvTranspose3d,
    NormPropLinear as NormPropLinear,
)
from normprop.projection import (
    attach_projection as attach_projection,
    clip_grad_unitwise_ as clip_grad_unitwise_,
    param_groups as param_groups,
    project_ as project_,
)

__version__ = "0.1.0"
