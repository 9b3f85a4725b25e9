# Blood cells: boxes by Faster R-CNN on a small Swin, 40 epochs; heads, data and schedule of
# faster_rcnn_vit-tiny_bccd.py. GPLQ_SWIN_CHECKPOINT names the first weights of the Swin, a timm checkpoint.
#   python tools/train.py configs/faster_rcnn_swin-mini_bccd.py --cfg-options data_root=data/bccd
_base_ = ['./faster_rcnn_vit-tiny_bccd.py', './_base_/swin-mini_fpn.py']

model = dict(backbone=_base_.swin, neck=_base_.fpn)
# The windows of 240 images do not overfit: a larger rate and no stochastic depth is better on dev.
optim_wrapper = dict(optimizer=dict(lr=1e-3))
