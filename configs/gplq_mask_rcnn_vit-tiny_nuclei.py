# Cell nuclei: the FP32 Mask R-CNN of mask_rcnn_vit-tiny_nuclei_distilled.py to 4-bit weights and activations.
#   python tools/train.py configs/gplq_mask_rcnn_vit-tiny_nuclei.py --cfg-options data_root=data/nuclei
_base_ = './mask_rcnn_vit-tiny_nuclei.py'

model = dict(backbone=dict(init_cfg=None))  # load_from brings every weight
default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4))
load_from = 'work_dirs/mask_rcnn_vit-tiny_nuclei_distilled/epoch_40.pth'
