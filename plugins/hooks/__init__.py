"""Runner hooks: they say when, the core says what."""

from gplq.plugins.hooks.activation_qat_hook import ActivationQATHook
from gplq.plugins.hooks.distillation_hook import FeatureDistillationHook
from gplq.plugins.hooks.gplq_hook import GPLQHook
from gplq.plugins.hooks.head_distillation_hook import HeadDistillationHook
from gplq.plugins.hooks.ptq4vit_hook import PTQ4ViTHook
from gplq.plugins.hooks.soft_label_hook import SoftLabelHook
from gplq.plugins.hooks.variation_aware_qat_hook import VariationAwareQATHook
from gplq.plugins.hooks.weight_ptq_hook import WeightPTQHook

__all__ = [
    'ActivationQATHook',
    'FeatureDistillationHook',
    'GPLQHook',
    'HeadDistillationHook',
    'PTQ4ViTHook',
    'SoftLabelHook',
    'VariationAwareQATHook',
    'WeightPTQHook',
]
