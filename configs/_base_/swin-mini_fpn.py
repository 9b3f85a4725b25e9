# A Swin of 6.9 M parameters (width 48, depths 2-2-6-2) with FPN, to stand in place of another backbone and neck.
swin = dict(
    _delete_=True,
    type='gplq.plugins.detection.TimmBackbone',
    model_name='swin_tiny_patch4_window7_224',
    model_args=dict(
        img_size=256,
        # Images of any size: what does not fill a window is padded.
        strict_img_size=False,
        window_size=8,
        embed_dim=48,
        depths=(2, 2, 6, 2),
        num_heads=(2, 4, 8, 16),
        drop_path_rate=0.0,
    ),
    init_cfg=dict(type='Pretrained', checkpoint='{{$GPLQ_SWIN_CHECKPOINT:checkpoints/swin_objects100.safetensors}}'),
)
fpn = dict(
    _delete_=True,
    type='FPN',
    in_channels=[48, 96, 192, 384],
    out_channels=96,
    norm_cfg=dict(type='gplq.plugins.detection.LN2d'),
    num_outs=4,
)
