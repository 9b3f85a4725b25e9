# DeiT-S fine-tuned on Flowers-102, all weights, 50 epochs.
#   python tools/train.py configs/deit_s_flowers.py --cfg-options data_root=data
_base_ = [
    './_base_/models/classifier_deit_s.py',
    './_base_/datasets/flowers.py',
    './_base_/schedule_finetune.py',
    './_base_/fgvc_runtime.py',
]

model = dict(num_classes=_base_.num_classes)
