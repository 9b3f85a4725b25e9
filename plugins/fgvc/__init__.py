"""Fine-grained classification on mmengine and timm, without mmcv or mmdet."""

import importlib.util

_packages = ('mmengine', 'timm', 'torchvision')
_missing = [name for name in _packages if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(f"gplq.plugins.fgvc needs {', '.join(_missing)}: pip install '.[fgvc]' in GPLQ's folder")

from .classifier import TimmClassifier  # noqa: E402
from .cub import CUBDataset  # noqa: E402
from .feature_cache import FeatureCacheHook  # noqa: E402
from .metric import ClassificationMetric  # noqa: E402
from .multi_crop import MultiCropDataset, collate_crops  # noqa: E402
from .torchvision_dataset import TorchvisionDataset  # noqa: E402
from .transforms import LoadImage, PackImage, TimmTransform, TorchvisionTransform  # noqa: E402

__all__ = [
    'CUBDataset',
    'ClassificationMetric',
    'FeatureCacheHook',
    'LoadImage',
    'MultiCropDataset',
    'PackImage',
    'TimmClassifier',
    'TimmTransform',
    'TorchvisionDataset',
    'TorchvisionTransform',
    'collate_crops',
]
