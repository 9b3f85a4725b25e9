# The Swin's rival by the Swin's schedule: faster_rcnn_r50_bccd.py with averaged weights.
#   python tools/train.py configs/faster_rcnn_r50_bccd_averaged.py --cfg-options data_root=data/bccd
_base_ = ['./faster_rcnn_r50_bccd.py', './_base_/averaged_adamw.py']

custom_hooks = [_base_.average]
param_scheduler = _base_.cosine_to_a_fifth
