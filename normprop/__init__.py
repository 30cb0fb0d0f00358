"""Normalization Propagation for PyTorch: keep every hidden layer at mean 0, variance 1 by formulas.

Read in this order:

    gaussian      E, Var and E[phi'^2] of a function of a Gaussian
    signal        the distribution of a map, carried by formula
    density       the same of a gradient, over the values it meets
    activations   the table of activations; ``moments`` of any of them
    rows          weight rows scaled to given lengths, many layers at once; kernels: the same on a GPU
    functional    ``NormRule`` and the layer maths, stateless
    modules       the layers
    merges        what stands between layers: sums, concatenations, gates, dropout
    pools         the same: pools, upsampling
    data_norm     the data, normalised once
    projection    training aids
    graph         whole networks: trace (with reading, inplace), predict (with taps), convert (with rewrite),
                  lighten, fold
    records       what is known of each node: tables, figures, JSON
    diagnostics   the same, measured
    testing       the promises, as checks
    recipes, cli  users of the above (extra: pip install 'normprop[recipes]')
"""

from normprop import functional as functional, testing as testing
from normprop.activations import Moments as Moments, moments as moments
from normprop.data_norm import (
    BatchDataNorm as BatchDataNorm,
    GlobalDataNorm as GlobalDataNorm,
    WhiteningDataNorm as WhiteningDataNorm,
)
from normprop.diagnostics import DataError as DataError, measure as measure
from normprop.functional import (
    PAPER as PAPER,
    RECOMMENDED as RECOMMENDED,
    NormRule as NormRule,
)
from normprop.graph.convert import (
    Conversion as Conversion,
    ConversionError as ConversionError,
    convert as convert,
)
from normprop.graph.fold import FoldError as FoldError, fold as fold
from normprop.graph.lighten import lighten as lighten
from normprop.graph.predict import predict as predict
from normprop.graph.trace import TraceError as TraceError
from normprop.merges import (
    NormalizedAdd as NormalizedAdd,
    NormalizedCat as NormalizedCat,
    NormalizedDropout as NormalizedDropout,
    NormalizedGate as NormalizedGate,
    RectifiedSum as RectifiedSum,
    ShiftedReLU as ShiftedReLU,
    Standardize as Standardize,
)
from normprop.modules import (
    NormalizedActivation as NormalizedActivation,
    NormPropConv1d as NormPropConv1d,
    NormPropConv2d as NormPropConv2d,
    NormPropConv3d as NormPropConv3d,
    NormPropConvTranspose1d as NormPropConvTranspose1d,
    NormPropConvTranspose2d as NormPropConvTranspose2d,
    NormPropConvTranspose3d as NormPropConvTranspose3d,
    NormPropLinear as NormPropLinear,
    scale_together as scale_together,
)
from normprop.pools import (
    NormalizedAdaptiveAvgPool1d as NormalizedAdaptiveAvgPool1d,
    NormalizedAdaptiveAvgPool2d as NormalizedAdaptiveAvgPool2d,
    NormalizedAdaptiveAvgPool3d as NormalizedAdaptiveAvgPool3d,
    NormalizedAdaptiveMaxPool1d as NormalizedAdaptiveMaxPool1d,
    NormalizedAdaptiveMaxPool2d as NormalizedAdaptiveMaxPool2d,
    NormalizedAdaptiveMaxPool3d as NormalizedAdaptiveMaxPool3d,
    NormalizedAvgPool1d as NormalizedAvgPool1d,
    NormalizedAvgPool2d as NormalizedAvgPool2d,
    NormalizedAvgPool3d as NormalizedAvgPool3d,
    NormalizedMaxPool1d as NormalizedMaxPool1d,
    NormalizedMaxPool2d as NormalizedMaxPool2d,
    NormalizedMaxPool3d as NormalizedMaxPool3d,
    NormalizedUpsample as NormalizedUpsample,
)
from normprop.projection import (
    attach_projection as attach_projection,
    clip_grad_unitwise_ as clip_grad_unitwise_,
    param_groups as param_groups,
    project_ as project_,
)
from normprop.records import Record as Record, SignalTrace as SignalTrace
from normprop.signal import Signal as Signal

__version__ = "0.1.0"
