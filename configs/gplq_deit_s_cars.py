# DeiT-S as deit_s_cars.py has fine-tuned it on Stanford Cars, to 4-bit weights and activations.
#   python tools/train.py configs/gplq_deit_s_cars.py --cfg-options data_root=data
# Not measured yet.
_base_ = './deit_s_cars.py'

default_hooks = dict(
    gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4, targets=['backbone', 'head'])
)
load_from = 'work_dirs/deit_s_cars/epoch_50.pth'
