"""Each mistake ends the run before any training, with an error that names the thing and the remedy."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from gplq.errors import (
    CalibrationError,
    CheckpointError,
    DataError,
    GPLQError,
    ProductError,
    RecipeError,
    StageError,
    TargetError,
    TrainingError,
)
from gplq.plugins.checkpoint_file import check_depth, parameter_names

MakeConfig = Callable[..., Config]


class Untrained(Hook):
    """Notes whether an iteration began."""

    began = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.began = True


def refused(config: Config, error: type[GPLQError], message: str) -> None:
    """Training raises `error` before its first iteration; `message` is a pattern."""
    watch = Untrained()
    with pytest.raises(error, match=message):
        runner = Runner.from_cfg(config)
        runner.register_hook(watch)
        runner.train()
    assert not watch.began


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(targets='backbone.blocks.7'), TargetError, "'backbone.blocks.7' matches nothing; similar names: .*block"),
        (dict(skip=['backbone.nothing']), TargetError, "skip pattern 'backbone.nothing' matches nothing"),
        (dict(part='body'), TargetError, "part='body': ToyClassifier has .*'backbone'.*; name one of these"),
        (dict(part='head'), TargetError, r"part='head' \(Linear\) does not run on images of .*takes images"),
        (dict(weight_bits=1), RecipeError, 'weight_bits=1 .*2'),
        (dict(activation_bits=9), RecipeError, 'activation_bits=9 .*8'),
        (dict(weight_bits=16), RecipeError, 'weight_bits=16'),
        (dict(activation_bits=4.5), RecipeError, 'activation_bits must be an integer or None, got 4.5'),
    ],
)
def test_settings(arguments: dict[str, Any], error: type[GPLQError], message: str, make_config: MakeConfig) -> None:
    refused(make_config(**arguments), error, message)


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('GPLQHook', 'GPLQHook'),
        ('GPLQHook', 'WeightPTQHook'),
        ('ActivationQATHook', 'GPLQHook'),
        ('ActivationQATHook', 'ActivationQATHook'),
        ('WeightPTQHook', 'WeightPTQHook'),
    ],
)
def test_a_second_hook(one: str, other: str, make_config: MakeConfig) -> None:
    config = make_config(type=f'gplq.plugins.{one}')
    config.custom_hooks = [dict(config.default_hooks.gplq, type=f'gplq.plugins.{other}')]
    refused(config, StageError, rf'({one} beside {other}|{other} beside {one}): .*leave one of the two out')


def test_parts_that_are_set_up_differently(make_config: MakeConfig) -> None:
    config = make_config(type='gplq.plugins.ActivationQATHook')
    config.custom_hooks = [dict(config.default_hooks.gplq, type='gplq.plugins.WeightPTQHook', seed=5)]
    refused(config, RecipeError, 'seed is 5 for WeightPTQHook and 0 for ActivationQATHook: give both the same')


@pytest.mark.parametrize('seen', [False, True])
@pytest.mark.parametrize('hidden', ['query-key', 'attention-value'])
def test_attention_whose_products_cannot_be_found(
    hidden: str, seen: bool, make_config: MakeConfig, toy: ModuleType, monkeypatch: Any
) -> None:
    def by_kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        # As from an extension that nobody can look into, or that at least calls itself an operator.
        if seen:
            return torch.ops.aten.matmul.default(left, right)
        with torch._C.DisableTorchFunction():
            return left @ right

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = by_kernel(q, k.mT) if hidden == 'query-key' else q @ k.mT
        y = scores.softmax(-1) @ v if hidden == 'query-key' else by_kernel(scores.softmax(-1), v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))

    monkeypatch.setattr(toy.Attention, 'forward', forward)
    refused(make_config(), ProductError, rf'backbone.blocks.\d.attn: the {hidden} product .* skip')


def test_nothing_is_loaded(make_config: MakeConfig) -> None:
    config = make_config()
    config.load_from = None
    refused(config, CheckpointError, 'nothing is loaded into the model.*load_from=PATH')


def test_checkpoint_is_missing(make_config: MakeConfig) -> None:
    config = make_config()
    config.load_from = 'none.pth'
    refused(config, CheckpointError, 'checkpoint none.pth does not exist; give a checkpoint')


def test_checkpoint_of_other_width(make_config: MakeConfig, toy: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / 'wide.pth'
    torch.save({'state_dict': toy.ToyClassifier(width=32).state_dict()}, path)
    config = make_config()
    config.load_from = str(path)
    message = r'wide.pth is not of this architecture: backbone\S+ has shape .*, the model needs'
    refused(config, CheckpointError, message)


def test_checkpoint_of_other_depth(make_config: MakeConfig, toy: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / 'shallow.pth'
    torch.save(toy.ToyClassifier(depth=1).state_dict(), path)
    config = make_config()
    config.load_from = str(path)
    message = 'shallow.pth is not of this architecture: 12 of 35 tensors are missing, such as .*backbone.blocks.1'
    refused(config, CheckpointError, message)


def test_checkpoint_of_a_deeper_model(make_config: MakeConfig, toy: ModuleType, tmp_path: Path) -> None:
    """Its first blocks would do for the whole model, which would then be measured as if it were trained."""
    path = tmp_path / 'deep.pth'
    torch.save(toy.ToyClassifier(depth=3).state_dict(), path)
    config = make_config()
    config.load_from = str(path)
    message = r'deep.pth is of a deeper model: 12 of its tensors .* such as backbone\.blocks\.2'
    refused(config, CheckpointError, message)


def test_shared_layers_are_no_further_ones() -> None:
    """As some detectors' heads have them on every level."""
    model = torch.nn.ModuleList(2 * [torch.nn.Linear(2, 2)])
    assert len(parameter_names(model)) == len(model.state_dict()) == 4
    check_depth(parameter_names(model), model.state_dict(), 'own.pth')


