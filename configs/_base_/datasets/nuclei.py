# Cell nuclei (Data Science Bowl 2018, CC0): masks in fluorescent and stained tissue, up to 360 pixels a side.
# `data_root` holds train.json, dev.json, test.json and images/. Say where it is by GPLQ_DATA_ROOT, which
# every program understands, or to this project's programs by `--cfg-options data_root=PATH`.
_base_ = './coco_files.py'

data_root = '{{$GPLQ_DATA_ROOT:data/nuclei}}'
metainfo = dict(classes=('nucleus',))
image_size = (256, 256)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='RandomChoiceResize',
        scales=[(205, 205), (230, 230), (256, 256), (288, 288), (320, 320)],
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=(256, 256)),
    # Cells have no upright position.
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PhotoMetricDistortion', hue_delta=10),
    dict(type='Pad', size=image_size),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=1.0),  # mmdet's heads want to know a scale
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
val_evaluator = dict(ann_file=data_root + '/dev.json', metric=['bbox', 'segm'])
test_evaluator = dict(ann_file=data_root + '/test.json', metric=['bbox', 'segm'])
