# The ViT's rival by the ViT's schedule: mask_rcnn_r50_nuclei.py with averaged weights.
#   python tools/train.py configs/mask_rcnn_r50_nuclei_averaged.py --cfg-options data_root=data/nuclei
_base_ = ['./mask_rcnn_r50_nuclei.py', './_base_/averaged_adamw.py']

custom_hooks = [_base_.average]
param_scheduler = _base_.cosine_to_a_fifth
