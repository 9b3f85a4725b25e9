# Swin-B (88 M parameters), pre-trained on ImageNet-22k on ImageNet.
# It is not trained here; first_checkpoint.py fetches its weights.
#   python tools/first_checkpoint.py configs/swin_b_imagenet.py work_dirs/swin_b_imagenet/fp32.pth
#   python tools/test.py configs/swin_b_imagenet.py work_dirs/swin_b_imagenet/fp32.pth
_base_ = [
    './_base_/models/classifier_swin_b.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedule_classifier.py',
    './_base_/fgvc_runtime.py',
]

model = dict(num_classes=_base_.num_classes)
