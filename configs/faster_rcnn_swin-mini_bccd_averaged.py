# Blood cells: faster_rcnn_swin-mini_bccd.py with averaged weights and stochastic depth, 40 epochs.
#   python tools/train.py configs/faster_rcnn_swin-mini_bccd_averaged.py --cfg-options data_root=data/bccd
# Box AP on dev is 0.58, without averaging 0.57.
_base_ = ['./faster_rcnn_swin-mini_bccd.py', './_base_/averaged_adamw.py']

model = dict(backbone=dict(model_args=dict(drop_path_rate=0.1)))
custom_hooks = [_base_.average]
param_scheduler = _base_.cosine_to_a_fifth
