# 100 classes of mostly man-made objects, from Tiny ImageNet (research use only).
_base_ = './images_64.py'

data_root = '{{$GPLQ_DATA_ROOT:data/objects100}}'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
