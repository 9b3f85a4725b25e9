_base_ = [
    './_base_/models/faster_rcnn_vit-tiny.py',
    './_base_/datasets/bccd.py',
    './_base_/schedule_adamw.py',
    './_base_/default_runtime.py',
]
