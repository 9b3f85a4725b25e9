# Your own images: data_root/train/CLASS/IMAGE and data_root/val/CLASS/IMAGE; a leaf gives num_classes.
_base_ = './images_224.py'

data_root = '{{$GPLQ_DATA_ROOT:data/images}}'
source = dict(type='gplq.plugins.fgvc.TorchvisionDataset', name='ImageFolder', data_root=data_root)
train_dataloader = dict(dataset=dict(split='train', **source))
val_dataloader = dict(dataset=dict(split='val', **source))
test_dataloader = dict(dataset=dict(split='val', **source))
