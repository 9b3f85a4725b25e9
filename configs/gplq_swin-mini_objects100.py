# Objects: the classifier of swin-mini_objects100.py to 4-bit weights and activations; head and patch embedding: 8.
#   python tools/first_checkpoint.py configs/swin-mini_objects100.py work_dirs/swin-mini_objects100/fp32.pth
#   python tools/train.py configs/gplq_swin-mini_objects100.py --cfg-options data_root=data/objects100
_base_ = './swin-mini_objects100.py'

model = dict(init_cfg=None)  # load_from brings every weight
default_hooks = dict(
    gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4, targets=['backbone', 'head'])
)
load_from = 'work_dirs/swin-mini_objects100/fp32.pth'
