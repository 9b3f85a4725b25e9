"""Linear probes of a backbone in FP32 and quantized, by tools/train.py."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import gplq
from gplq.errors import CheckpointError, RecipeError
from gplq.plugins.bootstrap import top1_of
from gplq.plugins.fgvc.probe import Probe, plan_probes, probe
from gplq.plugins.results import ResultError, ResultRow, file_sha256, read_rows

ROOT = Path(__file__).parents[3]
FGVC = 'gplq.plugins.fgvc.'
CONFIG = """
pipeline = [
    dict(type='gplq.plugins.fgvc.LoadImage'),
    dict(type='gplq.plugins.fgvc.TimmTransform', input_size=(3, 16, 16), is_training=False),
    dict(type='gplq.plugins.fgvc.PackImage'),
]
dataset = dict(type='gplq.plugins.fgvc.CUBDataset', data_root='CUB_200_2011', pipeline=pipeline)
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(split='train', **dataset),
                        sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
                      dataset=dict(split='test', split_file='dev_test_split.txt', test_mode=True, **dataset))
model = dict(
    type='gplq.plugins.fgvc.TimmClassifier', model_name='vit_tiny_patch16_224', num_classes=3, frozen=True,
    model_args=dict(img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=3),
)
train_cfg = dict(by_epoch=True, max_epochs=2)
val_cfg = dict()
val_evaluator = dict(type='gplq.plugins.fgvc.ClassificationMetric')
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
default_scope = 'mmengine'
custom_hooks = [dict(type='gplq.plugins.fgvc.FeatureCacheHook', folder='features')]
"""


@pytest.fixture
def place(cub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the programs, the miniature of CUB, the config, and the backbone in FP32, 4 and 3 bits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    (tmp_path / 'probe.py').write_text(CONFIG)
    init_default_scope('mmengine')
    torch.manual_seed(0)
    for bits in (32, 4, 3):
        model = MODELS.build(Config.fromfile('probe.py').model).eval()
        model.frozen = False
        if bits == 32:
            torch.save({'state_dict': model.state_dict()}, 'fp32.pth')
            continue
        model.load_state_dict(torch.load('fp32.pth', weights_only=True)['state_dict'])
        images = torch.randn(4, 3, 16, 16)
        gplq.prepare(model, gplq.Recipe.rtn(bits, bits), images[:2])
        gplq.calibrate(model, [images])
        gplq.quantize_weights(model, [images])
        gplq.save(model, f'gplq_w{bits}a{bits}_0.safetensors')
    return tmp_path


def rtn(*bits: int, seeds: tuple[int, ...] = (0,)) -> list[Probe]:
    files = [('rtn', f'gplq_w{b}a{b}_{{seed}}.safetensors') for b in bits]
    return plan_probes('probe.py', 'fp32.pth', files, seeds, 'test', Path('w'))


def test_heads_on_every_backbone(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = place / 'rows.jsonl'
    probe(rtn(4), 'birds', 'vit', output)
    rows = read_rows(output)
    assert [(r.method, r.metric, r.weight_bits, r.activation_bits) for r in rows] == [
        ('fp32', 'top1', 32, 32),
        ('rtn', 'top1', 4, 4),
        ('rtn', 'top1_low', 4, 4),
        ('rtn', 'top1_high', 4, 4),
    ]
    assert {(r.benchmark, r.model, r.split, r.seed, r.scope) for r in rows} == {('birds', 'vit', 'test', 0, 'backbone')}
    assert {r.checkpoint_sha256 for r in rows} == {file_sha256('fp32.pth')}
    assert [r.value for r in rows[:2]] == [top1_of(one.predictions) for one in rtn(4)]
    assert rows[0].effective_bits == 32 and 4 <= rows[1].effective_bits < 5
    assert rows[1].artifact_bytes < rows[0].artifact_bytes / 3
    for one in rtn(4):
        log = (one.work_dir / 'log.txt').read_text()
        assert f'backbone from {one.file}, head fresh' in log and 'Epoch(val) [2]' in log
    (rtn(4)[0].work_dir / 'log.txt').unlink()
    probe(rtn(4), 'birds', 'vit', output)
    assert '2 probes, 2 of them done already' in capfd.readouterr().out
    assert read_rows(output) == rows and not (rtn(4)[0].work_dir / 'log.txt').exists()


# Sees so many of ten images right, by the name of the backbone and the seed.
STAND_IN = """
import json, pathlib, sys
options = dict(part.split('=', 1) for part in sys.argv[sys.argv.index('--cfg-options') + 1:])
work = pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1])
name = pathlib.Path(options['model.init_cfg.checkpoint']).name
right = {'gplq_w4a4': 7, 'gplq_w3a3': 2}.get(name.rpartition('_')[0], 9) - int(options['randomness.seed'])
seen = {str(image): {'found': int(image < right), 'label': 1} for image in range(10)}
pathlib.Path(options['val_evaluator.outfile']).write_text(json.dumps(seen))
with open('calls.txt', 'a') as calls:
    calls.write(work.name + '\\n')
