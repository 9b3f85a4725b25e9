# ImageNet for models that were trained on pixels between -1 and 1.
_base_ = './imagenet.py'

_half = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
train_dataloader = _base_.train_dataloader
val_dataloader = _base_.val_dataloader
test_dataloader = _base_.test_dataloader
for _loader in (train_dataloader, val_dataloader, test_dataloader):
    _loader.dataset.pipeline[1].update(_half)
