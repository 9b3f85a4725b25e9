# The ViT's rival: ResNet-50 with FPN from scratch; heads, data and schedule of faster_rcnn_vit-tiny_bccd.py.
#   python tools/train.py configs/faster_rcnn_r50_bccd.py --cfg-options data_root=data/bccd
_base_ = ['./faster_rcnn_vit-tiny_bccd.py', './_base_/resnet50_fpn.py']

model = dict(backbone=_base_.resnet50, neck=_base_.fpn)
