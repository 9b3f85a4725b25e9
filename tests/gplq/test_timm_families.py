"""The verbs over timm's transformer families at small size: each is right at 8 bits or refused with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import gplq
from gplq import integer
from gplq.quantizer import Quantizer
from gplq.record import named_products, record_of, weight_views

timm = pytest.importorskip('timm')
from timm import models  # noqa: E402

BATCH = 8
CLASSES = 10
# The searches at few candidates: what is tested here is the breadth, not the accuracy.
RECIPE = gplq.Recipe.gplq(8, 8, exponents=(0.0, 0.5, 1.0), clips=(1.0,), compensation='none', rounding='nearest')


@dataclass(frozen=True)
class Family:
    """A small member: how it is made, its image size, how many attention products it has."""

    make: Callable[[], nn.Module]
    size: int
    products: int


def _named(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)
        return made

    return make


def _direct(module: str, name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = getattr(getattr(models, module), name)(num_classes=CLASSES, **settings)
        return made

    return make


def _mvitv2() -> nn.Module:
    cfg = models.mvitv2.MultiScaleVitCfg(
        depths=(1, 1), embed_dim=(16, 32), num_heads=(1, 2), stride_q=((1, 1), (2, 2)), stride_kv_adaptive=(4, 4)
    )
    made: nn.Module = models.mvitv2.MultiScaleVit(cfg, img_size=(64, 64), num_classes=CLASSES)
    return made


def _maxxvit(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=CLASSES, img_size=64, embed_dim=(32, 32, 32, 32), stem_width=(8, 16)
        )
        return made

    return make


PLAIN: dict[str, Any] = {'embed_dim': 32, 'depth': 2, 'num_heads': 2}
SMALL: dict[str, Any] = {**PLAIN, 'img_size': 32, 'patch_size': 8}
DINO: dict[str, Any] = {**PLAIN, 'img_size': 28, 'patch_size': 7}
WINDOWS: dict[str, Any] = {
    'img_size': 64,
    'window_size': 4,
    'embed_dim': 16,
    'depths': (2, 2),
    'num_heads': (2, 2),
}
FOUR: tuple[int, ...] = (16, 16, 32, 32)

FAMILIES: dict[str, Family] = {
    'vit': Family(_named('vit_tiny_patch16_224', **SMALL), 32, 4),
    'vit_qk_norm': Family(_named('test_vit', **SMALL, qk_norm=True), 32, 4),
    'vit_map_pool': Family(_named('vit_base_patch16_siglip_224', **SMALL), 32, 6),
    'vit_parallel': Family(_named('vit_small_patch16_18x2_224', **SMALL), 32, 8),
    'vit_parallel_scaling': Family(_named('test_vit4', img_size=32, patch_size=8), 32, 18),
    'vit_swiglu': Family(_named('vit_giant_patch14_dinov2', **DINO), 28, 4),
    'deit': Family(_named('deit_tiny_patch16_224', **SMALL), 32, 4),
    'deit_distilled': Family(_named('deit_tiny_distilled_patch16_224', **SMALL), 32, 4),
    'deit3': Family(_named('deit3_small_patch16_224', **SMALL), 32, 4),
    'dinov2_registers': Family(_named('vit_small_patch14_reg4_dinov2', **DINO), 28, 4),
    'dinov3': Family(_named('vit_small_patch16_dinov3', **SMALL), 32, 4),
    'swin': Family(_named('swin_tiny_patch4_window7_224', **WINDOWS), 64, 8),
    'swin_v2': Family(_named('swinv2_tiny_window8_256', **WINDOWS), 64, 8),
    'swin_v2_cr': Family(_named('swinv2_cr_tiny_224', **WINDOWS), 64, 8),
    'beit': Family(_named('beit_base_patch16_224', **SMALL), 32, 4),
    'beit_v2': Family(_named('beitv2_base_patch16_224', **SMALL), 32, 4),
    'eva': Family(_named('eva_giant_patch14_224', **DINO), 28, 4),
    'eva02': Family(_named('eva02_tiny_patch14_336', **DINO), 28, 4),
    'cait': Family(_named('cait_xxs24_224', **SMALL), 32, 8),
    'xcit': Family(_named('xcit_nano_12_p16_224', **PLAIN, img_size=64), 64, 8),
    'pvt_v2': Family(_named('pvt_v2_b0', depths=(1, 1, 1, 1), embed_dims=FOUR, num_heads=(1, 2, 2, 2)), 64, 8),
    'pvt_v2_linear': Family(
        _named('pvt_v2_b2_li', depths=(1, 1, 1, 1), embed_dims=FOUR, num_heads=(1, 2, 2, 2)), 64, 8
    ),
    'maxvit': Family(_maxxvit('test_maxvit'), 64, 16),
    'coatnet': Family(_maxxvit('test_coatnet'), 64, 6),
    'mvit_v2': Family(_mvitv2, 64, 4),
    'sam': Family(
        _named(
            'samvit_base_patch16',
            **{**SMALL, 'img_size': 64},
            window_size=3,
            global_attn_indexes=(1,),
            neck_chans=16,
        ),
        64,
        4,
    ),
    'hybrid': Family(_named('vit_tiny_r_s16_p8_224', **PLAIN, img_size=64), 64, 4),
    'tiny_vit': Family(
        _direct(
            'tiny_vit',
            'TinyVit',
            embed_dims=FOUR,
            depths=(1, 1, 1, 1),
            num_heads=(2, 2, 2, 2),
            window_sizes=(7, 4, 4, 2),
        ),
        64,
        6,
    ),
    'twins_pcpvt': Family(
        _named('twins_pcpvt_small', img_size=64, embed_dims=FOUR, num_heads=(1, 2, 2, 2), depths=(1, 1, 1, 1)),
        64,
        8,
    ),
    'twins_svt': Family(
        _named(
            'twins_svt_small',
            img_size=64,
            embed_dims=FOUR,
            num_heads=(1, 2, 2, 2),
            depths=(2, 1, 1, 1),
            wss=(4, 4, 2, 2),
        ),
        64,
        10,
    ),
    'hiera': Family(
        _named('hiera_tiny_224', img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 2, 1)), 64, 10
    ),
    'hiera_det': Family(
        _direct(
            'hieradet_sam2',
            'HieraDet',
            embed_dim=16,
            num_heads=1,
            stages=(1, 1, 2, 1),
            window_spec=(8, 4, 4, 4),
            global_att_blocks=(3,),
        ),
        64,
        10,
    ),
    'levit': Family(
        _named('levit_128s', img_size=64, embed_dim=(16, 32), key_dim=8, depth=(1, 1), num_heads=(2, 2)), 64, 6
    ),
    'levit_conv': Family(
        _named('levit_conv_128s', img_size=64, embed_dim=(16, 32), key_dim=8, depth=(1, 1), num_heads=(2, 2)), 64, 6
    ),
    'efficientformer': Family(_named('efficientformer_l1', depths=(1, 1, 1, 2), embed_dims=FOUR, num_vit=1), 224, 2),
    'efficientformer_v2': Family(
        _named(
            'efficientformerv2_s0',
            img_size=64,
            depths=(1, 1, 2, 2),
            embed_dims=FOUR,
            num_vit=1,
            mlp_ratios=(2, 2, (2, 2), (2, 2)),
        ),
        64,
        6,
    ),
    'mobilevit': Family(_named('mobilevit_xxs'), 64, 18),
    'mobilevit_v2': Family(_named('mobilevitv2_050'), 64, 0),
    'pit': Family(
        _named(
            'pit_ti_224', img_size=64, patch_size=8, stride=4, base_dims=(16, 16, 16), depth=(1, 1, 1), heads=(2, 2, 2)
        ),
        64,
        6,
    ),
    'coat': Family(
        _direct(
            'coat',
            'CoaT',
            img_size=64,
            patch_size=4,
            embed_dims=(16, 16, 16, 16),
            serial_depths=(1, 1, 1, 1),
            num_heads=2,
            crpe_window={3: 1, 5: 1},
        ),
        64,
        4,
    ),
    'nest': Family(
        _direct('nest', 'Nest', img_size=64, num_levels=2, embed_dims=(16, 32), num_heads=(2, 2), depths=(1, 1)), 64, 4
    ),
    'focalnet': Family(_direct('focalnet', 'FocalNet', embed_dim=16, depths=(1, 1, 1, 1)), 64, 0),
    'davit': Family(_named('davit_tiny', depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 2), window_size=4), 64, 8),
    'gcvit': Family(
        _direct(
            'gcvit',
            'GlobalContextVit',
            img_size=64,
            window_size=(4, 4, 2, 2),
            embed_dim=16,
            depths=(2, 2, 2, 2),
            num_heads=(2, 2, 2, 2),
        ),
        64,
        16,
    ),
    'poolformer': Family(_direct('metaformer', 'MetaFormer', depths=(1, 1, 1, 1), dims=FOUR), 64, 0),
    'caformer': Family(
        _direct(
            'metaformer',
            'MetaFormer',
            depths=(1, 1, 1, 1),
            dims=(32, 32, 64, 64),
            token_mixers=[models.metaformer.SepConv] * 2 + [models.metaformer.Attention] * 2,
            norm_layers=[models.metaformer.LayerNorm2dNoBias] * 2 + [models.metaformer.LayerNormNoBias] * 2,
        ),
        64,
        4,
    ),
    'volo': Family(
        _direct(
            'volo',
            'VOLO',
            layers=(1, 1, 1, 1),
            img_size=64,
            stem_hidden_dim=16,
            embed_dims=(16, 32, 32, 32),
            num_heads=(2, 2, 2, 2),
        ),
        64,
        11,
    ),
    'convit': Family(_named('convit_tiny', **SMALL, local_up_to_layer=1), 32, 4),
    'crossvit': Family(
        _direct(
            'crossvit',
            'CrossVit',
            img_size=48,
            patch_size=(8, 16),
            embed_dim=(16, 32),
            depth=((1, 1, 1),),
            num_heads=(2, 2),
        ),
        48,
        8,
    ),
    'nextvit': Family(_named('nextvit_small', depths=(1, 1, 5, 1)), 64, 6),
    'edgenext': Family(_named('edgenext_xx_small', dims=FOUR, depths=(1, 1, 2, 2)), 64, 6),
    'fastvit': Family(_named('fastvit_sa12', layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 64)), 64, 2),
    'vitamin': Family(_named('vitamin_small_224', img_size=64, depth=1), 64, 2),
    'repvit': Family(_named('repvit_m0_9', embed_dim=(16, 16, 16, 16), depth=(1, 1, 1, 1)), 64, 0),
    'naflexvit': Family(_named('naflexvit_base_patch16_gap', **PLAIN, patch_size=8), 32, 4),
    'visformer': Family(_named('visformer_tiny', img_size=64, embed_dim=32, depth=(1, 1, 1), num_heads=2), 64, 4),
    'tnt': Family(
        _named(
            'tnt_s_patch16_224', img_size=64, embed_dim=32, inner_dim=16, depth=2, num_heads_inner=2, num_heads_outer=2
        ),
        64,
        8,
    ),
    'relpos': Family(_named('vit_relpos_small_patch16_224', **SMALL), 32, 4),
    'relpos_mlp': Family(_named('vit_relpos_base_patch32_plus_rpn_256', **SMALL), 32, 4),
    'efficientvit_mit': Family(
        _named(
            'efficientvit_b0',
            widths=(8, 8, 16, 16, 16),
            depths=(1, 1, 1, 1, 1),
            head_dim=8,
            head_widths=(32, 32),
        ),
        64,
        0,
    ),
    'efficientvit_msra': Family(
        _named(
            'efficientvit_m0',
            img_size=64,
            embed_dim=(16, 32, 48),
            key_dim=(8, 8, 8),
            depth=(1, 1, 1),
            num_heads=(1, 2, 3),
            window_size=(4, 4, 4),
        ),
        64,
        12,
    ),
    'botnet': Family(_named('botnet26t_256', img_size=64, stem_chs=16), 64, 6),
    'halonet': Family(_named('halonet26t'), 256, 6),
    'mlp_mixer': Family(_direct('mlp_mixer', 'MlpMixer', img_size=32, patch_size=8, num_blocks=2, embed_dim=32), 32, 0),
    'convnext': Family(_named('convnext_atto', depths=(1, 1, 1, 1), dims=FOUR), 64, 0),
    'deepseek_vit': Family(_named('deepseek_vit_412m', **SMALL), 32, 4),
    'gemma4_vit': Family(_named('gemma4_vit_167m', **PLAIN), 32, 4),
    'qwen3_vit': Family(_named('qwen3_vit_88m', **PLAIN), 32, 4),
}


def pictures(size: int) -> Tensor:
    """Images that differ in color and large shapes, so that pooling leaves something to tell them apart by."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(BATCH, 3, 4, 4, generator=generator)
    shapes = nn.functional.interpolate(coarse, size=(size, size), mode='bilinear')
    colors = torch.randn(BATCH, 3, 1, 1, generator=generator)
    return shapes + colors + 0.1 * torch.randn(BATCH, 3, size, size, generator=generator)


