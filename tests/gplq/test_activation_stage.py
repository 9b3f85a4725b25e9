"""The first stage: what it trains, what it refuses, and what it leaves behind when it breaks down."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import gplq
from gplq.activation_stage import feature_point, learning_rates, parameter_groups, stage_iterations
from gplq.errors import GPLQError, RecipeError, StageError, TrainingError
from gplq.record import named_quantizers

Pair = tuple[nn.Module, nn.Module]


@pytest.fixture
def calibrated(toy_vit: Callable[..., nn.Module], images: Tensor) -> Pair:
    """A calibrated student and its FP32 teacher."""
    teacher = toy_vit(depth=1)
    model = copy.deepcopy(teacher)
    gplq.prepare(model, 'w4a4', images[:2])
    gplq.calibrate(model, [images])
    return model, teacher


FAST = gplq.ActivationStage(lr=1e-4, scale_lr=1e-2, rank=4)


def labelled(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.arange(len(part)) % 5) for part in images.chunk(4)]


def test_weights_and_scales_move_and_the_teacher_does_not(calibrated: Pair, images: Tensor) -> None:
    model, teacher = calibrated
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    mode = model.training
    gplq.train_activations(model, labelled(images), teacher=teacher, stage=FAST)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.endswith('log_scale')} <= moved
    assert {'patch_embed.weight', 'blocks.0.attn.qkv.weight', 'head.weight'} <= moved
    assert all(torch.equal(p, frozen[name]) for name, p in teacher.named_parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert model.training == mode


def test_it_learns(calibrated: Pair, images: Tensor) -> None:
    model, teacher = calibrated

    def distance() -> float:
        with torch.no_grad():
            return float((model.eval()(images) - teacher(images)).square().mean())

    before = distance()
    stage = gplq.ActivationStage(lr=3e-4, scale_lr=3e-3, rank=16)
    gplq.train_activations(model, [images], teacher=teacher, stage=stage, iterations=25, loss=None)
    assert distance() < 0.9 * before


def test_without_labels_labels_are_not_read(calibrated: Pair, images: Tensor) -> None:
    model, teacher = calibrated
    gplq.train_activations(model, [images], teacher=teacher, stage=FAST, loss=None)
    with pytest.raises(RecipeError, match='teacher'):
        gplq.train_activations(model, [images], loss=None)
    with pytest.raises(RecipeError, match='teacher'):
        stage = gplq.ActivationStage(mimicking_weight=0)
        gplq.train_activations(model, [images], teacher=teacher, stage=stage, loss=None)


def test_nan_stops_with_the_weights_of_the_step_before(calibrated: Pair, images: Tensor) -> None:
    model, _ = calibrated
    seen: list[dict[str, Tensor]] = []

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        seen.append({name: p.detach().clone() for name, p in m.named_parameters()})
        value: Tensor = m(batch).square().mean()
        return value if len(seen) < 3 else value * float('nan')

    with pytest.raises(TrainingError, match='iteration 2'):
        gplq.train_activations(model, [images] * 5, stage=FAST, loss=loss)
    assert all(torch.equal(p, seen[2][name]) for name, p in model.named_parameters())


def test_a_finite_loss_whose_gradient_is_not_stops_before_the_step(calibrated: Pair, images: Tensor) -> None:
    model, _ = calibrated
    before = copy.deepcopy(model.state_dict())

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        # 0 has an infinite slope under the root, and its inner gradient is 0: their product is NaN.
        value: Tensor = (0 * m(batch)).square().sum().sqrt()
        assert float(value.detach()) == 0
        return value

    with pytest.raises(TrainingError, match='gradient of iteration 0'):
        gplq.train_activations(model, [images], stage=FAST, loss=loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Normalized(nn.Module):
    """A convolution with running statistics, one of its norms frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.moving, self.frozen = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def train(self, mode: bool = True) -> Normalized:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.frozen(self.moving(self.conv(x))).mean((2, 3)))
        return logits


