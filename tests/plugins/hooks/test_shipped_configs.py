"""Detectors that mmdet ships, with the two lines and no other edit, shrunk by --cfg-options alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gplq.plugins.detection  # noqa: F401  isort: skip
import mmdet
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

import gplq as core
from gplq.plugins.detection.shapes import ShapesSettings, write_split
from gplq.plugins.hooks.data import calibration_loader
from gplq.plugins.hooks.settings import HookSettings
from gplq.record import record_of

ROOT = Path(__file__).parents[3]
MMDET_TOOLS = Path(mmdet.__file__).parent / '.mim/tools'

USER_CONFIG = """_base_ = 'mmdet::{name}'

default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4))
load_from = '{checkpoint}'
"""
SWIN, PVT, DINO = (
    'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'pvt/retinanet_pvt-t_fpn_1x_coco.py',
    'dino/dino-5scale_swin-l_8xb2-12e_coco.py',
)
# The classes stay COCO's, the depth of the model and the size of images do not.
SHRUNK = {
    SWIN: [
        'model.backbone.embed_dims=24',
        'model.backbone.depths=[1,1,1,1]',
        'model.neck.in_channels=[24,48,96,192]',
        'model.neck.out_channels=32',
        'model.rpn_head.in_channels=32',
        'model.rpn_head.feat_channels=32',
        'model.roi_head.bbox_roi_extractor.out_channels=32',
        'model.roi_head.bbox_head.in_channels=32',
        'model.roi_head.bbox_head.fc_out_channels=64',
        'model.roi_head.mask_roi_extractor.out_channels=32',
        'model.roi_head.mask_head.in_channels=32',
        'model.roi_head.mask_head.conv_out_channels=32',
        'model.train_cfg.rpn_proposal.nms_pre=50',
        'model.train_cfg.rpn_proposal.max_per_img=20',
        'model.test_cfg.rpn.max_per_img=20',
        'model.test_cfg.rcnn.score_thr=0.0',
        'model.test_cfg.rcnn.max_per_img=10',
        'train_dataloader.dataset.pipeline.2.scale=(72,72)',
        'val_dataloader.dataset.pipeline.1.scale=(72,72)',
        'test_dataloader.dataset.pipeline.1.scale=(72,72)',
    ],
    PVT: [
        'model.backbone.num_layers=[1,1,1,1]',
        'model.backbone.embed_dims=16',
        'model.neck.in_channels=[16,32,80,128]',
        'model.neck.out_channels=32',
        'model.bbox_head.in_channels=32',
        'model.bbox_head.feat_channels=32',
        'model.bbox_head.stacked_convs=1',
        'model.test_cfg.max_per_img=10',
        'model.test_cfg.score_thr=0.0',
        'train_dataloader.dataset.pipeline.2.scale=(64,64)',
        'val_dataloader.dataset.pipeline.1.scale=(64,64)',
        'test_dataloader.dataset.pipeline.1.scale=(64,64)',
    ],
    DINO: [
        'model.num_queries=10',
        'model.backbone.embed_dims=24',
        'model.backbone.depths=[1,1,1,1]',
        'model.backbone.num_heads=[1,2,4,8]',
        'model.neck.in_channels=[24,48,96,192]',
        'model.encoder.num_layers=1',
        'model.encoder.layer_cfg.ffn_cfg.feedforward_channels=64',
        'model.decoder.layer_cfg.ffn_cfg.feedforward_channels=64',
        'model.decoder.num_layers=2',
        'model.test_cfg.max_per_img=10',
        'train_dataloader.dataset.pipeline.3.prob=[1.0,0.0]',
        'train_dataloader.dataset.pipeline.3.transforms.0.0.scales=[(64,64),(96,96)]',
        'val_dataloader.dataset.pipeline.1.scale=(64,64)',
        'test_dataloader.dataset.pipeline.1.scale=(64,64)',
    ],
}
SHORT = [
    'default_hooks.gplq.iterations=2',
    'default_hooks.gplq.recipe.calibration_samples=2',
    'default_hooks.gplq.recipe.exponents=(0.0,1.0)',
    'default_hooks.gplq.recipe.clips=(1.0,)',
    'default_hooks.gplq.stage.pca_samples=2',
    'default_hooks.gplq.example_size=64',
    'default_hooks.logger.interval=1',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
]


@pytest.fixture(scope='session')
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated shapes under COCO's file and class names."""
    root = tmp_path_factory.mktemp('coco')
    settings = ShapesSettings(size=64, max_radius=16)
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'])]
    for split, count in (('train', 4), ('val', 2)):
        write_split(root, split, count, settings)
        content = json.loads((root / f'annotations/{split}.json').read_text())
        content['categories'] = categories
        (root / f'annotations/instances_{split}2017.json').write_text(json.dumps(content))
        (root / split).rename(root / f'{split}2017')
    return root