def randomized(model: nn.Module) -> nn.Module:
    """Weights at which the output depends on the input: timm's own start out nearly constant."""
    generator = torch.Generator().manual_seed(1)
    # Batch normalization scales nothing in a fresh model: convolutions must keep the signal's size themselves.
    normalized = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    gain = 1.3 if normalized else 0.7
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                noise = torch.randn(p.shape, generator=generator)
                norm = 'norm' in type(module).__name__.lower() or 'bn' in type(module).__name__.lower()
                if norm and name == 'weight':
                    p.copy_(1 + 0.2 * noise)
                elif norm or name.endswith('bias') or 'bias' in name and p.dim() == 1:
                    p.copy_(0.1 * noise)
                elif isinstance(module, (nn.Linear, nn.Conv2d)) or 'weight' in name and p.dim() > 1:
                    p.copy_(gain * noise / p[0].numel() ** 0.5)
                elif p.dim() <= 1 or p.numel() == max(p.shape):
                    # Layer scales and temperatures: alive, but the residual stream stays the larger part.
                    p.copy_(0.5 + 0.1 * noise)
                else:
                    p.copy_(0.2 * noise)
    return model.eval()


@dataclass
class Watch:
    """Every call of every map and product during a forward pass."""

    maps: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    products: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)


def watch(model: nn.Module, images: Tensor) -> Watch:
    seen = Watch()
    for _, view in weight_views(model):
        calls = seen.maps.setdefault(view.name, [])
        view.map.watcher = lambda x, y, calls=calls: calls.append((x.clone(), y.clone()))
    for name, product in named_products(model):
        found = seen.products.setdefault(name, [])
        product.watcher = lambda left, right, y, found=found: found.append((left.clone(), right.clone(), y.clone()))
    with torch.no_grad():
        model(images)
    for _, view in weight_views(model):
        view.map.watcher = None
    for _, product in named_products(model):
        product.watcher = None
    return seen


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= 2e-4 * max(1e-6, float(expected.abs().max()))