def test_nan_leaves_running_statistics_and_modes_as_they_were(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Normalized().eval()
    gplq.prepare(model, 'w4a4', images[:2])
    gplq.calibrate(model, [images])
    # Training goes from a mixed state back to it.
    model.head.train()
    modes = {name: module.training for name, module in model.named_modules()}
    labels = torch.arange(16) % 5
    broken = images * float('nan')
    with pytest.raises(TrainingError, match='iteration 1'):
        gplq.train_activations(model, [(images, labels), (broken, labels)], stage=FAST)
    # One sound step has been made, the broken one has not.
    assert int(model.moving.num_batches_tracked) == 1
    assert bool(model.moving.running_mean.isfinite().all() and model.moving.running_var.isfinite().all())
    assert int(model.frozen.num_batches_tracked) == 0
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_any_error_puts_the_modes_back(calibrated: Pair, images: Tensor) -> None:
    model, _ = calibrated

    def loss(m: nn.Module, batch: Any) -> Tensor:
        assert m.training
        raise KeyError('labels')

    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(KeyError):
        gplq.train_activations(model, [images], stage=FAST, loss=loss)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.training


def test_the_optimizer_is_the_paper_s(calibrated: Pair, images: Tensor) -> None:
    """AdamW with its usual betas at constant rates, against a loop written out."""
    model, _ = calibrated
    expected = copy.deepcopy(model).train()
    groups = parameter_groups(expected, FAST, None)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    for inputs, labels in labelled(images):
        optimizer.zero_grad()
        F.cross_entropy(expected(inputs), labels).backward()
        optimizer.step()
    gplq.train_activations(model, labelled(images), stage=FAST)
    found = model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.state_dict().items())


# The loader


def test_empty_loader(calibrated: Pair, images: Tensor) -> None:
    model, teacher = calibrated
    with pytest.raises(GPLQError, match='empty'):
        gplq.train_activations(model, [], teacher=teacher, stage=FAST)
    with pytest.raises(TrainingError, match='empty'):
        gplq.train_activations(model, [], stage=FAST)
    with pytest.raises(TrainingError, match='empty'):
        gplq.train_activations(model, [], stage=FAST, iterations=3)


@pytest.mark.parametrize('wrong', [{'epochs': 0}, {'epochs': -1}, {'iterations': 0}, {'iterations': -1}], ids=str)
def test_lengths_of_nothing(calibrated: Pair, images: Tensor, wrong: dict[str, int]) -> None:
    model, _ = calibrated
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        gplq.train_activations(model, labelled(images), stage=FAST, **wrong)


class Counting:
    """A loss that counts its steps."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.steps += 1
        loss: Tensor = model(batch[0]).square().mean()
        return loss


@pytest.mark.parametrize(
    ('length', 'steps'), [({}, 4), ({'epochs': 3}, 12), ({'iterations': 3}, 3), ({'iterations': 6, 'epochs': 9}, 6)]
)
def test_length_of_the_stage(calibrated: Pair, images: Tensor, length: dict[str, int], steps: int) -> None:
    model, teacher = calibrated
    count = Counting()
    gplq.train_activations(model, labelled(images), teacher=teacher, stage=FAST, loss=count, **length)
    assert count.steps == steps


@pytest.mark.parametrize('settings', [{'teacher': True}, {'epochs': 2}, {'teacher': True, 'iterations': 2}], ids=str)
def test_an_iterator_is_refused_where_it_would_have_to_be_read_again(
    calibrated: Pair, images: Tensor, settings: dict[str, Any]
) -> None:
    model, teacher = calibrated
    if settings.pop('teacher', False):
        settings['teacher'] = teacher
    loader, count = iter(labelled(images)), Counting()
    with pytest.raises(TrainingError, match='DataLoader or a list'):
        gplq.train_activations(model, loader, stage=FAST, loss=count, **settings)
    assert count.steps == 0
    # Nor was any of it eaten.
    assert len(list(loader)) == 4


def test_an_iterator_serves_one_pass_and_says_when_it_ends(calibrated: Pair, images: Tensor) -> None:
    model, _ = calibrated
    count = Counting()
    gplq.train_activations(model, iter(labelled(images)), stage=FAST, loss=count)
    assert count.steps == 4
    endless = itertools.cycle(labelled(images))
    gplq.train_activations(model, endless, stage=FAST, loss=count, iterations=5)
    assert count.steps == 9
    with pytest.raises(TrainingError, match='pass 2 .* can be read once'):
        gplq.train_activations(model, iter(labelled(images)), stage=FAST, loss=count, iterations=5)


class Batch(NamedTuple):
    """What a collate function of one's own may return."""

    inputs: Tensor
    labels: Tensor


