"""Linear probes of a backbone in FP32 and quantized, by tools/train.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import gplq
from gplq.errors import CheckpointError
from gplq.plugins.bootstrap import compare_top1, top1_of
from gplq.plugins.fgvc.probe import plan_probes, probe
from gplq.plugins.results import ResultError, read_rows

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


def test_heads_on_every_backbone(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = place / 'rows.jsonl'
    plan: Callable = lambda *bits: plan_probes(  # noqa: E731
        'probe.py', 'fp32.pth', [('rtn', f'gplq_w{b}a{b}_{{seed}}.safetensors') for b in bits], [0], 'test', place / 'w'
    )
    probe(plan(4), 'birds', 'vit', output)
    rows = read_rows(output)
    assert [(r.method, r.metric, r.weight_bits, r.activation_bits) for r in rows] == [
        ('fp32', 'top1', 32, 32),
        ('rtn', 'top1', 4, 4),
        ('rtn', 'top1_low', 4, 4),
        ('rtn', 'top1_high', 4, 4),
    ]
    assert {(r.benchmark, r.model, r.split, r.seed, r.scope) for r in rows} == {('birds', 'vit', 'test', 0, 'backbone')}
    assert len({r.checkpoint_sha256 for r in rows}) == 1
    fp32, rtn = plan(4)
    assert [r.value for r in rows[:2]] == [top1_of(one.predictions) for one in (fp32, rtn)]
    found = compare_top1(fp32.predictions, rtn.predictions)
    assert [r.value for r in rows[2:]] == [found.low, found.high]
    assert rows[0].effective_bits == 32 and 4 <= rows[1].effective_bits < 5
    assert rows[1].artifact_bytes < rows[0].artifact_bytes / 3
    for one in (fp32, rtn):
        log = (one.work_dir / 'log.txt').read_text()
        assert str(one.file) in log and 'head fresh' in log and 'Epoch(val) [2]' in log

    before = (fp32.work_dir / 'log.txt').stat().st_mtime_ns
    probe(plan(4, 3), 'birds', 'vit', output)
    assert '3 probes, 2 of them done already' in capfd.readouterr().out
    assert (fp32.work_dir / 'log.txt').stat().st_mtime_ns == before
    assert [r.weight_bits for r in read_rows(output)[4:]] == [3, 3, 3]

    # Predictions of another run than the row's.
    (rtn.work_dir / 'predictions.json').write_text('{"a": {"found": 1, "label": 1}}')
    (fp32.work_dir / 'predictions.json').write_text('{"a": {"found": 0, "label": 1}}')
    output.write_text('\n'.join(output.read_text().splitlines()[:2]) + '\n')
    assert rows[1].value < 100
    with pytest.raises(ResultError, match='they are of two runs, so delete the row'):
        probe(plan(4), 'birds', 'vit', output)


def test_what_cannot_be_probed_is_refused_before_anything_is_trained(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(kind: type[Exception], told: str, backbone: str, config: str = 'probe.py') -> None:
        with pytest.raises(kind, match=told):
            probe(
                plan_probes(config, 'fp32.pth', [('gplq', backbone)], [0], 'test', place / 'w'), 'b', 'm', place / 'r'
            )

    refused(ResultError, r'gplq: nothing_0.safetensors does not exist', 'nothing_{seed}.safetensors')
    refused(CheckpointError, 'fp32.pth', 'fp32.pth')
    Path('thawed.py').write_text(CONFIG.replace('frozen=True', 'frozen=False'))
    refused(ResultError, r'thawed.py trains the backbone too.*frozen=True', 'gplq_w4a4_0.safetensors', 'thawed.py')
    refused(ResultError, 'config lost.py does not exist', 'gplq_w4a4_0.safetensors', 'lost.py')
    Path('other').mkdir()
    Path('other/gplq_w4a4_0.safetensors').write_bytes(Path('gplq_w4a4_0.safetensors').read_bytes())
    with pytest.raises(ResultError, match='has the same method and name'):
        both = [('gplq', name) for name in ('gplq_w4a4_0.safetensors', 'other/gplq_w4a4_0.safetensors')]
        plan_probes('probe.py', 'fp32.pth', both, [0], 'test', place / 'w')
    monkeypatch.chdir(place / 'other')
    with pytest.raises(ResultError, match="start this program from the repository's folder"):
        probe(plan_probes('../probe.py', '../fp32.pth', [], [0], 'test', place / 'w'), 'b', 'm', place / 'r')
    assert not (place / 'w').exists()


def test_the_program_says_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr(sys, 'argv', ['probe.py', 'config.py', 'fp32.pth', '--backbones', 'gplq_w4a4.safetensors'])
    main = runpy.run_path(str(ROOT / 'tools/probe.py'))['main']
    with pytest.raises(ResultError, match='--backbones wants METHOD=FILE, got gplq_w4a4.safetensors'):
        main()
