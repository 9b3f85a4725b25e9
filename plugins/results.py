"""Result rows: one line of JSON for every figure, with the command that repeats it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from gplq.errors import GPLQError

__all__ = [
    'BOUNDS',
    'SCOPES',
    'Measurement',
    'ResultError',
    'ResultRow',
    'append_figures',
    'append_row',
    'bits_name',
    'commit',
    'file_sha256',
    'measure',
    'peak_memory_mb',
    'read_rows',
    'repeat_command',
    'rows_file',
    'rows_so_far',
    'versions',
]

SCOPES = ('backbone', 'detector')
# Endings of a metric's name: 95 % of the resampled differences from FP32 lie between the two.
BOUNDS = ('_low', '_high')
BITS = (2, 3, 4, 5, 6, 7, 8, 32)
PACKAGES = (
    'gplq',
    'torch',
    'torchvision',
    'timm',
    'numpy',
    'mmengine',
    'mmcv',
    'mmcv-lite',
    'mmdet',
    'pycocotools',
    'onnxruntime',
    'openvino',
)


class ResultError(GPLQError):
    """A result row or file that cannot be what a run wrote."""


@dataclass(frozen=True)
class ResultRow:
    """One figure of one run. Average precision is a fraction, top-1 a percentage, as in mmdet and mmpretrain.

    `method` is `fp32`, `fp32_control`, `rtn`, `gplq` or a peer's name. Floating-point weights have 32 bits:
    W32A4 is `weight_bits=32, activation_bits=4`. `effective_bits` counts 8-bit sites and compensation too.
    `variant` tells apart runs that differ in a setting, such as 'no mimicking'; `calibration_samples` are the images
    that quantizers and weights were set on, `settings_sha256` tells whether the config or the data's lists have changed
    since. A metric that ends in one of `BOUNDS`
    is a bound of the interval of its difference from FP32, which may be negative.

    Raises:
        ResultError: a field has a value that no run can give.
    """

    benchmark: str
    split: str
    model: str
    scope: str
    checkpoint_sha256: str
    method: str
    weight_bits: int
    activation_bits: int
    effective_bits: float | None
    seed: int
    metric: str
    value: float
    minutes: float | None
    peak_memory_mb: float | None
    artifact_bytes: int | None
    command: str
    commit: str
    versions: dict[str, str] = field(hash=False)
    variant: str = ''
    calibration_samples: int | None = None
    settings_sha256: str | None = None

    def __post_init__(self) -> None:
        for name in ('benchmark', 'split', 'model', 'method', 'metric', 'command', 'commit'):
            value = getattr(self, name)
            self._require(name, isinstance(value, str) and value.strip() != '', 'give a text')
        self._require('variant', isinstance(self.variant, str), 'give a text, empty for none')
        self._require('scope', self.scope in SCOPES, f'one of {", ".join(SCOPES)}')
        sha256 = isinstance(self.checkpoint_sha256, str) and re.fullmatch('[0-9a-f]{64}', self.checkpoint_sha256)
        self._require('checkpoint_sha256', bool(sha256), 'give the 64 digits of file_sha256()')
        for name in ('weight_bits', 'activation_bits'):
            bits = getattr(self, name)
            self._require(name, _is_int(bits) and bits in BITS, '2 to 8, or 32 for floating point')
        self._require('seed', _is_int(self.seed) and self.seed >= 0, 'give a whole number')
        self._require('value', _is_finite(self.value), 'the run has no result')
        # A bound of the interval around a difference may be negative.
        least = -1 if self.metric.endswith(BOUNDS) else 0
        if 'mAP' in self.metric:
            self._require('value', least <= self.value <= 1, f'{self.metric} is a fraction')
        if self.metric.startswith('top'):
            self._require('value', 100 * least <= self.value <= 100, f'{self.metric} is a percentage')
        for name in ('effective_bits', 'minutes', 'peak_memory_mb'):
            number = getattr(self, name)
            self._require(name, number is None or (_is_finite(number) and number >= 0), 'give a number, or None')
        for name in ('artifact_bytes', 'calibration_samples'):
            count = getattr(self, name)
            self._require(name, count is None or (_is_int(count) and count > 0), 'give a number, or None')
        texts = isinstance(self.versions, dict) and all(
            isinstance(k, str) and isinstance(v, str) for k, v in self.versions.items()
        )
        self._require('versions', texts and bool(self.versions), 'give what versions() returns')

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise ResultError(f'result row: {name} is {getattr(self, name)!r}; {remedy}')


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]


def bits_name(weight_bits: int, activation_bits: int) -> str:
    """Name a precision as in tables: `W4A4`, or `FP32` where nothing is quantized."""
    return 'FP32' if weight_bits == activation_bits == 32 else f'W{weight_bits}A{activation_bits}'


def append_row(path: str | os.PathLike[str], row: ResultRow) -> None:
    """Append a row in one write, so that runs which end together cannot mix their lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(row), ensure_ascii=False) + '\n'
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        # A run that was killed while writing leaves half a line; the next row must not join it.
        if size and os.pread(descriptor, 1, size - 1) != b'\n':
            line = '\n' + line
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_figures(path: str | os.PathLike[str], row: ResultRow, figures: Mapping[str, float]) -> None:
    """Add a row for each figure, alike but for metric and value, which ``row``'s own give way to."""
    for metric, value in figures.items():
        append_row(path, replace(row, metric=metric, value=value))


