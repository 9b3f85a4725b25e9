# DeiT-B (87 M parameters) on ImageNet.
# It is not trained here; first_checkpoint.py fetches its weights.
#   python tools/first_checkpoint.py configs/deit_b_imagenet.py work_dirs/deit_b_imagenet/fp32.pth
#   python tools/test.py configs/deit_b_imagenet.py work_dirs/deit_b_imagenet/fp32.pth
_base_ = [
    './_base_/models/classifier_deit_b.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedule_classifier.py',
    './_base_/fgvc_runtime.py',
]

model = dict(num_classes=_base_.num_classes)
