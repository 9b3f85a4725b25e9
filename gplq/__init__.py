"""GPLQ: 4-bit vision transformers in one epoch. Activations first, weights later (arXiv 2506.11784)."""

from gplq.activation_stage import ActivationStage, train_activations
from gplq.calibrate import calibrate
from gplq.errors import GPLQError
from gplq.export import export
from gplq.mimicking import MimickingLoss
from gplq.prepare import prepare
from gplq.recipe import Recipe
from gplq.reconstruct import Reconstruction
from gplq.scale_search import ScaleSearch, search_scales
from gplq.serialization import load, save
from gplq.summary import summary
from gplq.weight_stage import quantize_weights

__all__ = [
    'ActivationStage',
    'GPLQError',
    'MimickingLoss',
    'Recipe',
    'Reconstruction',
    'ScaleSearch',
    'calibrate',
    'export',
    'load',
    'prepare',
    'quantize_weights',
    'save',
    'search_scales',
    'summary',
    'train_activations',
]
