# mmdet's own Mask R-CNN with Swin-T to 4-bit weights and activations: its shipped config and two lines.
#   python tools/train.py configs/gplq_mask_rcnn_swin-t_coco.py --cfg-options data_root=data/coco/
# FP32: box AP 42.7, mask AP 39.3 on val2017, as published. 4 bits: not measured yet (the paper: 37.9, 36.8).
_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'

default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4))
load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-t-p4-w7_fpn_1x_coco/'
    'mask_rcnn_swin-t-p4-w7_fpn_1x_coco_20210902_120937-9d6b7cfa.pth'
)
