"""What detectors need: operators where mmcv has none compiled, and backbones for mmdet.

Importing it puts the operators in place, so it comes before `mmcv.ops` (see `stand_in`), and lets torch read
mmengine's checkpoints (see `gplq.plugins.safe_load`), which mmdet's own programs do not see to.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

_packages = ('mmengine', 'mmcv', 'mmdet', 'torchvision')
_missing = [name for name in _packages if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(
        f'gplq.plugins.detection needs {", ".join(_missing)}. '
        "Install the extra, and mmcv-lite unless you have mmcv, in GPLQ's folder: "
        "pip install '.[detection]' 'mmcv-lite<2.2'"
    )

from gplq.plugins.safe_load import allow_mmengine_objects  # noqa: E402

from .stand_in import install_operators  # noqa: E402

install_operators()
allow_mmengine_objects()

from .layer_norm import LN2d  # noqa: E402
from .simple_fpn import SimpleFPN  # noqa: E402
from .vit import ViT  # noqa: E402

if TYPE_CHECKING:
    from .timm_backbone import TimmBackbone

__all__ = ['LN2d', 'SimpleFPN', 'TimmBackbone', 'ViT', 'install_operators']


def __getattr__(name: str) -> Any:
    # timm is not among the detection extra's packages, so it is imported only for those who ask for it.
    if name == 'TimmBackbone':
        from .timm_backbone import TimmBackbone

        return TimmBackbone
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
