# Blood cells: boxes by Faster R-CNN on a plain ViT, 40 epochs. GPLQ_VIT_CHECKPOINT names the first weights
# of the ViT, a timm checkpoint.
#   python tools/train.py configs/faster_rcnn_vit-tiny_bccd.py --cfg-options data_root=data/bccd
# Expected: box AP 0.52 on dev.
_base_ = [
    './_base_/models/faster_rcnn_vit-tiny.py',
    './_base_/datasets/bccd.py',
    './_base_/schedule_adamw.py',
    './_base_/default_runtime.py',
]
