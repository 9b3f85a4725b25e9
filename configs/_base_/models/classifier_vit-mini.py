# A plain ViT of 2.8 M parameters for images of 64 x 64: patch 8, width 192, 6 blocks.
model = dict(
    type='gplq.plugins.fgvc.TimmClassifier',
    model_name='vit_tiny_patch16_224',
    model_args=dict(img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3),
    num_classes=100,
    label_smoothing=0.1,
    init_cfg=dict(type='Pretrained', checkpoint='{{$GPLQ_VIT_CHECKPOINT:checkpoints/vit_objects100.safetensors}}'),
)
