# Loaders of a data set that lies as train.json, dev.json, test.json and images/. A leaf gives data_root,
# metainfo and the pipelines.
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CocoDataset', ann_file='train.json', data_prefix=dict(img='images/')),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CocoDataset', ann_file='dev.json', data_prefix=dict(img='images/'), test_mode=True),
)
test_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CocoDataset', ann_file='test.json', data_prefix=dict(img='images/'), test_mode=True),
)
val_evaluator = dict(type='CocoMetric')
test_evaluator = dict(type='CocoMetric')
