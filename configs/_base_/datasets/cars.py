# Stanford Cars: 196 models, 8,144 images to train on, 8,041 to test.
_base_ = './images_224.py'

data_root = '{{$GPLQ_DATA_ROOT:data}}'
num_classes = 196
source = dict(type='gplq.plugins.fgvc.TorchvisionDataset', name='StanfordCars', data_root=data_root)
train_dataloader = dict(dataset=dict(split='train', **source))
val_dataloader = dict(dataset=dict(split='test', **source))
test_dataloader = dict(dataset=dict(split='test', **source))
