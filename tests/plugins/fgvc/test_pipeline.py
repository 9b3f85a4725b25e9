"""A classifier from its data set to 4 bits in a Runner, by the same hook as detectors."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from PIL import Image

from gplq.errors import CheckpointError, DataError, StageError, WriteError
from gplq.plugins.hooks.data_hook import DataHook
from gplq.plugins.hooks.restore_hook import RestoreHook
from gplq.plugins.results import read_rows
from gplq.record import record_of

_numbers = itertools.count()
TOOLS = Path(__file__).parents[3] / 'tools'
FGVC = 'gplq.plugins.fgvc.'


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(path)


def loader(root: Path, split: str, training: bool) -> dict[str, Any]:
    transform = dict(type=FGVC + 'TimmTransform', input_size=(3, 16, 16), is_training=training)
    pipeline = [dict(type=FGVC + 'LoadImage'), transform, dict(type=FGVC + 'PackImage')]
    dataset = dict(type=FGVC + 'CUBDataset', data_root=str(root), split=split, pipeline=pipeline, crop=True)
    sampler = dict(type='DefaultSampler', shuffle=training)
    return dict(batch_size=2, num_workers=0, dataset=dataset, sampler=sampler)


@pytest.fixture
def make_config(cub_root: Path, tmp_path: Path) -> Callable[..., Config]:
    """The config of a tiny ViT on the miniature of CUB; arguments are the hook's."""
    settings = dict(img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=3)
    model = dict(type=FGVC + 'TimmClassifier', model_name='vit_tiny_patch16_224', num_classes=3, model_args=settings)

    def make(work_dir: str = 'run', **hook: Any) -> Config:
        name = f'fgvc{next(_numbers)}'
        few = dict(calibration_samples=4, exponents=(0.0, 1.0), clips=(1.0,))
        gplq = dict(
            type='gplq.plugins.GPLQHook',
            weight_bits=4,
            activation_bits=4,
            iterations=2,
            targets=['backbone', 'head'],
            recipe=few,
            stage=dict(pca_samples=4, rank=4),
        )
        return Config(
            dict(
                model=model,
                train_dataloader=loader(cub_root, 'train', True),
                val_dataloader=loader(cub_root, 'test', False),
                test_dataloader=loader(cub_root, 'test', False),
                val_evaluator=dict(type=FGVC + 'ClassificationMetric', topk=(1, 2)),
                test_evaluator=dict(type=FGVC + 'ClassificationMetric', topk=(1, 2)),
                train_cfg=dict(by_epoch=True, max_epochs=30, val_interval=1),
                val_cfg=dict(),
                test_cfg=dict(),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
                default_hooks=dict(gplq={**gplq, **hook}),
                work_dir=str(tmp_path / work_dir),
                experiment_name=name,
                default_scope='mmengine',
                load_from=str(tmp_path / 'fp32.pth'),
            )
        )

    torch.manual_seed(0)
    built = MODELS.build(make().model)
    torch.save({'state_dict': built.state_dict()}, tmp_path / 'fp32.pth')
    return make


def test_three_steps_and_a_checkpoint_that_gives_them_back(make_config: Callable[..., Config]) -> None:
    runner = Runner.from_cfg(make_config())
    runner.train()
    steps = json.loads((Path(runner.work_dir) / 'gplq.json').read_text())
    assert [step['step'] for step in steps] == ['FP32', 'W32A4', 'W4A4']
    assert set(steps[0]['metrics']) == {'top1', 'top2', 'mean_class'}
    plan = record_of(runner.model).plan
    bits = {item.name: item.weight_bits for item in plan.maps}
    assert bits['head'] == bits['backbone.patch_embed.proj'] == 8 and bits['backbone.blocks.1.mlp.fc2'] == 4
    assert len(plan.products) == 4

    config = make_config('test')
    config.default_hooks.pop('gplq')
    config.load_from = steps[-1]['checkpoint']
    tested = Runner.from_cfg(config)
    tested.register_hook(RestoreHook())
    assert tested.test() == pytest.approx(steps[-1]['metrics'])


