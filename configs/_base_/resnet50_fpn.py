# A ResNet-50 with FPN from scratch, to stand in place of another backbone and neck.
resnet50 = dict(
    _delete_=True,
    type='ResNet',
    depth=50,
    num_stages=4,
    out_indices=(0, 1, 2, 3),
    frozen_stages=-1,
    norm_cfg=dict(type='BN'),
    norm_eval=False,
    style='pytorch',
)
fpn = dict(
    _delete_=True,
    type='FPN',
    in_channels=[256, 512, 1024, 2048],
    out_channels=96,
    norm_cfg=dict(type='gplq.plugins.detection.LN2d'),
    num_outs=4,
)
