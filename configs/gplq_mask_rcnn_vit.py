# ViTDet's Mask R-CNN with ViT-B to 4-bit weights and activations, from mmdetection's published checkpoint.
#   python tools/train.py configs/gplq_mask_rcnn_vit.py --cfg-options data_root=data/coco/
# FP32: box AP 51.6, mask AP 45.7 on val2017, as published. 4 bits: not measured yet.
_base_ = './mask_rcnn_vit-b_coco.py'

model = dict(backbone=dict(init_cfg=None))  # load_from brings every weight
default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4))
load_from = (
    'https://download.openmmlab.com/mmdetection/v3.0/vitdet/vitdet_mask-rcnn_vit-b-mae_lsj-100e/'
    'vitdet_mask-rcnn_vit-b-mae_lsj-100e_20230328_153519-e15fe294.pth'
)