def data_options(root: Path) -> list[str]:
    """What moves mmdet's data sets to another folder, where a program does not know `data_root=…`."""
    annotations = f'{root}/annotations/instances_val2017.json'
    return [
        *(f'{split}_dataloader.dataset.data_root={root}' for split in ('train', 'val', 'test')),
        *(f'{split}_evaluator.ann_file={annotations}' for split in ('val', 'test')),
    ]


def parsed(options: list[str]) -> dict[str, Any]:
    """Options as the command line understands them."""
    return {key: DictAction._parse_iterable(value) for key, value in (option.split('=', 1) for option in options)}


@pytest.fixture
def user_config(tmp_path: Path) -> Any:
    """A config of two lines in a folder of its own, with a checkpoint of the shrunk FP32 model."""

    def make(name: str) -> Path:
        path, checkpoint = tmp_path / 'user.py', tmp_path / 'fp32.pth'
        path.write_text(USER_CONFIG.format(name=name, checkpoint=checkpoint))
        register_all_modules()
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(parsed(SHRUNK[name]))
        cfg.model.backbone.init_cfg = None
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        model.init_weights()
        torch.save({'state_dict': model.state_dict()}, checkpoint)
        return path

    return make


def check_run(work_dir: Path) -> dict[str, Any]:
    """The three steps were reported; returns the last."""
    steps = json.loads((work_dir / 'gplq.json').read_text())
    assert [step['step'] for step in steps] == ['FP32', 'W32A4', 'W4A4']
    assert steps[2]['backbone_bytes'] < steps[0]['backbone_bytes']
    assert all('coco/bbox_mAP' in step['metrics'] for step in steps)
    return steps[2]


@pytest.mark.parametrize('name', [SWIN, PVT, DINO], ids=['swin', 'pvt', 'dino'])
def test_two_lines(name: str, user_config: Any, coco: Path, tmp_path: Path) -> None:
    path = user_config(name)

    def runner(**changes: Any) -> Runner:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(parsed([*SHRUNK[name], *SHORT, *data_options(coco)]))
        cfg.merge_from_dict({'work_dir': str(tmp_path / 'run'), 'launcher': 'none', **changes})
        cfg.experiment_name = f'{tmp_path.name}{len(changes)}'
        return Runner.from_cfg(cfg)

    trained = runner()
    trained.train()
    last = check_run(tmp_path / 'run')
    assert trained.iter == 2
    plan = record_of(trained.model).plan
    assert {site.name.split('.')[0] for site in plan.maps} == {'backbone'}
    assert len(plan.products) == {SWIN: 8, PVT: 8, DINO: 8}[name], 'two products a block, one block a stage'

    again = runner(load_from=last['checkpoint'])
    measured = again.test()
    assert {key: pytest.approx(value) for key, value in measured.items()} == last['metrics']

    init_default_scope('mmdet')
    fresh = MODELS.build(again.cfg.model)
    core.load(fresh, last['artifact'])
    fresh.eval()
    again.model.eval()
    batch = demo_mm_inputs(1, [[3, 64, 64]], num_items=[2], with_mask='mask' in name)
    trained.model.eval()
    models = (trained.model, again.model, fresh)
    with torch.no_grad():
        kept, read, loaded = (tensors(m(**m.data_preprocessor(batch, False), mode='tensor')) for m in models)
    # A detector this fresh finds nothing, so its metrics alone would prove little.
    for a, b, c in zip(kept, read, loaded, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in tensors(item)] if isinstance(value, (list, tuple)) else []


