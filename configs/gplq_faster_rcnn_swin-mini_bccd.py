# Blood cells: the FP32 Faster R-CNN of faster_rcnn_swin-mini_bccd_averaged.py to 4-bit weights and activations.
#   python tools/train.py configs/gplq_faster_rcnn_swin-mini_bccd.py --cfg-options data_root=data/bccd
_base_ = './faster_rcnn_swin-mini_bccd.py'

model = dict(backbone=dict(init_cfg=None))  # load_from brings every weight
default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4))
load_from = 'work_dirs/faster_rcnn_swin-mini_bccd_averaged/epoch_40.pth'
