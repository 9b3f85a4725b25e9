# Swin-T as swin_t_cub.py has fine-tuned it on CUB-200-2011, to 4-bit weights and activations.
#   python tools/train.py configs/gplq_swin_t_cub.py --cfg-options data_root=data/CUB_200_2011
# Not measured yet.
_base_ = './swin_t_cub.py'

default_hooks = dict(
    gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4, targets=['backbone', 'head'])
)
load_from = 'work_dirs/swin_t_cub/epoch_50.pth'
