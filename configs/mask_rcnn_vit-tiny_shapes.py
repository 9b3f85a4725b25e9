# Mask R-CNN with a plain ViT (1.9 of 3.1 M parameters) on generated shapes, small enough for two CPU cores; the FP32
# detector of `make demo`.
#   python tools/make_shapes.py work_dirs/shapes --train 1800 --val 256
#   python tools/train.py configs/mask_rcnn_vit-tiny_shapes.py
_base_ = [
    './_base_/models/mask_rcnn_vit-tiny.py',
    './_base_/datasets/shapes.py',
    './_base_/schedule_adamw.py',
    './_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        img_size=128,
        pretrain_img_size=128,
        depth=4,
        # 16 x 16 patches: four windows in the first and third block.
        window_block_indexes=[0, 2],
        drop_path_rate=0.0,
        init_cfg=None,
    ),
    neck=dict(out_channels=64, scales=(2.0, 1.0, 0.5), num_outs=3),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(strides=[4, 8, 16])),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=1), out_channels=64, featmap_strides=[4, 8, 16], finest_scale=28
        ),
        # One box and one mask regressor for all classes: a class alone has too few examples in five epochs.
        bbox_head=dict(in_channels=64, num_classes=6, reg_class_agnostic=True),
        mask_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=1), out_channels=64, featmap_strides=[4, 8, 16], finest_scale=28
        ),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_classes=6, class_agnostic=True),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=200, max_per_img=60),
        rcnn=dict(sampler=dict(num=48, pos_fraction=0.25)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=60), rcnn=dict(max_per_img=30)),
)
max_epochs = 5
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
optim_wrapper = dict(optimizer=dict(lr=7e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=200),
    dict(type='CosineAnnealingLR', begin=0, end=max_epochs, T_max=max_epochs, convert_to_iter_based=True),
]
