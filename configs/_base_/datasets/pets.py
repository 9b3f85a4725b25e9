# Oxford-IIIT Pet: 37 breeds, 3,680 images to train and validate on, 3,669 to test.
_base_ = './images_224.py'

data_root = '{{$GPLQ_DATA_ROOT:data}}'
num_classes = 37
source = dict(type='gplq.plugins.fgvc.TorchvisionDataset', name='OxfordIIITPet', data_root=data_root)
train_dataloader = dict(dataset=dict(split='trainval', **source))
val_dataloader = dict(dataset=dict(split='test', **source))
test_dataloader = dict(dataset=dict(split='test', **source))
