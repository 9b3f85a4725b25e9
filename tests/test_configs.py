"""Every shipped config can be read, and its model built."""

from __future__ import annotations

import inspect
from pathlib import Path

import gplq.plugins.detection  # noqa: F401  isort: skip
import pytest
import torch
from mmdet.registry import DATASETS, MODELS, TRANSFORMS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from PIL import Image

CONFIGS = Path(__file__).parents[1] / 'configs'
LEAVES = sorted(path.name for path in CONFIGS.glob('*rcnn*.py'))
CLASSIFIERS = sorted(path.name for path in CONFIGS.glob('*.py') if 'rcnn' not in path.name)


@pytest.fixture(scope='module', autouse=True)
def registered() -> None:
    register_all_modules()


@pytest.mark.parametrize('name', LEAVES)
def test_model_can_be_built(name: str) -> None:
    cfg = Config.fromfile(CONFIGS / name)
    model = MODELS.build(cfg.model)
    classes = cfg.train_dataloader.dataset.get('metainfo', {}).get('classes', range(80))
    assert model.roi_head.bbox_head.num_classes == len(classes)
    if model.with_mask:
        assert model.roi_head.mask_head.num_classes == len(classes)


@pytest.mark.parametrize('name', LEAVES)
def test_optimizer_can_be_built_on_any_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config.fromfile(CONFIGS / name)
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: False)
    wrapper = build_optim_wrapper(torch.nn.Linear(2, 2), cfg.optim_wrapper)
    assert wrapper.param_groups


@pytest.mark.parametrize('name', LEAVES)
def test_every_named_part_of_the_data_exists(name: str) -> None:
    cfg = Config.fromfile(CONFIGS / name)
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert DATASETS.get(dataset.type) is not None
        assert all(TRANSFORMS.get(step.type) is not None for step in dataset.pipeline)
        assert dataset.pipeline[-1].type == 'PackDetInputs'
    # mmdet's heads map boxes back by it
    assert any('Resize' in step.type for step in cfg.test_dataloader.dataset.pipeline)


@pytest.mark.parametrize('name', [name for name in LEAVES if 'coco' not in name and '_vit.py' not in name])
def test_data_root_can_be_given_by_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('GPLQ_DATA_ROOT', '/disk/data')
    cfg = Config.fromfile(CONFIGS / name)
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == '/disk/data'
    for split in ('val', 'test'):
        assert cfg[f'{split}_evaluator'].ann_file.startswith('/disk/data/')


@pytest.mark.parametrize('name', [name for name in LEAVES if name.startswith('gplq_')])
def test_two_lines_turn_a_config_into_gplqs(name: str) -> None:
    cfg = Config.fromfile(CONFIGS / name)
    assert cfg.default_hooks.gplq == dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4)
    assert cfg.load_from.endswith('.pth')


@pytest.mark.parametrize('name', LEAVES)
def test_config_opens_with_its_command(name: str) -> None:
    head = (CONFIGS / name).read_text(encoding='utf-8').split('_base_')[0]
    assert f'#   python tools/train.py configs/{name} ' in head or f'configs/{name}\n' in head


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_classifier_can_be_built_and_its_pipelines_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('GPLQ_DATA_ROOT', '/disk/data')
    cfg = Config.fromfile(CONFIGS / name)
    init_default_scope('mmengine')
    model = MODELS.build(cfg.model)
    size = model.backbone.img_size
    assert tuple(model.eval()(torch.zeros(1, 3, *size)).shape) == (1, cfg.model.num_classes)
    image = Image.new('RGB', (90, 70))
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == '/disk/data'
        assert inspect.isclass(DATASETS.get(dataset.type))
        *_, transform, pack = [TRANSFORMS.build(step) for step in dataset.pipeline]
        packed = pack(transform({'img': image, 'gt_label': 3, 'img_path': 'a.jpg'}))
        assert tuple(packed['inputs'].shape) == (3, *size) and packed['labels'] == 3
    assert build_optim_wrapper(model, cfg.optim_wrapper).param_groups
