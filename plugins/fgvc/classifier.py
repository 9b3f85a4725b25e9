"""Any timm model as a classifier for mmengine, in two parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import timm
import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel, ImgDataPreprocessor
from safetensors import SafetensorError, safe_open
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

import gplq
from gplq.errors import CheckpointError, DataError, RecipeError, StageError
from gplq.plugins.checkpoint_file import check_depth
from gplq.plugins.pretrained import read_state_dict
from gplq.plugins.timm_weights import BACKBONE, check_model_name, fit_timm_state, made_by_timm
from gplq.plugins.type_name import pretrained_source
from gplq.record import forget
from gplq.typecheck import check_types

__all__ = ['TimmClassifier']


class TimmClassifier(BaseModel):
    """A timm model whose `backbone` ends in pooled features and whose `head` is one Linear.

    Models with another head (two for distillation, a hidden layer) can have a fresh one; loading theirs is refused.

    Images (N, channels, H, W), normalized by the pipeline, -> logits (N, num_classes).

    Args:
        model_name: as `timm.create_model` takes it.
        num_classes: outputs of the head.
        pretrained: start from the weights that timm has of it, fetched when the weights are initialized.
        model_args: options of the model, such as `dict(img_size=448)`; positions are resized.
        drop_rate: dropout before the head.
        label_smoothing: of the cross-entropy.
        mixup: options of `timm.data.Mixup`, such as `dict(mixup_alpha=0.8, cutmix_alpha=1.0)`; None mixes nothing.
        frozen: train the head alone on features of the backbone as evaluation gives them: a linear probe.
        init_cfg: `dict(type='Pretrained', checkpoint=PATH)` starts from a timm classifier's or this class's weights in
            a file; the head is left fresh if it is of another number of classes, or `frozen`.
            `dict(type='Quantized', checkpoint=PATH)` takes the backbone of a classifier that `gplq.save` wrote, whose
            weights are final, so `frozen` goes with it.

    Raises:
        RecipeError: timm has no such model, or a setting is of the wrong type or outside of its range.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        pretrained: bool = False,
        model_args: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: dict[str, Any] | None = None,
        frozen: bool = False,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        settings = dict(
            model_name=model_name,
            num_classes=num_classes,
            pretrained=pretrained,
            model_args=model_args,
            drop_rate=drop_rate,
            label_smoothing=label_smoothing,
            mixup=mixup,
            frozen=frozen,
        )
        check_types(settings, get_type_hints(TimmClassifier.__init__), 'TimmClassifier: ')
        check_model_name(model_name, 'TimmClassifier')
        if num_classes < 1:
            raise RecipeError(f'TimmClassifier: num_classes={num_classes} must be at least 1')
        for name, share in (('drop_rate', drop_rate), ('label_smoothing', label_smoothing)):
            if not 0 <= share < 1:
                raise RecipeError(f'TimmClassifier: {name}={share} must be in [0, 1)')
        if 'num_classes' in (model_args or {}):
            raise RecipeError('TimmClassifier: num_classes is an argument of its own, leave it out of model_args')
        super().__init__(data_preprocessor=data_preprocessor or ImgDataPreprocessor(), init_cfg=init_cfg)
        self.num_classes = num_classes
        backbone: Any = made_by_timm('TimmClassifier', model_name, num_classes=0, **(model_args or {}))
        self.backbone = backbone
        self.model_name, self.pretrained, self.model_args = model_name, pretrained, dict(model_args or {})
        # What the backbone is made for, which the hooks run it on.
        backbone.img_size = _input_size(backbone, self.model_args)
        self._one_size = bool(getattr(getattr(backbone, 'patch_embed', None), 'strict_img_size', False))
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.Linear(getattr(backbone, 'head_hidden_size', None) or backbone.num_features, num_classes)
        self.label_smoothing = label_smoothing
        self.mixup = None
        if mixup is not None:
            options = {'label_smoothing': label_smoothing, 'num_classes': num_classes, **mixup}
            try:
                self.mixup = Mixup(**options)
            except (TypeError, ValueError, AssertionError) as error:
                raise RecipeError(f'TimmClassifier: timm does not take mixup={mixup}: {error}') from error
        self.frozen = frozen
        if frozen:
            self.backbone.requires_grad_(False)
        self.train()

    def init_weights(self) -> None:
        """Read the file of `init_cfg`; timm has initialized the backbone otherwise."""
        if self.init_cfg is None:
            if self.pretrained:
                self._take(self._fetched(), f'{self.model_name} of timm')
            return
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') == 'Quantized':
            if 'checkpoint' not in self.init_cfg:
                raise RecipeError("TimmClassifier: init_cfg=dict(type='Quantized') names no file; add checkpoint=PATH")
            self._take_quantized(self.init_cfg['checkpoint'])
            return
        source = pretrained_source(self.init_cfg)
        if source is None:
            super().init_weights()
            return
        self._take(read_state_dict(source), source)

    def _fetched(self) -> Mapping[str, Tensor]:
        try:
            whole = timm.create_model(self.model_name, pretrained=True, **self.model_args)
        except Exception as error:  # a download fails in any way
            reason = f'{type(error).__name__}: {error}'.splitlines()[0]
            raise CheckpointError(
                f'timm cannot fetch the weights of {self.model_name} ({reason}); without network give a file: '
                "init_cfg=dict(type='Pretrained', checkpoint=PATH)"
            ) from error
        state: Mapping[str, Tensor] = whole.state_dict()
        return state

    def _take(self, state: Mapping[str, Tensor], source: str) -> None:
        """Weights of a timm classifier or of this class."""
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise CheckpointError(
                    f'{source}: {name} holds NaN or infinite values, so nothing can be learned from it'
                )
        check_depth(self.backbone, [name.removeprefix(BACKBONE) for name in state], source)
        self.backbone.load_state_dict(fit_timm_state(self.backbone, state, source))
        # Probes of several backbones differ in these alone.
        head = None if self.frozen else self._head_in(state, source)
        if head is not None:
            self.head.load_state_dict(head)
            if not any(name.startswith(BACKBONE) for name in state):
                self._check_logits(state, source)
        print_log(
            f'TimmClassifier: backbone from {source}, head {"as well" if head else "fresh"}',
            logger='current',
        )

    def train(self, mode: bool = True) -> TimmClassifier:
        """Training mode; a frozen backbone stays as evaluation runs it."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def features(self, inputs: Tensor) -> Tensor:
        """Pooled features (N, C); features that come from a cache pass."""
        if inputs.ndim == 2:
            return inputs
        if self._one_size and tuple(inputs.shape[-2:]) != self.backbone.img_size:
            size = tuple(inputs.shape[-2:])
            raise DataError(
                f'TimmClassifier: images are {size} in height and width and {self.model_name} is made for '
                f'{self.backbone.img_size}: set model_args=dict(img_size={size}), or resize in the pipeline'
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features: Tensor = self.backbone(inputs)
        return features

    def logits(self, inputs: Tensor) -> Tensor:
        """Scores of the classes (N, num_classes)."""
        logits: Tensor = self.head(self.dropout(self.features(inputs)))
        return logits

    def loss(self, inputs: Tensor, labels: Tensor, soft_labels: Tensor | None = None) -> dict[str, Tensor]:
        """Cross-entropy of labels (N,), or of soft ones (N, num_classes) in their place."""
        if soft_labels is not None:
            if soft_labels.shape != (len(inputs), self.head.out_features):
                raise DataError(
                    f'soft labels are {tuple(soft_labels.shape)}, not ({len(inputs)}, {self.head.out_features}) for '
                    f'{len(inputs)} images and the classes of the head'
                )
            return {'loss_cls': F.cross_entropy(self.logits(inputs), soft_labels)}
        if self.mixup is not None and self.training and len(inputs) % 2 == 0:
            inputs, soft = self.mixup(inputs, labels)
            return {'loss_cls': -(soft * F.log_softmax(self.logits(inputs), -1)).sum(-1).mean()}
        return {'loss_cls': F.cross_entropy(self.logits(inputs), labels, label_smoothing=self.label_smoothing)}

    def forward(
        self,
        inputs: Tensor,
        labels: Sequence[int] | Tensor | None = None,
        mode: str = 'tensor',
        soft_labels: Sequence[Tensor] | Tensor | None = None,
        **about: Any,
    ) -> Any:
        """Logits, losses by name, or a list of predictions, as mmengine's modes say.

        Args:
            inputs: images, or features of a cache.
            labels: classes by number; not needed for logits.
            mode: `tensor`, `loss` or `predict`.
            soft_labels: a teacher's chances of the classes, one row an image, which the loss takes in place of labels.
            about: what else the data set says of the samples; passed on to the metric.
        """
        if mode == 'tensor':
            return self.logits(inputs)
        if mode not in ('loss', 'predict'):
            raise RecipeError(f"TimmClassifier: mode={mode!r} is none of 'tensor', 'loss' and 'predict'")
        if labels is None:
            raise DataError(f"TimmClassifier: mode={mode!r} needs labels in the batch; 'tensor' gives logits without")
        labels = torch.as_tensor(labels, device=inputs.device)
        if mode == 'loss':
            if soft_labels is not None and not isinstance(soft_labels, Tensor):
                soft_labels = torch.stack(list(soft_labels))
            return self.loss(inputs, labels, None if soft_labels is None else soft_labels.to(inputs.device))
        scores = self.logits(inputs).softmax(-1)
        names = about.get('img_path') or [''] * len(scores)
        return [
            {'scores': row, 'label': int(label), 'img_path': name}
            for row, label, name in zip(scores, labels, names, strict=True)
        ]

    def _check_logits(self, state: Mapping[str, Tensor], source: str) -> None:
        """Compare with timm's own classifier: some have two heads, or more than a Linear in one.

        Raises:
            CheckpointError: if the logits differ.
        """
        whole = timm.create_model(self.model_name, num_classes=self.head.out_features, **self.model_args)
        whole.load_state_dict(fit_timm_state(whole, state, source))
        shape = 1, int(self.model_args.get('in_chans', 3)), *self.backbone.img_size
        image = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
        training = self.training
        with torch.no_grad():
            ours, theirs = self.eval().cpu()(image), whole.eval()(image)
        self.train(training)
        if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3):
            raise self._other_head(source)

    def _other_head(self, source: str) -> CheckpointError:
        return CheckpointError(
            f'TimmClassifier: the head of {self.model_name} is more than one Linear on pooled features, so '
            f'{source} would lose some of it; take a model with a plain head, or train a fresh one (num_classes)'
        )

    def _take_quantized(self, path: str) -> None:
        if not self.frozen:
            raise StageError(f'{path} holds rounded weights, which cannot be trained: set frozen=True')
        fresh = self.head
        self.head = nn.Linear(fresh.in_features, _classes_in(path))
        gplq.load(self, path)
        # The classes of another data set: a head of its own, in floating point.
        self.head = fresh
        forget(self, 'head')
        print_log(f'TimmClassifier: quantized backbone from {path}, head fresh', logger='current')

    def _head_in(self, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor] | None:
        """Weight and bias of the head, where the file has one of these classes.

        Raises:
            CheckpointError: what the file has for these classes is no such head.
        """
        backbone: Any = self.backbone
        classifier = backbone.pretrained_cfg.get('classifier', 'head')
        names = [classifier] if isinstance(classifier, str) else list(classifier)
        for name in ('head', *names):
            found = {part: state.get(f'{name}.{part}') for part in ('weight', 'bias')}
            if all(tensor is not None and tensor.shape == getattr(self.head, n).shape for n, tensor in found.items()):
                return {part: tensor for part, tensor in found.items() if tensor is not None}
        # A head on several vectors of features, say.
        if any(len(state[f'{n}.weight']) == self.num_classes for n in names if f'{n}.weight' in state):
            raise self._other_head(source)
        return None


def _classes_in(path: str) -> int:
    """Outputs of the head in a file that `gplq.save` wrote."""
    if not Path(path).is_file():
        raise CheckpointError(f'{path} does not exist')
    try:
        with safe_open(path, framework='pt') as file:
            return int(file.get_slice('head.bias').get_shape()[0])
    except SafetensorError as error:
        raise CheckpointError(f'{path} holds no quantized TimmClassifier ({error})') from None


def _input_size(model: nn.Module, model_args: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width that the model is made for."""
    patches = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    size = patches or model_args.get('img_size') or model.pretrained_cfg['input_size'][1:]  # type: ignore[index]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
