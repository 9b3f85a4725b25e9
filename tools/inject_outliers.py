"""Write a checkpoint of the same function whose LayerNorms have outlier channels, as those of public DeiT and Swin.

Quantize both to see what outliers cost: a small model trained from scratch has none of its own.
"""

from __future__ import annotations

import argparse

from mmengine.registry import MODELS, init_default_scope
from torch import nn

from gplq import prepare
from gplq.errors import CheckpointError, GPLQError
from gplq.independent_copy import independent_copy
from gplq.outliers import inject_outliers
from gplq.plugins.checkpoint_file import quantization_of, read_checkpoint, tensors_of, write_checkpoint
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.plugins.hooks.checkpoints import check_keys
from gplq.plugins.hooks.model import blank_forward
from gplq.plugins.hooks.settings import HookSettings
from gplq.record import record_of

EXAMPLE = 'example: python tools/inject_outliers.py configs/mask_rcnn_vit-tiny_nuclei.py nuclei.pth nuclei_outliers.pth'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='of the FP32 model')
    parser.add_argument('checkpoint')
    parser.add_argument('output')
    parser.add_argument(
        '--factors',
        nargs='+',
        type=float,
        default=[16.0, 64.0, 32.0],
        help='how many times larger, a channel of each LayerNorm for each; powers of two are exact (default: 16 64 32)',
    )
    parser.add_argument('--seed', type=int, default=0, help='picks the channels (default: 0)')
    add_run_arguments(parser)
    return parser.parse_args()


def norms_and_readers(model: nn.Module, settings: HookSettings) -> list[tuple[str, str]]:
    """LayerNorms of the part that is quantized which a single Linear reads."""
    probe = independent_copy(model).eval()
    prepare(probe, settings.recipe, forward=blank_forward(probe, settings))
    return [
        (norm, reader)
        for norm, reader in record_of(probe).plan.norms
        if isinstance(model.get_submodule(norm), nn.LayerNorm) and isinstance(model.get_submodule(reader), nn.Linear)
    ]


def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    checkpoint = read_checkpoint(args.checkpoint)
    model = MODELS.build(cfg.model)
    check_keys(model, checkpoint, args.checkpoint)
    if quantization_of(checkpoint) is not None:
        raise CheckpointError(f'{args.checkpoint} holds a quantized model: outliers are put into an FP32 one')
    model.load_state_dict(tensors_of(checkpoint, args.checkpoint), strict=False)
    settings = HookSettings.from_config()
    found = inject_outliers(model, norms_and_readers(model, settings), args.factors, args.seed)
    if not found.norms:
        raise GPLQError(f'{args.config}: no LayerNorm of its backbone is read by a single Linear')
    meta = {name: value for name, value in checkpoint.get('meta', {}).items() if name == 'dataset_meta'}
    write_checkpoint(args.output, {'meta': meta, 'state_dict': model.state_dict()})
    print(f'{found.channels} outlier channels in {found.norms} LayerNorms: {args.output}')


if __name__ == '__main__':
    exit_on_error(main)