def read_rows(path: str | os.PathLike[str]) -> list[ResultRow]:
    """Read a file of rows, in its order.

    Raises:
        ResultError: a line is no row; the message names file, line and field.
    """
    names = {f.name for f in fields(ResultRow)}
    optional = {f.name for f in fields(ResultRow) if f.default is not MISSING}
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding='utf-8').splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values: Any = json.loads(line)
            if not isinstance(values, dict):
                raise ResultError('result row: not an object')
            missing = sorted(names - set(values) - optional)
            foreign = sorted(set(values) - names)
            if missing or foreign:
                raise ResultError(f'result row: missing {missing}, unknown {foreign}')
            rows.append(ResultRow(**values))
        except ValueError as error:
            raise ResultError(f'{path}, line {number}: {error}') from error
    return rows


def rows_so_far(path: str | os.PathLike[str]) -> list[ResultRow]:
    """Rows of a file that need not be there yet.

    Raises:
        ResultError: a line is no row.
    """
    return read_rows(path) if Path(path).is_file() else []


def rows_file(output: Path | None, split: str, work_dir: Path, benchmark: str) -> Path:
    """Where a benchmark's rows go: those of the test split are published, others lie with their runs.

    Args:
        output: what the user says, None for nothing.
        split: what is measured on.
        work_dir: of the runs.
        benchmark: its name.
    """
    return output or (Path('results') if split == 'test' else work_dir) / f'{benchmark}.jsonl'


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hash a file's content, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def commit() -> str:
    """Name this code: git's commit, `-dirty` when tracked files differ, or the release that was installed."""
    here = Path(__file__).resolve()

    def git(*args: str) -> str:
        done = subprocess.run(['git', '-C', str(here.parent), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # A wheel may lie inside someone else's repository, whose commit says nothing about this code.
        git('ls-files', '--error-unmatch', here.name)
        # Rows that are appended to a tracked file of results change no code.
        changed = git('status', '--porcelain', '-uno', '--', ':/', ':(top,exclude)results')
        return git('rev-parse', 'HEAD') + ('-dirty' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return f'release-{importlib.metadata.version("gplq")}'


def versions() -> dict[str, str]:
    """Versions of what a figure may depend on, the device that it was computed on included."""
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found['device'] = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return found


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.is_file():
        match = re.search(r'^model name\s*:\s*(.+)$', cpuinfo.read_text(), re.MULTILINE)
        name = match.group(1) if match else name
    return f'{name}, {torch.get_num_threads()} threads'


def repeat_command() -> str:
    """Give the command line of this process to be pasted; paths below the current folder are relative.

    Where data and first weights are is said by variables, whose values are of this machine alone: a shell into which
    the command is pasted asks for them.
    """
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith('GPLQ_') and value}
    arguments = [_pasted(argument, variables) for argument in sys.orig_argv[1:]]
    return ' '.join([*(f'{name}=${{{name}:?}}' for name in variables), 'python', *arguments])


def _pasted(argument: str, variables: Mapping[str, str]) -> str:
    """Quote an argument for a shell, with a variable in place of the path that it is or begins with.

    Args:
        argument: a value, or `KEY=value`.
        variables: names and paths; the longest that fits is taken.
    """
    argument = argument.removeprefix(os.getcwd() + os.sep)
    key, equals, value = argument.partition('=')
    for name, path in sorted(variables.items(), key=lambda item: -len(item[1])):
        root = path.rstrip('/') or path
        # A path can have an equals sign itself.
        for before, rest in (('', argument), (key + equals, value)):
            if rest == root or rest.startswith(root + '/'):
                expanded = f'${{{name}}}'
                # Single quotes would keep the variable from the shell; without quotes it splits a path at its spaces.
                if shlex.quote(argument) != argument:
                    expanded = f'"{expanded}"'
                return _quoted(before) + expanded + _quoted(rest[len(root) :])
    return shlex.quote(argument)


def _quoted(part: str) -> str:
    return shlex.quote(part) if part else ''


@dataclass
class Measurement:
    """What `measure` found; filled when its block ends."""

    minutes: float = 0.0
    peak_memory_mb: float = 0.0


@contextmanager
def measure() -> Iterator[Measurement]:
    """Measure a block's wall-clock minutes and peak memory: the GPU's where there is one, or the process's.

    Where the kernel does not let a process reset its own peak, the peak is that of the whole process so far.
    """
    result = Measurement()
    _reset_peak()
    start = time.perf_counter()
    try:
        yield result
    finally:
        result.minutes = (time.perf_counter() - start) / 60
        result.peak_memory_mb = peak_memory_mb()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        pass


def peak_memory_mb() -> float:
    """Peak so far: the GPU's allocations where there is a GPU, or what the process held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path('/proc/self/status')
    if status.is_file() and (match := re.search(r'^VmHWM:\s+(\d+) kB', status.read_text(), re.MULTILINE)):
        return int(match.group(1)) / 2**10
    import resource  # not on Windows

    # Kilobytes on Linux, bytes on macOS.
    unit = 2**20 if sys.platform == 'darwin' else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
