from __future__ import annotations

import pytest
from mmengine.config import Config

from gplq.plugins.data_root import apply_options


def config(root: str = 'data/cells/') -> Config:
    dataset = dict(type='CocoDataset', data_root=root, ann_file='train.json', data_prefix=dict(img='images/'))
    return Config(
        dict(
            data_root=root,
            train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset)),
            val_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=[dataset, dataset])),
            val_evaluator=[dict(type='CocoMetric', ann_file=root + 'dev.json')],
            test_evaluator=None,
            model=dict(checkpoint='data/cells/model.pth'),
        )
    )


@pytest.mark.parametrize('new', ['/disk/cells', '/disk/cells/'])
def test_data_root_reaches_wrapped_data_sets_and_metrics(new: str) -> None:
    cfg = config()
    apply_options(cfg, {'data_root': new})
    assert cfg.train_dataloader.dataset.dataset.data_root == '/disk/cells/'
    assert [d.data_root for d in cfg.val_dataloader.dataset.datasets] == ['/disk/cells/'] * 2
    assert cfg.val_evaluator[0].ann_file == '/disk/cells/dev.json'
    assert cfg.model.checkpoint == 'data/cells/model.pth'


def test_folder_whose_name_only_begins_alike_stays() -> None:
    cfg = config('data/cells')
    cfg.val_evaluator[0].ann_file = 'data/cells2/dev.json'
    apply_options(cfg, {'data_root': 'x'})
    assert cfg.val_evaluator[0].ann_file == 'data/cells2/dev.json'
    assert cfg.train_dataloader.dataset.dataset.data_root == 'x'


def test_other_options_are_merged_and_roots_left_alone() -> None:
    cfg = config()
    apply_options(cfg, {'val_evaluator.0.type': 'Other'})
    assert cfg.val_evaluator[0].type == 'Other'
    assert cfg.train_dataloader.dataset.dataset.data_root == 'data/cells/'
    apply_options(cfg, None)


def test_explicit_option_for_one_data_set_wins_over_the_root() -> None:
    cfg = config()
    apply_options(cfg, {'data_root': '/a', 'train_dataloader.dataset.dataset.data_root': '/b'})
    assert cfg.train_dataloader.dataset.dataset.data_root == '/b'
