# A linear probe on Flowers-102: the head alone, on the 4-bit backbone that gplq_deit_s_imagenet.py leaves.
#   python tools/train.py configs/probe_deit_s_flowers.py --cfg-options data_root=data
# FP32, to compare with: --cfg-options model.init_cfg=None
_base_ = [
    './_base_/models/classifier_deit_s.py',
    './_base_/datasets/flowers.py',
    './_base_/schedule_probe.py',
    './_base_/fgvc_runtime.py',
]

model = dict(
    num_classes=_base_.num_classes,
    frozen=True,
    init_cfg=dict(type='Quantized', checkpoint='work_dirs/gplq_deit_s_imagenet/gplq_w4a4.safetensors'),
)
train_dataloader = dict(batch_size=64, drop_last=False, dataset=dict(pipeline=_base_.test_pipeline))
