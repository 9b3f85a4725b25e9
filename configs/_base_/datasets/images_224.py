# Loaders of photographs at 224 x 224, normalized by ImageNet's mean and deviation. A piece for each data set says what
# it is.
train_pipeline = [
    dict(type='gplq.plugins.fgvc.LoadImage'),
    dict(
        type='gplq.plugins.fgvc.TimmTransform',
        input_size=(3, 224, 224),
        is_training=True,
        color_jitter=0.3,
        interpolation='bicubic',
    ),
    dict(type='gplq.plugins.fgvc.PackImage'),
]
test_pipeline = [
    dict(type='gplq.plugins.fgvc.LoadImage'),
    dict(
        type='gplq.plugins.fgvc.TimmTransform',
        input_size=(3, 224, 224),
        is_training=False,
        interpolation='bicubic',
        crop_pct=0.9,
    ),
    dict(type='gplq.plugins.fgvc.PackImage'),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(pipeline=test_pipeline, test_mode=True),
)
test_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(pipeline=test_pipeline, test_mode=True),
)
