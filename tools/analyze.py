"""Show what quantization meets and does in a model: distributions, outliers, noise and sensitivity of its modules.

The model is the config's, which has the two lines; an FP32 checkpoint is calibrated first, a quantized one is taken as
it is. `--sensitivity` measures the metric with each block alone quantized, and with each alone left out, for which the
weights must be in floating point yet. `--beside` adds another model, such as a convolutional one, to the first table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.utils import track_iter_progress
from torch import nn

from gplq.analysis import analyze, isolated
from gplq.errors import RecipeError
from gplq.files import write_bytes_atomically
from gplq.plugins.analysis_page import Model, Sensitivity, render_page, write_csv, write_table
from gplq.plugins.checkpoint_file import quantization_of, read_checkpoint
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.plugins.hook_of_config import hook_of
from gplq.plugins.hooks.activation_qat_hook import ActivationQATHook
from gplq.plugins.hooks.model import model_of
from gplq.plugins.hooks.progress import logged_progress
from gplq.plugins.hooks.report import evaluate
from gplq.plugins.hooks.restore_hook import RestoreHook
from gplq.plugins.preflight import preflight
from gplq.recipe import Recipe
from gplq.record import record_of

EXAMPLE = """example:
  python tools/analyze.py configs/gplq_vit-mini_objects100.py fp32.pth --bits w3a3 --sensitivity \\
      --cfg-options data_root=data/objects100"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='a config with the two lines')
    parser.add_argument('checkpoint', help='FP32, of the activation stage, or quantized')
    parser.add_argument('--bits', help="such as w3a3 (default: the config's)")
    parser.add_argument('--sensitivity', action='store_true', help='measure each block; takes two validations for each')
    parser.add_argument('--metric', help='default: the first that the evaluator gives')
    parser.add_argument('--beside', nargs=2, action='append', default=[], metavar=('CONFIG', 'CHECKPOINT'))
    parser.add_argument('--samples', type=int, default=64, help='images to look at (default: %(default)s)')
    add_run_arguments(parser)
    return parser.parse_args()


class _Found:
    """A model in its Runner, calibrated or quantized; the config names its checkpoint by ``load_from``."""

    def __init__(self, cfg: Config, bits: str | None) -> None:
        hook = hook_of(cfg, cfg.filename)
        cfg.default_hooks.pop('gplq')
        if bits is not None:
            found = Recipe.from_string(bits)
            hook |= {'weight_bits': found.weight_bits, 'activation_bits': found.activation_bits}
        self.hook = ActivationQATHook(**{**hook, 'iterations': 0, 'validate_fp32': False})
        runner = self.runner = Runner.from_cfg(cfg)
        if quantization_of(read_checkpoint(cfg.load_from)) is None:
            runner.register_hook(self.hook)
            runner.train()
        else:
            # Quantizers are those of the checkpoint, whatever the config says.
            runner.register_hook(RestoreHook())
            runner.load_or_resume()

    @property
    def model(self) -> nn.Module:
        model: nn.Module = model_of(self.runner)
        return model

    def sites(self, name: str, samples: int) -> Model:
        loader = self.hook.loader(self.runner, samples)
        forward = self.hook.forward(self.model)
        return Model(name, analyze(self.model, loader, forward=forward, samples=samples, progress=logged_progress))


def main() -> None:
    args = parse_args()
    cfg = _read(args, args.checkpoint)
    work = Path(cfg.work_dir)
    # Before anything takes minutes.
    others = [
        _read(
            argparse.Namespace(**{**vars(args), 'config': config, 'work_dir': str(work / Path(config).stem)}), weights
        )
        for config, weights in args.beside
    ]
    found = _Found(cfg, args.bits)
    models = [found.sites(Path(args.config).stem, args.samples)]
    sensitivities: list[Sensitivity] = []
    metric, fp32, whole = '', None, None
    if args.sensitivity:
        sensitivities, metric, fp32, whole = _sensitivities(found, args.metric)
    for other in others:
        name = Path(other.filename).stem
        models.append(_Found(other, args.bits).sites(name, args.samples))
    write_bytes_atomically(work / 'analysis.md', write_table(models).encode())
    write_bytes_atomically(work / 'analysis.csv', write_csv(models).encode())
    page = render_page(models, sensitivities, metric, fp32, whole)
    write_bytes_atomically(work / 'analysis.html', page.encode())
    print(f'{work}/analysis.html, .md and .csv')


def _read(args: argparse.Namespace, checkpoint: str) -> Config:
    cfg = read_config(args)
    hook_of(cfg, args.config)
    cfg.load_from, cfg.resume = checkpoint, False
    preflight(cfg)
    return cfg


def _sensitivities(found: _Found, name: str | None) -> tuple[list[Sensitivity], str, float, float]:
    """The metric of each block alone, and of all but each."""
    plan = record_of(found.model).plan
    blocks = list(dict.fromkeys(plan.block_of(a_map) or a_map.name for a_map in plan.maps))

    def measure(names: list[str], *, inverted: bool = False) -> dict[str, Any]:
        with isolated(found.model, names, inverted=inverted):
            metrics: dict[str, Any] = evaluate(found.runner)
            return metrics

    fp32, whole = measure([]), measure([], inverted=True)
    metric = name or next(iter(fp32), '')
    if metric not in fp32:
        raise RecipeError(f'--metric {metric}: the evaluator gives {sorted(fp32)}')
    rows = [
        Sensitivity(block, measure([block])[metric], measure([block], inverted=True)[metric])
        for block in track_iter_progress(blocks)
    ]
    return rows, metric, fp32[metric], whole[metric]


if __name__ == '__main__':
    exit_on_error(main)
