"""Write the weights that a config's model starts from as a checkpoint, which `load_from` takes.

The way from a timm classifier to GPLQ: `init_cfg` names the file, or `pretrained=True` has timm fetch it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.registry import MODELS, init_default_scope

from gplq.errors import CheckpointError
from gplq.plugins.checkpoint_file import write_checkpoint
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.record import is_prepared

EXAMPLE = (
    'example: python tools/first_checkpoint.py configs/vit-mini_objects100.py work_dirs/vit-mini_objects100/fp32.pth'
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='of the FP32 model')
    parser.add_argument('output')
    add_run_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = MODELS.build(cfg.model)
    if cfg.model.get('init_cfg') is None and not cfg.model.get('pretrained'):
        raise CheckpointError(f'{args.config}: its model starts from random weights: set model.init_cfg or pretrained')
    try:
        model.init_weights()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f'{args.config}: {error}') from error
    if is_prepared(model):
        raise CheckpointError(
            f'{args.config}: its init_cfg brings a quantized model, and load_from takes FP32 weights: name an FP32 file'
        )
    write_checkpoint(args.output, {'state_dict': model.state_dict()})
    print(f'{len(model.state_dict())} tensors: {Path(args.output)}')


if __name__ == '__main__':
    exit_on_error(main)
