# Animals: the fine-tuned classifier of vit-mini_animals24.py to 4-bit weights and activations.
#   python tools/train.py configs/gplq_vit-mini_animals24.py --cfg-options data_root=data/animals24
_base_ = './vit-mini_animals24.py'

model = dict(init_cfg=None)  # load_from brings every weight
# As for the Swin: few images, seen fifty times, teach by the features rather than by their labels.
default_hooks = dict(
    gplq=dict(
        type='gplq.plugins.GPLQHook',
        weight_bits=4,
        activation_bits=4,
        targets=['backbone', 'head'],
        mimicking=10,
        stage=dict(lr=5e-6),
    )
)
load_from = 'work_dirs/vit-mini_animals24/epoch_50.pth'
