# ViT-B (87 M parameters) of "How to train your ViT" on ImageNet.
# It is not trained here; first_checkpoint.py fetches its weights.
#   python tools/first_checkpoint.py configs/vit_b_imagenet.py work_dirs/vit_b_imagenet/fp32.pth
#   python tools/test.py configs/vit_b_imagenet.py work_dirs/vit_b_imagenet/fp32.pth
_base_ = [
    './_base_/models/classifier_vit_b.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedule_classifier.py',
    './_base_/fgvc_runtime.py',
]

model = dict(num_classes=_base_.num_classes)

# This model was trained on pixels between -1 and 1.
_half = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
for _loader in (train_dataloader, val_dataloader, test_dataloader):
    _loader.dataset.pipeline[1].update(_half)
