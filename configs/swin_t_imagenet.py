# Swin-T (28 M parameters) on ImageNet.
# It is not trained here; first_checkpoint.py fetches its weights.
#   python tools/first_checkpoint.py configs/swin_t_imagenet.py work_dirs/swin_t_imagenet/fp32.pth
#   python tools/test.py configs/swin_t_imagenet.py work_dirs/swin_t_imagenet/fp32.pth
_base_ = [
    './_base_/models/classifier_swin_t.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedule_classifier.py',
    './_base_/fgvc_runtime.py',
]

model = dict(num_classes=_base_.num_classes)
