# ViT-B (87 M parameters) of "How to train your ViT" on ImageNet to 4 bits.
# The paper's settings: one epoch, AdamW with a constant learning rate of 5e-6 at a batch of 128 over all GPUs, features
# along 60 % of their variance.
#   python tools/first_checkpoint.py configs/vit_b_imagenet.py work_dirs/vit_b_imagenet/fp32.pth
#   torchrun --nproc-per-node=8 tools/train.py configs/gplq_vit_b_imagenet.py --launcher pytorch
# Not measured yet.
_base_ = './vit_b_imagenet.py'

default_hooks = dict(
    gplq=dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4, targets=['backbone', 'head'])
)
load_from = 'work_dirs/vit_b_imagenet/fp32.pth'
# 8 GPUs x 16
train_dataloader = dict(batch_size=16)
