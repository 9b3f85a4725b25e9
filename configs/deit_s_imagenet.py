# DeiT-S (22 M parameters) on ImageNet.
# It is not trained here; first_checkpoint.py fetches its weights.
#   python tools/first_checkpoint.py configs/deit_s_imagenet.py work_dirs/deit_s_imagenet/fp32.pth
#   python tools/test.py configs/deit_s_imagenet.py work_dirs/deit_s_imagenet/fp32.pth
_base_ = [
    './_base_/models/classifier_deit_s.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedule_classifier.py',
    './_base_/fgvc_runtime.py',
]

model = dict(num_classes=_base_.num_classes)
