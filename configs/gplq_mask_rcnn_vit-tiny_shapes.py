# The demo's detector to 4-bit weights and activations.
#   python tools/train.py configs/gplq_mask_rcnn_vit-tiny_shapes.py --cfg-options load_from=CHECKPOINT
_base_ = './mask_rcnn_vit-tiny_shapes.py'

default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4))
load_from = 'work_dirs/mask_rcnn_vit-tiny_shapes/epoch_5.pth'
