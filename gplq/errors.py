"""Errors a user can act on: each message names the module or file, the value found and what to do."""

from __future__ import annotations

__all__ = [
    'CalibrationError',
    'CheckpointError',
    'DataError',
    'GPLQError',
    'ProductError',
    'RecipeError',
    'StageError',
    'TargetError',
    'TrainingError',
    'WriteError',
]


class GPLQError(ValueError):
    """Base of every error that GPLQ raises on purpose."""


class RecipeError(GPLQError):
    """A setting is outside what is supported (bits, exponent grid, unknown key, unreadable string)."""


class TargetError(GPLQError):
    """A name pattern matches nothing, or a targeted layer cannot be quantized."""


class ProductError(GPLQError):
    """The matrix products of an attention module cannot be found or do not repeat."""


class CalibrationError(GPLQError):
    """Calibration data is empty, not finite, or never reached a site."""


class StageError(GPLQError):
    """The verbs were called in an order that has no meaning."""


class TrainingError(GPLQError):
    """The activation stage cannot train: no batches, half precision, or a loss or gradient that is not finite."""


class CheckpointError(GPLQError):
    """A checkpoint is missing, damaged, of another model, or holds objects that are not data."""


class DataError(GPLQError):
    """A sample of a data set cannot be read."""


class WriteError(GPLQError, OSError):
    """A file cannot be written: the disk is full, or its folder is not writable."""