def test_named_tuples_and_mappings(calibrated: Pair, images: Tensor) -> None:
    model, teacher = calibrated
    labels = torch.arange(16) % 5
    twins = [copy.deepcopy(model) for _ in range(4)]

    def loss(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(m(batch['x']), labels)

    gplq.train_activations(twins[0], [(images, labels)], teacher=teacher, stage=FAST)
    gplq.train_activations(twins[1], [Batch(images, labels)], teacher=teacher, stage=FAST)
    gplq.train_activations(twins[2], [{'x': images}], teacher=teacher, stage=FAST, loss=loss)
    # A mapping with more than the model's arguments, as calibrate takes it.
    gplq.train_activations(
        twins[3],
        [{'x': images, 'labels': labels}],
        teacher=teacher,
        stage=FAST,
        loss=loss,
        forward=lambda m, batch: m(batch['x']),
    )
    expected = twins[0].state_dict()
    for twin in twins[1:]:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in twin.state_dict().items())


@pytest.mark.parametrize('named', [True, False])
def test_label_free_on_named_tuples_and_mappings(calibrated: Pair, images: Tensor, named: bool) -> None:
    model, teacher = calibrated
    expected = copy.deepcopy(model)
    gplq.train_activations(expected, [images], teacher=teacher, stage=FAST, loss=None)
    batch = Batch(images, torch.zeros(16)) if named else {'x': images}
    gplq.train_activations(model, [batch], teacher=teacher, stage=FAST, loss=None)
    found = model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.state_dict().items())


def test_a_mapping_needs_a_loss_of_its_own(calibrated: Pair, images: Tensor) -> None:
    model, _ = calibrated
    with pytest.raises(RecipeError, match=r"\['labels', 'x'\].*pass loss="):
        gplq.train_activations(model, [{'x': images, 'labels': torch.zeros(16)}], stage=FAST)


# The teacher


def test_a_teacher_that_is_no_fp32_copy(calibrated: Pair, images: Tensor) -> None:
    model, _ = calibrated
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    rounded = copy.deepcopy(model)
    gplq.quantize_weights(rounded, [images])
    for teacher in (model, nn.Sequential(model), copy.deepcopy(model), rounded):
        with pytest.raises(StageError, match=r'quantized .*copy\.deepcopy'):
            gplq.train_activations(model, labelled(images), teacher=teacher, stage=FAST)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == frozen


def test_a_teacher_whose_parameters_the_model_trains(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    """At 32 bits there is no quantizer to tell them apart by."""
    model = toy_vit(depth=1)
    gplq.prepare(model, 'w32a32', images[:2])
    gplq.calibrate(model, [images])
    with pytest.raises(StageError, match='share patch_embed.weight'):
        gplq.train_activations(model, labelled(images), teacher=model, stage=FAST)
    assert all(p.requires_grad for p in model.parameters())


def test_a_teacher_without_the_features_is_refused(calibrated: Pair, images: Tensor) -> None:
    foreign = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 5))
    with pytest.raises(StageError, match=r'the teacher \(Sequential\) has no head, whose input is compared'):
        gplq.train_activations(calibrated[0], labelled(images), teacher=foreign, stage=FAST)


