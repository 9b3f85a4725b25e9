# Animals: the fine-tuned classifier of swin-mini_animals24.py to 4-bit weights and activations.
#   python tools/train.py configs/gplq_swin-mini_animals24.py --cfg-options data_root=data/animals24
_base_ = './swin-mini_animals24.py'

model = dict(init_cfg=None)  # load_from brings every weight
# The fine-tuned classifier has seen these few images fifty times: its labels teach little that is new, its features
# more. Chosen on dev: nearer to FP32 than the hook's own settings (mimicking=1, lr=2.7e-5).
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
load_from = 'work_dirs/swin-mini_animals24/epoch_50.pth'
