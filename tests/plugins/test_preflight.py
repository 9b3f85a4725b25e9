from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.model import PretrainedInit
from mmengine.optim import AmpOptimWrapper

from gplq.errors import RecipeError
from gplq.plugins.hooks import GPLQHook
from gplq.plugins.preflight import PreflightError, preflight


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / 'data/images').mkdir(parents=True)
    (tmp_path / 'data/train.json').touch()
    (tmp_path / 'model.pth').touch()
    return tmp_path


def config(root: Path) -> Config:
    data = str(root / 'data')
    dataset = dict(type='CocoDataset', data_root=data, ann_file='train.json', data_prefix=dict(img='images/'))
    return Config(
        dict(
            train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset)),
            val_evaluator=dict(type='CocoMetric', ann_file=f'{data}/train.json'),
            load_from=str(root / 'model.pth'),
            model=dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=str(root / 'model.pth')))),
        )
    )


def test_a_missing_download_says_where_it_comes_from(root: Path) -> None:
    for dataset, told in (
        (dict(type='gplq.plugins.fgvc.CUBDataset', data_root='none'), 'data_root=PATH. CUB-200-2011 comes from https'),
        (
            dict(type='gplq.plugins.fgvc.TorchvisionDataset', name='Food101', data_root='none'),
            'lay it out as none/food',
        ),
    ):
        with pytest.raises(PreflightError, match=rf'data root none \(train_dataloader\) does not exist; .*{told}'):
            preflight(Config(dict(train_dataloader=dict(dataset=dataset))))


def test_complete_config_passes(root: Path) -> None:
    preflight(config(root))


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('train_dataloader.dataset.dataset.data_root', 'none', r'data root none \(train_dataloader\).*data_root='),
        (
            'train_dataloader.dataset.dataset.ann_file',
            'none.json',
            r'annotation file \S*none.json \(train_dataloader\)',
        ),
        ('train_dataloader.dataset.dataset.data_prefix.img', 'none/', r'image folder \S*none \(train_dataloader\)'),
        ('val_evaluator.ann_file', 'none.json', r'annotation file none.json \(val_evaluator\)'),
        ('load_from', 'none.pth', r'checkpoint none.pth \(load_from\).*give the path'),
        ('model.backbone.init_cfg.checkpoint', 'none.pth', r'none.pth \(model.backbone.init_cfg.checkpoint\)'),
    ],
)
def test_what_is_missing_is_named_with_its_place_and_remedy(root: Path, key: str, value: str, message: str) -> None:
    cfg = config(root)
    cfg.merge_from_dict({key: value})
    with pytest.raises(PreflightError, match=message):
        preflight(cfg)


def test_only_the_asked_splits_are_checked(root: Path) -> None:
    cfg = config(root)
    cfg.val_evaluator.ann_file = 'none.json'
    preflight(cfg, splits=('train', 'test'))


@pytest.mark.parametrize('address', ['https://host/model.pth', 'torchvision://resnet50'])
def test_remote_addresses_are_left_alone(root: Path, address: str) -> None:
    cfg = config(root)
    cfg.load_from = address
    cfg.model.backbone.init_cfg.checkpoint = address
    preflight(cfg)


def test_data_behind_another_backend_is_left_alone(root: Path) -> None:
    cfg = config(root)
    cfg.train_dataloader.dataset.dataset.update(data_root='bucket', backend_args=dict(backend='petrel'))
    preflight(cfg)


def test_config_without_data_passes() -> None:
    preflight(Config(dict(model=dict(type='ToyModel'))))


@pytest.mark.parametrize('type', ['gplq.plugins.GPLQHook', 'WeightPTQHook'])
def test_initial_weights_that_nobody_reads_may_be_missing(root: Path, type: str) -> None:
    cfg = config(root)
    cfg.model.backbone.init_cfg.checkpoint = 'none.pth'
    preflight(cfg, splits=('test',))
    cfg.default_hooks = dict(gplq=dict(type=type))
    preflight(cfg)


def test_classes_are_known_as_their_names_are(root: Path) -> None:
    cfg = config(root)
    cfg.model.backbone.init_cfg = dict(type=PretrainedInit, checkpoint='elsewhere.pth')
    with pytest.raises(PreflightError, match=r'elsewhere\.pth \(model\.backbone\.init_cfg\.checkpoint\)'):
        preflight(cfg)
    cfg.default_hooks = dict(gplq=dict(type=GPLQHook))
    preflight(cfg)


