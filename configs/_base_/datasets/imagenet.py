# ImageNet-1k: 1,000 classes, 1.28 million images to train on, 50,000 to validate.
_base_ = './images_224.py'

data_root = '{{$GPLQ_DATA_ROOT:data/imagenet}}'
num_classes = 1000
source = dict(type='gplq.plugins.fgvc.TorchvisionDataset', name='ImageNet', data_root=data_root)
train_dataloader = dict(dataset=dict(split='train', **source))
val_dataloader = dict(dataset=dict(split='val', **source))
test_dataloader = dict(dataset=dict(split='val', **source))
