# Swin-T (28 M parameters) on ImageNet to 4 bits.
# The paper's settings: one epoch, AdamW with a constant learning rate of 5e-6 at a batch of 128 over all GPUs, features
# along 60 % of their variance.
#   python tools/first_checkpoint.py configs/swin_t_imagenet.py work_dirs/swin_t_imagenet/fp32.pth
#   torchrun --nproc-per-node=8 tools/train.py configs/gplq_swin_t_imagenet.py --launcher pytorch
# Not measured yet.
_base_ = './swin_t_imagenet.py'

default_hooks = dict(
    gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4, targets=['backbone', 'head'])
)
load_from = 'work_dirs/swin_t_imagenet/fp32.pth'
# 8 GPUs x 16
train_dataloader = dict(batch_size=16)
