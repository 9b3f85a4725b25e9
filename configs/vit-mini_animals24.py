# The small ViT of vit-mini_objects100.py fine-tuned on animals24, all weights, 50 epochs.
#   python tools/train.py configs/vit-mini_animals24.py --cfg-options data_root=data/animals24
_base_ = [
    './_base_/models/classifier_vit-mini.py',
    './_base_/datasets/animals24.py',
    './_base_/schedule_finetune.py',
    './_base_/fgvc_runtime.py',
]

model = dict(num_classes=24)