"""


@pytest.fixture
def calls(place: Path) -> Callable[[], list[str]]:
    """Names of the runs so far, by a program in place of tools/train.py."""
    (place / 'tools').unlink()
    (place / 'tools').mkdir()
    (place / 'tools/train.py').write_text(STAND_IN)
    (place / 'calls.txt').touch()
    for bits in (4, 3):
        shutil.copy(f'gplq_w{bits}a{bits}_0.safetensors', f'gplq_w{bits}a{bits}_1.safetensors')
    return lambda: [name.rpartition('_')[0] for name in (place / 'calls.txt').read_text().split()]


def bounds(rows: list[ResultRow], bits: int, seed: int) -> list[float]:
    mine = [r for r in rows if (r.weight_bits, r.seed) == (bits, seed)]
    return [next(r.value for r in reversed(mine) if r.metric == f'top1_{end}') for end in ('low', 'high')]


def test_each_is_compared_with_fp32_of_its_seed(calls: Callable[[], list[str]]) -> None:
    output = Path('rows.jsonl')
    probe(rtn(4, 3, seeds=(0, 1)), 'birds', 'vit', output)
    assert calls() == ['fp32_s0', 'rtn_s0', 'rtn_s0', 'fp32_s1', 'rtn_s1', 'rtn_s1']
    rows = read_rows(output)
    values = {(r.weight_bits, r.seed): r.value for r in rows if r.metric == 'top1'}
    assert values == {(32, 0): 90, (4, 0): 70, (3, 0): 20, (32, 1): 80, (4, 1): 60, (3, 1): 10}
    # Two of ten images are lost at 4 bits, seven at 3, with either seed.
    for seed in (0, 1):
        low, high = bounds(rows, 4, seed)
        assert -60 < low < -20 < high <= 0
        low, high = bounds(rows, 3, seed)
        assert -100 <= low < -70 < high < -20
    probe(rtn(4, seeds=(1, 1)), 'birds', 'vit', output)
    assert len(calls()) == 6 and read_rows(output) == rows


def test_a_backbone_that_was_replaced_is_measured_anew(calls: Callable[[], list[str]]) -> None:
    output = Path('rows.jsonl')
    probe(rtn(4), 'birds', 'vit', output)
    first = read_rows(output)
    shutil.copy('gplq_w3a3_0.safetensors', 'gplq_w4a4_0.safetensors')
    probe(rtn(4), 'birds', 'vit', output)
    assert calls() == ['fp32_s0', 'rtn_s0', 'rtn_s0']
    assert [r.weight_bits for r in read_rows(output)[4:]] == [3, 3, 3]
    # So is everything from another FP32 backbone.
    state = torch.load('fp32.pth', weights_only=True)
    state['state_dict']['head.bias'] += 1
    torch.save(state, 'fp32.pth')
    probe(rtn(4), 'birds', 'vit', output)
    rows = read_rows(output)[7:]
    assert [r.metric for r in rows] == ['top1', 'top1', 'top1_low', 'top1_high']
    assert {r.checkpoint_sha256 for r in rows}.isdisjoint({r.checkpoint_sha256 for r in first})


def test_intervals_are_of_the_rows_they_stand_behind(
    calls: Callable[[], list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    output = Path('rows.jsonl')
    probe(rtn(4), 'birds', 'vit', output)
    lines = output.read_text().splitlines()
    # Killed between the two bounds.
    output.write_text('\n'.join(lines[:3]) + '\n')
    probe(rtn(4), 'birds', 'vit', output)
    assert bounds(read_rows(output), 4, 0) == [json.loads(line)['value'] for line in lines[2:]]
    # A row that was deleted is measured again, and so is its interval.
    output.write_text('\n'.join([lines[0], *lines[2:]]) + '\n')
    probe(rtn(4), 'birds', 'vit', output)
    assert [r.metric for r in read_rows(output)] == ['top1', 'top1_low', 'top1_high', 'top1', 'top1_low', 'top1_high']
    # Predictions of another run, on either side, or of none.
    for one in rtn(4):
        kept = one.predictions.read_text()
        output.write_text('\n'.join(lines[:2]) + '\n')
        one.predictions.write_text(kept.replace('"found": 1', '"found": 0', 1))
        with pytest.raises(ResultError, match=f'{one.work_dir}.*they are of two runs, so delete'):
            probe(rtn(4), 'birds', 'vit', output)
        one.predictions.unlink()
        probe(rtn(4), 'birds', 'vit', output)
        assert f'no interval of top1: {one.predictions} is gone' in capfd.readouterr().out
        one.predictions.write_text(kept)


def test_names_with_spaces_are_names(calls: Callable[[], list[str]]) -> None:
    Path('b 2').mkdir()
    shutil.copy('gplq_w3a3_0.safetensors', 'b 2/gplq_w4a4_0.safetensors')
    probes = plan_probes('probe.py', 'fp32.pth', [('rtn', 'b 2/gplq_w4a4_0.safetensors')], [0], 'test', Path('my w'))
    probe(probes, 'birds', 'vit', Path('rows.jsonl'))
    assert probes[1].predictions.is_file()
    assert read_rows('rows.jsonl')[1].weight_bits == 3


def test_what_cannot_be_probed_is_refused_before_anything_is_trained(
    calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(kind: type[Exception], told: str, method: str = 'gplq', **change: str) -> None:
        chosen = dict(config='probe.py', fp32='fp32.pth', file='gplq_w4a4_0.safetensors', work='w', output='r') | change
        with pytest.raises(kind, match=told):
            backbones = [(method, chosen['file'])]
            probes = plan_probes(chosen['config'], chosen['fp32'], backbones, [0], 'test', Path(chosen['work']))
            probe(probes, 'birds', 'vit', Path(chosen['output']))

    def config(text: str) -> str:
        Path('other.py').write_text(text)
        return 'other.py'

    refused(ResultError, 'gplq: nothing_0.safetensors is no file', file='nothing_{seed}.safetensors')
    refused(ResultError, 'fp32: tools is no file', fp32='tools')
    refused(ResultError, 'one FP32 backbone for all seeds', fp32='fp32_{seed}.pth')
    refused(ResultError, "'' names no method", method='')
    refused(ResultError, "'fp32' names no method", method='fp32')
    refused(CheckpointError, 'fp32.pth', file='fp32.pth')
    shutil.copy('gplq_w4a4_0.safetensors', 'a,b.safetensors')
    refused(ResultError, 'options cannot hold the name a,b.safetensors; rename', file='a,b.safetensors')
    refused(ResultError, '--work-dir w,v: options cannot hold', work='w,v')
    refused(ResultError, '--output tools is a folder', output='tools')
    refused(ResultError, 'config lost.py does not exist', config='lost.py')
    thawed = config(CONFIG.replace('frozen=True', 'frozen=False'))
    refused(ResultError, 'other.py trains the backbone too.*frozen=True', config=thawed)
    refused(ResultError, 'other.py trains the backbone too', config=config('train_cfg = None'))
    refused(ResultError, 'other.py has load_from or resume', config=config(CONFIG + "load_from = 'x.pth'"))
    refused(ResultError, 'has default_hooks.gplq', config=config(CONFIG + 'default_hooks = dict(gplq=dict())'))
    refused(ResultError, 'cannot be built: KeyError', config=config("model = dict(type='Nothing', frozen=True)"))
    refused(RecipeError, "timm cannot make .*'deep'", config=config(CONFIG.replace('depth=2', 'deep=2')))
    assert calls() == []
    monkeypatch.chdir('tools')
    with pytest.raises(ResultError, match="start this program from the repository's folder"):
        probe(plan_probes('../probe.py', '../fp32.pth', [], [0], 'test', Path('w')), 'b', 'm', Path('r'))


def test_the_program_says_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['probe.py', 'config.py', 'fp32.pth', '--backbones', 'gplq_w4a4.safetensors'])
    main = runpy.run_path(str(ROOT / 'tools/probe.py'))['main']
    with pytest.raises(ResultError, match='--backbones wants METHOD=FILE, got gplq_w4a4.safetensors'):
        main()
