# Blood cells: faster_rcnn_swin-mini_bccd.py taught by the ResNet-50 of faster_rcnn_r50_bccd.py,
# 40 epochs. Heads start from the teacher's weights, and the maps of its pyramid are a second aim.
#   python tools/train.py configs/faster_rcnn_swin-mini_bccd_distilled.py --cfg-options data_root=data/bccd
_base_ = ['./faster_rcnn_swin-mini_bccd.py', './_base_/averaged_adamw.py']

teacher = 'work_dirs/faster_rcnn_r50_bccd/epoch_40.pth'
model = dict(
    rpn_head=dict(init_cfg=dict(type='Pretrained', prefix='rpn_head', checkpoint=teacher)),
    roi_head=dict(init_cfg=dict(type='Pretrained', prefix='roi_head', checkpoint=teacher)),
)
custom_hooks = [
    dict(type='gplq.plugins.FeatureDistillationHook', config='configs/faster_rcnn_r50_bccd.py', checkpoint=teacher),
    _base_.average,
]
param_scheduler = _base_.cosine_to_a_fifth
