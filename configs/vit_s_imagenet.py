# ViT-S (22 M parameters) of "How to train your ViT" on ImageNet.
# It is not trained here; first_checkpoint.py fetches its weights.
#   python tools/first_checkpoint.py configs/vit_s_imagenet.py work_dirs/vit_s_imagenet/fp32.pth
#   python tools/test.py configs/vit_s_imagenet.py work_dirs/vit_s_imagenet/fp32.pth
_base_ = [
    './_base_/models/classifier_vit_s.py',
    './_base_/datasets/imagenet_half.py',
    './_base_/schedule_classifier.py',
    './_base_/fgvc_runtime.py',
]

model = dict(num_classes=_base_.num_classes)
