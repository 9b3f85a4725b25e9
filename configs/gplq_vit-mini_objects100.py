# Objects: the classifier of vit-mini_objects100.py to 4-bit weights and activations; head and patch embedding: 8.
#   python tools/first_checkpoint.py configs/vit-mini_objects100.py work_dirs/vit-mini_objects100/fp32.pth
#   python tools/train.py configs/gplq_vit-mini_objects100.py --cfg-options data_root=data/objects100
_base_ = './vit-mini_objects100.py'

model = dict(init_cfg=None)  # load_from brings every weight
default_hooks = dict(
    gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4, targets=['backbone', 'head'])
)
load_from = 'work_dirs/vit-mini_objects100/fp32.pth'
