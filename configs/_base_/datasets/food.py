# Food-101: 101 dishes, 75,750 images to train on, 25,250 to test.
_base_ = './images_224.py'

data_root = '{{$GPLQ_DATA_ROOT:data}}'
num_classes = 101
source = dict(type='gplq.plugins.fgvc.TorchvisionDataset', name='Food101', data_root=data_root)
train_dataloader = dict(dataset=dict(split='train', **source))
val_dataloader = dict(dataset=dict(split='test', **source))
test_dataloader = dict(dataset=dict(split='test', **source))