def run(*command: object, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize('name', [SWIN, PVT, DINO], ids=['swin', 'pvt', 'dino'])
@pytest.mark.parametrize('program', ['ours', "mmdet's"])
def test_two_lines_by_the_programs(program: str, name: str, user_config: Any, coco: Path, tmp_path: Path) -> None:
    path = user_config(name)
    options = [*SHRUNK[name], *SHORT]
    if program == 'ours':
        train, test = [ROOT / 'tools/train.py'], [ROOT / 'tools/test.py']
        options.append(f'data_root={coco}')
    else:
        launcher = ['-m', 'gplq.plugins.detection']
        train, test = [*launcher, MMDET_TOOLS / 'train.py'], [*launcher, MMDET_TOOLS / 'test.py']
        options += data_options(coco)
    run(*train, path, '--work-dir', 'run', '--cfg-options', *options, cwd=tmp_path)
    last = check_run(tmp_path / 'run')
    run(*test, path, last['checkpoint'], '--work-dir', 'test', '--cfg-options', *options, cwd=tmp_path)
    (log,) = (tmp_path / 'test').glob('*/*.json')
    measured = json.loads(log.read_text())
    assert {key: measured[key] for key in last['metrics']} == pytest.approx(last['metrics'])


def test_targets_reach_neck_and_heads(user_config: Any, coco: Path, tmp_path: Path) -> None:
    path = user_config(SWIN)
    targets = 'default_hooks.gplq.targets=[backbone,neck,rpn_head,roi_head]'

    def runner(**changes: Any) -> Runner:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(parsed([*SHRUNK[SWIN], *SHORT, *data_options(coco), targets]))
        cfg.merge_from_dict({'work_dir': str(tmp_path / 'run'), **changes})
        cfg.experiment_name = f'{tmp_path.name}{len(changes)}'
        return Runner.from_cfg(cfg)

    trained = runner()
    trained.train()
    last = check_run(tmp_path / 'run')
    kinds = {(site.name.split('.')[0], site.kind) for site in record_of(trained.model).plan.maps}
    assert kinds == {
        ('backbone', 'conv2d'),
        ('backbone', 'linear'),
        ('neck', 'conv2d'),
        ('rpn_head', 'conv2d'),
        ('roi_head', 'conv2d'),
        ('roi_head', 'linear'),
    }
    steps = json.loads((tmp_path / 'run/gplq.json').read_text())
    assert steps[2]['model_bytes'] < steps[0]['model_bytes'] / 3, 'heads are most of this detector'
    again = runner(load_from=last['checkpoint'])
    assert {key: pytest.approx(value) for key, value in again.test().items()} == last['metrics']


def test_targets_reach_the_whole_of_a_detr(user_config: Any, coco: Path, tmp_path: Path) -> None:
    path = user_config(DINO)
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(parsed([*SHRUNK[DINO], *SHORT, *data_options(coco)]))
    cfg.merge_from_dict({'work_dir': str(tmp_path / 'run')})
    cfg.default_hooks.gplq.targets = ['backbone', 'encoder', 'decoder']
    cfg.experiment_name = tmp_path.name
    runner = Runner.from_cfg(cfg)
    runner.train()
    check_run(tmp_path / 'run')
    plan = record_of(runner.model).plan
    assert 'decoder.layers.0.self_attn.attn' in plan.multiheads
    assert any(site.name == 'encoder.layers.0.self_attn.value_proj' for site in plan.maps)


def test_calibration_annotations_are_those_of_the_resized_image(user_config: Any, coco: Path, tmp_path: Path) -> None:
    cfg = Config.fromfile(user_config(SWIN))
    cfg.merge_from_dict(parsed(data_options(coco)))
    cfg.merge_from_dict({'val_dataloader.dataset.pipeline.1.scale': (128, 128), 'work_dir': str(tmp_path)})
    init_default_scope('mmdet')
    loaders = {f'_{split}_dataloader': cfg.get(f'{split}_dataloader') for split in ('train', 'val', 'test')}
    stub = SimpleNamespace(**loaders)
    batch = next(iter(calibration_loader(stub, HookSettings.from_config(), 1)))  # type: ignore[arg-type]
    (sample,) = batch['data_samples']
    truth = {a['image_id']: [] for a in json.loads((coco / 'annotations/train.json').read_text())['annotations']}
    for annotation in json.loads((coco / 'annotations/train.json').read_text())['annotations']:
        truth[annotation['image_id']].append(annotation['bbox'])
    expected = torch.tensor(truth[sample.img_id]) * 2  # 64 pixels became 128
    expected[:, 2:] += expected[:, :2]
    assert batch['inputs'][0].shape == (3, 128, 128)
    torch.testing.assert_close(sample.gt_instances.bboxes.tensor, expected, rtol=0, atol=1e-3)
