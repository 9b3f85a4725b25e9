# A linear probe on CUB-200-2011: the head alone, on the 4-bit backbone that gplq_swin_t_imagenet.py leaves.
#   python tools/train.py configs/probe_swin_t_cub.py --cfg-options data_root=data/CUB_200_2011
# FP32, to compare with: --cfg-options model.init_cfg=None
_base_ = [
    './_base_/models/classifier_swin_t.py',
    './_base_/datasets/cub.py',
    './_base_/schedule_probe.py',
    './_base_/fgvc_runtime.py',
]

model = dict(
    num_classes=_base_.num_classes,
    frozen=True,
    init_cfg=dict(type='Quantized', checkpoint='work_dirs/gplq_swin_t_imagenet/gplq_w4a4.safetensors'),
)
train_dataloader = dict(batch_size=64, drop_last=False, dataset=dict(pipeline=_base_.test_pipeline))
