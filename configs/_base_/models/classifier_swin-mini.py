# A Swin of 6.9 M parameters for images of 64 x 64: width 48, depths 2-2-6-2, windows of 4 x 4.
model = dict(
    type='gplq.plugins.fgvc.TimmClassifier',
    model_name='swin_tiny_patch4_window7_224',
    model_args=dict(img_size=64, window_size=4, embed_dim=48, depths=(2, 2, 6, 2), num_heads=(2, 4, 8, 16)),
    num_classes=100,
    label_smoothing=0.1,
    init_cfg=dict(type='Pretrained', checkpoint='{{$GPLQ_SWIN_CHECKPOINT:checkpoints/swin_objects100.safetensors}}'),
)
