# Loaders of images of 64 x 64 pixels, in the layout of CUB-200-2011 with a split of what is held out into dev and test.
# A leaf gives data_root.
train_pipeline = [
    dict(type='gplq.plugins.fgvc.LoadImage'),
    dict(
        type='gplq.plugins.fgvc.TimmTransform',
        input_size=(3, 64, 64),
        is_training=True,
        scale=(0.35, 1.0),
        color_jitter=0.3,
        interpolation='bicubic',
    ),
    dict(type='gplq.plugins.fgvc.PackImage'),
]
test_pipeline = [
    dict(type='gplq.plugins.fgvc.LoadImage'),
    dict(type='gplq.plugins.fgvc.TimmTransform', input_size=(3, 64, 64), is_training=False, crop_pct=1.0),
    dict(type='gplq.plugins.fgvc.PackImage'),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='gplq.plugins.fgvc.CUBDataset', split='train', split_file='dev_test_split.txt', pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='gplq.plugins.fgvc.CUBDataset',
        split='dev',
        split_file='dev_test_split.txt',
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = dict(
    batch_size=128,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='gplq.plugins.fgvc.CUBDataset',
        split='test',
        split_file='dev_test_split.txt',
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