def check_integers(model: nn.Module, images: Tensor) -> None:
    """Every map and product that the forward evaluated, recomputed from integer codes."""
    seen = watch(model, images)
    functional = {
        f'{owner.name}.{child}' if owner.name else child
        for owner in record_of(model).plan.owners
        for child in owner.functional_linears
    }
    for _, view in weight_views(model):
        assert seen.maps[view.name], view.name
        for x, y in seen.maps[view.name]:
            found = integer.linear_from_codes(view, x)
            if view.name in functional:
                # The parent passes a bias of its own: it is all that may differ, the same for every token.
                found = found + (y - found).flatten(0, -2).mean(0)
            assert close(found, y), view.name
    for name, product in named_products(model):
        assert seen.products[name], name
        for left, right, y in seen.products[name]:
            assert close(integer.product_from_codes(product, left, right), y), name


def flat(output: Any) -> Tensor:
    if isinstance(output, (tuple, list)):
        return torch.cat([x.flatten(1) for x in output], dim=1)
    return output.flatten(1)


def relative_error(found: Any, expected: Any) -> float:
    """Error against what the output tells images apart by, not against its common part."""
    found, expected = flat(found), flat(expected)
    signal = expected - expected.mean(0)
    return float((found - expected).norm() / signal.norm())


def add_rounding_noise(quantizer: Quantizer, x: Tensor) -> Tensor:
    """What rounding is taken for: uniform noise of one step."""
    return x + (torch.rand_like(x) - 0.5) * quantizer.scale_over(len(x)) if quantizer.enabled else x


