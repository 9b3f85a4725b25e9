# A linear probe on animals24: the head alone, on the 4-bit backbone that gplq_swin-mini_objects100.py leaves.
#   python tools/train.py configs/probe_swin-mini_animals24.py --cfg-options data_root=data/animals24
# FP32, to compare with: --cfg-options model.init_cfg.type=Pretrained model.init_cfg.checkpoint=FP32
_base_ = [
    './_base_/models/classifier_swin-mini.py',
    './_base_/datasets/animals24.py',
    './_base_/schedule_probe.py',
    './_base_/fgvc_runtime.py',
]

model = dict(
    num_classes=24,
    label_smoothing=0.0,
    frozen=True,
    init_cfg=dict(type='Quantized', checkpoint='work_dirs/gplq_swin-mini_objects100/gplq_w4a4.safetensors'),
)
train_dataloader = dict(batch_size=64, drop_last=False, dataset=dict(pipeline=_base_.test_pipeline))
