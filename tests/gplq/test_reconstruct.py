"""Weights whose rounding is learned: it starts at the weight, decides, and helps the block's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gplq
from gplq import block_samples, reconstruct
from gplq.errors import RecipeError, StageError
from gplq.record import named_quantizers, weight_views
from gplq.sample_store import SampleStore
from gplq.soft_rounding import SoftRounding
from gplq.weights import choose_weight_scales

Make = Callable[..., nn.Module]


@pytest.mark.parametrize('scheme', ['mse', 'percentile_asymmetric'])
def test_soft_rounding_starts_at_the_weight_and_ends_on_the_grid(scheme: str, toy_vit: Make, images: Tensor) -> None:
    model = toy_vit()
    gplq.prepare(model, gplq.Recipe.reconstruct(4, 4, weight_scheme=scheme), images[:2])
    gplq.calibrate(model, [images])
    view = next(v for _, v in weight_views(model) if v.name == 'blocks.0.fc1')
    exact = view.matrix().clone()
    scales = choose_weight_scales(exact * view.map.column_scale, 4, scheme)
    soft = SoftRounding(view, scales, 4)
    inside = (soft.floor > soft.bounds[0]) & (soft.floor < soft.bounds[1] - 1)
    assert torch.allclose(soft()[inside], exact[inside], atol=1e-3 * float(exact.abs().max()))
    assert float(soft.indecision(2.0)) > 0
    with torch.no_grad():
        soft.logit.copy_(torch.where(soft.logit > 0, 10.0, -10.0))
    assert float(soft.indecision(2.0)) == 0
    nearest = soft().detach()
    soft.settle()
    # The codes follow from what was written.
    assert torch.allclose(view.matrix(), nearest, atol=1e-6)
    assert torch.equal(view.codes(), view.codes().round())


def block_error(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        x, y = model.patch_embed(images), reference.patch_embed(images)
        x, y = (v.flatten(2).transpose(1, 2) for v in (x, y))
        return float((model.blocks[0](y) - reference.blocks[0](y)).square().mean())


@pytest.mark.parametrize('bits', [2, 3])
def test_a_block_is_nearer_than_by_rounding_to_nearest(bits: int, toy_vit: Make, images: Tensor) -> None:
    errors = {}
    for rounding in ('nearest', 'reconstruct'):
        model = toy_vit(depth=1)
        # Without activations at low bits all that differs is the rounding of weights.
        recipe = gplq.Recipe.reconstruct(bits, 8, rounding=rounding, fold_layernorm=False)
        gplq.prepare(model, recipe, images[:2])
        gplq.calibrate(model, [images])
        settings = gplq.Reconstruction(iterations=500, drop=0.0)
        gplq.quantize_weights(model, [images], reconstruction=settings)
        errors[rounding] = block_error(model, toy_vit(depth=1), images)
    assert errors['reconstruct'] < 0.8 * errors['nearest'], errors


def test_it_is_repeatable_and_leaves_no_trace(toy_vit: Make, images: Tensor) -> None:
    outputs = []
    for _ in range(2):
        model = toy_vit().train()
        gplq.prepare(model, gplq.Recipe.reconstruct(4, 4), images[:2])
        gplq.calibrate(model, [images])
        state = torch.random.get_rng_state()
        gplq.quantize_weights(model, [images[:8], images[8:]], reconstruction=gplq.Reconstruction(iterations=20))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.training and all(block.training for block in model.blocks)
        assert all(q.drop == 0 for _, q in named_quantizers(model))
        assert all(p.grad is None for p in model.parameters())
        with torch.no_grad():
            outputs.append(model.eval()(images))
    assert torch.equal(*outputs)


class Watched(nn.Module):
    """A block that notes how much it is given, and looks at all entries together if it is told to."""

    def __init__(self, block: nn.Module, together: bool) -> None:
        super().__init__()
        self.block, self.together, self.seen = block, together, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        y: Tensor = self.block(x)
        return y - y.mean(dim=0) if self.together else y


@pytest.mark.parametrize('together', [False, True])
def test_an_iteration_takes_a_few_entries_of_a_batch_where_the_block_treats_each_by_itself(
    together: bool, toy_vit: Make, images: Tensor
) -> None:
    model = toy_vit(depth=1)
    model.blocks[0] = Watched(model.blocks[0], together)
    gplq.prepare(model, gplq.Recipe.reconstruct(3, 3), images[:2])
    gplq.calibrate(model, [images])
    model.blocks[0].seen.clear()
    settings = gplq.Reconstruction(iterations=20, batch_size=4)
    # The last batch is smaller than an iteration's.
    gplq.quantize_weights(model, [images[:-2], images[-2:]], reconstruction=settings)
    whole = len(images) - 2
    learned = [size for size in model.blocks[0].seen if size != 2]
    assert set(learned) == {whole, 4}
    # The trial is one call; it is the only one where entries depend on one another.
    assert (learned.count(4) == 1) == together
    assert learned.count(whole) + learned.count(4) >= 10


def test_models_without_a_divergence_count_all_outputs_alike(toy_vit: Make, images: Tensor) -> None:
    """One logit has no divergence from itself: its slope says nothing."""
    model = toy_vit(depth=1)
    model.head = nn.Linear(16, 1)
    gplq.prepare(model, gplq.Recipe.reconstruct(2, 8, fold_layernorm=False), images[:2])
    gplq.calibrate(model, [images])
    gplq.quantize_weights(model, [images], reconstruction=gplq.Reconstruction(iterations=150, drop=0.0))
    nearest = toy_vit(depth=1)
    gplq.prepare(nearest, gplq.Recipe.reconstruct(2, 8, rounding='nearest', fold_layernorm=False), images[:2])
    gplq.calibrate(nearest, [images])
    gplq.quantize_weights(nearest, [images])
    assert block_error(model, toy_vit(depth=1), images) < 0.8 * block_error(nearest, toy_vit(depth=1), images)


def test_errors_are_weighed_by_what_the_head_makes_of_them(
    toy_vit: Make, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that reads half of the channels says that the other half matters less."""
    errors, seen = [], []
    collect, fit = reconstruct.collect_blocks, reconstruct._fit
    for factor in (1.0, 10.0):

        def scaled(*args: object, factor: float = factor) -> block_samples.BlockSamples:
            found = collect(*args)  # type: ignore[arg-type]
            ours = block_samples.BlockSamples(SampleStore(10.0))
            for sample in found:
                seen.append(sample.importance.mean(dim=(0, 1)))
                ours.add(replace(sample, importance=sample.importance * factor))
            return ours

        def watched(*args: object) -> tuple[float, float]:
            errors.append(fit(*args))  # type: ignore[arg-type]
            return errors[-1]

        model = toy_vit(depth=1)
        with torch.no_grad():
            model.norm.weight[8:] = 0
            model.norm.bias.zero_()
        monkeypatch.setattr(reconstruct, 'collect_blocks', scaled)
        monkeypatch.setattr(reconstruct, '_fit', watched)
        gplq.prepare(model, gplq.Recipe.reconstruct(2, 8), images[:2])
        gplq.calibrate(model, [images])
        gplq.quantize_weights(model, [images], reconstruction=gplq.Reconstruction(iterations=30))
    assert float(seen[0].mean()) == pytest.approx(1)
    assert float(seen[0][:8].mean()) > 2 * float(seen[0][8:].mean())
    # A factor common to all changes the errors, and nothing that is learned.
    assert errors[1] == pytest.approx([10 * error for error in errors[0]], rel=1e-3)


