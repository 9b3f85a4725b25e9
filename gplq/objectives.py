"""Losses whose gradients say how much each output of a site matters: they must not vanish where the model is right.

PTQ4ViT's released code takes the Kullback-Leibler divergence between a model and itself, whose gradient is zero but
for rounding noise. These three are not.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['Objective', 'fisher', 'perturbed_kl', 'quantized_kl']

Objective = Literal['fisher', 'quantized_kl', 'perturbation']


def fisher(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy with classes drawn from the model's own prediction, ``(batch, classes)`` -> a number.

    The mean square of its gradient is the diagonal of the Fisher matrix, the expected Hessian of the divergence
    (Martens 2020, sec. 5).
    """
    chances = logits.detach().float().softmax(dim=-1)
    labels = torch.multinomial(chances.cpu(), 1, generator=generator).flatten().to(logits.device)
    return F.cross_entropy(logits, labels, reduction='sum')


def quantized_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """Divergence of a quantized model's prediction from the floating-point one's, both ``(batch, classes)``."""
    return F.kl_div(
        logits.log_softmax(dim=-1), reference.detach().log_softmax(dim=-1), reduction='sum', log_target=True
    )


def perturbed_kl(logits: Tensor, generator: torch.Generator, share: float = 0.1) -> Tensor:
    """Divergence from the model's own prediction with its logits shifted by noise, ``(batch, classes)`` -> a number.

    The noise is ``share`` of the logits' spread: as in APHQ-ViT, the slope beside the minimum stands for the curvature
    that the slope at the minimum does not show.
    """
    noise = torch.randn(logits.shape, generator=generator).to(logits)
    target = logits.detach() + share * logits.detach().std() * noise
    return quantized_kl(logits, target)
