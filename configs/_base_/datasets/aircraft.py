# FGVC-Aircraft: 100 variants, 6,667 images to train and validate on, 3,333 to test.
_base_ = './images_224.py'

data_root = '{{$GPLQ_DATA_ROOT:data}}'
num_classes = 100
source = dict(type='gplq.plugins.fgvc.TorchvisionDataset', name='FGVCAircraft', data_root=data_root)
train_dataloader = dict(dataset=dict(split='trainval', **source))
val_dataloader = dict(dataset=dict(split='test', **source))
test_dataloader = dict(dataset=dict(split='test', **source))
