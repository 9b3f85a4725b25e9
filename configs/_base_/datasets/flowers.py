# Flowers-102: 102 kinds, 1,020 images to train on, 6,149 to test.
_base_ = './images_224.py'

data_root = '{{$GPLQ_DATA_ROOT:data}}'
num_classes = 102
source = dict(type='gplq.plugins.fgvc.TorchvisionDataset', name='Flowers102', data_root=data_root)
train_dataloader = dict(dataset=dict(split='train', **source))
val_dataloader = dict(dataset=dict(split='test', **source))
test_dataloader = dict(dataset=dict(split='test', **source))
