"""A stand-in for mmcv's compiled operators, for mmcv-lite and uncompiled mmcv."""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from . import kernels

__all__ = ['install_operators']

_NAME = 'mmcv._ext'


def install_operators() -> bool:
    """Put the stand-in where mmcv looks for compiled operators, unless they are there; say whether it did.

    Must run before `mmcv.ops` is imported: its import is what looks. Installing twice changes nothing.
    """
    if isinstance(sys.modules.get(_NAME), _StandIn):
        return True
    if _NAME in sys.modules or importlib.util.find_spec(_NAME) is not None:
        return False
    sys.modules[_NAME] = _StandIn()
    return True


class _StandIn(ModuleType):
    """Has every name that mmcv asks for; one without a kernel here is a function that says so when called."""

    def __init__(self) -> None:
        super().__init__(_NAME, __doc__)
        self.__spec__ = importlib.machinery.ModuleSpec(_NAME, loader=None, origin=__name__)
        for name in kernels.__all__:
            setattr(self, name, getattr(kernels, name))
        # mmdet's environment report prints these two.
        self.get_compiler_version = lambda: 'not compiled (operators by gplq)'
        self.get_compiling_cuda_version = lambda: 'not compiled (operators by gplq)'

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> NoReturn:
            raise NotImplementedError(
                f"mmcv's operator `{name}` is not compiled here, and gplq has no stand-in for it. Get mmcv "
                'with compiled operators: pip uninstall mmcv-lite; pip install "setuptools<82" ninja; '
                'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-binary mmcv "mmcv==2.1.0"'
            )

        return missing
