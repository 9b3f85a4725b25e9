# CUB-200-2011: 200 species of birds, 5,994 images to train on, 5,794 to test.
_base_ = './images_224.py'

data_root = '{{$GPLQ_DATA_ROOT:data/CUB_200_2011}}'
num_classes = 200
source = dict(type='gplq.plugins.fgvc.CUBDataset', data_root=data_root)
train_dataloader = dict(dataset=dict(split='train', **source))
val_dataloader = dict(dataset=dict(split='test', **source))
test_dataloader = dict(dataset=dict(split='test', **source))