def test_export_compares_top_1(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """All six images, on both engines; one thread each gives what PyTorch gives but for ties."""
    pytest.importorskip('onnxruntime')
    pytest.importorskip('openvino')
    runner = Runner.from_cfg(make_config(iterations=0, validate_fp32=False))
    runner.train()
    config = make_config()
    config.default_hooks.pop('gplq')
    config.dump(tmp_path / 'config.py')
    checkpoint = Path(runner.work_dir, 'gplq_w4a4.pth')
    command = [sys.executable, str(TOOLS / 'export.py'), str(tmp_path / 'config.py'), str(checkpoint), 'model.onnx']
    command += ['--rounds', '3', '--batch', '2', '--rows', 'rows.jsonl']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    part = subprocess.run(
        [*command[:-2], '--part', 'backbone'], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert part.returncode == 0 and 'top-1' not in part.stdout, 'features are no classes'
    figure = r'([\d.]+) %'
    found = re.findall(f'top-1 {figure}, in PyTorch {figure} and on codes there {figure}, on 6 images', done.stdout)
    assert len(found) == 2 and all(engine == values == codes for engine, values, codes in found)
    rows = read_rows(tmp_path / 'rows.jsonl')
    for engine in {row.variant for row in rows}:
        mine = {(row.method, row.metric): row for row in rows if row.variant == engine}
        assert mine['fp32', 'latency_ms'].value > 0
        if 'bfloat16' not in engine:
            assert mine['fp32', 'latency_ratio'].value == 1
            equal, images = mine['gplq', 'equal_codes'].value, mine['gplq', 'equal_images'].value
            assert images == pytest.approx(100 * round(6 * images / 100) / 6)
            assert (equal == 100) == (images == 100)
            assert mine['gplq', 'integer_products'].weight_bits == 4
            assert {metric for method, metric in mine if method == 'gplq'} >= {'latency_ms', 'equal_codes', 'top1'}


def test_without_labels(make_config: Callable[..., Config]) -> None:
    config = make_config(label_free=True, targets=['backbone'])
    runner = Runner.from_cfg(config)
    runner.train()
    before = torch.load(config.load_from, weights_only=True)['state_dict']
    assert torch.equal(runner.model.head.weight, before['head.weight'])
    assert not torch.equal(runner.model.backbone.cls_token, before['backbone.cls_token'])


@pytest.fixture
def probe(make_config: Callable[..., Config], cub_root: Path, tmp_path: Path) -> Callable[..., Config]:
    """A linear probe on a backbone in a file: three epochs on images as evaluation sees them."""

    def make(name: str, init_cfg: dict[str, Any], classes: int = 3, cached: bool = False) -> Config:
        config = make_config(name)
        config.default_hooks.pop('gplq')
        config.load_from = None
        config.model.update(frozen=True, init_cfg=init_cfg, num_classes=classes)
        config.train_dataloader = loader(cub_root, 'train', False)
        config.train_dataloader['sampler'] = dict(type='DefaultSampler', shuffle=True)
        config.train_cfg.max_epochs = 3
        config.optim_wrapper.optimizer = dict(type='AdamW', lr=1e-3)
        config.randomness = dict(seed=0)
        if cached:
            config.custom_hooks = [dict(type=FGVC + 'FeatureCacheHook', folder=str(tmp_path / 'features'))]
        return config

    return make


OWN = torch.Generator()
APART = "differently: class 0 is 'apple' in the one and 'bread' in the other, of 3 and 2; name all"


def numpy_noise(results: dict[str, Any]) -> dict[str, Any]:
    return {**results, 'img': results['img'] + np.random.rand()}


def trained(config: Config) -> Runner:
    runner = Runner.from_cfg(config)
    runner.register_hook(RestoreHook())
    runner.train()
    return runner


def test_a_probe_on_cached_features_is_the_probe_on_images(
    probe: Callable[..., Config], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    init_cfg = dict(type='Pretrained', checkpoint=make_config().load_from)
    plain, cached, again = (
        trained(probe(name, init_cfg, cached=name != 'plain')) for name in ('plain', 'cached', 'again')
    )
    fresh = torch.load(init_cfg['checkpoint'], weights_only=True)['state_dict']
    assert not torch.allclose(plain.model.head.weight, fresh['head.weight'], atol=1e-4)
    # Images are run one by one for the cache and two by two without it.
    assert torch.allclose(cached.model.head.weight, plain.model.head.weight, atol=1e-5)
    assert torch.equal(again.model.head.weight, cached.model.head.weight)
    assert torch.equal(plain.model.backbone.pos_embed, fresh['backbone.pos_embed'])
    assert len(list((tmp_path / 'features').iterdir())) == 2, 'one file for training, one for validation'


@pytest.mark.parametrize('wrapper', ['RepeatDataset', 'ConcatDataset', 'ClassBalancedDataset'])
def test_a_probe_on_cached_features_of_a_data_set_in_another(
    probe: Callable[..., Config], make_config: Callable[..., Config], wrapper: str
) -> None:
    init_cfg = dict(type='Pretrained', checkpoint=make_config().load_from)
    heads = []
    for cached in (False, True):
        config = probe(f'{wrapper}{cached}', init_cfg, cached=cached)
        inner = config.train_dataloader.dataset
        more = dict(datasets=[inner, inner]) if wrapper == 'ConcatDataset' else dict(dataset=inner)
        more |= {'RepeatDataset': dict(times=2), 'ClassBalancedDataset': dict(oversample_thr=0.5)}.get(wrapper, {})
        config.train_dataloader.dataset = dict(type=wrapper, **more)
        heads.append(trained(config).model.head.weight)
    assert torch.allclose(*heads, atol=1e-5)


def test_data_and_weights_that_do_not_fit_are_told_before_training(
    probe: Callable[..., Config], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    init_cfg = dict(type='Pretrained', checkpoint=make_config().load_from)

    def refused(error: type[Exception], told: str, **change: Any) -> None:
        config = probe('refused', init_cfg)
        config.merge_from_dict(change)
        runner = Runner.from_cfg(config)
        runner.register_hook(DataHook())
        with pytest.raises(error, match=told):
            runner.train()
        assert runner.iter == 0

    refused(
        DataError, 'gives no batch: 6 samples', **{'train_dataloader.batch_size': 7, 'train_dataloader.drop_last': True}
    )
    refused(
        DataError, 'train_dataloader has 3 classes.*num_classes=2: set model.num_classes=3', **{'model.num_classes': 2}
    )
    refused(DataError, 'train_dataloader has 3 classes .*num_classes=4: their numbers may', **{'model.num_classes': 4})
    # Images of another size than the model's.
    refused(DataError, r'images are \(16, 16\).* made for \(8, 8\).*img_size', **{'model.model_args.img_size': 8})
    quantized = Runner.from_cfg(make_config())
    quantized.train()
    artifact = json.loads((Path(quantized.work_dir) / 'gplq.json').read_text())[-1]['artifact']
    config = probe('mixture', dict(type='Quantized', checkpoint=artifact))
    config.load_from = init_cfg['checkpoint']
    with pytest.raises(CheckpointError, match='holds an FP32 model, whose weights would replace the rounded ones'):
        trained(config)
    config.dump(tmp_path / 'probe.py')
    command = [sys.executable, TOOLS / 'first_checkpoint.py', tmp_path / 'probe.py', tmp_path / 'first.pth']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and 'brings a quantized model' in done.stderr, done.stderr
    assert not (tmp_path / 'first.pth').exists()


@pytest.mark.parametrize('split', ['val', 'test'])
def test_classes_that_validation_or_test_data_number_apart(
    split: str, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Food-101 by its lists: without the first class, the second is the first."""
    lists = {'train': {'apple': 4, 'bread': 4, 'curry': 4}, 'test': {'bread': 2, 'curry': 2}}
    for name, classes in lists.items():
        for kind, count in classes.items():
            for number in range(count):
                draw(tmp_path / f'food-101/images/{kind}/{number}.jpg')
        listed = {kind: [f'{kind}/{number}' for number in range(count)] for kind, count in classes.items()}
        (tmp_path / 'food-101/meta').mkdir(exist_ok=True)
        (tmp_path / f'food-101/meta/{name}.json').write_text(json.dumps(listed))
    config = make_config()
    config.default_hooks.pop('gplq')
    food = dict(type=FGVC + 'TorchvisionDataset', name='Food101', data_root=str(tmp_path))
    for loader, part in (('train', 'train'), ('val', 'test'), ('test', 'test')):
        pipeline = config[f'{loader}_dataloader'].dataset.pipeline
        config[f'{loader}_dataloader'].dataset = dict(food, split=part, pipeline=pipeline)
    if split == 'val':
        # What has no number of classes of its own is compared as well.
        for outputs, told in ((3, 'val_dataloader has 2 classes .*=3: their numbers may'), (None, APART)):
            runner = Runner.from_cfg(config)
            runner.model.num_classes = outputs
            runner.register_hook(DataHook())
            with pytest.raises(DataError, match=told):
                runner.train()
            assert runner.iter == 0
    runner = Runner.from_cfg(config)
    runner.register_hook(DataHook())
    with pytest.raises(DataError, match=f'{split}_dataloader has 2 classes and TimmClassifier num_classes=3'):
        runner.val() if split == 'val' else runner.test()


def test_features_are_learned_from_images_without_classes(make_config: Callable[..., Config], tmp_path: Path) -> None:
    for number in range(8):
        draw(tmp_path / f'plain/train/images/{number}.jpg')
    config = make_config()
    config.train_dataloader.dataset = dict(
        type=FGVC + 'TorchvisionDataset',
        name='ImageFolder',
        data_root=str(tmp_path / 'plain'),
        split='train',
        pipeline=config.train_dataloader.dataset.pipeline,
    )
    for settings in ({}, dict(label_free=True), dict(label_free=False, iterations=0)):
        config.default_hooks.gplq.update(targets=['backbone'], **settings)
        runner = Runner.from_cfg(config)
        runner.register_hook(DataHook())
        if settings:
            runner.train()
        else:
            with pytest.raises(DataError, match='train_dataloader has 1 classes'):
                runner.train()


def test_an_unwritable_folder_of_features_is_told_before_the_backbone_runs(
    probe: Callable[..., Config], make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = probe('unwritable', dict(type='Pretrained', checkpoint=make_config().load_from), cached=True)
    (tmp_path / 'features').touch()
    monkeypatch.setattr('gplq.plugins.fgvc.feature_cache._run', lambda *given: pytest.fail('the backbone has run'))
    with pytest.raises(WriteError, match=r"FeatureCacheHook: folder='.*features': .* cannot be written"):
        trained(config)


def test_a_probe_on_a_quantized_backbone_and_its_checkpoint(
    probe: Callable[..., Config], make_config: Callable[..., Config]
) -> None:
    quantized = Runner.from_cfg(make_config())
    quantized.train()
    artifact = json.loads((Path(quantized.work_dir) / 'gplq.json').read_text())[-1]['artifact']
    config = probe('probe', dict(type='Quantized', checkpoint=artifact), classes=3, cached=True)
    runner = trained(config)
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(runner.model.eval().backbone(image), quantized.model.eval().backbone(image))
    assert type(runner.model.head) is torch.nn.Linear
    assert 'head' not in {a_map.name for a_map in record_of(runner.model).plan.maps}

    config = probe('probe', dict(type='Quantized', checkpoint=artifact), cached=True)
    config.train_cfg.max_epochs, config.resume = 4, True
    resumed = trained(config)
    assert (Path(resumed.work_dir) / 'epoch_4.pth').is_file()

    test = probe('test', dict(type='Quantized', checkpoint=artifact))
    test.load_from = str(Path(runner.work_dir) / 'epoch_3.pth')
    tested = Runner.from_cfg(test)
    tested.register_hook(RestoreHook())
    tested.test()
    with torch.no_grad():
        assert torch.equal(tested.model(image), runner.model(image))


def test_what_a_probe_cannot_be(
    probe: Callable[..., Config], make_config: Callable[..., Config], cub_root: Path
) -> None:
    init_cfg = dict(type='Pretrained', checkpoint=make_config().load_from)
    config = probe('random', init_cfg, cached=True)
    config.train_dataloader = loader(cub_root, 'train', True)
    with pytest.raises(DataError, match='draws random numbers'):
        trained(config)
    # One that leaves most images as they are.
    config = probe('flipped', init_cfg, cached=True)
    flip = dict(type=FGVC + 'TorchvisionTransform', transforms=[dict(type='RandomHorizontalFlip', p=0.01)])
    config.train_dataloader.dataset.pipeline.insert(1, flip)
    with pytest.raises(DataError, match='draws random numbers'):
        trained(config)
    # Numbers of its own, or numpy's behind the first of a block of 624.
    for step in (lambda results: {**results, 'img': results['img'] + torch.rand(1, generator=OWN)}, numpy_noise):
        config = probe('noisy', init_cfg, cached=True)
        np.random.rand()
        runner = Runner.from_cfg(config)
        runner.register_hook(RestoreHook())
        runner.train_loop.dataloader.dataset.pipeline.transforms.insert(-1, step)
        with pytest.raises(DataError, match='draws random numbers'):
            runner.train()
    config = probe('mixed', init_cfg, cached=True)
    config.model.mixup = dict(mixup_alpha=1.0)
    with pytest.raises(DataError, match='set mixup=None'):
        trained(config)
    config = probe('trained', init_cfg, cached=True)
    config.model.frozen = False
    with pytest.raises(DataError, match='set frozen=True'):
        trained(config)
    config = probe('iterations', init_cfg, cached=True)
    config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=3, val_interval=3)
    with pytest.raises(DataError, match='IterBasedTrainLoop draws its batches before .*EpochBasedTrainLoop'):
        trained(config)
    config = probe('thawed', dict(type='Quantized', checkpoint='w4a4.safetensors'))
    config.model.frozen = False
    with pytest.raises(StageError, match='rounded weights, which cannot be trained: set frozen=True'):
        trained(config)
    with pytest.raises(CheckpointError, match='nothing.safetensors does not exist'):
        trained(probe('missing', dict(type='Quantized', checkpoint='nothing.safetensors')))


def test_features_are_found_again_only_for_the_same_images_and_model(
    probe: Callable[..., Config], make_config: Callable[..., Config], cub_root: Path, tmp_path: Path
) -> None:
    def files() -> int:
        return len(list((tmp_path / 'features').iterdir()))

    init_cfg = dict(type='Pretrained', checkpoint=make_config().load_from)
    trained(probe('first', init_cfg, cached=True))
    assert files() == 2
    # Equal weights, another function.
    config = probe('average', init_cfg, cached=True)
    config.model.model_args.update(global_pool='avg', fc_norm=False)
    trained(config)
    assert files() == 4
    config = probe('normalized', init_cfg, cached=True)
    config.model.data_preprocessor = dict(type='ImgDataPreprocessor', mean=[0.1] * 3, std=[2.0] * 3)
    runner = trained(config)
    assert files() == 6
    assert runner.model.data_preprocessor.mean.flatten().tolist() == pytest.approx([0.1] * 3), (
        'images are normalized again'
    )
    runner.val()
    # A setting that torchvision's transforms do not tell.
    for fill in (3, 9):
        config = probe(f'padded{fill}', init_cfg, cached=True)
        pad = dict(type='Pad', padding=2, fill={'others': fill})
        for data in (config.train_dataloader.dataset, config.val_dataloader.dataset):
            data.pipeline.insert(1, dict(type=FGVC + 'TorchvisionTransform', transforms=[pad]))
        trained(config)
    before = 10
    assert files() == before
    # A changed image of training; a damaged file is made again.
    path = cub_root / 'images/001.Black_footed_Albatross/bird_1.jpg'
    path.write_bytes((cub_root / 'images/002.Laysan_Albatross/bird_2.jpg').read_bytes())
    trained(probe('changed', init_cfg, cached=True))
    assert files() == before + 1
    newest = max((tmp_path / 'features').iterdir(), key=lambda file: file.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    trained(probe('damaged', init_cfg, cached=True))
    assert files() == before + 1 and newest.read_bytes() != bytes(content)