def test_blocks_that_a_journal_knows_are_not_learned_again(
    toy_vit: Make, images: Tensor, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(journal: Path) -> dict[str, Tensor]:
        model = toy_vit()
        gplq.prepare(model, gplq.Recipe.reconstruct(3, 4), images[:2])
        gplq.calibrate(model, [images])
        gplq.quantize_weights(model, [images], journal=journal, reconstruction=gplq.Reconstruction(iterations=30))
        return model.state_dict()

    expected = run(tmp_path / 'whole')
    fits, fit = [], reconstruct._fit

    def interrupted(*args: object) -> object:
        if len(fits) == 1:
            raise KeyboardInterrupt
        fits.append(args)
        return fit(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reconstruct, '_fit', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'journal')
    monkeypatch.setattr(reconstruct, '_fit', lambda *args: (fits.append(args), fit(*args))[1])
    found = run(tmp_path / 'journal')
    assert len(fits) == 2
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize('megabytes', [0.0, 0.02])
def test_samples_that_lie_in_files_are_the_same(megabytes: float, toy_vit: Make, images: Tensor) -> None:
    states = []
    for memory_mb in (megabytes, 100.0):
        model = toy_vit(depth=1)
        gplq.prepare(model, gplq.Recipe.reconstruct(3, 4), images[:2])
        gplq.calibrate(model, [images])
        settings = gplq.Reconstruction(iterations=20, memory_mb=memory_mb)
        gplq.quantize_weights(model, list(images.chunk(4)), reconstruction=settings)
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


class InPlace(nn.Module):
    """A block that adds to its input, of which the LayerNorm's gradient needs the old value."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = block.norm1, block.attn, block.norm2
        self.fc1, self.fc2 = block.fc1, block.fc2

    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.norm1(x))
        x += self.fc2(torch.nn.functional.gelu(self.fc1(self.norm2(x))))
        return x


class NextInPlace(nn.Module):
    """Adds to what the block before it gave, which no gradient needs."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1.0
        return x


def test_what_a_later_module_does_in_place_is_no_matter(toy_vit: Make, images: Tensor) -> None:
    outputs = []
    for after in (nn.Identity(), NextInPlace()):
        model = toy_vit(depth=1)
        # A common shift of all channels, which the LayerNorm behind it takes away.
        model.norm = nn.Sequential(after, model.norm)
        gplq.prepare(model, gplq.Recipe.reconstruct(3, 3, fold_layernorm=False), images[:2])
        gplq.calibrate(model, [images])
        gplq.quantize_weights(model, [images], reconstruction=gplq.Reconstruction(iterations=20))
        outputs.append(block_error(model, toy_vit(depth=1), images))
    assert outputs[0] == pytest.approx(outputs[1], rel=0.05)


def test_a_block_without_a_gradient_is_named(toy_vit: Make, images: Tensor) -> None:
    model = toy_vit()
    model.blocks = nn.ModuleList(InPlace(block) for block in model.blocks)
    gplq.prepare(model, gplq.Recipe.reconstruct(3, 3), images[:2])
    gplq.calibrate(model, [images])
    with pytest.raises(StageError, match=r'blocks.0 .*overwrites.* in place.*rounding='):
        gplq.quantize_weights(model, [images], reconstruction=gplq.Reconstruction(iterations=2))


def test_a_journal_of_other_settings_is_not_gone_on_with(toy_vit: Make, images: Tensor, tmp_path) -> None:
    def run(iterations: int, journal) -> Tensor:
        model = toy_vit()
        gplq.prepare(model, gplq.Recipe.reconstruct(3, 3, compensation='qwt'), images[:2])
        gplq.calibrate(model, [images])
        settings = gplq.Reconstruction(iterations=iterations)
        gplq.quantize_weights(model, [images], reconstruction=settings, journal=journal)
        with torch.no_grad():
            return model(images)

    run(1, tmp_path / 'shared')
    assert torch.equal(run(60, tmp_path / 'shared'), run(60, tmp_path / 'own'))


def test_what_is_refused(toy_vit: Make, images: Tensor) -> None:
    with pytest.raises(RecipeError, match='iterations=0'):
        gplq.Reconstruction(iterations=0)
    with pytest.raises(RecipeError, match='batch_size=0'):
        gplq.Reconstruction(batch_size=0)
    with pytest.raises(RecipeError, match='drop=1'):
        gplq.Reconstruction(drop=1)
    model = toy_vit()
    gplq.prepare(model, gplq.Recipe.reconstruct(4, 4), images[:2])
    gplq.calibrate(model, [images])
    with pytest.raises(StageError, match="rounding='reconstruct'.* need calibration batches"):
        gplq.quantize_weights(model)
