# Animals: the fine-tuned classifier of vit-mini_animals24.py to 4-bit weights and activations.
#   python tools/train.py configs/gplq_vit-mini_animals24.py --cfg-options data_root=data/animals24
_base_ = './vit-mini_animals24.py'

model = dict(init_cfg=None)  # load_from brings every weight
# As for the Swin: few images, seen fifty times, teach by the FP32 classifier's chances and features.
default_hooks = dict(
    gplq=dict(
        type='gplq.plugins.GPLQHook',
        weight_bits=4,
        activation_bits=4,
        targets=['backbone', 'head'],
        mimicking=10,
        stage=dict(lr=1e-5),
    )
)
load_from = 'work_dirs/vit-mini_animals24/epoch_50.pth'
custom_hooks = [
    dict(type='gplq.plugins.SoftLabelHook', config='configs/vit-mini_animals24.py', checkpoint=load_from),
]