SLOW = ('gemma4_vit', 'nextvit', 'mobilevit', 'mobilevit_v2', 'botnet', 'halonet')


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES])
def test_verbs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    images = pictures(family.size)
    model = randomized(family.make())
    keys = list(model.state_dict())
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images)

    plan = gplq.prepare(model, RECIPE, images[:2])
    assert [key for key in model.state_dict() if key in keys] == keys
    assert len(plan.products) == family.products
    with torch.no_grad():
        assert torch.equal(model(images), expected)

    gplq.calibrate(model, [images])
    with torch.no_grad():
        activations_only = relative_error(model(images), expected)
        with monkeypatch.context() as patch:
            patch.setattr(Quantizer, 'forward', add_rounding_noise)
            noise = relative_error(model(images), expected)
    # A convolution at random weights passes noise on louder than a trained one; a fault shows far above this.
    assert activations_only <= 0.02 + 2.5 * noise

    def task(trained: nn.Module, batch: Tensor) -> Tensor:
        # The statistics never belonged to these weights: training by those of the batch is another function.
        for module in trained.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return (trained(batch) / expected.abs().max()).square().mean()

    stage = gplq.ActivationStage(lr=1e-6, scale_lr=1e-4, rank=2)
    gplq.train_activations(model, [images], teacher=teacher, stage=stage, loss=task)
    gplq.quantize_weights(model, [images])
    with torch.no_grad():
        found = model(images)
    assert relative_error(found, expected) <= 0.05 + 3 * noise
    check_integers(model, images)

    summary = gplq.summary(model)
    every = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    named = {row.name for row in summary.weights} | {row.name for row in summary.floating}
    assert every <= named
    assert all(row.calibrated for row in summary.sites)
    assert summary.packed_bytes < summary.float_bytes
    assert 'in floating point' in str(summary)

    gplq.save(model, tmp_path / 'model.safetensors')
    loaded = gplq.load(family.make(), tmp_path / 'model.safetensors').eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), found)


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES])
def test_every_multiplication_is_in_the_summary(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.make().eval(), pictures(family.size)[:1]
    # The fused kernel of the CPU is one that torch does not count. Its module tracker wants gradients.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    plan = gplq.prepare(model, 'w4a4', images)
    # Torch counts matrix products and convolutions; MobileViTv2 weights values one by one.
    rows = (*plan.maps, *plan.products, *(row for row in plan.floating if row.what != 'mul'))
    assert 2 * sum(row.multiplications for row in rows) == counter.get_total_flops()


def test_attention_without_products_is_refused_by_name() -> None:
    """SwiftFormer's additive attention multiplies no matrices: nothing tells it from a custom kernel."""
    made = timm.create_model(
        'swiftformer_xs', pretrained=False, num_classes=CLASSES, layers=(1, 1, 1, 1), embed_dims=FOUR
    ).eval()
    with pytest.raises(gplq.GPLQError, match=r'stages\.0\.blocks\.0\.attn.*skip'):
        gplq.prepare(made, RECIPE, pictures(64)[:2])
    gplq.prepare(made, RECIPE.replace(skip=('*.attn',)), pictures(64)[:2])
