"""Another trained model that a run learns from."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from gplq.errors import RecipeError
from gplq.plugins.hooks.checkpoints import load_weights

__all__ = ['read_frozen']


def read_frozen(asker: str, config: str, checkpoint: str) -> nn.Module:
    """Build the model of a config with the weights of a checkpoint, for evaluation and without gradients.

    Args:
        asker: whose teacher it is, for the messages.
        config: the model's config.
        checkpoint: its weights; read without executing anything in the file.

    Raises:
        RecipeError: the config does not exist.
        CheckpointError: the checkpoint is missing, damaged or another model's.
    """
    if not Path(config).is_file():
        raise RecipeError(f'{asker}: config {config} does not exist')
    model: nn.Module = MODELS.build(Config.fromfile(config).model)
    load_weights(model, checkpoint, config)
    # Apart: some backbones' train() returns nothing.
    model.eval()
    return model.requires_grad_(False)