def test_a_copy_that_is_prepared_and_no_more_is_a_teacher(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    model = toy_vit(depth=1)
    gplq.prepare(model, 'w4a4', images[:2])
    teacher = copy.deepcopy(model)
    gplq.calibrate(model, [images])
    gplq.train_activations(model, labelled(images), teacher=teacher, stage=FAST)


def test_stage_one_needs_calibration(toy_vit: Callable[..., nn.Module], images: Tensor) -> None:
    with pytest.raises(StageError, match='not prepared'):
        gplq.train_activations(toy_vit(), labelled(images))
    model = toy_vit()
    gplq.prepare(model, 'w4a4', images[:2])
    with pytest.raises(StageError, match='calibrated'):
        gplq.train_activations(model, labelled(images))


def test_groups_and_feature_point(calibrated: Pair) -> None:
    model, _ = calibrated
    weights, scales = parameter_groups(model, gplq.ActivationStage(lr=1.0, scale_lr=2.0, weight_decay=0.5), 10)
    assert (weights['lr'], weights['weight_decay']) == (1.0, 0.5)
    assert (scales['lr'], scales['weight_decay']) == (2.0, 0.0)
    assert len(scales['params']) == sum(1 if q.offset is None else 2 for _, q in named_quantizers(model))
    assert len(weights['params']) + len(scales['params']) == len(list(model.parameters()))
    assert feature_point(model) == ('head', 'input')


@pytest.mark.parametrize(
    ('epoch', 'full', 'expected'), [(5000, 0, 5000), (100, 0, 1000), (100, 2400, 240), (100, 50_000, 1000), (9, 3, 1)]
)
def test_length(epoch: int, full: int, expected: int) -> None:
    assert stage_iterations(epoch, full) == expected


@pytest.mark.parametrize(
    ('iterations', 'faster'), [(10_009, 1), (1000, 1), (500, 2), (125, 8), (100, 10), (1, 10), (None, 1)]
)
def test_a_short_stage_moves_faster(iterations: int | None, faster: int) -> None:
    assert learning_rates(gplq.ActivationStage(), iterations) == pytest.approx((5e-6 * faster, 5e-4 * faster))
    assert learning_rates(gplq.ActivationStage(lr=1e-4, scale_lr=0.0), iterations) == (1e-4, 0.0)


def test_the_rates_of_a_loop_depend_on_its_length(
    calibrated: Pair, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches in five epochs are ten iterations; what has no length is taken as long."""
    rates = []
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self: rates.append([g['lr'] for g in self.param_groups]))
    model, _ = calibrated
    batches = labelled(images)

    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return iter(batches)

    gplq.train_activations(model, batches, epochs=250 // len(batches))
    gplq.train_activations(model, batches, iterations=1)
    gplq.train_activations(model, Stream(), epochs=1)
    assert rates[0] == pytest.approx([5e-6 * 4, 5e-4 * 4], rel=0.02)
    assert rates[-len(batches) - 1] == pytest.approx([5e-5, 5e-3])
    assert rates[-1] == pytest.approx([5e-6, 5e-4])


@pytest.mark.parametrize('wrong', [{'lr': -1.0}, {'scale_lr': float('nan')}, {'pca_samples': 0}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        gplq.ActivationStage(**wrong)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_refused(
    toy_vit: Callable[..., nn.Module], images: Tensor, dtype: torch.dtype
) -> None:
    """A step of 5e-6 would be lost in them, and with it the stage, silently."""
    model, images = toy_vit(depth=1).to(dtype), images.to(dtype)
    gplq.prepare(model, 'w4a4', images[:2])
    gplq.calibrate(model, [images])
    with pytest.raises(TrainingError, match=r'model\.float\(\).*autocast'):
        gplq.train_activations(model, labelled(images), stage=FAST)
    model.float()
    before = model.head.weight.detach().clone()
    gplq.train_activations(model, labelled(images.float()), stage=FAST)
    assert not torch.equal(model.head.weight, before)


class Stream(IterableDataset):
    """Images whose number nobody knows before they are read."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images, torch.arange(len(self.images)) % 5, strict=True)


def test_a_stream_has_no_length(calibrated: Pair, images: Tensor) -> None:
    model, teacher = calibrated
    before = model.head.weight.detach().clone()
    gplq.train_activations(model, DataLoader(Stream(images), batch_size=4), teacher=teacher)
    # The rates of a long stage, since the length is unknown: a step of AdamW is at most its rate.
    steps = -(-len(images) // 4)
    assert 0 < float((model.head.weight.detach() - before).abs().max()) <= 5e-6 * steps * 1.01


@pytest.mark.parametrize('epochs', [1.5, 0, True])
def test_epochs_are_a_whole_number(epochs: Any, calibrated: Pair, images: Tensor) -> None:
    with pytest.raises(RecipeError, match=f'epochs={epochs} must be a whole number'):
        gplq.train_activations(calibrated[0], labelled(images), epochs=epochs)


def test_a_frozen_model_cannot_be_trained(calibrated: Pair, images: Tensor) -> None:
    model, _ = calibrated
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match='every weight and scale is frozen'):
        gplq.train_activations(model, labelled(images))


@pytest.mark.parametrize(('result', 'named'), [({'loss': 1.0}, 'dict'), (torch.ones(3), r'\(3,\)')])
def test_a_loss_is_one_number(result: Any, named: str, calibrated: Pair, images: Tensor) -> None:
    with pytest.raises(TrainingError, match=f'it returned {named}: sum its parts'):
        gplq.train_activations(calibrated[0], labelled(images), loss=lambda model, batch: result)
