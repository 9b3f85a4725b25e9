"""Observers read tensors during calibration and propose scale and offset."""

from gplq.observers.base import Observer, Range, scale_from_range
from gplq.observers.factory import OBSERVERS, make_observer
from gplq.observers.min_max import MinMaxObserver
from gplq.observers.mse import MSEObserver
from gplq.observers.percentile import PercentileObserver

__all__ = [
    'OBSERVERS',
    'MSEObserver',
    'MinMaxObserver',
    'Observer',
    'PercentileObserver',
    'Range',
    'make_observer',
    'scale_from_range',
]
