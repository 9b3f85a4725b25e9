"""Where a classifier's weights come from: timm, a file of a timm classifier or of ours, or a quantized one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from mmengine.logging import print_log
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import gplq
from gplq.errors import CheckpointError, RecipeError, StageError
from gplq.plugins.pretrained import BACKBONE, read_state_dict
from gplq.plugins.timm_weights import check_timm_depth, fit_timm_state
from gplq.plugins.type_name import pretrained_source
from gplq.record import forget

if TYPE_CHECKING:
    from gplq.plugins.fgvc.classifier import TimmClassifier

__all__ = ['take_initial_weights']


def take_initial_weights(model: TimmClassifier) -> bool:
    """Give a classifier the weights that its `init_cfg` or `pretrained` names.

    Returns:
        Whether that is all; False leaves an `init_cfg` of another kind to mmengine.

    Raises:
        CheckpointError: a file is missing, damaged or another model's, or timm cannot fetch its weights.
        RecipeError: `init_cfg` names no file.
        StageError: a quantized backbone is to be trained.
    """
    settings = model.init_cfg
    if settings is None:
        if model.pretrained:
            _take(model, _fetched(model), f'{model.model_name} of timm')
        return True
    if isinstance(settings, dict) and settings.get('type') == 'Quantized':
        path = settings.get('checkpoint')
        if not isinstance(path, (str, Path)):
            raise RecipeError("TimmClassifier: init_cfg=dict(type='Quantized') names no file; add checkpoint=PATH")
        _take_quantized(model, str(path))
        return True
    source = pretrained_source(settings)
    if source is not None:
        _take(model, read_state_dict(source), source)
    return source is not None


def _fetched(model: TimmClassifier) -> Mapping[str, Tensor]:
    try:
        whole = timm.create_model(model.model_name, pretrained=True, **model.model_args)
    except Exception as error:  # a download fails in any way
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise CheckpointError(
            f'timm cannot fetch the weights of {model.model_name} ({reason}); without network give a file: '
            "init_cfg=dict(type='Pretrained', checkpoint=PATH)"
        ) from error
    state: Mapping[str, Tensor] = whole.state_dict()
    return state


def _take(model: TimmClassifier, state: Mapping[str, Tensor], source: str) -> None:
    """Weights of a timm classifier or of our class."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f'{source}: {name} holds NaN or infinite values, so nothing can be learned from it')
    check_timm_depth(model.backbone, model.model_name, model.model_args, state, source)
    model.backbone.load_state_dict(fit_timm_state(model.backbone, state, source))
    # Probes of several backbones differ in these alone.
    head = None if model.frozen else _head_in(model, state, source)
    if head is not None:
        model.head.load_state_dict(head)
        if not any(name.startswith(BACKBONE) for name in state):
            _check_logits(model, state, source)
    print_log(f'TimmClassifier: backbone from {source}, head {"as well" if head else "fresh"}', logger='current')


def _check_logits(model: TimmClassifier, state: Mapping[str, Tensor], source: str) -> None:
    """Compare with timm's own classifier: some have two heads, or more than a Linear in one.

    Raises:
        CheckpointError: if the logits differ.
    """
    whole = timm.create_model(model.model_name, num_classes=model.head.out_features, **model.model_args)
    whole.load_state_dict(fit_timm_state(whole, state, source))
    shape = 1, int(model.model_args.get('in_chans', 3)), *model.backbone.img_size
    image = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    training = model.training
    with torch.no_grad():
        ours, theirs = model.eval().cpu()(image), whole.eval()(image)
    model.train(training)
    if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3):
        raise _other_head(model, source)


def _head_in(model: TimmClassifier, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor] | None:
    """Weight and bias of the head, where the file has one of these classes.

    Raises:
        CheckpointError: what the file has for these classes is no such head.
    """
    backbone: Any = model.backbone
    classifier = backbone.pretrained_cfg.get('classifier', 'head')
    names = [classifier] if isinstance(classifier, str) else list(classifier)
    for name in ('head', *names):
        found = {part: state.get(f'{name}.{part}') for part in ('weight', 'bias')}
        if all(tensor is not None and tensor.shape == getattr(model.head, n).shape for n, tensor in found.items()):
            return {part: tensor for part, tensor in found.items() if tensor is not None}
    # A head on several vectors of features, say.
    if any(len(state[f'{n}.weight']) == model.num_classes for n in names if f'{n}.weight' in state):
        raise _other_head(model, source)
    return None


def _other_head(model: TimmClassifier, source: str) -> CheckpointError:
    return CheckpointError(
        f'TimmClassifier: the head of {model.model_name} is more than one Linear on pooled features, so '
        f'{source} would lose some of it; take a model with a plain head, or train a fresh one (num_classes)'
    )


def _take_quantized(model: TimmClassifier, path: str) -> None:
    if not model.frozen:
        raise StageError(f'{path} holds rounded weights, which cannot be trained: set frozen=True')
    fresh = model.head
    model.head = nn.Linear(fresh.in_features, _classes_in(path))
    gplq.load(model, path)
    # The classes of another data set: a head of its own, in floating point.
    model.head = fresh
    forget(model, 'head')
    print_log(f'TimmClassifier: quantized backbone from {path}, head fresh', logger='current')


def _classes_in(path: str) -> int:
    """Outputs of the head in a file that `gplq.save` wrote."""
    if not Path(path).is_file():
        raise CheckpointError(f'{path} does not exist')
    try:
        with safe_open(path, framework='pt') as file:
            return int(file.get_slice('head.bias').get_shape()[0])
    except SafetensorError as error:
        raise CheckpointError(f'{path} holds no quantized TimmClassifier ({error})') from None
