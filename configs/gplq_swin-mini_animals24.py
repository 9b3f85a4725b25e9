# Animals: the fine-tuned classifier of swin-mini_animals24.py to 4-bit weights and activations.
#   python tools/train.py configs/gplq_swin-mini_animals24.py --cfg-options data_root=data/animals24
_base_ = './swin-mini_animals24.py'

model = dict(init_cfg=None)  # load_from brings every weight
# Few images, seen fifty times: their labels teach nothing new. The FP32 classifier's own chances of the classes do,
# with its features at ten times their usual weight and slower weights. Of eleven settings nearest to FP32 on dev.
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
load_from = 'work_dirs/swin-mini_animals24/epoch_50.pth'
custom_hooks = [
    dict(type='gplq.plugins.SoftLabelHook', config='configs/swin-mini_animals24.py', checkpoint=load_from),
]
