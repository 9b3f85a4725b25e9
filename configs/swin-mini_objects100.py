# Objects: a small Swin as a classifier of 100 kinds. GPLQ_SWIN_CHECKPOINT names the weights to start from, a timm
# checkpoint; model.init_cfg=None trains from scratch.
#   python tools/train.py configs/swin-mini_objects100.py --cfg-options data_root=data/objects100
_base_ = [
    './_base_/models/classifier_swin-mini.py',
    './_base_/datasets/objects100.py',
    './_base_/schedule_classifier.py',
    './_base_/fgvc_runtime.py',
]
