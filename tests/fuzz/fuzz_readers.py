"""Give the readers of files and recipes mutated input: each must take it or refuse it with an error of its own.

Nothing in an input may be executed, and none may take longer than the patience. A failure prints the seed that makes
its input again.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import gplq
from gplq.errors import GPLQError
from gplq.fingerprint import fingerprint
from gplq.plugins.checkpoint_file import quantization_of, read_checkpoint
from gplq.plugins.hooks.checkpoints import check_keys
from gplq.plugins.hooks.settings import HookSettings
from gplq.recipe import Recipe
from gplq.serialization import adopt

EXAMPLE = 'example: OMP_NUM_THREADS=1 python tests/fuzz/fuzz_readers.py --inputs 100000'
PATIENCE = 20
STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    10**40,
    0.5,
    -1e308,
    float('nan'),
    float('inf'),
    '',
    'w4a4',
    '..',
    'a' * 5000,
    '\0',
    '\ud800',
    '[[[',
    [],
    {},
    [[]],
    [0] * 200,
    {'': None},
    [1, 'a', None],
]

# Reads one input; whatever it raises that is not an error of ours has failed.
Read = Callable[[Path], object]


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.proj(y.transpose(1, 2).flatten(2))


class Small(nn.Module):
    """One block, so that reading it takes milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = Attention(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attn(self.norm(x))).mean(1))


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--inputs', type=int, default=1000, help='in all (default: 1000)')
    parser.add_argument('--first', type=int, default=0, help='first seed; input n has the seed first + n (default: 0)')
    return parser.parse_args()


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat or insert a few times, most often near the front, where headers are."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        end = min(len(data), rng.choice((16, 200, 2000, len(data)))) or 1
        at = rng.randrange(end)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 8] = rng.choice((0, 1, 2**32, 2**62, 2**64 - 1)).to_bytes(8, 'little')
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
    return bytes(data)