def test_checkpoint_with_nan(make_config: MakeConfig, checkpoint: Path, tmp_path: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    saved['state_dict']['head.bias'][1] = float('nan')
    torch.save(saved, tmp_path / 'nan.pth')
    config = make_config()
    config.load_from = str(tmp_path / 'nan.pth')
    refused(config, CheckpointError, 'nan.pth: head.bias holds NaN')


@pytest.mark.parametrize('share', [0.0, 0.3, 0.97])
def test_checkpoint_is_truncated(share: float, make_config: MakeConfig, checkpoint: Path, tmp_path: Path) -> None:
    content = checkpoint.read_bytes()
    path = tmp_path / 'cut.pth'
    path.write_bytes(content[: int(share * len(content))])
    config = make_config()
    config.load_from = str(path)
    refused(config, CheckpointError, 'cut.pth cannot be read, it may be truncated')


class Payload:
    """Writes a file when it is unpickled by a loader that executes what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('how', ['train', 'test', 'resume'])
@pytest.mark.parametrize('archive', [True, False], ids=['archive', 'legacy'])
def test_checkpoint_with_foreign_objects_is_not_executed(
    how: str, archive: bool, make_config: MakeConfig, checkpoint: Path, tmp_path: Path
) -> None:
    trace = tmp_path / 'executed'
    saved = torch.load(checkpoint, weights_only=True)
    path = tmp_path / 'foreign.pth'
    torch.save({**saved, 'meta': Payload(trace)}, path, _use_new_zipfile_serialization=archive)
    config = make_config()
    config.load_from, config.resume = str(path), how == 'resume'
    message = 'foreign.pth holds objects that are not data, such as _?io.open, and was not read; save it anew'
    if how == 'test':
        with pytest.raises(CheckpointError, match=message):
            Runner.from_cfg(config).test()
    else:
        refused(config, CheckpointError, message)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), 'the trap works'


def test_checkpoint_of_old_torch_is_read(train: Callable[..., Runner], checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / 'legacy.pth'
    torch.save(torch.load(checkpoint, weights_only=True), path, _use_new_zipfile_serialization=False)

    def change(config: Config) -> None:
        config.load_from = str(path)

    assert train(change=change, iterations=1).iter == 1


def refused_in_a_test(config: Config, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Runner.from_cfg(config).test()


LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 123\n'
PAGE = b'<!DOCTYPE html>\n<html><body>404 Not Found</body></html>'


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'hello', "is text, beginning with 'hello'; if it was downloaded, .*download it again"),
        (PAGE, "is text, beginning with '<!DOCTYPE html> <html><body>.*download it again"),
        (b'{"error": {"code": 404}}', "is text, beginning with '{.*download it again"),
        (LFS, 'is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`'),
        (b'\x1f\x8b\x08\x00data', 'is no checkpoint of torch, it begins with .*; unpack or convert it first'),
        (pickle.dumps('text'), 'cannot be read, it may be truncated or not written by torch.save'),
    ],
    ids=['text', 'page', 'json', 'lfs', 'gzip', 'pickle'],
)
def test_file_that_is_no_checkpoint(content: bytes, message: str, make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / 'file.pth'
    path.write_bytes(content)
    config = make_config()
    config.load_from = str(path)
    refused(config, CheckpointError, f'checkpoint {path} {message}')


@pytest.mark.parametrize('place', [0.2, 0.5, 0.8])
def test_checkpoint_with_a_flipped_bit(place: float, make_config: MakeConfig, checkpoint: Path, tmp_path: Path) -> None:
    content = bytearray(checkpoint.read_bytes())
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    # Behind the member's header of 30 bytes, its name and its padding.
    content[largest.header_offset + int(place * largest.file_size) + len(largest.filename) + 94] ^= 4
    path = tmp_path / 'flipped.pth'
    path.write_bytes(content)
    config = make_config()
    config.load_from = str(path)
    refused(config, CheckpointError, f'flipped.pth is damaged: {largest.filename} .*checksum')


def test_compressed_checkpoint(make_config: MakeConfig, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / 'packed.pth'
    with zipfile.ZipFile(checkpoint) as plain, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    config = make_config()
    config.load_from = str(path)
    refused(config, CheckpointError, 'packed.pth is damaged: .* is compressed')


def test_artifact_is_no_checkpoint(
    train: Callable[..., Runner], steps_of: Callable, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config('test')
    config.load_from = steps_of(train(iterations=0))[2]['artifact']
    refused_in_a_test(
        config, 'gplq_w4a4.safetensors is a safetensors file; gplq.load reads .*; give the .pth beside it'
    )


@pytest.mark.parametrize(
    'content',
    [[1, 2], {}, {'state_dict': None}, {'state_dict': 'text'}, {'model': {'head.bias': torch.ones(4)}}],
    ids=str,
)
def test_checkpoint_without_tensors(content: Any, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    config.load_from = str(tmp_path / 'other.pth')
    torch.save(content, config.load_from)
    message = 'other.pth (holds a list, not a state dict|has no tensors, neither under .*save it anew as)'
    refused(config, CheckpointError, message)
    refused_in_a_test(config, message)


def test_test_of_a_checkpoint_of_another_model(make_config: MakeConfig, toy: ModuleType, tmp_path: Path) -> None:
    config = make_config()
    config.load_from = str(tmp_path / 'shallow.pth')
    torch.save(toy.ToyClassifier(depth=1).state_dict(), config.load_from)
    refused_in_a_test(config, 'shallow.pth is not of this architecture: 12 of 35 tensors are missing')


def test_metadata_of_another_kind_is_that_of_an_fp32_model(
    make_config: MakeConfig, checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config()
    config.load_from = str(tmp_path / 'other.pth')
    torch.save({**torch.load(checkpoint, weights_only=True), 'meta': 'made by hand'}, config.load_from)
    assert Runner.from_cfg(config).test()['toy/accuracy'] >= 0.75


def test_quantized_checkpoint_is_not_quantized_again(
    train: Callable[..., Runner], steps_of: Callable, make_config: MakeConfig
) -> None:
    steps = steps_of(train())
    for step, message in ((steps[1], 'has activation quantizers already'), (steps[2], 'quantized already')):
        config = make_config('again')
        config.load_from = step['checkpoint']
        refused(config, CheckpointError, message)


def test_test_of_a_checkpoint_that_lacks_a_scale(
    train: Callable[..., Runner], steps_of: Callable, make_config: MakeConfig, tmp_path: Path
) -> None:
    saved = torch.load(steps_of(train())[2]['checkpoint'], weights_only=True)
    saved['state_dict'].pop('backbone.blocks.0.fc1.quantization.weight.scale')
    torch.save(saved, tmp_path / 'lacking.pth')
    config = make_config('test')
    config.load_from = str(tmp_path / 'lacking.pth')
    with pytest.raises(CheckpointError, match=r'1 of \d+ tensors are missing.*fc1.quantization.weight.scale'):
        Runner.from_cfg(config).test()


def test_calibration_image_is_nan(make_config: MakeConfig) -> None:
    config = make_config(validate_fp32=False, mimicking=False)
    config.train_dataloader.dataset.length = 8
    config.train_dataloader.dataset.broken = 3
    refused(config, CalibrationError, r'calibration batch \d holds NaN or infinite values; check the images')


def test_teacher_image_is_nan(make_config: MakeConfig) -> None:
    config = make_config(validate_fp32=False)
    config.train_dataloader.dataset.length = 8
    config.train_dataloader.dataset.broken = 3
    refused(config, CalibrationError, r'batch \d holds NaN or infinite values; check the images')


def test_fewer_images_than_a_batch_that_is_dropped(make_config: MakeConfig) -> None:
    config = make_config()
    config.train_dataloader.update(batch_size=64, drop_last=True)
    refused(config, DataError, 'gives no batch: 16 samples .* less than a batch of 64.*drop_last=False')


def test_no_calibration_images(make_config: MakeConfig) -> None:
    from gplq.plugins.hooks.data import calibration_loader
    from gplq.plugins.hooks.settings import HookSettings

    config = make_config()
    config.train_dataloader.dataset.length = 0
    with pytest.raises(CalibrationError, match='training data set is empty'):
        calibration_loader(Runner.from_cfg(config), HookSettings.from_config(), 8)
    config = make_config()
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler'):
        config.pop(key)
    with pytest.raises(CalibrationError, match='no train_dataloader'):
        calibration_loader(Runner.from_cfg(config), HookSettings.from_config(), 8)


def test_weight_stage_without_calibration(make_config: MakeConfig, toy: ModuleType) -> None:
    import gplq

    model = toy.ToyClassifier()
    gplq.prepare(model.backbone, 'w4a4', torch.zeros(1, 3, 16, 16))
    with pytest.raises(StageError, match='not calibrated: call gplq.calibrate first.*plain post-training'):
        gplq.quantize_weights(model.backbone, [torch.zeros(1, 3, 16, 16)])


def test_divergence_names_the_weights_from_before_it(make_config: MakeConfig) -> None:
    config = make_config()
    config.default_hooks.gplq.stage = dict(config.default_hooks.gplq.get('stage', {}), lr=1e25)
    runner = Runner.from_cfg(config)
    point = Path(runner.work_dir) / 'gplq_resume.pth'
    with pytest.raises(TrainingError, match=f'iteration [12] .*diverged.*{re.escape(str(point))}'):
        runner.train()
    assert not (Path(runner.work_dir) / 'gplq_last_good.pth').exists()
    kept = torch.load(point, weights_only=True)['state_dict']
    assert max(float(tensor.abs().max()) for tensor in kept.values()) < 1e4


class Break(Hook):
    """Breaks the third iteration: its image, or one weight's gradient."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.before: dict[str, torch.Tensor] = {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter != 2:
            return
        self.before = {name: t.clone() for name, t in runner.model.state_dict().items()}
        if self.what == 'loss':
            data_batch['inputs'][0].fill_(float('nan'))
        else:
            runner.model.head.weight.register_hook(lambda gradient: gradient * float('inf'))


@pytest.mark.parametrize(
    ('what', 'message'),
    [('loss', 'the loss of iteration 2 is nan: lower lr'), ('gradient', 'a gradient of iteration 2 is not finite')],
)
def test_nan_keeps_the_last_good_weights(what: str, message: str, make_config: MakeConfig) -> None:
    runner = Runner.from_cfg(make_config())
    broken = Break(what)
    runner.register_hook(broken)
    kept = Path(runner.work_dir) / 'gplq_last_good.pth'
    with pytest.raises(TrainingError, match=f'{message}.*{re.escape(str(kept))}'):
        runner.train()
    saved = torch.load(kept, weights_only=True)
    assert saved['meta']['iter'] == 2
    for name, tensor in broken.before.items():
        # The statistics of the BatchNorm included, which have seen the image.
        assert torch.equal(saved['state_dict'][name], tensor), name
    test = make_config('test')
    test.load_from = str(kept)
    assert Runner.from_cfg(test).test()['toy/accuracy'] >= 0
