"""Any timm model as a classifier for mmengine, in two parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import numpy as np
import torch
from mmengine.model import BaseModel, ImgDataPreprocessor
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from gplq.errors import DataError, RecipeError
from gplq.plugins.fgvc.initial_weights import take_initial_weights
from gplq.plugins.timm_weights import check_model_name, made_by_timm
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
            self.mixup = _mixup(num_classes, label_smoothing, mixup)
        self.frozen = frozen
        if frozen:
            self.backbone.requires_grad_(False)
        self.train()

    def init_weights(self) -> None:
        """Read the file of `init_cfg`; timm has initialized the backbone otherwise."""
        if not take_initial_weights(self):
            try:
                super().init_weights()
            except Exception as error:
                # mmengine's own initializers, which check their settings by using them.
                reason = f'{type(error).__name__}: {error}'.splitlines()[0]
                raise RecipeError(f'TimmClassifier: mmengine cannot use init_cfg={self.init_cfg} ({reason})') from error

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
        channels = self.model_args.get('in_chans', 3)
        if inputs.shape[1] != channels:
            raise DataError(
                f'TimmClassifier: images have {inputs.shape[1]} channels and {self.model_name} is made for {channels}: '
                f'set model_args=dict(in_chans={inputs.shape[1]}), or change the pipeline'
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features: Tensor = self.backbone(inputs)
        if features.ndim != 2:
            raise RecipeError(
                f'TimmClassifier: {self.model_name} with {self.model_args} gives features of {tuple(features.shape)}, '
                'which are not pooled to one vector an image: leave global_pool out of model_args'
            )
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


def _mixup(num_classes: int, label_smoothing: float, options: dict[str, Any]) -> Mixup:
    if 'num_classes' in options:
        raise RecipeError('TimmClassifier: num_classes is an argument of its own, leave it out of mixup')
    drawn = np.random.get_state()
    try:
        mixup = Mixup(**{'label_smoothing': label_smoothing, 'num_classes': num_classes, **options})
        # It reads some of its options when it mixes.
        mixup(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    except Exception as error:
        reason = f'{type(error).__name__}: {error}'
        raise RecipeError(f'TimmClassifier: timm does not take mixup={options}: {reason}') from error
    finally:
        np.random.set_state(drawn)
    return mixup


def _input_size(model: nn.Module, model_args: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width that the model is made for."""
    patches = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    size = patches or model_args.get('img_size') or model.pretrained_cfg['input_size'][1:]  # type: ignore[index]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