def mutated_value(value: Any, rng: random.Random) -> Any:
    """Put something strange in place of a random part of a tree of mappings and lists."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        kind = rng.random()
        if kind < 0.08:
            del changed[key]
        elif kind < 0.12:
            changed[str(rng.choice(STRANGE))] = changed.pop(key)
        else:
            changed[key] = mutated_value(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.1:
            return value[:at]
        return [*value[:at], mutated_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(STRANGE)


class Inputs:
    """Sound files in a folder, and mutated ones made from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bomb = folder / 'executed'
        torch.manual_seed(0)
        images = torch.randn(4, 5, 8)
        self.fp32 = Small()
        model = Small()
        gplq.prepare(model, 'w4a4', images)
        gplq.calibrate(model, [images])
        self.calibrated = gplq.serialization.describe(model)
        gplq.quantize_weights(model, [images])
        self.saved = folder / 'sound.safetensors'
        gplq.save(model, self.saved)
        self.checkpoint = folder / 'sound.pth'
        state = {'state_dict': model.state_dict(), 'meta': {'gplq': gplq.serialization.describe(model), 'epoch': 1}}
        torch.save(state, self.checkpoint)
        legacy = folder / 'legacy.pth'
        torch.save(state, legacy, _use_new_zipfile_serialization=False)
        bombs = folder / 'bomb.pth', folder / 'bomb_legacy.pth'
        torch.save({'state_dict': {}, 'meta': Bomb(self.bomb)}, bombs[0])
        bombs[1].write_bytes(pickle.dumps({'state_dict': Bomb(self.bomb)}))
        self.checkpoints = [path.read_bytes() for path in (self.checkpoint, legacy, *bombs)]
        self.images = images

    def make(self, rng: random.Random) -> tuple[str, Callable[[], object]]:
        """A reader's name and a call of it with a mutated input."""
        kind = rng.choice(
            ('load bytes', 'load bytes', 'load plan', 'load plan', 'checkpoint', 'adopt', 'recipe', 'hook')
        )
        path = self.folder / 'mutated'
        if kind == 'load bytes':
            path.write_bytes(mutated_bytes(self.saved.read_bytes(), rng))
            return kind, lambda: gplq.load(Small(), path)
        if kind == 'load plan':
            self._forge(path, rng)
            return kind, lambda: gplq.load(Small(), path)
        if kind == 'checkpoint':
            path.write_bytes(mutated_bytes(rng.choice(self.checkpoints), rng))
            return kind, lambda: self._read_checkpoint(path)
        if kind == 'adopt':
            description = mutated_value(self.calibrated, rng)
            if isinstance(description, dict) and rng.random() < 0.7:
                plan = json.loads(self.calibrated['plan'])
                description['plan'] = json.dumps(mutated_value(plan, rng))
            return kind, lambda: self._adopt(description)
        if kind == 'recipe':
            values = mutated_value(Recipe.gplq(4, 4).to_dict(), rng)
            text = ''.join(rng.choice('wa0123456789 .-') for _ in range(rng.randrange(8)))
            return kind, lambda: Recipe.from_string(text) if rng.random() < 0.3 else Recipe.from_dict(values)
        hook = {'weight_bits': 4, 'recipe': {'calibration_samples': 8}, 'stage': {'lr': 1e-5}, 'mimicking': 1.0}
        settings = mutated_value({**hook, 'targets': ['backbone'], 'iterations': 3, 'example_size': [8, 8]}, rng)
        return kind, lambda: HookSettings.from_config(**settings) if isinstance(settings, dict) else None

    def _forge(self, path: Path, rng: random.Random) -> None:
        """A file whose hash fits: what is said of the tensors, or a tensor, is strange."""
        tensors = load_file(self.saved)
        with safe_open(self.saved, 'pt') as file:
            metadata = dict(file.metadata())
        if rng.random() < 0.3:
            name = rng.choice(list(tensors))
            shape = rng.choice(([], [0], [1], [3, 5], list(tensors[name].shape)))
            dtype = rng.choice((torch.float32, torch.uint8, torch.int64, torch.bfloat16, torch.bool))
            tensors[name] = torch.full(shape, rng.choice((0, 1, 255, -1)), dtype=torch.float64).to(dtype)
        else:
            metadata['plan'] = json.dumps(mutated_value(json.loads(metadata['plan']), rng))
        if rng.random() < 0.2:
            key = rng.choice(list(metadata))
            metadata[key] = str(rng.choice(STRANGE)).replace('\ud800', '?')
        metadata['sha256'] = fingerprint(tensors, json.dumps({**metadata, 'sha256': ''}, sort_keys=True))
        save_file(tensors, path, metadata=metadata)

    def _read_checkpoint(self, path: Path) -> None:
        checkpoint = read_checkpoint(str(path))
        quantization_of(checkpoint)
        check_keys(self.fp32, checkpoint, str(path))

    def _adopt(self, description: Any) -> None:
        model = Small()
        gplq.prepare(model, 'w4a4', self.images)
        adopt(model, description)


@contextmanager
def patience() -> Iterator[None]:
    def over(number: int, frame: object) -> None:
        raise TimeoutError(f'longer than {PATIENCE} s')

    signal.signal(signal.SIGALRM, over)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)


def failed(inputs: Inputs, seed: int, counts: dict[str, list[int]]) -> bool:
    """Try one input; a failure is printed with its seed."""
    kind, read = inputs.make(random.Random(seed))
    count = counts.setdefault(kind, [0, 0])
    try:
        with patience():
            read()
        count[0] += 1
    except GPLQError:
        count[1] += 1
    except Exception:
        print(f'seed {seed} ({kind}):\n{traceback.format_exc()}', flush=True)
        return True
    if inputs.bomb.exists():
        print(f'seed {seed} ({kind}): something in the input was executed', flush=True)
        inputs.bomb.unlink()
        return True
    return False


def main() -> None:
    args = parse_args()
    start = time.monotonic()
    counts: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder))
        failures = 0
        for number in range(args.inputs):
            failures += failed(inputs, args.first + number, counts)
            if (number + 1) % max(1, args.inputs // 20) == 0:
                left = (time.monotonic() - start) / (number + 1) * (args.inputs - number - 1)
                print(f'{number + 1} of {args.inputs}, {left / 60:.1f} minutes left', file=sys.stderr, flush=True)
    for kind, (taken, refused) in sorted(counts.items()):
        print(f'{kind}: {taken} taken, {refused} refused')
    print(f'{failures} of {args.inputs} inputs failed, seeds {args.first} to {args.first + args.inputs - 1}')
    sys.exit(bool(failures))


if __name__ == '__main__':
    main()