@pytest.mark.parametrize('kind', ['AmpOptimWrapper', AmpOptimWrapper])
def test_mixed_precision_of_gpus_is_told_before_the_run(
    root: Path, kind: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(root)
    cfg.optim_wrapper = dict(type=kind)
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    preflight(cfg)
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    preflight(cfg, splits=('test',))
    with pytest.raises(PreflightError, match='AmpOptimWrapper needs a GPU.*--amp'):
        preflight(cfg)


@pytest.mark.parametrize('kind', ['gplq.plugins.GPLQHook', GPLQHook])
def test_settings_of_our_hooks_are_read_before_the_run(root: Path, kind: object) -> None:
    cfg = config(root)
    cfg.default_hooks = dict(gplq=dict(type=kind, weight_bits=4, priority='NORMAL'))
    preflight(cfg)
    cfg.default_hooks.gplq.weight_bit = 4
    with pytest.raises(RecipeError, match=r"no setting \['weight_bit'\]"):
        preflight(cfg)


def test_a_misspelled_hook_of_ours_is_named(root: Path) -> None:
    cfg = config(root)
    cfg.custom_hooks = [dict(type='gplq.plugins.GPLQhook')]
    with pytest.raises(PreflightError, match=r'no gplq\.plugins\.GPLQhook .*; did you mean gplq\.plugins\.GPLQHook'):
        preflight(cfg)


CLASSIFIER = dict(type='gplq.plugins.fgvc.TimmClassifier', model_name='vit_tiny_patch16_224', num_classes=3)
BIRDS = dict(type='gplq.plugins.fgvc.CUBDataset', corrupt='skip', lazy_init=True, test_mode=True)
CROP = dict(type='gplq.plugins.fgvc.LoadImage', margin=0.1)


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (
            {'model': {**CLASSIFIER, 'lable_smoothing': 0.1}},
            r'no setting lable_smoothing \(model\); did you mean label_',
        ),
        (
            {'model': {**CLASSIFIER, 'type': 'gplq.plugins.fgvc.TimmClasifier'}},
            r'mean gplq.plugins.fgvc.TimmClassifier\?',
        ),
        ({'model': {**CLASSIFIER, 'type': 'gplq.plugins.fgcv.TimmClassifier'}}, r'no gplq.plugins.fgcv.TimmClassifier'),
        ({'dataset': {**BIRDS, 'splitt': 'dev'}}, r'no setting splitt \(train_dataloader.dataset.dataset\); .* split'),
        ({'dataset': {**BIRDS, 'pipeline': [{**CROP, 'margins': 1}]}}, r'LoadImage .*dataset.pipeline\[0\]\).* margin'),
        ({'dataset': {**BIRDS, 'pipeline': [{**CROP, 'x': 1}]}}, r"no setting x .*; it has \['margin'\]"),
    ],
)
def test_names_that_our_classes_do_not_know(root: Path, change: dict[str, dict], told: str) -> None:
    cfg = config(root)
    cfg.model = change.get('model', CLASSIFIER)
    # Wrapped as well, and with what its base classes take.
    cfg.train_dataloader.dataset.dataset = {**change.get('dataset', BIRDS), 'data_root': str(root / 'data')}
    with pytest.raises(PreflightError, match=told):
        preflight(cfg)


def test_names_that_our_classes_or_mmengine_know(root: Path) -> None:
    cfg = config(root)
    cfg.model = dict(CLASSIFIER, init_cfg=None, data_preprocessor=dict(type='ImgDataPreprocessor'))
    cfg.train_dataloader.dataset.dataset = dict(BIRDS, pipeline=[CROP], data_root=str(root / 'data'))
    wrapper = dict(type='gplq.plugins.amp.BFloat16OptimWrapper', optimizer=dict(type='AdamW'), paramwise_cfg={})
    cfg.optim_wrapper = dict(wrapper, clip_grad=None, constructor='DefaultOptimWrapperConstructor')
    preflight(cfg)


def test_loaders_without_workers_lose_the_settings_of_workers(root: Path) -> None:
    cfg = config(root)
    worker = dict(persistent_workers=True, prefetch_factor=2)
    cfg.train_dataloader.update(num_workers=0, **worker)
    cfg.val_dataloader = dict(num_workers=2, dataset=[], **worker)
    cfg.test_dataloader = dict(dataset=[], **worker)
    preflight(cfg)
    assert set(cfg.train_dataloader) == {'dataset', 'num_workers'} and set(cfg.test_dataloader) == {'dataset'}
    assert cfg.val_dataloader.persistent_workers and cfg.val_dataloader.prefetch_factor == 2


@pytest.mark.parametrize('name', ['top1', 'mean_class', ['top2', 'top1'], 'auto', None, 'top7', ['top1', 'accuracy']])
def test_the_best_checkpoint_goes_by_a_figure_of_validation(root: Path, name: Any) -> None:
    cfg = config(root)
    cfg.default_hooks = dict(checkpoint=dict(type='CheckpointHook', save_best=name, rule='greater'))
    # Of mmdet's nothing is known.
    preflight(cfg)
    cfg.val_evaluator = dict(type='gplq.plugins.fgvc.ClassificationMetric', topk=(1, 2))
    preflight(cfg, splits=('test',))
    if name in ('top7', ['top1', 'accuracy']):
        with pytest.raises(
            PreflightError, match=r"save_best='(top7|accuracy)' is no .*\['top1', 'top2', 'mean_class'\]"
        ):
            preflight(cfg)
    else:
        preflight(cfg)


def test_the_launcher_of_pytorch_needs_torchrun_and_a_gpu_for_each_process(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(root)
    cfg.launcher = 'pytorch'
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(PreflightError, match='for processes that torchrun has started: torchrun --nproc'):
        preflight(cfg)
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setattr('gplq.plugins.preflight.get_device', lambda: 'cpu')
    with pytest.raises(PreflightError, match='there is none here: start one process without torchrun'):
        preflight(cfg)
    monkeypatch.setattr('gplq.plugins.preflight.get_device', lambda: 'cuda')
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    for count in (1, 2):
        monkeypatch.setattr('torch.cuda.device_count', lambda count=count: count)
        if count == 2:
            preflight(cfg)
            continue
        with pytest.raises(PreflightError, match='process 1 of this machine.* which has 1; .*--nproc-per-node=1'):
            preflight(cfg)


def test_what_is_to_be_downloaded_need_not_be_there(root: Path) -> None:
    cfg = config(root)
    food = dict(type='gplq.plugins.fgvc.TorchvisionDataset', name='Food101', data_root='none', download=True)
    cfg.train_dataloader.dataset = food
    preflight(cfg)
