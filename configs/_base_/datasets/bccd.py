# Blood cells (BCCD, MIT license): boxes of platelets, red and white cells in 640 x 480 micrographs, halved to
# 320 x 240. `data_root` holds train.json, dev.json, test.json and images/. Say where it is by GPLQ_DATA_ROOT,
# which every program understands, or to this project's programs by `--cfg-options data_root=PATH`.
_base_ = './coco_files.py'

data_root = '{{$GPLQ_DATA_ROOT:data/bccd}}'
metainfo = dict(classes=('Platelets', 'RBC', 'WBC'))
image_size = (320, 240)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(240, 320)),
    # Cells have no upright position.
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PhotoMetricDistortion', hue_delta=10),
    dict(type='Pad', size=image_size),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
val_evaluator = dict(ann_file=data_root + '/dev.json', metric=['bbox'])
test_evaluator = dict(ann_file=data_root + '/test.json', metric=['bbox'])
