# DeiT-S fine-tuned on CUB-200-2011, all weights, 50 epochs.
#   python tools/train.py configs/deit_s_cub.py --cfg-options data_root=data/CUB_200_2011
_base_ = [
    './_base_/models/classifier_deit_s.py',
    './_base_/datasets/cub.py',
    './_base_/schedule_finetune.py',
    './_base_/fgvc_runtime.py',
]

model = dict(num_classes=_base_.num_classes)
