# Cell nuclei: masks by Mask R-CNN on a small Swin, 40 epochs; heads, data and schedule of
# mask_rcnn_vit-tiny_nuclei.py. GPLQ_SWIN_CHECKPOINT names the first weights of the Swin, a timm checkpoint.
#   python tools/train.py configs/mask_rcnn_swin-mini_nuclei.py --cfg-options data_root=data/nuclei
_base_ = ['./mask_rcnn_vit-tiny_nuclei.py', './_base_/swin-mini_fpn.py']

model = dict(backbone=_base_.swin, neck=_base_.fpn)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
