# The ViT's rival: ResNet-50 with FPN from scratch; heads, data and schedule of mask_rcnn_vit-tiny_nuclei.py.
#   python tools/train.py configs/mask_rcnn_r50_nuclei.py --cfg-options data_root=data/nuclei
_base_ = ['./mask_rcnn_vit-tiny_nuclei.py', './_base_/resnet50_fpn.py']

model = dict(backbone=_base_.resnet50, neck=_base_.fpn)
